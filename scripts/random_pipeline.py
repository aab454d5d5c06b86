"""Writes a pipeline folder of a released architecture with random weights, for running and timing without a download.

python scripts/random_pipeline.py --model cogvideox-5b OUT
"""

import argparse
from pathlib import Path

import torch

from cogtune.errors import run_command
from cogtune.models import DTYPES, choose_device
from cogtune.random_pipeline import ARCHITECTURES, write_random_pipeline


def main() -> None:
    """Parse, build, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="cogvideox-5b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="where weights are drawn")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 for tiny models, else bfloat16")
    parser.add_argument("--text-encoder", choices=["small", "full"], default="small", help="full: T5-XXL's size")
    arguments = parser.parse_args()
    tiny = arguments.model.startswith("tiny")
    dtype = DTYPES[arguments.dtype] if arguments.dtype else (torch.float32 if tiny else torch.bfloat16)
    write_random_pipeline(
        arguments.out,
        arguments.model,
        seed=arguments.seed,
        device=choose_device(arguments.device),
        dtype=dtype,
        text_encoder=arguments.text_encoder,
    )
    print(f"random weights, {arguments.model}: {arguments.out}")


if __name__ == "__main__":
    run_command(main)
