"""Writes converted tensors: sharded safetensors and torch's own format, one tensor in memory at a time."""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from cogtune.errors import UserError
from cogtune.formats.tensors import DTYPE_CODES, Tensors

MAX_SHARD_BYTES = 5_000_000_000
COMPONENT_STEM = "diffusion_pytorch_model"


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, put in place when all of it is written; raises `UserError` where it exists or can't be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; choose another output folder")
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); free space or choose another"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_component(
    tensors: Tensors, config: dict[str, Any], folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """A diffusers component: `config.json` and its weights, sharded where they are larger than one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_sharded(tensors, folder, COMPONENT_STEM, max_shard_bytes=max_shard_bytes)


def write_sharded(tensors: Tensors, folder: Path, stem: str, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
    """`<stem>.safetensors`, or `<stem>-00001-of-0000n.safetensors` and their index, as diffusers names them."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.specs.items():
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    if len(shards) == 1:
        return [write_safetensors(tensors, folder / f"{stem}.safetensors")]
    files = [folder / f"{stem}-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        write_safetensors(tensors, file, names=names)
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in tensors.specs.values())},
        "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def write_safetensors(
    tensors: Tensors, file: Path, *, names: list[str] | None = None, metadata: dict[str, str] | None = None
) -> Path:
    """One safetensors file; the header is known beforehand, so each tensor goes to disk as soon as it is read.

    The format: 8 bytes with the header's length, the header in JSON padded to 8 bytes, the tensors' bytes.
    """
    names = list(tensors.specs) if names is None else names
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    offset = 0
    for name in names:
        spec = tensors.specs[name]
        end = offset + spec.num_bytes
        header[name] = {"dtype": DTYPE_CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            _write_bytes(out, _read_checked(tensors, name))
    return file


def order_metadata(file: Path) -> None:
    """Puts what a safetensors file says of itself in order, in place: its library writes it in any, so that equal
    contents had unequal bytes."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        said = dict(sorted(header.pop("__metadata__", {}).items()))
        text = json.dumps({"__metadata__": said, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as long as it was, but for how a rare character is written
            stream.seek(8)
            stream.write(text.ljust(length))


def write_torch_file(tensors: Tensors, file: Path, *, under: str) -> None:
    """A torch file `{under: {name: tensor}}`: laid out without data first, then filled in tensor by tensor."""
    # Memory that nobody touches isn't there: `empty` only reserves addresses.
    layout = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in tensors.specs.items()}
    try:
        with skip_data():
            torch.save({under: layout}, file)
    except RuntimeError as error:  # torch's writer has no other error for a full disk
        raise OSError(str(error).splitlines()[0]) from error
    del layout
    with FakeTensorMode():
        laid_out = torch.load(file, weights_only=True)[under]
    with file.open("r+b") as out:
        for name in tensors.specs:
            out.seek(laid_out[name].untyped_storage()._checkpoint_offset)
            _write_bytes(out, _read_checked(tensors, name))


def _read_checked(tensors: Tensors, name: str) -> torch.Tensor:
    tensor, spec = tensors.read(name), tensors.specs[name]
    assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, f"{name}: {tensor.shape} {tensor.dtype}"
    return tensor


def _write_bytes(out: BinaryIO, tensor: torch.Tensor) -> None:
    if tensor.numel():
        out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def link_tree(source: Path, target: Path) -> None:
    """Copies a file or folder; hard links where the file system allows."""
    if source.is_dir():
        target.mkdir(parents=True)
        for child in sorted(source.iterdir()):
            link_tree(child, target / child.name)
        return
    try:
        os.link(source.resolve(), target)  # hub caches hold links: link what they point to
    except OSError:
        shutil.copy2(source, target)
