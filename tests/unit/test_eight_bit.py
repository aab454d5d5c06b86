"""8-bit numbers: how far they are from what was given, and rounding that is right in the mean."""

import math
from collections.abc import Callable

import pytest
import torch

from cogtune.eight_bit import BLOCK, _find_codes, dequantize, make_tables, quantize, round_stochastically

CPU = torch.device("cpu")


def draw_bits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-0x8000, 0x8000, (count,), dtype=torch.int16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [True, False])
def test_a_table_has_256_values_that_double_with_each_decade(signed: bool) -> None:
    values, limits = make_tables(CPU, signed=signed)
    assert len(values) == 256 and len(limits) == 255 and (values.diff() > 0).all()
    assert values[-1] == 1 and ((values == 0).sum() == 1 if signed else values[0] > 0)
    counts = [int(((values > 10.0 ** (d - 7)) & (values < 10.0 ** (d - 6))).sum()) for d in range(7)]
    assert counts == ([1, 2, 4, 8, 16, 32, 64] if signed else [2 + 1, 4, 8, 16, 32, 64, 128]), "zero's place is below"


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e10])
def test_the_error_of_a_round_trip_is_bounded(signed: bool, size: float) -> None:
    """Half the distance of neighbours: 0.9 / count of a decade's top, so a part of each number and a floor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64 * BLOCK, generator=generator) * 10 ** (torch.rand(64 * BLOCK, generator=generator) * -6) * size
    x = x if signed else x.abs()
    values, limits = make_tables(CPU, signed=signed)
    codes, scales = quantize(x, limits, signed=signed)
    assert codes.dtype == torch.uint8 and scales.shape == (64,)
    error = (dequantize(codes, scales, values) - x).abs() / scales.repeat_interleave(BLOCK)
    part = x.abs() / scales.repeat_interleave(BLOCK)
    for decade in range(7):
        # Numbers near a decade's end may round to the next one's first value: that gap is at most one of its steps.
        inside = (part > 10.0 ** (decade - 7)) & (part <= 10.0 ** (decade - 6))
        gap = 0.9 * 10.0 ** (decade - 6) / (2**decade * (1 if signed else 2))
        assert inside.any() and error[inside].max() <= 0.51 * gap + 1e-8
    assert error[part > 0.1].max() < (0.008 if signed else 0.004)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_codes_are_those_of_a_search(signed: bool, compiled: bool) -> None:
    """Every limit and value with 500 float32 neighbours to each side, decades' ends, zeros, numbers of all sizes."""
    values, limits = make_tables(CPU, signed=signed)
    generator = torch.Generator().manual_seed(0)
    drawn = 10.0 ** (torch.rand(1 << 20, generator=generator) * -12)
    around = torch.cat([values, limits, torch.logspace(-9, 0, 10)])
    steps = torch.arange(-500, 501, dtype=torch.int32)
    near = (around.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    parts = torch.cat([drawn, near[near.isfinite()], torch.tensor([0.0, -0.0, 1.0, 1e-38, 1e-45])])
    parts = torch.cat([parts, -parts, -values]) if signed else parts.abs()
    parts = parts[parts.abs() <= 1]
    torch._dynamo.reset()
    find: Callable[..., torch.Tensor] = torch.compile(_find_codes) if compiled else _find_codes
    expected = torch.bucketize(parts, limits, out_int32=True)
    assert torch.equal(find(parts, limits, signed=signed), expected)
    assert len(expected.unique()) == 256
    torch._dynamo.reset()


def test_zeros_and_a_blocks_largest_number_are_exact_the_negative_one_nearly() -> None:
    x = torch.zeros(2 * BLOCK)
    x[3] = -0.7
    values, limits = make_tables(CPU, signed=True)
    assert torch.allclose(dequantize(*quantize(x, limits, signed=True), values), x, rtol=8e-3, atol=0)
    x[3] = 0.7
    assert torch.equal(dequantize(*quantize(x, limits, signed=True), values), x)


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour_only() -> None:
    exact = torch.tensor([1.001, -1.001, 3.14159, -2.71828e-5, 1e30, 1.0, -0.5, 0.0])
    count = 40_000
    drawn = round_stochastically(exact.repeat(count), draw_bits(8 * count)).float().view(count, 8)
    down = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((exact.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((drawn == down) | (drawn == up)).all()
    part = (exact - down) / (up - down)
    gap = (up - down).abs().double()
    error = (drawn.double().mean(0) - exact.double()).abs() / gap
    assert (error <= 4 * (part * (1 - part) / count).sqrt()).all(), error
    assert torch.equal(drawn[:, 5:], exact[5:].expand(count, 3)), "what bfloat16 has is exact"
    nearest = exact.bfloat16().double()
    assert (nearest - exact.double()).abs()[0] / gap[0] > 10 / math.sqrt(count), "the test can tell them apart"


def test_small_updates_are_kept_in_the_mean() -> None:
    """A hundredth of bfloat16's resolution, a thousand times: to the nearest, nothing would ever change."""
    weight = torch.ones(20_000, dtype=torch.bfloat16)
    nearest = weight.clone()
    update = 2.0**-7 / 100
    for seed in range(500):
        weight = round_stochastically(weight.float() + update, draw_bits(len(weight), seed))
        nearest = (nearest.float() + update).bfloat16()
    assert weight.float().mean() == pytest.approx(1 + 500 * update, rel=3e-4)
    assert (nearest == 1).all()


@pytest.mark.parametrize(("beta", "low", "high"), [(0.95, 0.92, 1.08), (0.99, 0.87, 1.12), (0.999, 0.84, 1.19)])
def test_a_moving_average_of_squares_stays_near_the_exact_one(beta: float, low: float, high: float) -> None:
    """Its root, stored in each step, beside float64's; gradients of log-normal sizes (docs/LOG.md has other ways)."""
    generator = torch.Generator().manual_seed(1)
    values, limits = make_tables(CPU, signed=False)
    sizes = torch.randn(16 * BLOCK, generator=generator).exp()
    exact, kept = torch.zeros(16 * BLOCK, dtype=torch.float64), quantize(torch.zeros(16 * BLOCK), limits, signed=False)
    for _ in range(int(6 / (1 - beta))):
        square = (torch.randn(16 * BLOCK, generator=generator) * sizes).square()
        exact = exact * beta + square.double() * (1 - beta)
        root = dequantize(*kept, values)
        kept = quantize((root.square() * beta + square * (1 - beta)).sqrt(), limits, signed=False)
    ratio = dequantize(*kept, values) / exact.sqrt()
    assert ratio.quantile(0.05) > low and ratio.quantile(0.95) < high, ratio.quantile(
        torch.tensor([0.05, 0.95]).double()
    )
    assert ratio.median() == pytest.approx(1, abs=0.02)
