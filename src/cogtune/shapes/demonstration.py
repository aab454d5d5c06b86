"""The steps of `make demo`: commands shown and run one after the other, and the judge's table at the end.

Each command runs in a process of its own. On Linux it is a copy of this one, which has imported PyTorch and diffusers
already: that takes longer than some of the commands.
"""

import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars

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
    if sys.platform == "linux":
        code = _run_copy(command)
    else:
        code = subprocess.run([sys.executable, *command], env=os.environ | _QUIET).returncode
    if code:
        raise UserError(f"{command[0]} failed; its message is above")


def _run_copy(command: Sequence[str]) -> int:
    """The exit code of a command in a copy of this process, which must not have computed with PyTorch before."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        disable_progress_bars()
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001  (of any kind: the copy must never go on as the demo)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def training_precision() -> str:
    """`model.dtype` for the demo: bfloat16 on a CPU with products of its own for it, which are faster."""
    known: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # of newer releases
    found = known()
    has_products = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return "bfloat16" if has_products and not torch.cuda.is_available() else "auto"


def pick_evenly(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts, spread over the whole list."""
    if not 1 <= count <= len(prompts):
        raise UserError(f"{count} prompts are asked for: give 1 to {len(prompts)}")
    return [prompts[index * len(prompts) // count] for index in range(count)]


def score_adapter(
    model: str, lora: Path, device: torch.device, *, num_prompts: int, seed: int = 0, num_processes: int = 1
) -> list[Row]:
    """Base and adapter on the concept's unseen prompts and on the base's own, with the same noise.

    With two processes each scores one of them. They are copies of this one, which must not have computed with PyTorch
    before, and share the cores: small models leave a part of each core idle when they have all of them.
    """
    kinds = {
        "the concept's": pick_evenly(concept_prompts(), num_prompts),
        "the base's own": base_prompts(num_prompts, seed=0),
    }
    score = partial(_score, model, device, list(kinds.values()), seed)
    if num_processes == 1:
        found = [score(None), score(lora)]
    else:
        threads = max(1, (os.cpu_count() or 1) // 2)
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(2, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            found = list(pool.map(score, [None, lora]))
    return [
        Row(kind, name, scores[index])
        for index, kind in enumerate(kinds)
        for name, scores in zip(("base", "adapter"), found, strict=True)
    ]


def _score(
    model: str, device: torch.device, kinds: Sequence[Sequence[Prompt]], seed: int, lora: Path | None
) -> list[Scores]:
    """Scores of each kind of prompts, by the adapter or the bare model."""
    pipeline = load_scored_pipeline(model, lora, device)
    return [score_prompts(pipeline, prompts, seed=seed, batch_size=default_batch_size(device)) for prompts in kinds]


def count_scorers(device: torch.device) -> int:
    """Processes for `score_adapter`."""
    return 2 if device.type == "cpu" and sys.platform == "linux" and (os.cpu_count() or 1) > 1 else 1


def format_rows(rows: Sequence[Row]) -> str:
    """The table as text, in percent of the videos."""
    lines = [f"{'prompts':<16}{'model':<10}{'videos':>7}" + "".join(f"{name:>9}" for name in _NAMES)]
    for row in rows:
        shares = "".join(f"{100 * row.scores.share(name):>7.0f} %" for name in _NAMES)
        lines.append(f"{row.prompts:<16}{row.model:<10}{row.scores.num_videos:>7}{shares}")
    return "\n".join(lines)
