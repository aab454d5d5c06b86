"""What is saved of weights and optimizer comes back exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogtune.config import OptimizerSettings
from cogtune.errors import UserError
from cogtune.formats.tensors import open_safetensors
from cogtune.optimization import group_parameters, make_optimizer
from cogtune.saving import OPTIMIZER, DeviceStore


def save(store: DeviceStore, folder: Path) -> None:
    save_file(store.read_optimizer(), folder / OPTIMIZER)


def load(store: DeviceStore, folder: Path) -> None:
    store.write_optimizer(open_safetensors(folder / OPTIMIZER))


def make_training(seed: int, ratio: float = 1.0) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        f"blocks.{i}.to_out.0.lora_{'BA'[i % 2]}.weight": torch.nn.Parameter(torch.randn(3, 4, generator=generator))
        for i in range(3)
    }
    settings = OptimizerSettings(learning_rate=0.01, lora_plus_ratio=ratio)
    return parameters, make_optimizer(group_parameters(parameters, settings), settings)


def run_steps(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_the_optimizer_comes_back_exactly(ratio: float, tmp_path: Path) -> None:
    straight, optimizer = make_training(0, ratio)
    run_steps(straight, optimizer, range(3))
    save(DeviceStore(straight, optimizer), tmp_path)
    resumed, fresh = make_training(1, ratio)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(straight[name])
    load(DeviceStore(resumed, fresh), tmp_path)
    for name, parameter in straight.items():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[resumed[name]][key], value), (name, key)
    run_steps(straight, optimizer, range(3, 6))
    run_steps(resumed, fresh, range(3, 6))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_fresh_optimizer_can_be_saved(tmp_path: Path) -> None:
    parameters, optimizer = make_training(0)
    store = DeviceStore(parameters, optimizer)
    save(store, tmp_path)
    load(store, tmp_path)
    assert not optimizer.state


def test_optimizer_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    parameters, optimizer = make_training(0)
    run_steps(parameters, optimizer, range(1))
    save(DeviceStore(parameters, optimizer), tmp_path)
    name = next(iter(parameters))
    with pytest.raises(UserError, match=f"optimizer state of {name}"):
        load(DeviceStore({k: v for k, v in parameters.items() if k != name}, optimizer), tmp_path)


def test_only_the_main_process_holds_what_is_read() -> None:
    parameters, optimizer = make_training(0)
    run_steps(parameters, optimizer, range(1))
    other = DeviceStore(parameters, optimizer, is_main=False)
    assert other.read_weights() == other.read_optimizer() == {}
    weights = DeviceStore(parameters, optimizer).read_weights()
    assert all(torch.equal(weights[name], parameter) for name, parameter in parameters.items())
