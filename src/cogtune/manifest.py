"""Reads data set manifests: which clips there are and what their captions say.

    folder/  metadata.jsonl or metadata.csv (Hugging Face video folder), or prompts.txt + videos.txt,
             or videos with a .txt of the same name each
    file     .jsonl or .csv with `video`, `caption` and optional `start`, `end` (seconds), `weight`, `prior`, `id`,
             `image`

Videos are named relative to the manifest's folder and must stay inside it unless `data.allow_outside_root` is set.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.draws import derive_seed
from cogtune.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_VIDEO_COLUMNS = ("video", "file_name", "video_path")
_CAPTION_COLUMNS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class ClipFormat:
    """What a training clip looks like: frames, pixels, frames a second."""

    num_frames: int
    height: int
    width: int
    fps: float

    def describe(self) -> str:
        """As it is written in `data.buckets`: frames x height x width."""
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Clip:
    """One row of a manifest: a video or a part of it, and what it shows."""

    id: str
    video: Path
    caption: str
    start: float = 0.0
    """Seconds from the first frame."""
    end: float | None = None
    """Seconds; None: the end of the file."""
    weight: float = 1.0
    """How often an epoch takes it."""
    prior: bool = False
    """Shows what the base model can do already and is to keep (prior preservation, arXiv:2208.12242)."""
    image: Path | None = None
    """What an image-to-video model starts from; None: the clip's first frame."""
    form: ClipFormat | None = None
    """The bucket that it belongs to; None: the run's one format."""


def read_manifest(manifest: Path, *, id_token: str | None = None, allow_outside_root: bool = False) -> list[Clip]:
    """Every clip of a manifest, in order, with `id_token` put before each caption.

    Raises `UserError` with all mistakes of the manifest itself (columns, captions, ids, paths); whether the videos
    can be decoded is found out by `cogtune.inspection`.
    """
    if not manifest.exists():
        raise UserError(f"data.manifest={manifest}: no such file or folder")
    root = manifest if manifest.is_dir() else manifest.parent
    rows = _read_folder(manifest) if manifest.is_dir() else _read_table(manifest)
    if not rows:
        raise UserError(f"data.manifest={manifest}: no clips in it")
    problems: list[str] = []
    clips: list[Clip] = []
    for where, row in rows:
        try:
            clips.append(_make_clip(row, root, id_token, allow_outside_root))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    problems += _find_duplicates(clips)
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError("\n       ".join([f"data.manifest={manifest}: {len(problems)} wrong row(s)", *shown]))
    return clips


def _read_folder(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return _read_table(folder / name)
    prompts, videos = folder / "prompts.txt", folder / "videos.txt"
    if prompts.is_file() and videos.is_file():
        captions, names = _read_text(prompts).splitlines(), _read_text(videos).split("\n")
        names = [name.strip() for name in names if name.strip()]
        if len(captions) != len(names):
            raise UserError(
                f"{folder}: prompts.txt has {len(captions)} lines, videos.txt {len(names)}; "
                "line n of one belongs to line n of the other"
            )
        return [
            (f"videos.txt:{i}", {"video": n, "caption": c})
            for i, (n, c) in enumerate(zip(names, captions, strict=True), 1)
        ]
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES)
    rows = []
    for path in files:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"{path}: no caption beside it; write {caption.name}, or a metadata.jsonl for the folder")
        rows.append(
            (
                str(path.relative_to(folder)),
                {"video": str(path.relative_to(folder)), "caption": _read_text(caption).strip()},
            )
        )
    return rows


