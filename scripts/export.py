"""Merges adapters into a base, extracts a LoRA from two models, adds adapters up, casts weights.

python scripts/export.py merge cogvideox-5b OUT --lora runs/a/final --lora runs/b/final:0.5
python scripts/export.py extract cogvideox-5b runs/my-sft/final OUT --rank 64
python scripts/export.py combine OUT --lora runs/a/final:0.7 --lora runs/b/final:0.5 --rank 64
python scripts/export.py cast runs/my-sft/final OUT --dtype bfloat16

docs/formats.md says what each computes; COMMAND --help lists its options.
"""

from cogtune.errors import run_command
from cogtune.formats.exporting import parse_export


def main() -> None:
    """Check, compute, write."""
    options = parse_export(__doc__ or "")
    options.run(options)


if __name__ == "__main__":
    run_command(main)
