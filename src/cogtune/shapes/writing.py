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

_CRF = 8  # near lossless; at the default of 12 the small shapes' corners soften visibly


def write_clips(folder: Path, split: str, *, count: int, seed: int, workers: int = 1) -> None:
    """Writes clips 0 .. count - 1 of a split under a seed into an empty or new folder.

    The same arguments give the same pictures and captions on every machine, in any number of worker processes.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}' does not exist: choose one of {', '.join(SPLITS)}")
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise UserError(f"{name} is {value}: it must be {least} or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: name another one or remove it")
    (folder / "clips").mkdir(parents=True)
    write = partial(_write_clip, folder, split, seed)
    if workers == 1:
        rows = [write(index) for index in range(count)]
    else:
        with ProcessPoolExecutor(workers) as pool:
            rows = list(pool.map(write, range(count), chunksize=8))
    _write_lines(folder / "truth.jsonl", (truth for _, truth in rows))
    _write_lines(folder / "metadata.jsonl", (row for row, _ in rows))  # last: a folder with a manifest is complete


def _write_clip(folder: Path, split: str, seed: int, index: int) -> tuple[dict[str, str], dict[str, str | float]]:
    clip, text = captioned_clip(split, seed, index)
    name = f"clips/{index:06d}.mp4"
    write_video(folder / name, render(clip), FPS, crf=_CRF)
    return {"video": name, "caption": text}, {"video": name, **asdict(clip)}


def _write_lines(path: Path, rows: Iterable[dict[str, str] | dict[str, str | float]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
