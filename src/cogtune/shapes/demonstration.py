"""The steps of `make demo`: commands shown and run one after the other, and the judge's table at the end."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cogtune.errors import UserError
from cogtune.shapes.captions import Prompt, base_prompts, concept_prompts
from cogtune.shapes.scoring import Scores, default_batch_size, load_scored_pipeline, score_prompts

_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_NAMES = ("right", "shape", "colour", "motion")


@dataclass(frozen=True)
class Row:
    """What the judge read in the videos of one kind of prompts by one model."""

    prompts: str
    model: str
    scores: Scores


def run_step(*command: str) -> None:
    """Shows and runs one of the project's commands; raises `UserError` where it fails."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], env=os.environ | _QUIET).returncode:
        raise UserError(f"{command[0]} failed; its message is above")


def pick_evenly(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts, spread over the whole list."""
    if not 1 <= count <= len(prompts):
        raise UserError(f"{count} prompts are asked for: give 1 to {len(prompts)}")
    return [prompts[index * len(prompts) // count] for index in range(count)]


def score_adapter(model: str, lora: Path, device: torch.device, *, num_prompts: int, seed: int = 0) -> list[Row]:
    """Base and adapter on the concept's unseen prompts and on the base's own, from one pipeline and the same noise."""
    pipeline = load_scored_pipeline(model, lora, device)
    kinds = {
        "the concept's": pick_evenly(concept_prompts(), num_prompts),
        "the base's own": base_prompts(num_prompts, seed=0),
    }
    rows = []
    for kind, prompts in kinds.items():
        for name, switch in (("base", pipeline.disable_lora), ("adapter", pipeline.enable_lora)):
            switch()
            scores = score_prompts(pipeline, prompts, seed=seed, batch_size=default_batch_size(device))
            rows.append(Row(kind, name, scores))
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The table as text, in percent of the videos."""
    lines = [f"{'prompts':<16}{'model':<10}{'videos':>7}" + "".join(f"{name:>9}" for name in _NAMES)]
    for row in rows:
        shares = "".join(f"{100 * row.scores.share(name):>7.0f} %" for name in _NAMES)
        lines.append(f"{row.prompts:<16}{row.model:<10}{row.scores.num_videos:>7}{shares}")
    return "\n".join(lines)
