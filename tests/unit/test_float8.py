"""float8 rows: the error that the format has, and the devices that are refused."""

import pytest
import torch

from cogtune.errors import UserError
from cogtune.float8 import check_float8_device, quantize_rows


def test_rows_come_back_to_three_bits_of_mantissa() -> None:
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    rounded, scale = quantize_rows(values)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (64, 1)
    error = (rounded.float() * scale - values).abs()
    largest = values.abs().amax(-1, keepdim=True)
    assert (error <= torch.maximum(values.abs() / 16, largest / 448 / 2**6)).all()
    assert torch.equal(quantize_rows(torch.zeros(2, 16))[0].float(), torch.zeros(2, 16))


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"8\.9 or newer"):
        check_float8_device(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "fine"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_are_refused_by_their_capability(
    capability: tuple[int, int], fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A Card")
    if fine:
        check_float8_device(torch.device("cuda"))
        return
    with pytest.raises(UserError, match=r"that setting on A Card: needs .* 8\.9 .*; that remedy"):
        check_float8_device(torch.device("cuda"), setting="that setting", remedy="that remedy")
