"""GPU tests: skipped without CUDA. On a machine with a GPU: `python -m pytest tests/gpu`."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cogtune.adapter import adapter_parameters
from cogtune.config import OptimizerSettings
from cogtune.optimization import make_optimizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder, and says why it is skipped where there is no GPU."""
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; run `python -m pytest tests/gpu` on one"))


@pytest.fixture
def clean_gpu() -> Iterator[None]:
    """Nothing compiled and no memory held by the tests before, not even by the traceback of one that failed."""
    sys.last_exc = sys.last_value = sys.last_traceback = None
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    yield
    torch._dynamo.reset()


@pytest.fixture
def measure_peak(clean_gpu: None) -> Callable[[Any, Callable[[Any], dict[str, torch.Tensor]]], int]:
    """Peak bytes of adapter steps with AdamW after a first one: `measure_peak(transformer, step)`.

    `step(transformer)` gives the gradients by name. What tests before left on the GPU doesn't count, nor do the matrix
    library's workspaces, whose size doesn't follow the model's.
    """
    before = torch.cuda.memory_allocated()

    def measure(transformer: Any, step: Callable[[Any], dict[str, torch.Tensor]]) -> int:
        parameters = adapter_parameters(transformer)
        optimizer = make_optimizer(list(parameters.values()), OptimizerSettings())
        for number in range(3):
            gradients = step(transformer)
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]
            optimizer.step()
            optimizer.zero_grad()
            if number == 0:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()
        return peak - before - (held - torch.cuda.memory_allocated())

    return measure


@pytest.fixture
def make_job(clips_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of a short run: `make_job(model_folder, train={"max_steps": 2})`."""

    def make(model: Path, /, **sections: dict[str, Any]) -> Path:
        values: dict[str, Any] = {
            "model": {"path": str(model)},
            "data": {"manifest": str(clips_folder), "cache_dir": str(tmp_path / "cache"), "validation_clips": 1},
            "train": {"max_steps": 12},
            "validation": {"prompts": ["waves"], "num_inference_steps": 2},
            "checkpoint": {"every_steps": 6},
            "tracking": {"log_every_steps": 4},
            "output_dir": str(tmp_path / "run"),
        }
        for section, settings in sections.items():
            values[section] = values.get(section, {}) | settings
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make
