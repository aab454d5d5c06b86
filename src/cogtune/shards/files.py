"""Files of pieces: safetensors, whose header says where in its tensor each piece belongs.

The places stand twice: under the key of torch.distributed.checkpoint, whose `HuggingFaceStorageReader` reads the folder
as it is, and under our own, which also has the whole tensor's shape and allows ranges that are no rows.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogtune.cluster.whereabouts import move
from cogtune.errors import UserError
from cogtune.formats.tensors import DTYPE_CODES, SAFETENSORS_DTYPES
from cogtune.shards.pieces import Piece

_PLACES = "cogtune_places"
MAX_FILE_BYTES = 2 << 30
"""Files of this size at most (unless one piece is larger): they are written, digested and read side by side."""
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class ShardFile:
    """A file to write: its name and the pieces in it, in their order."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all numbers, without the header."""
        return sum(piece.num_bytes for piece in self.pieces)

    def header(self) -> bytes:
        """Length and JSON, padded so that the numbers start at a multiple of 8."""
        places, boxes = {}, {}
        entries: dict[str, Any] = {}
        offset = 0
        for piece in self.pieces:
            shape, offsets = piece.box()
            end = offset + piece.num_bytes
            code = DTYPE_CODES[piece.data.dtype]
            entries[piece.name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            places[piece.name] = {"shape": list(piece.shape), "start": piece.start}
            boxes[piece.name] = {"saved_offsets": list(offsets)}
            offset = end
        metadata = {
            "format": "pt",
            _PLACES: json.dumps(places),
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps(boxes),
        }
        text = json.dumps({"__metadata__": metadata} | entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def lay_out(pieces: Iterable[Piece], *, rank: int, max_bytes: int = MAX_FILE_BYTES) -> list[ShardFile]:
    """This process's files; a piece named `weights.x` goes to `weights-<rank>-<number>.safetensors`."""
    groups: dict[str, list[list[Piece]]] = {}
    sizes: dict[str, int] = {}
    # Larger numbers first: then every piece lies at a multiple of its numbers' size.
    for piece in sorted(pieces, key=lambda piece: -piece.data.element_size()):
        group = piece.name.partition(".")[0]
        files = groups.setdefault(group, [[]])
        size = sizes.get(group, 0) + piece.num_bytes
        if files[-1] and size > max_bytes:
            files.append([])
            size = piece.num_bytes
        files[-1].append(piece)
        sizes[group] = size
    return [
        ShardFile(f"{group}-{rank:05d}-{number:04d}.safetensors", tuple(file))
        for group, files in sorted(groups.items())
        for number, file in enumerate(files)
    ]


def write_file(folder: Path, file: ShardFile, chunks: Iterable[Tensor]) -> str:
    """Writes and syncs a file from its numbers' bytes (uint8, on the host); gives the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with (folder / file.name).open("wb") as out:
        header = file.header()
        out.write(header)
        digest.update(header)
        for chunk in chunks:
            data = chunk.numpy().data
            out.write(data)
            digest.update(data)
            move()
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def split_bytes(data: Tensor) -> Iterator[Tensor]:
    """uint8 [n] in chunks; none where there is nothing."""
    return iter(data.split(CHUNK_BYTES)) if data.numel() else iter(())


@dataclass(frozen=True)
class StoredPiece:
    """A range of a tensor in a file."""

    file: Path
    offset: int
    """Byte of the file at which it begins."""
    start: int
    stop: int
    """The numbers from start to before stop of the flattened tensor."""


def read_header(file: Path, group: str | None) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, StoredPiece]]:
    """Name, whole shape, type and place of everything in a file; `group` is put before the names of a whole file.

    Raises `UserError` for a file that can't be read.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entries = json.loads(opened.read(length))
        metadata = entries.pop("__metadata__", {})
        places = json.loads(metadata.get(_PLACES, "{}"))
        for name, entry in entries.items():
            place = places.get(name, {"shape": entry["shape"], "start": 0})
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            start = place["start"]
            stored = StoredPiece(file, 8 + length + begin, start, start + (end - begin) // dtype.itemsize)
            yield name if group is None else f"{group}.{name}", tuple(place["shape"]), dtype, stored
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); copy it again") from None
