"""The cache of encoded clips and captions: content-keyed, checked, written atomically.

An entry's name is the digest of everything that it depends on, so it can't be stale; its header holds the digest of
its tensors, so damage is found when it is read. Any number of processes may read and write at once. Layout:

    <cache_dir>/latents/<kk>/<key>.safetensors    mean, logvar  [C, F, H, W]: training samples anew each time
    <cache_dir>/images/<kk>/<key>.safetensors     image         [H, W, 3] uint8: image-to-video noises its pixels
    <cache_dir>/text/<kk>/<key>.safetensors       embeddings    [L, D]: all positions, there is no attention mask
    <cache_dir>/digests/<kk>/<key>.json           digests of source files, valid while size and times are the same
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cogtune.errors import UserError


def make_key(**parts: Any) -> str:
    """The entry name for everything that determines an entry's content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def digest_bytes(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Cache:
    """A folder of entries; `kind` is "latents", "images" or "text"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check_writable(self) -> None:
        """Raises `UserError` where nothing can be written, before hours are spent on encoding."""
        probe = self.folder / f".probe-{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"data.cache_dir={self.folder}: cannot be written ({error.strerror}); choose a folder that can"
            ) from None

    def path(self, kind: str, key: str) -> Path:
        """Where an entry lies or would lie."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether a file of that name exists; damage shows only in `read`."""
        return self.path(kind, key).is_file()

    def read(self, kind: str, key: str) -> dict[str, torch.Tensor] | None:
        """An entry's tensors, or None where it is missing or damaged (the damaged file is removed)."""
        path = self.path(kind, key)
        try:
            # In one go: `safe_open` opens the file twice, and another process may replace it in between.
            content = path.read_bytes()
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            expected = header.get("__metadata__", {}).get("digest")
        except FileNotFoundError:
            return None
        except SafetensorError:
            tensors, expected = {}, "unreadable"
        if digest_tensors(tensors) == expected:
            return tensors
        path.unlink(missing_ok=True)
        return None

    def write(self, kind: str, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Writes an entry so that readers see all of it or nothing. Raises `UserError` where the disk refuses."""
        path = self.path(kind, key)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save(tensors, metadata={"digest": digest_tensors(tensors)}))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"data.cache_dir={self.folder}: cannot be written ({error.strerror}); "
                "free some space or choose another folder"
            ) from None

    def size_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))

    def digest_file(self, path: Path) -> str:
        """SHA-256 of a file's bytes; remembered while its size, inode and times stay the same."""
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        key = make_key(file=str(path.resolve()))
        memo = self.folder / "digests" / key[:2] / f"{key}.json"
        try:
            remembered = json.loads(memo.read_text())
            if remembered["seen"] == seen:
                return remembered["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no memo, or a damaged one: it is made again below
        digest = digest_bytes(path)
        temporary = memo.with_name(f".{memo.stem}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"seen": seen, "digest": digest}))
        temporary.replace(memo)
        return digest

    def digest_folder(self, folder: Path) -> str:
        """One digest over a component's files (weights, config, vocabulary)."""
        kinds = (".safetensors", ".json", ".model", ".txt")
        files = sorted(path for path in folder.iterdir() if path.suffix in kinds)
        return make_key(files=[[path.name, self.digest_file(path)] for path in files])
