"""float8 layers: the error that the format has, the layers that are replaced, the GPUs that are refused."""

import pytest
import torch

from cogtune.errors import UserError
from cogtune.float8 import Float8Linear, check_float8_device, quantize_linears, quantize_rows
from cogtune.random_pipeline import make_random_transformer


def test_rows_come_back_to_three_bits_of_mantissa() -> None:
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    rounded, scale = quantize_rows(values)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (64, 1)
    error = (rounded.float() * scale - values).abs()
    largest = values.abs().amax(-1, keepdim=True)
    assert (error <= torch.maximum(values.abs() / 16, largest / 448 / 2**6)).all()
    assert torch.equal(quantize_rows(torch.zeros(2, 16))[0].float(), torch.zeros(2, 16))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_off_by_a_few_percent(bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 256, bias=bias).requires_grad_(False)
    values = torch.randn(3, 7, 512)
    expected, got = linear(values), Float8Linear(linear)(values)
    assert got.shape == expected.shape and got.dtype == values.dtype
    error = (got - expected).norm() / expected.norm()
    assert 0.01 < error < 0.05


def test_the_blocks_products_are_replaced_and_modulations_stay() -> None:
    transformer = make_random_transformer("tiny", seed=0, device=torch.device("cpu"), dtype=torch.float32)
    block = transformer.transformer_blocks[0]
    assert quantize_linears(block) == 6
    kinds = {name: type(module).__name__ for name, module in block.named_modules()}
    assert kinds["attn1.to_q"] == kinds["attn1.to_out.0"] == kinds["ff.net.0.proj"] == "Float8Linear"
    assert kinds["norm1.linear"] == kinds["norm2.linear"] == "Linear"


def test_other_devices_and_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"8\.9 or newer"):
        check_float8_device(torch.device("cpu"))
    holder = torch.nn.Module()
    holder.ff = torch.nn.Linear(24, 32)
    with pytest.raises(UserError, match="no multiple of 16"):
        quantize_linears(holder)
