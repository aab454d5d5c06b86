"""Weights and AdamW on the host: the numbers of training on the device, clipping and bad steps included."""

from typing import Any

import pytest
import torch
from test_attention import make_inputs
from test_attention import make_transformer as make_random

from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.config import OptimizerSettings
from cogtune.execution import configure_blocks
from cogtune.formats.tensors import Spec
from cogtune.host_training import HostAdamW, HostStepGuard, HostWeights
from cogtune.optimization import StepGuard, make_optimizer
from cogtune.shards.parts import ParameterParts
from cogtune.streaming import updates

CPU = torch.device("cpu")
SETTINGS = OptimizerSettings(learning_rate=0.01, weight_decay=0.1)


def make(
    activations: Activations, *, on_host: bool, dtype: torch.dtype = torch.float32, offloaded: int = 0, updated: int = 0
) -> Any:
    transformer = make_random("tiny", None, torch.float32, num_layers=4).train()
    install_attention(transformer, "default")
    weights = HostWeights(transformer, dtype, CPU, num_updated=updated) if on_host else None
    configure_blocks(
        transformer,
        activations,
        compiled=False,
        has_dropout=False,
        num_offloaded=offloaded,
        gradients=None if weights is None else weights.gradients,
    )
    return transformer, weights


def backward(transformer: Any, seed: int) -> torch.Tensor:
    inputs = make_inputs(transformer, seed)
    loss = (transformer(**inputs, return_dict=False)[0].float() - inputs["hidden_states"].float()).square().mean()
    loss.backward()
    return loss.detach()


def train_on_device(steps: int, max_norm: float | None) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    transformer, _ = make("recompute", on_host=False)
    parameters = list(transformer.parameters())
    optimizer = make_optimizer(parameters, SETTINGS)
    guard = StepGuard(CPU, use_loss_scale=False, max_grad_norm=max_norm)
    seen = []
    for seed in range(steps):
        seen.append(backward(transformer, seed))
        seen.append(guard.apply(optimizer, parameters))
        optimizer.step()
        optimizer.zero_grad()
    return seen, {name: p.detach() for name, p in transformer.named_parameters()}


