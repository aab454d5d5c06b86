"""AdamW inside the backward pass: against float32 AdamW, exact resume, bad gradients, blocks compiled or recomputed."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attention import make_inputs
from test_attention import make_transformer as make_random
from torch import nn

from cogtune import eight_bit_adamw
from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.config import OptimizerSettings
from cogtune.eight_bit import BLOCK
from cogtune.eight_bit_adamw import EightBitAdamW, EightBitGuard, is_quantized
from cogtune.execution import configure_blocks
from cogtune.formats.tensors import hold
from cogtune.optimization import make_optimizer
from cogtune.saving import DeviceStore

SETTINGS = OptimizerSettings(learning_rate=3e-3, weight_decay=0.01)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 32))


def make_problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 32, generator=generator)
    weights = torch.randn(32, 32, generator=generator) / 32**0.5
    return inputs, (inputs @ weights).sin()


def find_loss(model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    inputs, targets = make_problem()
    dtype = next(model.parameters()).dtype
    return (model(inputs[rows].to(dtype)).float() - targets[rows]).square().mean()


def take_steps(model: nn.Module, optimizer: Any, guard: Any, steps: range) -> list[torch.Tensor]:
    norms = []
    for step in steps:
        find_loss(model, slice(64 * (step % 8), 64 * (step % 8 + 1))).backward()
        assert all(p.grad is None for p in model.parameters())
        norms.append(guard.apply(optimizer, []))
        optimizer.step()
    return norms


def make_8bit(model: nn.Module, settings: OptimizerSettings = SETTINGS) -> tuple[EightBitAdamW, EightBitGuard]:
    optimizer = EightBitAdamW(list(model.parameters()), settings, seed=5)
    return optimizer, EightBitGuard(optimizer)


def test_it_learns_like_float32_adamw() -> None:
    """A regression of 300 steps: the losses end within 15 % of each other, at a fiftieth of the first one."""
    reference, model = make_model(), make_model().bfloat16()
    exact = make_optimizer(list(reference.parameters()), SETTINGS)
    first = find_loss(reference).item()
    for step in range(300):
        find_loss(reference, slice(64 * (step % 8), 64 * (step % 8 + 1))).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        exact.step()
        exact.zero_grad()
    optimizer, guard = make_8bit(model)
    take_steps(model, optimizer, guard, range(300))
    expected, found = find_loss(reference).item(), find_loss(model).item()
    assert expected < first / 50
    assert found == pytest.approx(expected, rel=0.15)


def test_without_rounding_a_step_is_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 8 bits to the left of the point would hide an error in the arithmetic: float32 in and out here."""
    monkeypatch.setattr(eight_bit_adamw, "round_stochastically", lambda x, _bits: x)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.ones(1000, dtype=torch.float32) for _ in range(2))
    parameter = nn.Parameter(theirs)
    reference = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mean, square = torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 6):
        gradient = torch.randn(1000, generator=generator)
        parameter.grad = gradient.clone() * 0.5
        reference.step()
        numbers = [1.0, 0.5, 0.9, 0.95, 1 - 0.01 * 0.1, 0.01 / (1 - 0.9**step), (1 - 0.95**step) ** -0.5, 1e-8]
        bits = torch.zeros(1000, dtype=torch.int16)
        eight_bit_adamw._adamw(ours, gradient, mean, square, bits, [torch.tensor(n) for n in numbers])
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_the_state_is_8_bits_but_for_small_tensors() -> None:
    model = make_model().bfloat16()
    optimizer, guard = make_8bit(model)
    take_steps(model, optimizer, guard, range(1))
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if name in ("0.weight", "3.weight"):
            assert is_quantized(parameter)
            num_bytes = sum(t.numel() * t.element_size() for t in state.values())
            assert num_bytes == parameter.numel() * 2 * (1 + 4 / BLOCK)
        else:
            assert [t.dtype for t in state.values()] == [torch.float32] * 2, name


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the random bits of weights, which later steps' moments see: one step, moments only."""
    found = []
    for chunk in (1 << 22, 1024):
        monkeypatch.setattr(eight_bit_adamw, "CHUNK", chunk)
        model = make_model().bfloat16()
        optimizer, guard = make_8bit(model, OptimizerSettings(max_grad_norm=None))
        take_steps(model, optimizer, guard, range(1))
        found.append([t.clone() for p in model.parameters() for t in optimizer.state[p].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_resuming_is_exact_bit_for_bit() -> None:
    straight = make_model().bfloat16()
    optimizer, guard = make_8bit(straight)
    take_steps(straight, optimizer, guard, range(5))
    state = DeviceStore(dict(straight.named_parameters()), optimizer).read_optimizer()
    saved = hold("saved", {name: tensor.clone() for name, tensor in state.items()})
    kept, weights = guard.state(), {k: v.clone() for k, v in straight.state_dict().items()}
    expected = take_steps(straight, optimizer, guard, range(5, 9))

    resumed = make_model(3).bfloat16()
    resumed.load_state_dict(weights)
    optimizer, guard = make_8bit(resumed)
    DeviceStore(dict(resumed.named_parameters()), optimizer).write_optimizer(saved)
    guard.load(kept)
    assert torch.equal(torch.stack(take_steps(resumed, optimizer, guard, range(5, 9))), torch.stack(expected))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.num_steps == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_after_bad_gradients_nothing_changes_any_more(value: float) -> None:
    model = make_model().bfloat16()
    optimizer, guard = make_8bit(model)
    take_steps(model, optimizer, guard, range(2))
    assert not guard.has_failed()
    good = [p.detach().clone() for p in model.parameters()]
    state = [t.clone() for p in model.parameters() for t in optimizer.state[p].values()]
    for factor in (value, 1.0):
        (find_loss(model) * factor).backward()
        guard.apply(optimizer, [])
        optimizer.step()
        assert guard.has_failed()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), good, strict=True))
    after = [t for p in model.parameters() for t in optimizer.state[p].values()]
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_one_bad_gradient_stops_its_weight_and_all_that_come_after_it() -> None:
    weights = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = EightBitAdamW(weights, OptimizerSettings(learning_rate=0.1), seed=0)
    guard = EightBitGuard(optimizer)
    for weight, factor in zip(weights, (1.0, float("inf"), 1.0), strict=True):
        (weight.sum() * factor).backward()
    norm = guard.apply(optimizer, [])
    optimizer.step()
    assert guard.has_failed() and not norm.isfinite()
    assert [bool((weight != 1).all()) for weight in weights] == [True, False, False]
    assert all((weight == 1).all() for weight in weights[1:])


