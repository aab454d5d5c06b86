"""Times every attention backend on the shapes of the released models, forward and backward.

python scripts/bench.py attention
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from cogtune.benchmark.ceilings import StepShape, attention_rates
from cogtune.models import choose_device, choose_dtype
from cogtune.random_pipeline import ARCHITECTURES, make_architecture_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py attention`."""
    parser.add_argument("--models", default="cogvideox-5b,cogvideox-2b", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates by model and backend, at the models' own clip size."""
    device = choose_device(arguments.device)
    results: dict[str, Any] = {}
    for model in arguments.models.split(","):
        facts = make_architecture_facts(model)
        tokens = facts.num_tokens(facts.num_frames, facts.height, facts.width)
        shape = StepShape.of(facts, tokens, arguments.batch_size)
        rates = attention_rates(shape, device, choose_dtype("auto", facts, device))
        results[model] = {"tokens": tokens, "torch": torch.__version__, "backends": rates}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def describe(results: dict[str, Any]) -> str:
    """A line for each model and backend."""
    lines = []
    for model, row in results.items():
        for name, rate in row["backends"].items():
            lines.append(
                f"{model:<13} {row['tokens']:>6} tokens  {name:<10} forward {1e3 * rate['forward_seconds']:7.2f} ms "
                f"{rate['forward_tflops']:5.0f} TFLOP/s   backward {1e3 * rate['backward_seconds']:7.2f} ms "
                f"{rate['backward_tflops']:5.0f} TFLOP/s"
            )
    return "\n".join(lines)
