"""Checkpoints: written under a temporary name, synced, renamed; a manifest with every file's digest is written last.

One without a complete manifest is never resumed from and never a reason to delete an older one. All tensors are
safetensors and the rest is JSON: nothing in a checkpoint can run code when it is read.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from cogtune.cache import digest_bytes
from cogtune.cluster.whereabouts import move
from cogtune.errors import UserError

MANIFEST = "manifest.json"
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    state: dict[str, Any]
    """What the loop saved beside the weights: plain JSON values."""


class Exchange(Protocol):
    """Processes that share the work of checking, as `shards.ranks.Ranks` does."""

    @property
    def rank(self) -> int:
        """This process's number."""
        ...

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    def first_error(self, error: str | None) -> str | None:
        """Anybody's error, on all of them."""
        ...


class CheckpointFolder:
    """`<output_dir>/checkpoints`: saves, rotates and finds checkpoints."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        self.folder, self._keep_last = folder, keep_last

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Lets `write` fill a folder, completes it and puts it in place; then deletes what is too old.

        Raises `UserError` where the disk refuses; every older checkpoint is then still there.
        """
        try:
            partial = self.begin(step)
            write(partial)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            digests = {str(path.relative_to(partial)): _sync_and_digest(path) for path in files}
            return self.complete(step, state, digests)
        except (OSError, SafetensorError) as error:
            self.discard(step)
            raise UserError(self.explain(step, str(error))) from None

    def partial(self, step: int) -> Path:
        """The temporary folder of a checkpoint that is being written."""
        return self.folder / f"{_PARTIAL}step-{step:06d}"

    def place(self, step: int) -> Path:
        """The folder of a complete checkpoint."""
        return self.folder / f"step-{step:06d}"

    def begin(self, step: int) -> Path:
        """Makes the temporary folder, empty."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def complete(self, step: int, state: dict[str, Any], digests: dict[str, str]) -> Path:
        """Writes the manifest of synced files, puts the folder in place, and deletes what is too old."""
        partial, final = self.partial(step), self.place(step)
        manifest = {"step": step, "state": state, "files": dict(sorted(digests.items()))}
        _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(self.folder)
        for old in self._folders()[: -self._keep_last]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def discard(self, step: int) -> None:
        """Deletes the temporary folder."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def explain(self, step: int, error: str) -> str:
        """What to tell where a checkpoint can't be written."""
        kept = ", ".join(path.name for path in self._folders()) or "none"
        return (
            f"checkpoint at step {step}: cannot be written to {self.folder} ({error}); free some space "
            f"and start again, the run resumes (complete checkpoints: {kept})"
        )

    def _folders(self) -> list[Path]:
        """Folders with a manifest, oldest first."""
        found = [path for path in self.folder.glob("step-*") if (path / MANIFEST).is_file()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def list_steps(self) -> tuple[int, ...]:
        """The steps of complete checkpoints, by names alone, oldest first."""
        return tuple(int(folder.name.removeprefix("step-")) for folder in self._folders())

    def find_newest(self, report: Callable[[str], None], ranks: Exchange | None = None) -> Checkpoint | None:
        """The newest checkpoint whose every file is as written; damaged ones are reported and passed over.

        `ranks` check together, and come to the same.
        """
        for folder in reversed(self._folders()):
            try:
                return read_checkpoint(folder, ranks)
            except UserError as error:
                report(f"{error}; falling back to the one before")
        return None

    def remove_partial(self) -> None:
        """Deletes what a killed run left half-written."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path, ranks: Exchange | None = None) -> Checkpoint:
    """Checks a checkpoint's files against its manifest; raises `UserError` where one differs.

    `ranks` share the files out, and all raise what one finds.
    """
    checkpoint, error = None, None
    try:
        checkpoint = _check_files(folder, 0 if ranks is None else ranks.rank, 1 if ranks is None else ranks.world_size)
    except UserError as found:
        error = str(found)
    if ranks is not None:
        error = ranks.first_error(error)
    if checkpoint is None or error is not None:
        raise UserError(error)
    return checkpoint


def _check_files(folder: Path, first: int, every: int) -> Checkpoint:
    """Digests every `every`-th file, beginning with `first`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = sorted(manifest["files"].items())
        step, state = int(manifest["step"]), manifest["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder}: no complete {MANIFEST}; not a finished checkpoint") from None
    for name, _ in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing")
    for name, digest in files[first::every]:
        move()
        if digest_bytes(folder / name) != digest:
            raise UserError(f"{folder}: {name} is damaged (its digest differs from the manifest's)")
    return Checkpoint(folder, step, state)


def _sync_and_digest(path: Path) -> str:
    move()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest_bytes(path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_differences(saved: dict[str, Any], current: dict[str, Any], free: frozenset[str]) -> list[str]:
    """`section.key: saved -> current` for every setting that differs and isn't in `free` (keys or whole sections).

    A setting that came after the run was saved doesn't differ while it is off: that is what the run did.
    """
    lines = []
    for section in sorted(set(saved) | set(current)):
        old, new = saved.get(section), current.get(section)
        if section in free or old == new:
            continue
        if not (isinstance(old, dict) and isinstance(new, dict)):
            lines.append(f"{section}: {old!r} -> {new!r}")
            continue
        for key in sorted(set(old) | set(new)):
            if key not in old and new[key] in (None, False):
                continue
            if f"{section}.{key}" not in free and old.get(key) != new.get(key):
                lines.append(f"{section}.{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return lines
