"""Which attention kernel a run takes, and what is refused before any weight is loaded."""

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.attention as torch_attention

from cogtune import attention_backends, flash4
from cogtune.attention_backends import (
    CLEARLY_FASTER,
    SDPA_BACKENDS,
    Backend,
    BackendTiming,
    activated,
    check_backend,
    choose_backend,
    hint_at_package,
    is_installed,
    measure_backends,
    pick_backend,
)
from cogtune.config import TrainSettings
from cogtune.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE: dict[str, Any] = {"num_heads": 2, "head_dim": 16, "dtype": torch.float32}


def times(**totals: float) -> dict[Backend, BackendTiming]:
    return {name: BackendTiming(total / 4, 3 * total / 4) for name, total in totals.items()}  # type: ignore[misc]


def test_settings_and_backends_are_the_same_list() -> None:
    options = TrainSettings.model_json_schema()["properties"]["attention"]["enum"]
    assert {*options, "math"} == {"auto", *SDPA_BACKENDS}, "math is a CPU's own choice"


def test_the_fastest_kernel_is_taken_where_it_is_clearly_faster() -> None:
    assert choose_backend("auto", times(cudnn=10.0, flash=12.0, efficient=20.0)) == "cudnn"
    assert choose_backend("auto", times(cudnn=10.0, flash=5.0, efficient=20.0)) == "flash"
    nearly = 10.0 * (CLEARLY_FASTER + 0.01)
    assert choose_backend("auto", times(cudnn=10.0, flash=nearly)) == "cudnn", "noise may not change the kernel"
    assert choose_backend("auto", times(cudnn=10.0, flash=nearly, flash3=6.0)) == "flash3"
    assert choose_backend("auto", times(efficient=10.0)) == "efficient"
    assert choose_backend("auto", {}) == "default"


def test_a_given_kernel_is_taken_or_refused() -> None:
    assert choose_backend("flash", times(cudnn=1.0, flash=9.0)) == "flash"
    assert choose_backend("default", {}) == "default"
    with pytest.raises(UserError, match=r"train\.attention=flash3: does not run here.*default, cudnn, flash"):
        choose_backend("flash3", times(cudnn=1.0, flash=9.0))


def test_a_cpu_measures_its_default_alone() -> None:
    timings = measure_backends(batch_size=1, tokens=24, device=CPU, **SHAPE)
    assert list(timings) == ["default"]
    assert timings["default"].total == timings["default"].forward + timings["default"].backward > 0


@pytest.mark.parametrize(
    ("wanted", "dtype", "tokens", "expected"),
    [
        ("auto", torch.bfloat16, 184, "math"),
        ("auto", torch.float32, 184, "default"),
        ("default", torch.bfloat16, 184, "default"),
        ("auto", torch.bfloat16, 17776, "default"),  # 30 GB of scores
    ],
)
def test_a_cpu_takes_plain_products_for_small_shapes_in_16_bits(
    wanted: Any, dtype: torch.dtype, tokens: int, expected: Backend
) -> None:
    shape: dict[str, Any] = {"batch_size": 8, "num_heads": 4, "head_dim": 48, "device": CPU}
    assert pick_backend(wanted, tokens=tokens, dtype=dtype, **shape) == (expected, {})


def test_kernels_that_do_not_run_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = attention_backends._measure

    def refuse(backend: Backend, *arguments: Any) -> BackendTiming:
        if backend == "flash":
            raise RuntimeError("No available kernel")
        return measure("default", *arguments)

    monkeypatch.setattr(attention_backends, "_measure", refuse)
    found = measure_backends(
        batch_size=1, tokens=24, device=CPU, candidates=("cudnn", "flash", "efficient", "flash3"), **SHAPE
    )
    assert list(found) == ["cudnn", "efficient"], "flash refuses, flash3 is not installed"


@pytest.mark.parametrize("wanted", ["cudnn", "flash", "efficient", "flash3"])
def test_a_cpu_refuses_kernels_for_gpus(wanted: Backend) -> None:
    with pytest.raises(UserError, match=rf"train\.attention={wanted}: a kernel for GPUs.*auto or default"):
        check_backend(wanted, device=CPU, **SHAPE)
    for fine in ("auto", "default"):
        check_backend(fine, device=CPU, **SHAPE)