@pytest.mark.parametrize("max_norm, piece", [(0.05, updates.PIECE), (None, updates.PIECE), (0.05, 1000)])
@pytest.mark.parametrize(
    "activations, offloaded, updated",
    [("recompute", 0, 0), ("recompute", 0, 4), ("keep_attention", 4, 2), ("keep_all", 2, 3)],
)
def test_steps_equal_those_on_the_device(
    activations: Activations,
    offloaded: int,
    updated: int,
    max_norm: float | None,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(updates, "PIECE", piece)
    expected, final = train_on_device(4, max_norm)
    transformer, weights = make(activations, on_host=True, offloaded=offloaded, updated=updated)
    assert weights is not None and len(weights.updated) == updated
    optimizer = HostAdamW(weights, SETTINGS)
    guard = HostStepGuard(weights, optimizer, max_grad_norm=max_norm)
    seen = []
    for seed in range(4):
        seen.append(backward(transformer, seed))
        assert all(p.grad is None for p in transformer.transformer_blocks.parameters())
        seen.append(guard.apply(optimizer, []))
        optimizer.step()
        optimizer.zero_grad()
    assert not guard.has_failed()
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-5, atol=0)
    assert weights.parameters.keys() == final.keys()
    for name, value in final.items():
        torch.testing.assert_close(weights.parameters[name].detach(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("updated", [0, 3])
def test_the_device_computes_with_rounded_copies_of_the_new_weights(updated: int) -> None:
    transformer, weights = make("recompute", on_host=True, dtype=torch.bfloat16, updated=updated)
    assert weights is not None
    optimizer = HostAdamW(weights, SETTINGS)
    guard = HostStepGuard(weights, optimizer, max_grad_norm=1.0)
    before = {name: p.detach().clone() for name, p in weights.parameters.items()}
    losses = []
    for _ in range(6):
        losses.append(float(backward(transformer, 0)))
        guard.apply(optimizer, [])
        optimizer.step()
    assert losses[-1] < losses[0]
    optimizer.wait()
    for block in transformer.transformer_blocks:
        for name, parameter in block.named_parameters():
            assert parameter.dtype == torch.bfloat16, name
    names = [name for name, _ in transformer.named_parameters()]
    seen = {}
    for number, block in enumerate(transformer.transformer_blocks):
        seen |= {f"transformer_blocks.{number}.{name}": p.detach().clone() for name, p in block.named_parameters()}
    seen |= {name: p.detach() for name, p in transformer.named_parameters() if name not in seen}
    assert set(names) == set(seen)
    for name, weight in weights.parameters.items():
        assert weight.dtype == torch.float32 and torch.equal(weight.detach().bfloat16(), seen[name]), name
        assert not torch.equal(weight.detach(), before[name]), name


def test_after_bad_gradients_nothing_changes_any_more() -> None:
    transformer, weights = make("recompute", on_host=True)
    assert weights is not None
    optimizer = HostAdamW(weights, SETTINGS)
    guard = HostStepGuard(weights, optimizer, max_grad_norm=1.0)
    backward(transformer, 0)
    guard.apply(optimizer, [])
    optimizer.step()
    assert not guard.has_failed()
    good = {name: p.detach().clone() for name, p in weights.parameters.items()}
    for seed, factor in ((1, float("nan")), (2, 1.0)):
        inputs = make_inputs(transformer, seed)
        (transformer(**inputs, return_dict=False)[0].mean() * factor).backward()
        guard.apply(optimizer, [])
        optimizer.step()
        assert guard.has_failed()
    assert all(torch.equal(p.detach(), good[name]) for name, p in weights.parameters.items())


def test_weights_read_from_a_file_reach_the_device() -> None:
    transformer, weights = make("recompute", on_host=True)
    other, _ = make("recompute", on_host=False)
    assert weights is not None
    backward(transformer, 0)
    weights.gradients.finish()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(1.25)
            weights.parameters[name].copy_(parameter)
    weights.publish_all()
    assert torch.equal(backward(transformer, 3), backward(other, 3))


def test_state_that_is_read_stays_where_the_device_reads_it() -> None:
    """In page-locked memory: a resumed run's updates are as fast as before."""
    transformer, weights = make("recompute", on_host=True, updated=2)
    assert weights is not None and weights.updated == {1, 3}
    optimizer = HostAdamW(weights, SETTINGS)
    parts = ParameterParts(weights.parameters, optimizer)
    backward(transformer, 0)
    HostStepGuard(weights, optimizer, max_grad_norm=1.0).apply(optimizer, [])
    optimizer.step()
    optimizer.wait()
    state = parts.state()
    made = parts.make_state({name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()})
    moments = {id(tensor) for pair in weights.moments.values() for tensor in pair}
    there = {id(tensor) for entry in optimizer.state.values() for tensor in entry.values()}
    updated = [
        name for name in weights.parameters if name.startswith(("transformer_blocks.1.", "transformer_blocks.3."))
    ]
    assert len(moments) == 2 * len(updated) > 0
    assert moments <= there
    kept = [(buffer.bytes.data_ptr(), buffer.bytes.numel()) for buffer in weights.locked]
    tensors = [weights.parameters[name] for name in updated] + [t for pair in weights.moments.values() for t in pair]
    for tensor in tensors:  # a buffer that goes takes the lock from its pages
        assert any(first <= tensor.data_ptr() < first + size for first, size in kept)
    assert made.keys() == state.keys()


def test_pieces_go_across_a_block_s_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors cost no pieces of their own; all five ranges are laid out alike."""
    monkeypatch.setattr(updates, "PIECE", 1000)
    transformer, weights = make("recompute", on_host=True, dtype=torch.bfloat16, updated=1)
    (index,) = weights.updated
    with torch.no_grad():
        for parameter in weights.parts[index]:
            parameter.uniform_()
    weights.publish(index)
    backward(transformer, 0)
    weights.gradients.finish()
    pieces = weights.split(index)
    size = sum(len(piece[0]) for piece in pieces)
    own = sum(p.numel() for p in weights.parts[index])
    assert own <= size < own + 128 * len(weights.parts[index]) and len(pieces) == -(-size // 1000)
    whole = [torch.cat([piece[number] for piece in pieces]) for number in range(3)]
    gradients = weights.gradients.wait(index)
    assert all(gradient.any() for gradient in gradients)
    layout = weights.stream.flat[index].layout(list(transformer.transformer_blocks[index].parameters()))
    for flat, wanted in zip(whole, (weights.parts[index], gradients, weights.copies[index]), strict=True):
        for view, tensor in zip(layout.views(flat), wanted, strict=True):
            assert torch.equal(view, tensor)


@pytest.mark.parametrize("dtype, element_bytes", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_room_for_pieces_is_what_the_plan_counts(
    dtype: torch.dtype, element_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "PIECE", 1000)
    rooms = [room for slot in updates.StreamedUpdates(CPU, dtype)._slots for room in (*slot.rooms, slot.scaled)]
    assert sum(room.nbytes for room in rooms) == updates.count_staging_bytes(element_bytes)
