"""Writes clips of the world as an ordinary data set: mp4 files, `metadata.jsonl`, and the truth in a file of its own.

folder/  metadata.jsonl  {"video": "clips/000000.mp4", "caption": "a red circle moves left ..."}
         truth.jsonl     what each video shows, for judges; no trainer reads it
         clips/000000.mp4 ...
"""

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cogtune.errors import UserError
from cogtune.shapes.captions import captioned_clip
from cogtune.shapes.render import render
from cogtune.shapes.world import FPS, SPLITS
from cogtune.video import write_video

_Row = dict[str, str | float]
_CRF = 8  # near lossless; at the default of 12 the small shapes' corners soften visibly


def write_clips(
    folder: Path, split: str, *, count: int, seed: int, workers: int = 1, num_ordinary: int = 0, weight: float = 1.0
) -> None:
    """Writes clips 0 .. count - 1 of a split under a seed into an empty or new folder.

    `num_ordinary` clips of the base split follow, marked as `prior`: they keep a model's other abilities while it
    learns the split's.
    `weight`: how often an epoch shows each of the split's clips for one showing of an ordinary one. The same arguments
    give the same pictures and captions on every machine, in any number of worker processes.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}' does not exist: choose one of {', '.join(SPLITS)}")
    numbers = (("count", count, 1), ("seed", seed, 0), ("workers", workers, 1), ("num_ordinary", num_ordinary, 0))
    for name, value, least in numbers:
        if value < least:
            raise UserError(f"{name} is {value}: it must be {least} or more")
    if weight <= 0:
        raise UserError(f"weight is {weight}: it must be above 0")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: name another one or remove it")
    (folder / "clips").mkdir(parents=True)
    write = partial(_write_clip, folder, seed)
    jobs = [(number, split, number, weight, False) for number in range(count)]
    jobs += [(count + number, "base", number, 1.0, True) for number in range(num_ordinary)]
    if workers == 1:
        rows = [write(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers) as pool:
            rows = list(pool.map(write, *zip(*jobs, strict=True), chunksize=8))
    _write_lines(folder / "truth.jsonl", (truth for _, truth in rows))
    _write_lines(folder / "metadata.jsonl", (row for row, _ in rows))  # last: a folder with a manifest is complete


def _write_clip(
    folder: Path, seed: int, number: int, split: str, index: int, weight: float, prior: bool
) -> tuple[_Row, _Row]:
    clip, text = captioned_clip(split, seed, index)
    name = f"clips/{number:06d}.mp4"
    write_video(folder / name, render(clip), FPS, crf=_CRF)
    row: _Row = {"video": name, "caption": text}
    extra = ({"weight": weight} if weight != 1.0 else {}) | ({"prior": True} if prior else {})
    return row | extra, {"video": name, **asdict(clip)}


def _write_lines(path: Path, rows: Iterable[_Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
