"""Models that are read where they stay have the bits of those that were loaded whole, in one process and in parts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from cogtune.errors import UserError
from cogtune.full import TrainedModel
from cogtune.models import load_transformer, make_empty_transformer, read_facts
from cogtune.parallel.fully_sharded import make_mesh, shard_transformer
from cogtune.parallel.strategy import Strategy
from cogtune.shards.filling import fill_module

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save_in(dtype: torch.dtype, pipeline: Path, out: Path) -> Path:
    """The pipeline's transformer alone, its files in another precision."""
    (out / "transformer").mkdir(parents=True)
    for file in (pipeline / "transformer").iterdir():
        if file.suffix == ".safetensors":
            save_file(
                {name: tensor.to(dtype) for name, tensor in load_file(file).items()}, out / "transformer" / file.name
            )
        else:
            (out / "transformer" / file.name).write_bytes(file.read_bytes())
    for entry in pipeline.iterdir():
        if entry.name != "transformer":
            (out / entry.name).symlink_to(entry)
    return out


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        own, other = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["tiny", "tiny-2b", "tiny-i2v", "tiny-1.5-i2v"])
def test_all_bits_are_those_of_a_loaded_model(
    model: str, stored: torch.dtype, wanted: torch.dtype, variant_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of computed positions (2B) and learned ones (image-to-video) too, which are buffers."""
    facts = read_facts(save_in(stored, variant_folder(model), tmp_path / "pipeline"))
    empty = make_empty_transformer(facts, wanted)
    assert all(parameter.is_meta for parameter in empty.parameters())
    fill_module(empty, facts.folder / "transformer", CPU)
    assert_same(empty, load_transformer(facts, wanted))
    assert not empty.training and not any(parameter.requires_grad for parameter in empty.parameters())


def divide(facts: Any, world_size: int, *, empty: bool, trained: str = "attn1") -> Any:
    """What has `trained` in its name is trained in float32, the rest frozen in bfloat16."""
    names = [name for name, _ in make_empty_transformer(facts, torch.float32).named_parameters()]
    chosen = {name for name in names if trained in name}
    load = make_empty_transformer if empty else load_transformer
    model = TrainedModel(load(facts, torch.float32), facts, "", export_dtype=torch.bfloat16, trained=chosen)
    strategy = Strategy("fsdp2", world_size, world_size)
    mesh = make_mesh(strategy, CPU)
    shard_transformer(model.transformer, strategy, mesh, CPU, torch.bfloat16, full=True)
    if empty:
        assert all(parameter.is_meta for parameter in model.transformer.parameters())
        fill_module(model.transformer, facts.folder / "transformer", CPU)
    return model.transformer


def compare_on_rank(rank: int, world_size: int, folder: Path, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    facts = read_facts(folder)
    filled, divided = (divide(facts, world_size, empty=empty) for empty in (True, False))
    uneven = 0
    for (name, found), expected in zip(filled.named_parameters(), divided.parameters(), strict=True):
        assert (
            isinstance(found, DTensor)
            and found.requires_grad == expected.requires_grad
            and found.dtype == expected.dtype
        )
        own, other = found.to_local(), expected.to_local()
        assert own.shape == other.shape and torch.equal(own, other), name
        uneven += own.shape[0] * world_size != found.shape[0]
    assert uneven, "some tensors don't divide evenly"
    inputs = {
        "hidden_states": torch.randn(1, 5, 16, 8, 12, generator=torch.Generator().manual_seed(rank)),
        "encoder_hidden_states": torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(9)),
        "timestep": torch.tensor([500]),
    }
    results = []
    for model in (filled, divided):
        output = model(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()})[0]
        output.float().square().mean().backward()
        results.append([output, *[p.grad.to_local() for p in model.parameters() if p.grad is not None]])
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))
    dist.destroy_process_group()


def test_three_processes_read_their_parts(tiny_folder: Path, tmp_path: Path) -> None:
    multiprocessing.start_processes(
        compare_on_rank, (3, tiny_folder, str(tmp_path / "store")), nprocs=3, start_method="fork"
    )


@pytest.mark.usefixtures("group")
def test_files_of_another_model_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    facts = read_facts(tiny_folder)
    file = next((tiny_folder / "transformer").glob("*.safetensors"))
    state = load_file(file)
    for change, message in (
        ({"proj_out.bias": None}, "has no proj_out.bias"),
        ({"proj_out.bias": torch.zeros(3)}, r"proj_out.bias is \[3\]"),
    ):
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        save_file(changed, tmp_path / file.name)
        with pytest.raises(UserError, match=message):
            fill_module(make_empty_transformer(facts, torch.float32), tmp_path, CPU)


def measure_on_rank(rank: int, world_size: int, folder: Path, store: str, empty: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    facts = read_facts(folder)
    make_empty_transformer(facts, torch.float32)  # what is imported late counts as neither
    before = read_peak()
    divided = divide(facts, world_size, empty=empty, trained="")
    taken = read_peak() - before
    whole = 4 * sum(parameter.numel() for parameter in divided.parameters())
    assert (taken < 0.7 * whole) == empty, f"{taken} of {whole} bytes"
    dist.destroy_process_group()


def read_peak() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")  # `getrusage` counts what ran before an exec too
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("empty", [True, False])
def test_no_process_ever_holds_the_whole(empty: bool, tiny_folder: Path, tmp_path: Path) -> None:
    """Two parts of 54 million float32 weights on a CPU: half of them each. Loaded whole, the measure shows it."""
    config = json.loads((tiny_folder / "transformer" / "config.json").read_text())
    config |= {"num_layers": 16, "num_attention_heads": 16, "attention_head_dim": 32}
    wide = tmp_path / "wide"
    (wide / "transformer").mkdir(parents=True)
    (wide / "transformer" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        meta = CogVideoXTransformer3DModel.from_config(config)
    state = {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in meta.named_parameters()}
    assert sum(tensor.numel() for tensor in state.values()) > 50_000_000
    save_file(state, wide / "transformer" / "diffusion_pytorch_model.safetensors")
    for entry in tiny_folder.iterdir():
        if entry.name != "transformer":
            (wide / entry.name).symlink_to(entry)
    # New processes: a copy of this one would have the memory that it has freed.
    multiprocessing.spawn(measure_on_rank, (2, wide, str(tmp_path / "store"), empty), nprocs=2)
