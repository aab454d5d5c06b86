"""What a deterministic run keeps of what `auto` came to: taken again, and what makes it void."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.memory import MemoryPlan
from cogtune.ways import FILE_NAME, read_ways, write_ways

CPU = torch.device("cpu")
TAKEN = MemoryPlan("keep_attention", 10, 20, 30, 40, num_lean=3, num_resident=2, num_offloaded=6, seconds=2.0)


def make_config(folder: Path, *, deterministic: bool = True, resume: str = "auto") -> RunConfig:
    values: dict[str, Any] = {"train": {"deterministic": deterministic}, "checkpoint": {"resume": resume}}
    return RunConfig.model_validate(values | {"output_dir": str(folder)})


def test_what_rounds_alike_is_preferred_and_otherwise_what_is_fast(tmp_path: Path) -> None:
    write_ways(tmp_path, CPU, "flash", TAKEN)
    ways = read_ways(make_config(tmp_path), CPU)
    assert ways is not None and ways.attention == "flash" and ways.device == "cpu"
    faster = MemoryPlan("keep_all", 1, 2, 3, 4, seconds=1.0)
    alike = replace(TAKEN, num_resident=None, num_offloaded=0, num_leaving=2, seconds=1.9)
    others = [replace(TAKEN, **changed) for changed in ({"num_lean": 6}, {"eight_bit": True}, {"num_updated": 4})]
    assert ways.match(alike) and not any(ways.match(rung) for rung in (faster, *others))
    assert ways.prefer([faster, *others, alike, TAKEN]) == [alike, TAKEN, faster, *others]


def test_it_holds_for_deterministic_runs_that_go_on_on_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_ways(make_config(tmp_path), CPU) is None, "a run that begins"
    write_ways(tmp_path, CPU, "default", TAKEN)
    assert read_ways(make_config(tmp_path), CPU) is not None
    assert read_ways(make_config(tmp_path, deterministic=False), CPU) is None
    assert read_ways(make_config(tmp_path, resume="never"), CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Another Card")
    assert read_ways(make_config(tmp_path), torch.device("cuda")) is None


@pytest.mark.parametrize("text", ["", "[1]", '{"device": "cpu"}', json.dumps({"device": "cpu", "more": 1})])
def test_a_file_that_says_nothing_is_named_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=rf"{FILE_NAME}: can't be read .*delete it"):
        read_ways(make_config(tmp_path), CPU)
