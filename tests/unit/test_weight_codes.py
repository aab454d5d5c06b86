"""Weights in 8 and 4 bits: each number within the format's own bound, and the values of NF4 as its paper gives them."""

import pytest
import torch

from cogtune.weight_codes import NF4_BLOCK, WeightKind, count_code_bytes, decode, encode, nf4_values

# arXiv:2305.14314, appendix E.
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restore(weight: torch.Tensor, kind: WeightKind, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.tensor(nf4_values()) if kind == "nf4" else None
    return decode(*encode(weight, kind), values, weight.shape[1], dtype)


def test_the_values_of_nf4_are_the_papers() -> None:
    assert nf4_values() == pytest.approx(PAPER, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_half_a_step_off_at_most(dtype: torch.dtype) -> None:
    weight = (draw(40, 96) * torch.logspace(-3, 3, 40)[:, None]).to(torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restore(weight, "int8") - weight).abs() <= step / 2 * 1.0001).all()
    rounded = restore(weight, "int8", dtype).float()
    torch.testing.assert_close(rounded, restore(weight, "int8"), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("width", [64, 192, 32, 100])
def test_nf4_is_half_a_gap_off_at_most(width: int) -> None:
    """Of the gap that a number lies in, times its block's largest size; bfloat16 moves that by 1 / 256 at most."""
    weight = draw(40, width) * torch.logspace(-3, 3, 40)[:, None]
    got, values = restore(weight, "nf4"), torch.tensor(PAPER)
    for start in range(0, width, NF4_BLOCK):
        block, largest = weight[:, start : start + NF4_BLOCK], weight[:, start : start + NF4_BLOCK].abs().amax(1)
        place = torch.searchsorted(values, (block / largest[:, None]).clamp(-1, 1)).clamp(1, 15)
        gap = (values[place] - values[place - 1]) * largest[:, None]
        error = (got[:, start : start + NF4_BLOCK] - block).abs()
        assert (error <= gap / 2 + largest[:, None] / 200).all()
    assert got.shape == weight.shape


def test_what_a_format_holds_comes_back_exactly() -> None:
    whole = torch.randint(-127, 128, (8, 64), generator=torch.Generator().manual_seed(1)).float()
    whole[:, 0] = 127
    assert torch.equal(restore(whole, "int8"), whole)
    picked = torch.tensor(nf4_values())[torch.arange(128) * 7 % 16].view(1, 128) * torch.tensor([[0.5], [96.0]])
    assert torch.equal(restore(picked, "nf4"), picked)


@pytest.mark.parametrize(("kind", "low", "high"), [("int8", 0.005, 0.011), ("nf4", 0.08, 0.1)])
def test_the_error_of_normal_weights_is_the_formats(kind: WeightKind, low: float, high: float) -> None:
    weight = draw(64, 1024) * 0.02
    assert low < float((restore(weight, kind) - weight).norm() / weight.norm()) < high


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_stay_zeros(kind: WeightKind) -> None:
    weight = draw(4, 128)
    weight[1], weight[2, 64:] = 0, 0
    got = restore(weight, kind)
    assert got.isfinite().all() and not got[1].any() and not got[2, 64:].any() and got[2, :64].any()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("width", [192, 100])
def test_bytes_are_counted(kind: WeightKind, width: int) -> None:
    codes, scale = encode(draw(48, width), kind)
    assert count_code_bytes(48, width, kind) == codes.nbytes + scale.nbytes
    assert count_code_bytes(3072, 3072, "nf4") * 8 / 3072**2 == 4.25
