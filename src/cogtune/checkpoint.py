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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cogtune.cache import digest_bytes
from cogtune.cluster.whereabouts import move
from cogtune.errors import UserError

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    state: dict[str, Any]
    """What the loop saved beside the weights: plain JSON values."""


class CheckpointFolder:
    """`<output_dir>/checkpoints`: saves, rotates and finds checkpoints."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        self.folder, self._keep_last = folder, keep_last

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Lets `write` fill a folder, completes it and puts it in place; then deletes what is too old.

        Raises `UserError` where the disk refuses; every older checkpoint is then still there.
        """
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f"{_PARTIAL}{final.name}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            manifest = {
                "step": step,
                "state": state,
                "files": {str(path.relative_to(partial)): _sync_and_digest(path) for path in files},
            }
            _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = ", ".join(path.name for path in self._folders()) or "none"
            raise UserError(
                f"checkpoint at step {step}: cannot be written to {self.folder} ({error}); free some space "
                f"and start again, the run resumes (complete checkpoints: {kept})"
            ) from None
        for old in self._folders()[: -self._keep_last]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def _folders(self) -> list[Path]:
        """Folders with a manifest, oldest first."""
        found = [path for path in self.folder.glob("step-*") if (path / MANIFEST).is_file()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def find_newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose every file is as written; damaged ones are reported and passed over."""
        for folder in reversed(self._folders()):
            try:
                return read_checkpoint(folder)
            except UserError as error:
                report(f"{error}; falling back to the one before")
        return None

    def remove_partial(self) -> None:
        """Deletes what a killed run left half-written."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Checks a checkpoint's files against its manifest; raises `UserError` where one differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"].items()
        step, state = int(manifest["step"]), manifest["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder}: no complete {MANIFEST}; not a finished checkpoint") from None
    for name, digest in files:
        move()
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing")
        if digest_bytes(path) != digest:
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


def save_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """The optimizer's state tensors as safetensors, named by parameter."""
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, folder / OPTIMIZER)


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """Puts saved state tensors back, on each parameter's device; raises `UserError` where names differ."""
    tensors = load_file(folder / OPTIMIZER)
    by_parameter: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for name, tensor in tensors.items():
        owner, key = name.rsplit(".", 1)
        if owner not in by_parameter:
            raise UserError(f"{folder}: optimizer state of {owner}, which this config doesn't train")
        by_parameter[owner][key] = tensor
    for name, parameter in parameters.items():
        if by_parameter[name]:
            optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in by_parameter[name].items()}


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
