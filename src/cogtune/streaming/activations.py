"""What the backward pass reads of a block waits in page-locked host memory instead of on the device.

    with offload.keeping(index, hidden_states):
        output = run_block(...)                # what autograd saves in here leaves while the next block computes
    offload.fetch(index)                       # in the backward pass: comes back ahead of use

Copies run on two streams of their own, one for each direction. Small tensors, weights and tensors with gaps between
their elements stay where they are. The bytes come back as they were.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cogtune.streaming.host import HostBuffer


@dataclass
class _Range:
    """The bytes of a tensor that left."""

    buffer: HostBuffer
    source: Tensor | None
    """The device tensor until its copy is done; held so that its memory isn't reused."""
    back: Tensor | None = None
    """The bytes on the device again."""


@dataclass(frozen=True)
class _Kept:
    """What autograd holds in a tensor's place."""

    range: _Range
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _BlockState:
    ranges: dict[tuple[int, int], _Range] = field(default_factory=dict)
    """By address and length on the device, so that what is saved twice leaves once."""
    left: torch.cuda.Event | None = None
    arrived: torch.cuda.Event | None = None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, in whatever order."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _bytes_of(tensor: Tensor) -> Tensor:
    """A dense tensor's memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class ActivationOffload:
    """Keeps what some blocks save for the backward pass on the host."""

    def __init__(
        self, blocks: Iterable[int], device: torch.device, weights: Iterable[Tensor], *, num_leaving: int = 1
    ) -> None:
        """`blocks`: their numbers; `weights` are never copied.

        When a block begins, the copies of `num_leaving` before it may still be under way; it waits for older ones.
        """
        self.device = device
        self._num_leaving = num_leaving
        self._states = {index: _BlockState() for index in sorted(blocks)}
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._spare: dict[int, list[HostBuffer]] = {}
        on_gpu = device.type == "cuda"
        self._leaving = torch.cuda.Stream(device) if on_gpu else None
        self._arriving = torch.cuda.Stream(device) if on_gpu else None
        self._held: list[int] = []
        """Blocks whose tensors are still on the device, oldest first: their copies may be under way."""

    @contextlib.contextmanager
    def keeping(self, index: int, hidden_states: Tensor) -> Iterator[None]:
        """What autograd saves inside, of at least half the size of the block's input, goes to the host."""
        # The last blocks' copies run beside this block, which must not wait for them.
        self._let_go(all_but=self._num_leaving)
        state = self._states.get(index)
        if state is None:
            yield
            return
        self._clear(state)
        smallest = hidden_states.numel() * hidden_states.element_size() // 2

        def pack(tensor: Tensor) -> Tensor | _Kept:
            large = tensor.numel() * tensor.element_size() >= smallest
            if not large or not is_dense(tensor) or tensor.untyped_storage()._cdata in self._weights:
                return tensor
            return self._send(state, tensor)

        def unpack(packed: Any) -> Tensor:
            return self._receive(index, packed) if isinstance(packed, _Kept) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        if self._leaving is not None and state.ranges:
            state.left = torch.cuda.Event()
            state.left.record(self._leaving)
        self._held.append(index)

    def fetch(self, index: int) -> None:
        """Starts bringing back what a block kept, if anything; queued work that frees memory comes first."""
        state = self._states.get(index)
        if state is None or all(part.back is not None for part in state.ranges.values()):
            return
        if index in self._held:  # its copies have just begun: what is still there serves, and nothing reads the copies
            for part in state.ranges.values():
                assert part.source is not None
                part.back, part.source = _bytes_of(part.source), None
            self._held.remove(index)
            return
        self._let_go()
        for part in state.ranges.values():  # from the pool of the stream that computes, as what has just left
            part.back = torch.empty(part.buffer.bytes.shape, dtype=torch.uint8, device=self.device)
        if self._arriving is not None:
            self._arriving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._arriving):
            if self._arriving is not None and state.left is not None:
                self._arriving.wait_event(state.left)
            for part in state.ranges.values():
                assert part.back is not None
                part.back.copy_(part.buffer.bytes, non_blocking=True)
            if self._arriving is not None:
                state.arrived = torch.cuda.Event()
                state.arrived.record(self._arriving)

    def fetch_before(self, index: int) -> None:
        """Starts bringing back what the nearest offloaded block before this one kept."""
        before = [other for other in self._states if other < index]
        if before:
            self.fetch(max(before))

    def finish(self, index: int) -> None:
        """The block's backward pass is queued: its host memory may be used again by the next forward pass."""
        state = self._states.get(index)
        if state is not None:
            self._clear(state)

    @property
    def host_bytes(self) -> int:
        """Host memory in use or held for the next step."""
        held = [part.buffer for state in self._states.values() for part in state.ranges.values()]
        held += [buffer for buffers in self._spare.values() for buffer in buffers]
        return sum(buffer.bytes.numel() for buffer in held)

    def _send(self, state: _BlockState, tensor: Tensor) -> _Kept:
        num_bytes = tensor.numel() * tensor.element_size()
        address = (tensor.data_ptr(), num_bytes)
        if address not in state.ranges:
            buffers = self._spare.setdefault(num_bytes, [])
            buffer = buffers.pop() if buffers else HostBuffer(num_bytes, page_locked=self._leaving is not None)
            if self._leaving is not None:
                self._leaving.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._leaving):
                buffer.bytes.copy_(_bytes_of(tensor), non_blocking=True)
            state.ranges[address] = _Range(buffer, tensor.detach())
        return _Kept(state.ranges[address], tensor.size(), tensor.stride(), tensor.dtype)

    def _let_go(self, *, all_but: int = 0) -> None:
        """Lets device memory of blocks go whose copies are done, and of the older ones, after their copies."""
        while self._held:
            state = self._states[self._held[0]]
            if state.left is not None and not state.left.query():
                if len(self._held) <= all_but:
                    return
                torch.cuda.current_stream(self.device).wait_event(state.left)
            for part in state.ranges.values():
                part.source = None
            del self._held[0]

    def _receive(self, index: int, kept: _Kept) -> Tensor:
        state = self._states[index]
        if kept.range.back is None:
            self.fetch(index)
        if state.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(state.arrived)
            state.arrived = None
        assert kept.range.back is not None, "a block's backward pass ran twice; what it kept is gone"
        return kept.range.back.view(kept.dtype).as_strided(kept.size, kept.stride)

    def _clear(self, state: _BlockState) -> None:
        if state.arrived is not None:  # nothing has read it; others must not get the memory while it is written
            torch.cuda.current_stream(self.device).wait_event(state.arrived)
        for part in state.ranges.values():
            part.source = part.back = None
            self._spare.setdefault(part.buffer.bytes.numel(), []).append(part.buffer)
        state.ranges, state.left, state.arrived = {}, None, None