def test_missing_packages_and_kernels_without_support_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_installed("flash3") and not is_installed("flash4") and is_installed("flash")
    with pytest.raises(UserError, match=r"needs flash_attn_interface, and .*: install flash_attn_"):
        check_backend("flash3", device=CUDA, **SHAPE)
    with pytest.raises(UserError, match=r"cutlass and flash_attn\.cute, and .*: pip install 'cogtune\[flash4\]'"):
        check_backend("flash4", device=CUDA, **SHAPE)
    tried: list[Any] = []

    def measure(**shape: Any) -> dict[Backend, BackendTiming]:
        tried.append(shape["candidates"])
        return times(cudnn=1.0) if shape["candidates"] == ("cudnn",) else {}

    monkeypatch.setattr(attention_backends, "measure_backends", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Old Card")
    check_backend("cudnn", device=CUDA, **SHAPE)
    with pytest.raises(
        UserError, match=r"train\.attention=flash: does not run on Old Card in float32 with heads of 16"
    ):
        check_backend("flash", device=CUDA, **SHAPE)
    check_backend("auto", device=CUDA, **SHAPE)
    assert tried == [("cudnn",), ("flash",)], "nothing is tried for auto"


def test_a_package_is_active_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[str | None] = [None]
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", active.append, raising=False)
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: active[-1], raising=False)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", lambda: active.append(None), raising=False)
    with pytest.raises(ZeroDivisionError), activated("flash3"):
        assert active[-1] == "FA3"
        raise ZeroDivisionError
    assert active == [None, "FA3", None]
    with activated("cudnn"):
        assert active == [None, "FA3", None]


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        module = type(sys)(name)
        module.__spec__ = sys.__spec__
        monkeypatch.setitem(sys.modules, name, module)


def test_an_installed_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface")
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", print, raising=False)
    assert is_installed("flash3")
    monkeypatch.delattr(torch_attention, "activate_flash_attention_impl")
    assert not is_installed("flash3"), "a PyTorch that can't hand attention to it"


def test_the_fourth_version_is_not_found_without_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention-2 brings it along."""
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", print, raising=False)
    install(monkeypatch, "flash_attn", "flash_attn.cute")
    assert not is_installed("flash4")
    install(monkeypatch, "cutlass")
    assert is_installed("flash4")


class Interface:
    """The package's functions, of a release whose results have more parts than PyTorch expects."""

    @staticmethod
    def _flash_attn_fwd(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor | None, ...]:
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * options["softmax_scale"]
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return out, scores.logsumexp(-1), None, None, None

    @staticmethod
    def _flash_attn_bwd(*inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor | None, ...]:
        if len(inputs) != 6 or options != {"softmax_scale": 0.5}:
            raise KeyError("no such tile\n  at line 7")
        return inputs[0], inputs[1], inputs[2], None


def test_any_release_of_flash_attention_4_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].__dict__.update(
        {name: getattr(Interface, name) for name in ("_flash_attn_fwd", "_flash_attn_bwd")}
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    query, key, value = (torch.randn(1, 5, 2, 4) for _ in range(3))
    out, lse = flash4._flash_attn_fwd(query, key, value, softmax_scale=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert lse.shape == (1, 2, 5)
    assert flash4._flash_attn_bwd(query, key, value, out, out, lse, softmax_scale=0.5) == (query, key, value)
    with pytest.raises(RuntimeError, match="FlashAttention-4 does not run here: 'no such tile"):
        flash4._flash_attn_bwd(query, softmax_scale=0.5)


def test_the_forward_pass_can_be_measured_alone() -> None:
    both, alone = (
        measure_backends(batch_size=1, tokens=24, device=CPU, backward=backward, **SHAPE)["default"]
        for backward in (True, False)
    )
    assert both.backward > 10 * alone.backward and alone.forward > 0


def test_a_faster_package_is_named_on_hopper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hint_at_package(CPU) == ""
    for major, installed, expected in ((9, False, True), (9, True, False), (8, False, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, major=major: (major, 0))
        monkeypatch.setattr(attention_backends, "is_installed", lambda _backend, installed=installed: installed)
        assert ("cogtune[flash4]" in hint_at_package(CUDA)) == expected


@pytest.mark.skipif(not hasattr(torch_attention, "activate_flash_attention_impl"), reason="PyTorch older than 2.11")
def test_flash_attention_4_goes_through_our_hands_and_is_given_back() -> None:
    from torch.nn.attention import _fa4

    with activated("flash4"):
        assert torch_attention.current_flash_attention_impl() == flash4.IMPLEMENTATION
        assert _fa4._FA4_MODULE_PATH == "cogtune.flash4"
    assert torch_attention.current_flash_attention_impl() is None
