"""Converts between SAT, diffusers, adapter styles and checkpoints of many processes.

python scripts/convert.py from-sat transformer SAT_FOLDER OUT --base cogvideox-5b --positions rotary
python scripts/convert.py to-sat transformer PIPELINE OUT
python scripts/convert.py adapter runs/my-lora/final my-lora.safetensors --keys comfyui
python scripts/convert.py checkpoint checkpoint-1000 OUT --base cogvideox-5b --alpha 64

docs/formats.md says what each reads, checks and writes; COMMAND --help lists its options.
"""

from cogtune.errors import run_command
from cogtune.formats.converting import parse_conversion


def main() -> None:
    """Check, then convert tensor by tensor."""
    options = parse_conversion(__doc__ or "")
    options.run(options)


if __name__ == "__main__":
    run_command(main)
