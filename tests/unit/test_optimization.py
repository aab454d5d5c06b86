"""Learning rates against their definition; the step guard against torch's own clipping and plain AdamW."""

import math

import pytest
import torch

from cogtune.config import OptimizerSettings, ScheduleSettings
from cogtune.optimization import (
    FIRST_LOSS_SCALE,
    MAX_OVERFLOWS_IN_A_ROW,
    SCALE_GROWTH_STEPS,
    StepGuard,
    group_parameters,
    learning_rate_at,
    make_optimizer,
    set_learning_rate,
)

CPU = torch.device("cpu")


def reference_rate(step: int, total: int, peak: float, name: str, warmup: int, ratio: float) -> float:
    """Piecewise: a line through zero, then the shape from the peak to ratio * peak at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    low = ratio * peak
    shapes = {
        "constant": peak,
        "linear": peak + (low - peak) * done,
        "cosine": (peak + low) / 2 + (peak - low) / 2 * math.cos(math.pi * done),
    }
    return shapes[name]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup, ratio", [(0, 0.0), (10, 0.0), (7, 0.1)])
def test_learning_rate_shapes(name: str, warmup: int, ratio: float) -> None:
    schedule = ScheduleSettings(name=name, warmup_steps=warmup, final_ratio=ratio)
    for step in range(100):
        expected = reference_rate(step, 100, 3e-4, name, warmup, ratio)
        assert learning_rate_at(step, 100, 3e-4, schedule) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_learning_rate_never_wastes_a_step() -> None:
    rates = [learning_rate_at(step, 50, 1.0, ScheduleSettings(warmup_steps=5)) for step in range(50)]
    assert min(rates) > 0, "neither the first nor the last step has a rate of zero"
    assert max(rates) == 1.0 and rates.index(1.0) == 4


def test_warmup_of_its_own_is_a_tenth_of_a_short_run_and_a_given_one_is_kept() -> None:
    unset = ScheduleSettings(name="constant")
    assert [learning_rate_at(step, 20, 1.0, unset) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate_at(49, 5000, 1.0, unset) == 0.5
    given = ScheduleSettings(name="constant", warmup_steps=10)
    assert learning_rate_at(4, 20, 1.0, given) == 0.5


def make_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (7,), (2, 2, 2)]]


def set_gradients(parameters: list[torch.nn.Parameter], seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * factor


def spoil(parameters: list[torch.nn.Parameter], value: float = math.inf) -> None:
    gradient = parameters[1].grad
    assert gradient is not None
    gradient[3] = value


def values(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_lora_plus_trains_the_up_matrices_at_their_own_rate() -> None:
    """Equal to two optimizers of their own, through a warm-up and a decay."""
    settings = OptimizerSettings(learning_rate=0.01, weight_decay=0.1, lora_plus_ratio=16.0)
    names = ["to_q.lora_A.default.weight", "to_q.lora_B.default.weight", "to_q.lora_magnitude_vector.default.weight"]
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_optimizer(group_parameters(dict(zip(names, ours, strict=True)), settings), settings)
    others = [make_optimizer(part, settings) for part in ([theirs[0], theirs[2]], [theirs[1]])]
    for seed, rate in enumerate((0.005, 0.01, 0.004)):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        set_learning_rate(optimizer, rate)
        assert optimizer.param_groups[0]["lr"] == rate  # what the metrics show
        optimizer.step()
        for other, ratio in zip(others, (1.0, 16.0), strict=True):
            set_learning_rate(other, ratio * rate)
            other.step()
    assert equal(values(ours), values(theirs))


@pytest.mark.parametrize("max_norm", [0.5, 1000.0, None])
@pytest.mark.parametrize("use_loss_scale", [False, True])
def test_guarded_steps_equal_torch_clipping_and_adamw(max_norm: float | None, use_loss_scale: bool) -> None:
    settings = OptimizerSettings(learning_rate=0.01, weight_decay=0.1)
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_optimizer(ours, settings)
    reference = torch.optim.AdamW(
        theirs, lr=0.01, betas=settings.betas, eps=settings.eps, weight_decay=0.1, foreach=False
    )
    guard = StepGuard(CPU, use_loss_scale=use_loss_scale, max_grad_norm=max_norm)
    for seed in range(5):
        set_gradients(ours, seed, factor=guard.scale.item())
        set_gradients(theirs, seed)
        norm = guard.apply(optimizer, ours)
        optimizer.step()
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm if max_norm is not None else math.inf)
        reference.step()
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not guard.has_failed() and guard.num_skipped == 0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_after_non_finite_gradients_no_step_changes_anything(value: float) -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, OptimizerSettings(learning_rate=0.1))
    guard = StepGuard(CPU, use_loss_scale=False, max_grad_norm=1.0)
    set_gradients(parameters, 0)
    guard.apply(optimizer, parameters)
    optimizer.step()
    assert not guard.has_failed()
    good = values(parameters)
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    for seed in range(1, 4):
        set_gradients(parameters, seed)
        if seed == 1:
            spoil(parameters, value)
        guard.apply(optimizer, parameters)
        optimizer.step()
        assert guard.has_failed() and equal(values(parameters), good)
    for parameter, before in zip(parameters, state, strict=True):
        for key, tensor in before.items():
            assert torch.equal(optimizer.state[parameter][key], tensor), key


def test_an_overflow_skips_its_step_and_halves_the_scale() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, OptimizerSettings(learning_rate=0.1))
    guard = StepGuard(CPU, use_loss_scale=True, max_grad_norm=None)
    assert guard.scale.item() == FIRST_LOSS_SCALE
    before = values(parameters)
    set_gradients(parameters, 0, FIRST_LOSS_SCALE)
    spoil(parameters)
    guard.apply(optimizer, parameters)
    optimizer.step()
    assert equal(values(parameters), before)
    assert guard.scale.item() == FIRST_LOSS_SCALE / 2 and guard.num_skipped == 1 and not guard.has_failed()
    set_gradients(parameters, 1, guard.scale.item())
    guard.apply(optimizer, parameters)
    optimizer.step()
    assert not equal(values(parameters), before), "the next step counts again"


def test_the_scale_doubles_after_a_run_of_good_steps() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, OptimizerSettings())
    guard = StepGuard(CPU, use_loss_scale=True, max_grad_norm=None)
    guard.load({"scale": 8.0, "good": SCALE_GROWTH_STEPS - 2.0, "skipped": 0.0})
    scales = []
    for seed in range(4):
        set_gradients(parameters, seed)
        guard.apply(optimizer, parameters)
        scales.append(guard.scale.item())
    assert scales == [8.0, 16.0, 16.0, 16.0]


def test_only_a_run_of_overflows_is_fatal() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, OptimizerSettings())
    guard = StepGuard(CPU, use_loss_scale=True, max_grad_norm=None)

    def overflow(times: int) -> None:
        for _ in range(times):
            set_gradients(parameters, 0)
            spoil(parameters)
            guard.apply(optimizer, parameters)

    overflow(MAX_OVERFLOWS_IN_A_ROW - 1)
    set_gradients(parameters, 1)
    guard.apply(optimizer, parameters)
    overflow(MAX_OVERFLOWS_IN_A_ROW - 1)
    assert not guard.has_failed()
    overflow(1)
    assert guard.has_failed() and guard.num_skipped == 2 * MAX_OVERFLOWS_IN_A_ROW - 1


def test_guard_state_survives_a_checkpoint() -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, OptimizerSettings())
    guard = StepGuard(CPU, use_loss_scale=True, max_grad_norm=None)
    for seed, bad in enumerate([False, True, False, False]):
        set_gradients(parameters, seed)
        if bad:
            spoil(parameters)
        guard.apply(optimizer, parameters)
    other = StepGuard(CPU, use_loss_scale=True, max_grad_norm=None)
    other.load(guard.state())
    assert other.state() == guard.state() == {"scale": FIRST_LOSS_SCALE / 2, "good": 2.0, "skipped": 1.0}
