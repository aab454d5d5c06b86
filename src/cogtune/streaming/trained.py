"""Trained blocks that do not fit on the device, where a step inside the backward pass updates them.

    stream = stream_trained_blocks(transformer, "transformer_blocks", device, num_resident=10, make_state=make_state)
    optimizer = EightBitAdamW(parameters, settings, seed=seed, state=stream.state)

A block's weights come for both of its passes. With them come, for the backward pass alone, the tensors of its
optimizer's state; both are updated there and go back beside the next block's work, on a stream of their own, while the
block after that comes. What stays on the device is newer there until somebody asks for it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cogtune.streaming.blocks import (
    DEFAULT_SLOTS,
    BlockStream,
    Order,
    all_tensors,
    attach_stream,
    find_stream,
    without_number,
)

State = dict[nn.Parameter, dict[str, Tensor]]
"""An optimizer's state: tensors by name for each weight."""


class _Held(nn.Module):
    """Tensors of a block that none of its modules has."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(str(number), tensor, persistent=False)


class TrainedStream(BlockStream):
    """Blocks whose weights change in their backward pass, and with them state that nothing else reads."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        num_resident: int,
        make_state: Callable[[nn.Parameter], dict[str, Tensor]],
        num_slots: int = DEFAULT_SLOTS,
    ) -> None:
        """`make_state` gives a weight's state at its start, on the host; the resident blocks' stays with them."""
        self.state: State = {p: make_state(p) for block in blocks for p in block.parameters() if p.requires_grad}
        """Of all weights in the blocks: the same tensors all the time, with memory while their block has it."""
        held = [_Held([t for p in block.parameters() for t in self.state.get(p, {}).values()]) for block in blocks]
        super().__init__(blocks, device, num_resident=num_resident, num_slots=num_slots, select=all_tensors)
        self._states = BlockStream(held, device, num_resident=num_resident, num_slots=num_slots)
        self._on_host = {key: copy for flat in (*self.flat, *self._states.flat) for key, copy in flat.on_host.items()}

    def enter(self, index: int, order: Order) -> None:
        """`BlockStream.enter`; before a backward pass with the block's state."""
        super().enter(index, order)
        if order == "training backward":
            self._states.enter(index, "backward alone")

    def leave(self, index: int, order: Order) -> None:
        """`BlockStream.leave`; after a backward pass weights and state go back."""
        if order == "training backward":
            self.change(index)
            self._states.change(index)
            self._states.leave(index, "backward alone")
        super().leave(index, order)

    def store(self) -> None:
        """`BlockStream.store`, and the state."""
        super().store()
        self._states.store()

    def forget(self) -> None:
        """`BlockStream.forget`, and the state."""
        super().forget()
        self._states.forget()

    def release(self) -> None:
        """`BlockStream.release`, and the state."""
        super().release()
        self._states.release()

    def on_host(self, tensor: Tensor) -> Tensor:
        """Where the host has a weight or a tensor of its state, as it was in the last `store`; what is in no block, as
        it is."""
        return self._on_host.get(id(tensor), tensor)


def stream_trained_blocks(
    model: nn.Module,
    name: str,
    device: torch.device,
    *,
    num_resident: int,
    make_state: Callable[[nn.Parameter], dict[str, Tensor]],
    num_slots: int = DEFAULT_SLOTS,
) -> TrainedStream:
    """Puts a model on the device but for the blocks in its list `name`, whose trained weights are updated in the
    backward pass; in place, as `blocks.stream_blocks` does for frozen ones."""
    device, blocks = without_number(device), list(model.get_submodule(name).children())
    stream = TrainedStream(blocks, device, num_resident=num_resident, make_state=make_state, num_slots=num_slots)
    attach_stream(model, name, stream)
    return stream


def find_trained_stream(model: nn.Module) -> TrainedStream | None:
    """The stream of a model whose trained blocks wait on the host, if they do."""
    stream = find_stream(model)
    return stream if isinstance(stream, TrainedStream) else None