def test_gradients_are_clipped_by_recent_norms_and_by_the_step_itself() -> None:
    """Seen in the first moment: a tenth of what a gradient was scaled to, from zero."""
    first, second = (nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = EightBitAdamW([first, second], OptimizerSettings(max_grad_norm=1.0), seed=0)
    guard = EightBitGuard(optimizer)

    def step(*sizes: float) -> list[float]:
        """The norm of a step with these gradients, one after the other, and the factors that they got."""
        factors = []
        for parameter, size in zip((first, second), sizes, strict=True):
            optimizer.state.pop(parameter, None)
            (parameter * size).backward()
            factors.append(optimizer.state[parameter]["exp_avg"].item() / (0.1 * size))
        norm = guard.apply(optimizer, [])
        optimizer.step()
        return [norm.item(), *factors]

    assert step(0.25, 0.5) == pytest.approx([0.3125**0.5, 1.0, 1.0])
    norm, *factors = step(32.0, 32.0)
    assert [norm, *factors] == pytest.approx([32 * 2**0.5, 1 / 32, 1 / (32 * 2**0.5)], rel=1e-5)
    assert step(0.25, 0.5) == pytest.approx([0.3125**0.5, 1.0, 1.0]), "a spike hardly holds back the step after it"
    optimizer.log_norm = torch.tensor(4.0).log()
    assert step(1.0, 1.0) == pytest.approx([2**0.5, 0.25, 0.25], rel=1e-5)


def test_a_compiled_step_is_made_once_for_all_sizes() -> None:
    torch._dynamo.reset()
    sizes = [(64, 64), (16, 1024), (96, 256), (80,), (300,), (2048, 24)]
    found = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(size, generator=generator).bfloat16()) for size in sizes]
        optimizer = EightBitAdamW(parameters, SETTINGS, seed=0, compiled=compiled, compiler="aot_eager")
        guard = EightBitGuard(optimizer)
        with torch._dynamo.config.patch(error_on_recompile=compiled):
            for _ in range(3):
                torch.stack([p.float().sin().sum() for p in parameters]).sum().backward()
                guard.apply(optimizer, [])
                optimizer.step()
        found.append(parameters)
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)


