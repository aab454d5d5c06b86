"""The average of the weights: float32, the same on the host, and swapped in and out without a trace."""

import pytest
import torch
from safetensors.torch import load, save

from cogtune import ema as ema_module
from cogtune.ema import Ema


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (37, 5), "b": (11,), "c": (2, 3, 4), "d": ()}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()
    }


def run(parameters: dict[str, torch.nn.Parameter], ema: Ema, steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for step in range(1, steps + 1):
        ema.wait()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        ema.update(step)


def read(ema: Ema) -> dict[str, torch.Tensor]:
    return {piece.name.removeprefix("ema."): piece.data.view(piece.shape).clone() for piece in ema.pieces().values()}


def test_it_is_the_weighted_sum_in_float64() -> None:
    parameters = make_parameters()
    expected = {name: p.detach().double() for name, p in parameters.items()}
    ema = Ema(parameters, 0.9)
    generator = torch.Generator().manual_seed(2)
    for step in range(1, 40):
        decay = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
                expected[name] = decay * expected[name] + (1 - decay) * parameter.double()
        ema.update(step)
    for name, tensor in read(ema).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_comes_to_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema_module, "CHUNK_NUMBERS", 16)  # several pieces a tensor
    results = []
    for on_host in (False, True):
        parameters = make_parameters(dtype)
        ema = Ema(parameters, 0.95, on_host=on_host)
        run(parameters, ema, 25)
        results.append(read(ema))
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())
    assert all(tensor.dtype == torch.float32 for tensor in results[1].values())


@pytest.mark.parametrize("on_host", [False, True])
def test_swapping_in_gives_the_average_and_back_the_weights(on_host: bool) -> None:
    parameters = make_parameters()
    ema = Ema(parameters, 0.9, on_host=on_host)
    run(parameters, ema, 5)
    own = {name: p.detach().clone() for name, p in parameters.items()}
    average = {name: tensor.clone() for name, tensor in read(ema).items()}
    with ema.swapped_in():
        assert all(torch.equal(p, average[name]) for name, p in parameters.items())
    assert all(torch.equal(p, own[name]) for name, p in parameters.items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in read(ema).items())
    assert not torch.equal(own["a"], average["a"])


def test_what_was_read_is_put_back() -> None:
    parameters = make_parameters()
    ema = Ema(parameters, 0.9)
    run(parameters, ema, 5)
    kept = load(save(read(ema)))
    other = Ema(make_parameters(), 0.9, on_host=True)
    other.write(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in read(other).items())
    assert {name: piece.shape for name, piece in other.pieces().items()} == {
        f"ema.{name}": tuple(p.shape) for name, p in parameters.items()
    }
