"""The ring of streamed blocks: order, slots, what shares memory, and that a model is never there as a whole."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cogtune.streaming.blocks import (
    BlockStream,
    FlatBlock,
    Order,
    StreamedBlocks,
    choose_streamed,
    find_stream,
    frozen_tensors,
    stream_blocks,
    visit,
)

CPU = torch.device("cpu")


def make_blocks(count: int) -> list[nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    blocks = [nn.Linear(4, 4).requires_grad_(False) for _ in range(count)]
    for block in blocks:
        block.weight.copy_(torch.randn(4, 4, generator=generator))
    return blocks


class Recorder:
    """Which blocks are loaded, in order."""

    def __init__(self, stream: BlockStream) -> None:
        self.loads: list[int] = []
        for index, flat in enumerate(stream.flat):
            flat.load = self._wrap(index, flat.load)  # type: ignore[method-assign]

    def _wrap(self, index: int, load: Callable[[], None]) -> Callable[[], None]:
        def note() -> None:
            self.loads.append(index)
            load()

        return note

    def take(self) -> list[int]:
        taken, self.loads = self.loads, []
        return taken


def walk(stream: BlockStream, indices: list[int], order: Order, most: int) -> None:
    for index in indices:
        stream.enter(index, order)
        assert index in stream.loaded() and len(stream.loaded()) <= most
        stream.leave(index, order)
        assert len(stream.loaded()) <= most


@pytest.mark.parametrize("slots", [1, 2, 3, 6, 9])
def test_training_turns_around_at_both_ends_without_loading_twice(slots: int) -> None:
    """Of 6 blocks, those in the ring at the end of a pass are the first that the next one needs."""
    stream = BlockStream(make_blocks(6), CPU, num_resident=0, num_slots=slots)
    recorder = Recorder(stream)
    walk(stream, [0, 1, 2, 3, 4, 5], "training forward", slots)
    assert recorder.take() == [0, 1, 2, 3, 4, 5]
    walk(stream, [5, 4, 3, 2, 1, 0], "training backward", slots)
    assert recorder.take() == [5, 4, 3, 2, 1, 0][slots:]
    walk(stream, [0, 1, 2, 3, 4, 5], "training forward", slots)
    assert recorder.take() == [0, 1, 2, 3, 4, 5][slots:]


def test_inference_goes_round() -> None:
    stream = BlockStream(make_blocks(4), CPU, num_resident=0)
    recorder = Recorder(stream)
    walk(stream, [0, 1, 2, 3] * 2, "inference", 2)
    assert recorder.take() == [0, 1, 2, 3] * 2 + [0, 1], "ahead, over the end of a step too"


def test_the_next_block_is_asked_for_before_the_last_one_is_done() -> None:
    stream = BlockStream(make_blocks(6), CPU, num_resident=0, num_slots=3)
    stream.enter(0, "training forward")
    assert stream.loaded() == [0]
    stream.leave(0, "training forward")
    stream.enter(1, "training forward")
    assert stream.loaded() == [1, 2, 3]


def test_a_block_in_use_is_never_released() -> None:
    """Whatever order was announced: here the blocks come at random."""
    blocks = make_blocks(5)
    values = [block.weight.clone() for block in blocks]
    stream = BlockStream(blocks, CPU, num_resident=1, num_slots=2)
    generator = torch.Generator().manual_seed(3)
    for index in torch.randint(5, (60,), generator=generator).tolist():
        order: Order = ("training forward", "training backward", "inference")[index % 3]
        stream.enter(index, order)
        assert torch.equal(blocks[index].weight, values[index])
        stream.leave(index, order)


def test_resident_blocks_come_once_and_are_spread() -> None:
    assert choose_streamed(6, 6) == [] and choose_streamed(4, 0) == [0, 1, 2, 3]
    for total, resident in itertools.product([1, 5, 42], [0, 1, 13, 30]):
        if resident > total:
            continue
        streamed = choose_streamed(total, resident)
        assert len(set(streamed)) == total - resident and all(0 <= index < total for index in streamed)
        gaps = [after - before for before, after in itertools.pairwise(streamed)]
        assert not gaps or max(gaps) - min(gaps) <= 1
    stream = BlockStream(make_blocks(6), CPU, num_resident=4, num_slots=1)
    recorder = Recorder(stream)
    for _ in range(2):
        walk(stream, list(range(6)), "training forward", 5)
        walk(stream, list(range(6))[::-1], "training backward", 5)
    assert all(recorder.loads.count(index) == 1 for index in (0, 2, 3, 5)), recorder.loads


def test_released_blocks_come_back_with_their_values() -> None:
    blocks = make_blocks(3)
    values = [block.weight.clone() for block in blocks]
    stream = BlockStream(blocks, CPU, num_resident=2, num_slots=1)
    walk(stream, [0, 1, 2], "inference", 3)
    stream.release()
    assert stream.loaded() == [] and all(block.weight.untyped_storage().nbytes() == 0 for block in blocks)
    for index, value in enumerate(values):
        stream.enter(index, "inference")
        assert torch.equal(blocks[index].weight, value)
        stream.leave(index, "inference")


def test_views_of_one_memory_stay_views_of_one_memory() -> None:
    block = nn.Module()
    whole = torch.arange(24.0).view(6, 4)
    block.register_buffer("whole", whole)
    block.first = nn.Parameter(torch.empty(0), requires_grad=False)
    block.first.data = whole[:2]
    block.columns = nn.Parameter(torch.empty(0), requires_grad=False)
    block.columns.data = whole[:, 1:3]
    block.other = nn.Parameter(torch.full((5,), 7, dtype=torch.bfloat16), requires_grad=False)
    block.wide = nn.Parameter(torch.full((3,), 2.5, dtype=torch.float64), requires_grad=False)
    flat = FlatBlock(frozen_tensors(block), CPU)
    assert flat.num_bytes < 24 * 4 + 2 * 256 + 3 * 8 + 1, "memory that is shared is kept once"
    flat.load()
    assert torch.equal(block.whole, torch.arange(24.0).view(6, 4))
    assert block.first.data_ptr() == block.whole.data_ptr()
    assert torch.equal(block.columns, block.whole[:, 1:3]) and block.columns.stride() == (4, 1)
    assert block.other.tolist() == [7] * 5 and block.wide.tolist() == [2.5] * 3
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in block.parameters())


def test_a_model_keeps_its_names_and_only_its_blocks_are_away() -> None:
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.blocks = nn.ModuleList(make_blocks(3))
    model.outside = nn.Linear(2, 2)
    model.inner.blocks[1].bias.requires_grad_(True)
    names = list(model.state_dict())
    assert find_stream(model) is None
    stream = stream_blocks(model, "inner.blocks", CPU, num_resident=0)
    assert find_stream(model) is stream and list(model.state_dict()) == names
    away = {name for name, p in model.named_parameters() if p.untyped_storage().nbytes() == 0}
    assert away == {name for name in names if name.startswith("inner") and name != "inner.blocks.1.bias"}
    assert set(model._ddp_params_and_buffers_to_ignore) == away
    assert isinstance(model.inner.blocks, StreamedBlocks) and len(model.inner.blocks) == 3


def test_some_blocks_are_visited_and_given_up_after_an_error() -> None:
    blocks = nn.ModuleList(make_blocks(4))
    stream = BlockStream(list(blocks), CPU, num_resident=0)
    streamed = StreamedBlocks(blocks, stream)
    assert [stream.index_of(block) for block in visit(streamed, 1, 3)] == [1, 2]
    assert [block is blocks[index] for index, block in enumerate(visit(blocks, 0, None))] == [True] * 4
    with pytest.raises(RuntimeError, match="stop"):
        for _block in streamed:
            raise RuntimeError("stop")
    assert len(stream.loaded()) <= 2
    with pytest.raises(ValueError, match="resident"):
        BlockStream(list(blocks), CPU, num_resident=5)


def test_a_cpu_with_a_number_is_the_cpu() -> None:
    """accelerate numbers it where several processes run; moved there, tensors without memory would be read."""
    model = nn.Module()
    model.blocks = nn.ModuleList(make_blocks(3))
    expected = [block.weight.clone() for block in model.blocks]
    stream_blocks(model, "blocks", torch.device("cpu:0"), num_resident=0)
    assert isinstance(model.blocks, StreamedBlocks)
    assert all(torch.equal(block.weight, weight) for block, weight in zip(model.blocks, expected, strict=True))