def train_blocks(make_hooks: Callable[[Any], Any], activations: Activations, *, compiled: bool, offloaded: int) -> Any:
    transformer = make_random("tiny", None, torch.float32, num_layers=3).bfloat16().train().requires_grad_(True)
    install_attention(transformer, "default")
    configure_blocks(
        transformer,
        activations,
        compiled=compiled,
        has_dropout=False,
        compiler="aot_eager",
        num_offloaded=offloaded,
    )
    collected = make_hooks(transformer)
    inputs = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in make_inputs(transformer, 0).items()
        if k != "image_rotary_emb"
    }
    rotary = make_inputs(transformer, 0).get("image_rotary_emb")
    inputs |= {"image_rotary_emb": rotary}
    loss = (transformer(**inputs, return_dict=False)[0].float() - inputs["hidden_states"].float()).square().mean()
    loss.backward()
    return transformer, collected


@pytest.mark.parametrize("activations", ["recompute", "keep_attention", "keep_products", "keep_all"])
@pytest.mark.parametrize("compiled, offloaded", [(False, 0), (True, 0), (False, 2)])
def test_weights_change_while_the_backward_pass_goes_on_and_gradients_are_the_same(
    activations: Activations, compiled: bool, offloaded: int
) -> None:
    torch._dynamo.reset()

    def step_inside(transformer: Any) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        for name, parameter in transformer.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.__setitem__(name, p.grad.detach().clone())
            )
        optimizer = EightBitAdamW(list(transformer.parameters()), OptimizerSettings(learning_rate=0.5), seed=0)
        before.update({name: p.detach().clone() for name, p in transformer.named_parameters()})
        seen["optimizer"] = optimizer  # pyright: ignore[reportArgumentType]
        return seen

    before: dict[str, torch.Tensor] = {}
    plain, _ = train_blocks(lambda _model: None, activations, compiled=compiled, offloaded=offloaded)
    stepping, seen = train_blocks(step_inside, activations, compiled=compiled, offloaded=offloaded)
    for name, parameter in plain.named_parameters():
        assert torch.equal(seen[name], parameter.grad), name
    for name, parameter in stepping.named_parameters():
        assert parameter.grad is None
        assert not torch.equal(parameter, before[name]) or not seen[name].any(), name


def test_weights_and_state_are_gone_with_their_optimizer() -> None:
    """Python can't free a cycle through a tensor's hook, so there must be none."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = EightBitAdamW([weight], OptimizerSettings(), seed=0)
    weight.sum().backward()
    left = weakref.ref(optimizer), weakref.ref(weight)
    del optimizer, weight
    gc.collect()
    assert [each() for each in left] == [None, None]


def test_training_without_the_optimizer_fails() -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    EightBitAdamW([weight], OptimizerSettings(), seed=0)
    gc.collect()
    with pytest.raises(AssertionError, match="optimizer is gone"):
        weight.sum().backward()
