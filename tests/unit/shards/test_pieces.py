"""Pieces and their files: every number is written once, and read into any other division."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cogtune.errors import UserError
from cogtune.shards.files import as_bytes, lay_out, split_bytes, write_file
from cogtune.shards.pieces import Piece, choose_written, find_piece
from cogtune.shards.stored import StoredTensors

SHAPES = {"weights.a.weight": (10, 3), "weights.b": (7,), "optimizer.a.weight.step": (), "ema.c": (4, 2, 3)}


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut(name: str, tensor: torch.Tensor, edges: list[int]) -> list[Piece]:
    """The flattened tensor cut at these places."""
    flat = tensor.reshape(-1)
    places = [0, *edges, flat.numel()]
    return [
        Piece(name, tuple(tensor.shape), start, flat[start:stop].clone())
        for start, stop in itertools.pairwise(places)
        if start < stop
    ]


def write(folder: Path, pieces: list[Piece], rank: int, max_bytes: int = 1 << 30) -> list[str]:
    folder.mkdir(exist_ok=True)
    files = lay_out(pieces, rank=rank, max_bytes=max_bytes)
    for file in files:
        content = torch.cat([as_bytes(piece.data) for piece in file.pieces])
        write_file(folder, file, split_bytes(content))
    return [file.name for file in files]


@pytest.mark.parametrize("seed", range(4))
def test_any_division_is_read_into_any_other(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    tensors = make_tensors(seed)
    for name, tensor in tensors.items():
        edges = sorted(draw.sample(range(1, tensor.numel()), min(2, tensor.numel() - 1))) if tensor.numel() > 1 else []
        for rank, piece in enumerate(cut(name, tensor, edges)):
            # Several files for a process too: each write has a rank of its own here.
            write(tmp_path, [piece], rank=100 * list(tensors).index(name) + rank)
    stored = StoredTensors(tmp_path)
    assert {name: entry.shape for name, entry in stored.tensors.items()} == SHAPES
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor)
        flat = tensor.reshape(-1)
        start = draw.randrange(flat.numel())
        target = Piece(name, SHAPES[name], start, torch.empty(draw.randint(1, flat.numel() - start)))
        stored.read_into(target)
        assert torch.equal(target.data, flat[start : target.stop])


def test_files_are_safetensors_with_rows_where_pieces_are_rows(tmp_path: Path) -> None:
    tensor = torch.arange(30.0).reshape(10, 3)
    pieces = cut("weights.a", tensor, [12])
    names = [write(tmp_path, [piece], rank)[0] for rank, piece in enumerate(pieces)]
    assert names == ["weights-00000-0000.safetensors", "weights-00001-0000.safetensors"]
    with safe_open(tmp_path / names[1], framework="pt") as opened:
        assert torch.equal(opened.get_tensor("weights.a"), tensor[4:])
        places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        assert places == {"weights.a": {"saved_offsets": [4, 0]}}


def test_large_groups_become_several_files_and_types_are_aligned() -> None:
    kinds = (torch.uint8, torch.bfloat16, torch.float32)
    pieces = [Piece(f"optimizer.{n}", (5,), 0, torch.zeros(5, dtype=kinds[n % 3])) for n in range(9)]
    files = lay_out(pieces, rank=2, max_bytes=64)
    assert [file.name for file in files] == [f"optimizer-00002-000{n}.safetensors" for n in range(2)]
    assert sum(len(file.pieces) for file in files) == 9
    for file in files:
        offset = 0
        for piece in file.pieces:
            assert offset % piece.data.element_size() == 0
            offset += piece.num_bytes


def test_copies_are_written_once_and_shared_out() -> None:
    tensors = {f"weights.{n}": torch.zeros(10 * (n + 1)) for n in range(12)}
    written = []
    for rank in range(4):
        pieces = {name: find_piece(name, tensor, rank=rank, world_size=4) for name, tensor in tensors.items()}
        mine = choose_written(pieces)
        assert sum(piece.num_bytes for piece in mine) <= 2 * 4 * 780 / 4, "about a quarter of 780 numbers"
        written += [piece.name for piece in mine]
    assert sorted(written) == sorted(tensors)


def test_whole_files_of_one_process_are_read_by_group(tmp_path: Path) -> None:
    save_file({"a.weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "weights.safetensors")
    save_file({"a.weight.exp_avg": torch.ones(2, 3)}, tmp_path / "optimizer.safetensors")
    stored = StoredTensors(tmp_path)
    assert stored.names("weights") == ["a.weight"] and stored.names("optimizer") == ["a.weight.exp_avg"]
    target = Piece("weights.a.weight", (2, 3), 3, torch.empty(3))
    stored.read_into(target)
    assert target.data.tolist() == [3, 4, 5]


def test_missing_numbers_names_and_wrong_shapes_are_errors(tmp_path: Path) -> None:
    first, _ = cut("weights.a", torch.arange(30.0).reshape(10, 3), [12])
    write(tmp_path, [first], 0)
    stored = StoredTensors(tmp_path)
    with pytest.raises(UserError, match="12 of the numbers 0 to 30"):
        stored.read("weights.a")
    with pytest.raises(UserError, match=r"has no weights\.b"):
        stored.read_into(Piece("weights.b", (3,), 0, torch.empty(3)))
    with pytest.raises(UserError, match=r"is \[10, 3\] and should be \[5, 6\]"):
        stored.read_into(Piece("weights.a", (5, 6), 0, torch.empty(30)))
    name = next(tmp_path.iterdir())
    content = name.read_bytes()
    name.write_bytes(content[:-8])
    with pytest.raises(UserError, match="ends too early"):
        stored.read_into(Piece("weights.a", (10, 3), 0, torch.empty(12)))
    name.write_bytes(content[:20])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        StoredTensors(tmp_path)


def test_pieces_of_other_shapes_are_of_different_runs(tmp_path: Path) -> None:
    write(tmp_path, [Piece("weights.a", (4,), 0, torch.zeros(2))], 0)
    write(tmp_path, [Piece("weights.a", (5,), 2, torch.zeros(3))], 1)
    with pytest.raises(UserError, match="several shapes or types"):
        StoredTensors(tmp_path)