def _read_table(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif path.suffix == ".csv":
        rows = _read_csv(path)
    else:
        raise UserError(f"data.manifest={path}: expected a folder, a .jsonl or a .csv file")
    if rows:
        columns = set(rows[0][1])
        for names in (_VIDEO_COLUMNS, _CAPTION_COLUMNS):
            if not columns & set(names):
                found = ", ".join(map(str, rows[0][1]))
                raise UserError(f"{path}: no '{names[0]}' column (nor {', '.join(names[1:])}); found {found}")
    return rows


def _read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: expected an object with 'video' and 'caption', found {type(row).__name__}"
            )
        rows.append((f"{path.name}:{number}", row))
    return rows


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(_read_text(path).splitlines(keepends=True))
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise UserError(
                f"{path}:{reader.line_num}: {'more' if None in row else 'fewer'} fields than columns; "
                "put captions with commas in quotes"
            )
        rows.append(
            (
                f"{path.name}:{reader.line_num}",
                {k: v for k, v in row.items() if v != ""} | {k: "" for k in _CAPTION_COLUMNS if row.get(k) == ""},
            )
        )
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _make_clip(row: dict[str, Any], root: Path, id_token: str | None, allow_outside_root: bool) -> Clip:
    name = next((row[key] for key in _VIDEO_COLUMNS if key in row), None)
    caption = next((row[key] for key in _CAPTION_COLUMNS if key in row), None)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"video is {name!r}; expected a path relative to {root}")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{name}: empty caption; describe the clip, or remove the row")
    video = root / name
    if not allow_outside_root and not video.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name}: leads out of {root}; move the file there, or set data.allow_outside_root")
    if video.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"{name}: an image; this model is trained on clips, so remove it from the manifest")
    start, weight = _number(row, "start", 0.0), _number(row, "weight", 1.0)
    end = _number(row, "end", None)
    assert start is not None and weight is not None
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"{name}: start={start:g}, end={end}; expected 0 <= start < end, in seconds")
    if weight < 0:
        raise ValueError(f"{name}: weight={weight:g}; expected zero or more")
    caption = caption.strip()
    if id_token:
        caption = f"{id_token.strip()} {caption}"
    identity = str(row.get("id", name if "start" not in row and "end" not in row else f"{name}@{start:g}"))
    return Clip(
        identity, video, caption, start, end, weight, _flag(row, "prior"), _find_image(row, root, allow_outside_root)
    )


def _flag(row: dict[str, Any], key: str) -> bool:
    value = row.get(key, False)
    written = {"true": True, "false": False, "1": True, "0": False}.get(str(value).strip().lower())
    if written is None:
        raise ValueError(f"{key}={value!r}; expected true or false")
    return written


def _find_image(row: dict[str, Any], root: Path, allow_outside_root: bool) -> Path | None:
    name = row.get("image")
    if name is None or (isinstance(name, str) and not name.strip()):
        return None
    if not isinstance(name, str):
        raise ValueError(f"image is {name!r}; expected a path relative to {root}, or nothing")
    image = root / name.strip()
    if not allow_outside_root and not image.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"image {name}: leads out of {root}; move the file there, or set data.allow_outside_root")
    if image.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"image {name}: expected one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return image


def _number(row: dict[str, Any], key: str, default: float | None) -> float | None:
    value = row.get(key, default)
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key}={value!r}; expected a number")
    return number


def _find_duplicates(clips: list[Clip]) -> list[str]:
    seen: dict[str, Clip] = {}
    problems = []
    for clip in clips:
        if clip.id in seen:
            problems.append(
                f"id {clip.id!r} stands twice ({seen[clip.id].video.name} and {clip.video.name}); "
                "give each row its own id, or use weight to repeat a clip"
            )
        seen.setdefault(clip.id, clip)
    return problems


def split_validation(clips: list[Clip], count: int | None, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Training and held-out clips; the choice depends on the ids and the seed alone, not on the manifest's order.

    `count` None: 5 % where there are at least 20 clips, none otherwise. Segments of one video stay together.
    """
    count = (len(clips) // 20 if len(clips) >= 20 else 0) if count is None else count
    if count >= len(clips):
        raise UserError(f"data.validation_clips={count}: leaves none of {len(clips)} clips to train on")
    groups: dict[Path, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.video, []).append(clip)
    ranked = sorted(groups, key=lambda video: derive_seed("validation", seed, min(clip.id for clip in groups[video])))
    held: set[Path] = set()
    taken = 0
    for video in ranked:
        if taken >= count:
            break
        held.add(video)
        taken += len(groups[video])
    if len(held) == len(groups) and count:
        raise UserError(
            f"data.validation_clips={count}: all segments come from one video; give data.validation_manifest"
        )
    return [c for c in clips if c.video not in held], [c for c in clips if c.video in held]
