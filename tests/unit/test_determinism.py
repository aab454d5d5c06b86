"""`train.deterministic`: what is turned on and off, which attention kernels are left, what a plan counts for it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from cogtune.attention_backends import Backend, BackendTiming, check_backend, measure_backends, pick_backend
from cogtune.config import RunConfig
from cogtune.determinism import follow_determinism
from cogtune.errors import UserError
from cogtune.machine import NOMINAL, sum_in_order
from cogtune.memory import GIB, MemoryPlan, activation_bytes, units_of_partial_sums
from cogtune.random_pipeline import make_architecture_facts
from cogtune.training_rungs import list_training_rungs

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"num_heads": 2, "head_dim": 16, "dtype": torch.float32}
FACTS = make_architecture_facts("cogvideox-5b")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    follow_determinism(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_a_process_follows_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    follow_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    follow_determinism(True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert getattr(inductor, "deterministic", True)
    follow_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled() and not getattr(inductor, "deterministic", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    follow_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own stays"


class RestlessGradient(torch.autograd.Function):
    """The identity, whose gradient is another one each time, in a last bit."""

    calls = 0

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        RestlessGradient.calls += 1
        return grad * (1 + 1e-6 * RestlessGradient.calls)


def test_kernels_without_an_order_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: dict[str, Any] = {"batch_size": 1, "tokens": 24, "device": CPU, **SHAPE}
    follow_determinism(True)
    assert list(measure_backends(**layer)) == ["default"], "it repeats itself"
    attend = torch.nn.functional.scaled_dot_product_attention

    def restless(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        return attend(RestlessGradient.apply(query), *rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", restless)
    assert measure_backends(**layer) == {}
    assert list(measure_backends(backward=False, **layer)) == ["default"], "sampling takes no gradient"
    follow_determinism(False)
    assert list(measure_backends(**layer)) == ["default"]
    assert RestlessGradient.calls > 4


def test_a_kernel_that_was_asked_for_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogtune.attention_backends.measure_backends", lambda **_: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "New Card")
    follow_determinism(True)
    message = r"train\.attention=cudnn: does not run on New Card, or sums in no fixed order there, and train\.determin"
    with pytest.raises(UserError, match=message):
        check_backend("cudnn", device=torch.device("cuda"), **SHAPE)
    assert pick_backend("auto", batch_size=1, tokens=24, device=CPU, **SHAPE) == ("default", {})


def test_the_kernel_that_a_run_began_with_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timings: dict[Backend, BackendTiming] = {"flash": BackendTiming(1.0, 1.0), "efficient": BackendTiming(9.0, 9.0)}
    monkeypatch.setattr("cogtune.attention_backends.measure_backends", lambda **_: timings)
    layer: dict[str, Any] = {"batch_size": 1, "tokens": 24, "device": torch.device("cuda"), **SHAPE}
    assert pick_backend("auto", **layer)[0] == "flash"
    assert pick_backend("auto", before="efficient", **layer)[0] == "efficient"
    assert pick_backend("auto", before="cudnn", **layer)[0] == "flash", "it doesn't run here any more"
    assert pick_backend("flash", before="efficient", **layer)[0] == "flash", "what the user asks for"
    assert pick_backend("auto", before="flash", **(layer | {"device": CPU}))[0] == "default"


def rungs(*, free: int | None = 130 * GIB, **train: Any) -> dict[str, MemoryPlan]:
    """What a LoRA of 5B may keep with everything on the device, by way."""
    found = list_training_rungs(
        FACTS, RunConfig.model_validate({"train": train}), dtype=torch.bfloat16, machine=NOMINAL, tokens=17776,
        free_bytes=free, num_parameters=5_570_000_000, num_trainable=66_000_000,
    )  # fmt: skip
    return {
        rung.activations: rung
        for rung in found
        if rung.num_resident is None and not rung.num_offloaded and not rung.num_lean
    }


def test_a_plan_counts_the_partial_sums_and_the_slower_kernel() -> None:
    """5B has 48 heads: 132 multiprocessors sum a query's gradient in three parts, two more than one."""
    assert [units_of_partial_sums(heads, 132) for heads in (48, 96, 132, 400)] == [4.0, 2.0, 0.0, 0.0]
    unit = activation_bytes(FACTS, 17776, 1, torch.bfloat16)
    plain, ordered = rungs(), rungs(deterministic=True)
    assert plain.keys() == ordered.keys() and len(plain) == 4
    for way, rung in ordered.items():
        assert rung.workspace - plain[way].workspace == pytest.approx(4 * unit, abs=2)
        # 42 layers' attention: 31 ms by cuDNN, 80 in one order, measured; twice forward where it is made again.
        more = 42 * 1.17 * (0.0797 - 0.0312 + (0.0033 if way == "recompute" else 0.0))
        assert rung.seconds - plain[way].seconds == pytest.approx(more, rel=0.03)
    on_cpu = rungs(free=None, deterministic=True)
    assert on_cpu["keep_all"].total == rungs(free=None)["keep_all"].total, "a CPU's sums have their order"
    assert sum_in_order(NOMINAL).flops == NOMINAL.flops
