"""Which models are read where they stay, in what, and what loading the others takes of the host."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogtune.loading import plan_loading
from cogtune.memory import MemoryPlan
from cogtune.models import ModelFacts, read_facts
from cogtune.parallel.strategy import Strategy

SINGLE, FSDP2, ZERO2 = Strategy(), Strategy("fsdp2", 8, 8), Strategy("zero2", 8, 8)


@pytest.fixture
def facts(tiny_folder: Path, tmp_path: Path) -> ModelFacts:
    """Of a folder whose transformer is in bfloat16."""
    for entry in tiny_folder.iterdir():
        (tmp_path / entry.name).mkdir() if entry.name == "transformer" else (tmp_path / entry.name).symlink_to(entry)
    for file in (tiny_folder / "transformer").iterdir():
        copy = tmp_path / "transformer" / file.name
        if file.suffix == ".safetensors":
            save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, copy)
        else:
            copy.write_bytes(file.read_bytes())
    return read_facts(tmp_path)


def memory(**changes: Any) -> MemoryPlan:
    return MemoryPlan("recompute", 0, 0, 0, 0, **changes)


@pytest.mark.parametrize("strategy", [SINGLE, Strategy("ddp", 4), FSDP2, Strategy("hsdp", 8, 4)])
def test_full_fine_tuning_is_read_where_it_stays(facts: ModelFacts, strategy: Strategy) -> None:
    found = plan_loading(facts, memory(), strategy, torch.bfloat16, full=True)
    assert (found.dtype, found.in_place, found.host_bytes) == (torch.float32, True, 0)
    assert "straight to where they stay" in found.describe()
    assert all(parameter.is_meta for parameter in found.load(facts).parameters())


def test_8_bit_weights_too_in_their_own_precision(facts: ModelFacts) -> None:
    found = plan_loading(facts, memory(eight_bit=True), SINGLE, torch.bfloat16, full=True)
    assert (found.dtype, found.in_place) == (torch.bfloat16, True)


@pytest.mark.parametrize(("strategy", "full"), [(SINGLE, False), (FSDP2, False), (ZERO2, False), (ZERO2, True)])
def test_what_is_in_the_files_precision_takes_nothing(facts: ModelFacts, strategy: Strategy, full: bool) -> None:
    found = plan_loading(facts, memory(), strategy, torch.bfloat16, full=full)
    assert (found.dtype, found.in_place, found.host_bytes) == (torch.bfloat16, False, 0)
    assert "files' own pages" in found.describe()


@pytest.mark.parametrize(
    ("changes", "full", "dtype"),
    [
        ({}, False, torch.float32),
        ({}, False, torch.float16),
        ({"on_host": True}, True, torch.bfloat16),
        ({"num_resident": 1}, True, torch.bfloat16),
    ],
)
def test_what_is_converted_on_the_host_is_counted(
    facts: ModelFacts, changes: dict[str, Any], full: bool, dtype: torch.dtype
) -> None:
    found = plan_loading(facts, memory(**changes), SINGLE, dtype, full=full)
    loaded = found.load(facts)
    assert not found.in_place and found.dtype == (torch.float32 if full else dtype)
    assert found.host_bytes == sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert "GiB of host memory" in found.describe()
