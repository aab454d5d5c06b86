"""Trained blocks that come and go: the same weights and state bit for bit, what goes back when, and checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attention import make_inputs, make_transformer

from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.checkpoint import CheckpointFolder
from cogtune.config import OptimizerSettings
from cogtune.eight_bit_adamw import EightBitAdamW, EightBitGuard, is_quantized, make_state
from cogtune.execution import configure_blocks
from cogtune.formats.tensors import hold
from cogtune.saving import DeviceStore
from cogtune.shards.ranks import Ranks
from cogtune.shards.saver import ShardedSaver, ShardedState
from cogtune.shards.writer import CheckpointWriter
from cogtune.streaming.blocks import stream_blocks
from cogtune.streaming.trained import TrainedStream, find_trained_stream, stream_trained_blocks

CPU = torch.device("cpu")
LAYERS = 5


class Training:
    """A small transformer whose weights are all trained, with 8-bit state."""

    def __init__(
        self,
        resident: int | None = None,
        *,
        slots: int = 2,
        activations: Activations = "recompute",
        offloaded: int = 0,
        compiler: str | None = None,
        seed: int = 0,
    ) -> None:
        """`resident`: how many blocks stay; None: all, without a stream."""
        self.transformer: Any = make_transformer("tiny", None, torch.bfloat16, num_layers=LAYERS).train()
        if seed:
            with torch.no_grad():
                for parameter in self.transformer.parameters():
                    parameter.zero_()
        install_attention(self.transformer, "default")
        self.stream: TrainedStream | None = None
        if resident is not None:
            self.stream = stream_trained_blocks(
                self.transformer,
                "transformer_blocks",
                CPU,
                num_resident=resident,
                make_state=make_state,
                num_slots=slots,
            )
        configure_blocks(
            self.transformer,
            activations,
            compiled=compiler is not None,
            has_dropout=False,
            compiler=compiler or "inductor",
            num_offloaded=offloaded,
        )
        self.parameters = dict(self.transformer.named_parameters())
        settings = OptimizerSettings(learning_rate=3e-2, weight_decay=0.1)
        state = None if self.stream is None else self.stream.state
        self.optimizer = EightBitAdamW(list(self.parameters.values()), settings, seed=5, state=state)
        self.guard = EightBitGuard(self.optimizer)
        self.store = DeviceStore(self.parameters, self.optimizer, stream=self.stream)

    def step(self, seed: int) -> float:
        inputs = make_inputs(self.transformer, seed)
        output = self.transformer(**inputs, return_dict=False)[0]
        loss = (output.float() - inputs["hidden_states"].float()).square().mean()
        loss.backward()
        self.guard.apply(self.optimizer, [])
        self.optimizer.step()
        return loss.item()

    def result(self) -> dict[str, torch.Tensor]:
        """Weights and state, as they would be saved."""
        found = {**self.store.read_weights(), **self.store.read_optimizer()}
        return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("activations", ["recompute", "keep_attention", "keep_products", "keep_all"])
@pytest.mark.parametrize("resident, slots, offloaded", [(0, 1, 0), (0, 2, 3), (2, 2, 0), (3, 1, 5), (5, 2, 0)])
def test_weights_and_state_are_those_of_blocks_that_stay(
    activations: Activations, resident: int, slots: int, offloaded: int
) -> None:
    """Three steps, with a look without gradients after each."""
    plain = Training(activations=activations)
    streamed = Training(resident, slots=slots, activations=activations, offloaded=offloaded)
    before = plain.result()
    for seed in (1, 2, 3):
        assert streamed.step(seed) == plain.step(seed)
        with torch.no_grad():
            outputs = [
                each.transformer(**make_inputs(each.transformer, seed), return_dict=False)[0]
                for each in (streamed, plain)
            ]
        assert torch.equal(*outputs)
    after = plain.result()
    assert_same(streamed.result(), after)
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert len(changed) > 0.9 * len(before), "all learn"
    assert any(is_quantized(p) for p in plain.parameters.values())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_blocks_share_one_graph(compiler: str) -> None:
    torch._dynamo.reset()
    plain = Training(activations="keep_products", compiler=compiler)
    expected = [plain.step(seed) for seed in (1, 2, 3)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    streamed = Training(1, activations="keep_products", offloaded=2, compiler=compiler)
    losses = [streamed.step(1)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        losses += [streamed.step(seed) for seed in (2, 3)]
    assert losses == expected
    assert_same(streamed.result(), plain.result())
    torch._dynamo.reset()


def test_what_is_streamed_has_no_memory_between_steps_and_no_more_than_the_slots_in_them() -> None:
    training = Training(2)
    stream = training.stream
    assert stream is not None
    most = 0
    enter = stream.enter

    def watch(*arguments: Any) -> None:
        nonlocal most
        enter(*arguments)
        most = max(most, len(stream.loaded()), len(stream._states.loaded()))

    stream.enter = watch  # type: ignore[method-assign]
    training.step(1)
    assert most == 4, "two that stay and two that come"
    for index, block in enumerate(training.transformer.transformer_blocks.children()):
        for parameter in block.parameters():
            assert (parameter.untyped_storage().nbytes() > 0) == (index in stream.loaded())
            for tensor in training.optimizer.state[parameter].values():
                assert (tensor.untyped_storage().nbytes() > 0) == (index in stream._states.loaded())
    resident = set(range(LAYERS)) - set(stream._streamed)
    assert set(stream.loaded()) == resident | set(stream._streamed[:2]), "for the next forward pass"
    assert set(stream._states.loaded()) == resident | set(stream._streamed[-2:]), "for the next backward pass"


def test_state_comes_for_the_backward_pass_alone_and_goes_back_once() -> None:
    training = Training(0)
    stream = training.stream
    assert stream is not None
    events: list[tuple[str, int]] = []

    def note(act: Callable[[], None], event: tuple[str, int]) -> None:
        events.append(event)
        act()

    for kind, part in (("weights", stream), ("state", stream._states)):
        for index, flat in enumerate(part.flat):
            for name in ("load", "store"):
                setattr(flat, name, partial(note, getattr(flat, name), (f"{name} {kind}", index)))
    training.step(1)
    events.clear()
    training.step(2)
    found = {kind: [index for other, index in events if other == kind] for kind, _ in events}
    assert found["load weights"] == [2, 3, 4, 2, 1, 0]
    assert found["load state"] == [2, 1, 0, 4, 3], "the last two came at the end of the step before"
    assert found["store weights"] == found["store state"] == [4, 3, 2, 1, 0]
    for index in (0, 1, 2):
        for kind in ("weights", "state"):
            after = events[events.index((f"store {kind}", index + 2)) :]
            assert (f"load {kind}", index) in after, "what leaves the slot goes back first"


def test_blocks_that_stay_go_back_when_somebody_asks() -> None:
    training = Training(5)
    stream = training.stream
    assert stream is not None
    weight = next(iter(training.transformer.transformer_blocks.children())).attn1.to_q.weight
    before = stream.on_host(weight).clone()
    training.step(1)
    assert torch.equal(stream.on_host(weight), before) and not torch.equal(weight, before)
    stream.store()
    assert torch.equal(stream.on_host(weight), weight)


@pytest.mark.parametrize("resident", [0, 2, 5])
def test_memory_that_others_want_is_given_back_without_loss(resident: int) -> None:
    """Validation lets all blocks go; training goes on as if it had not."""
    plain, streamed = Training(), Training(resident)
    for seed in (1, 2):
        assert streamed.step(seed) == plain.step(seed)
        assert streamed.stream is not None
        streamed.stream.release()
        assert streamed.stream.loaded() == streamed.stream._states.loaded() == []
    assert_same(streamed.result(), plain.result())


@pytest.mark.parametrize("first, second", [(None, 0), (0, None), (1, 4), (5, 0)])
def test_a_checkpoint_is_the_same_wherever_blocks_are(first: int | None, second: int | None, tmp_path: Path) -> None:
    """Saved in shards by one way, resumed by another: the same steps after it."""

    def make_saver(training: Training) -> ShardedSaver:
        state = ShardedState(training.store.parts, None, Ranks())
        folder = CheckpointFolder(tmp_path, keep_last=1)
        return ShardedSaver(state, CheckpointWriter(folder, Ranks(), asynchronous=False))

    training = Training(first)
    training.step(1)
    training.step(2)
    make_saver(training).save(2, {})
    guard = training.guard.state()
    expected = [training.step(3), training.step(4)]
    resumed = Training(second, seed=1)
    resumed.step(9)  # blocks are on the device, and out of date afterwards
    make_saver(resumed).load(tmp_path / "step-000002")
    resumed.guard.load(guard)
    assert [resumed.step(3), resumed.step(4)] == expected
    assert_same(resumed.result(), training.result())


def test_whole_weights_and_state_are_put_back() -> None:
    """As the files of one process are."""
    training = Training(1)
    training.step(1)
    saved = {"weights": training.store.read_weights(), "state": training.store.read_optimizer()}
    held = {key: hold(key, {name: t.clone() for name, t in tensors.items()}) for key, tensors in saved.items()}
    guard, expected = training.guard.state(), training.step(2)
    other = Training(3, seed=1)
    other.store.write_weights(held["weights"])
    other.store.write_optimizer(held["state"])
    other.guard.load(guard)
    assert other.step(2) == expected


def test_the_largest_moments_are_found_while_blocks_are_away() -> None:
    plain, streamed = Training(), Training(0)
    assert streamed.step(1) == plain.step(1)
    expected, found = plain.store.largest_moments(), streamed.store.largest_moments()
    assert found.keys() == expected.keys() == plain.parameters.keys()
    assert all(torch.equal(found[name].float(), expected[name].float()) and found[name] > 0 for name in found)


def test_only_a_stream_of_trained_blocks_is_found() -> None:
    assert find_trained_stream(Training().transformer) is None
    assert find_trained_stream(Training(0).transformer) is not None
    frozen = make_transformer("tiny", None, torch.float32, num_layers=2).requires_grad_(False)
    stream_blocks(frozen, "transformer_blocks", CPU, num_resident=0)
    assert find_trained_stream(frozen) is None
