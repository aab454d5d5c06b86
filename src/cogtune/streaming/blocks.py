"""Runs a model whose blocks do not fit on the device: their frozen weights wait on the host and come just in time.

    stream = stream_blocks(transformer, "transformer_blocks", device, num_resident=10)
    for block in transformer.transformer_blocks:   # whoever iterates finds each block on the device while it holds it
        ...

Each block's frozen tensors are one range of bytes, page-locked on the host, copied in one piece on a stream of its own
ahead of use, and never copied back. On the device the range is a storage that is given memory and loses it again, so
all views of it (fused projections, what autograd saved) are right whenever the block is there, and compiled graphs
take them as the inputs that they are. Trained weights stay on the device; those that come, are changed and go back are
`streaming.trained`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cogtune.streaming.host import HostBuffer, Layout

Order = Literal["training forward", "training backward", "backward alone", "inference"]
_CHANGING: tuple[Order, ...] = ("training backward", "backward alone")
"""When a block that is entered may be updated: after it has been read for the way back."""
DEFAULT_SLOTS = 2
"""Streamed blocks on the device at once: the one that computes and the one that arrives."""
_ALIGNMENT = 256


@dataclass(frozen=True)
class _Place:
    """A tensor of a block and its first byte within the block's range."""

    tensor: Tensor
    offset: int


def frozen_tensors(block: nn.Module) -> list[Tensor]:
    """The tensors of a block that no training changes: parameters without gradients, and buffers."""
    return [p for p in block.parameters() if not p.requires_grad] + list(block.buffers())


def all_tensors(block: nn.Module) -> list[Tensor]:
    """Every parameter and buffer of a block."""
    return [*block.parameters(), *block.buffers()]


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _lay_out(tensors: Sequence[Tensor]) -> tuple[list[_Place], int]:
    """Places for the tensors in one range, and its size; those that share memory go on sharing it."""
    places: list[_Place] = []
    first = end = size = base = 0
    for tensor in sorted((t for t in tensors if t.numel()), key=lambda t: (t.data_ptr(), -_span(t))):
        address = tensor.data_ptr()
        if not places or address >= end:  # nothing before reaches into it
            base = -(-size // _ALIGNMENT) * _ALIGNMENT
            first, end = address, address
        places.append(_Place(tensor, base + address - first))
        end = max(end, address + _span(tensor))
        size = base + end - first
    return places, size


def count_bytes(tensors: Sequence[Tensor]) -> int:
    """Memory that the tensors take together, what they share once."""
    return _lay_out(tensors)[1]


class FlatBlock:
    """Tensors of a block as one range of bytes: always on the host, on the device from `load` to `release`."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        places, self.num_bytes = _lay_out(tensors)
        self.host = HostBuffer(self.num_bytes, page_locked=device.type == "cuda")
        self.device_bytes = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        self.on_host: dict[int, Tensor] = {}
        """Each tensor's values on the host, by the tensor's identity."""
        with torch.no_grad():
            for place in places:
                on_host, on_device = (self._view(whole, place) for whole in (self.host.bytes, self.device_bytes))
                on_host.copy_(place.tensor)
                self.on_host[id(place.tensor)] = on_host
                # The tensor object stays, and its version with it: autograd doesn't see the memory come and go.
                place.tensor.data = on_device
        self.is_loaded = True
        self.release()

    def layout(self, tensors: Sequence[Tensor]) -> Layout:
        """Where these tensors of the block, all of one type, lie in its range; in numbers, not bytes."""
        views = [self.on_host[id(tensor)] for tensor in tensors]
        assert all(view.is_contiguous() and view.dtype == views[0].dtype for view in views)
        offsets = tuple(int(view.storage_offset()) for view in views)
        return Layout(offsets, tuple(view.shape for view in views), self.num_bytes // views[0].dtype.itemsize)

    @staticmethod
    def _view(whole: Tensor, place: _Place) -> Tensor:
        tensor = place.tensor
        view = torch.empty(0, dtype=tensor.dtype, device=whole.device)
        offset = place.offset // tensor.element_size()
        return view.set_(whole.untyped_storage(), offset, tensor.shape, tensor.stride())

    def load(self) -> None:
        """Takes device memory from the current stream's pool and queues the copy on that stream."""
        self.device_bytes.untyped_storage().resize_(self.num_bytes)
        self.device_bytes.copy_(self.host.bytes, non_blocking=True)
        self.is_loaded = True

    def store(self) -> None:
        """Queues the copy back on the current stream."""
        self.host.bytes.copy_(self.device_bytes, non_blocking=True)

    def release(self) -> None:
        """Gives the device memory back to the pool that it came from."""
        self.device_bytes.untyped_storage().resize_(0)
        self.is_loaded = False


def choose_streamed(num_blocks: int, num_resident: int) -> list[int]:
    """Which blocks are streamed: spread evenly, so that copies are too."""
    num_streamed = num_blocks - num_resident
    return [((2 * k + 1) * num_blocks) // (2 * num_streamed) for k in range(num_streamed)]


class BlockStream:
    """Blocks that come to the device when they are entered, and the next ones while it computes."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        num_resident: int,
        num_slots: int = DEFAULT_SLOTS,
        prepare: Callable[[nn.Module], object] | None = None,
        select: Callable[[nn.Module], list[Tensor]] = frozen_tensors,
    ) -> None:
        """`num_resident` blocks stay once they came; `num_slots` of the others are there at once.

        `prepare` is called with each block on the device, one at a time, before it leaves; `select` says which of its
        tensors leave.
        """
        if not 0 <= num_resident <= len(blocks) or num_slots < 1:
            raise ValueError(f"{num_resident} resident of {len(blocks)} blocks, {num_slots} slots")
        self.device, self.num_slots, self.num_resident = device, num_slots, num_resident
        on_gpu = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if on_gpu else None
        self._returning = torch.cuda.Stream(device) if on_gpu else None
        self._changed: set[int] = set()
        """Blocks that are newer on the device than on the host."""
        self._returned: dict[int, torch.cuda.Event] = {}
        """When what goes back has been read, of blocks that have not been changed since."""
        self.flat: list[FlatBlock] = []
        for block in blocks:
            if prepare is not None:
                prepare(block.to(device))
            if self._copying is not None:  # what `prepare` queued comes before the copy to the host
                self._copying.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._copying):  # memory for copies comes from this stream's pool alone
                self.flat.append(FlatBlock(select(block), device))
        self._indices = {id(block): index for index, block in enumerate(blocks)}
        self._streamed = choose_streamed(len(blocks), num_resident)
        self._position = {index: position for position, index in enumerate(self._streamed)}
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._in_use: int | None = None
        self.before_load: Callable[[int], None] | None = None
        """Called before a block's host memory is read: waits for who writes it."""

    def index_of(self, block: nn.Module) -> int:
        """A block's number."""
        return self._indices[id(block)]

    def enter(self, index: int, order: Order) -> None:
        """The block is on the device for all that is queued on the current stream from now on."""
        self._in_use = index
        if not self.flat[index].is_loaded:
            if index in self._position:
                self._make_room([index, *self._upcoming(index, order)][: self.num_slots])
            self._load(index)
        awaited = [self._arrived.pop(index, None)]
        if order in _CHANGING:
            awaited.append(self._returned.pop(index, None))
        for event in awaited:
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)

    def leave(self, index: int, order: Order) -> None:
        """The block is no longer needed; its slot goes to the next one that isn't there."""
        self._in_use = None
        if index not in self._position:
            return
        wanted = self._upcoming(index, order)[: self.num_slots]
        for following in wanted:
            if not self.flat[following].is_loaded:
                self._make_room(wanted)
                self._load(following)

    def change(self, index: int) -> None:
        """The work that is queued on the current stream changed the block: it goes back, a resident one in `store`."""
        self._changed.add(index)
        if index in self._position:
            self._store(index)

    def store(self) -> None:
        """Until the host has every block as it is on the device."""
        for index in sorted(self._changed):
            self._store(index)
        if self._returning is not None:
            self._returning.synchronize()

    def _store(self, index: int) -> None:
        self._changed.discard(index)
        if self._returning is not None:
            self._returning.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._returning):
            self.flat[index].store()
            if self._returning is not None:
                event = self._returned[index] = torch.cuda.Event()
                event.record(self._returning)

    def forget(self) -> None:
        """The blocks on the device are out of date: whichever is entered next comes anew, the resident ones too."""
        self._changed.clear()
        for index in self.loaded():
            self._arrived.pop(index, None)
            self.flat[index].release()

    def release(self) -> None:
        """Frees the device memory of all blocks, the resident ones too; they come back when they are entered."""
        self.store()
        if self._copying is not None:  # what was queued must be done before others take the memory
            torch.cuda.current_stream(self.device).wait_stream(self._copying)
            torch.cuda.synchronize(self.device)
        for flat in self.flat:
            if flat.is_loaded:
                flat.release()
        self._arrived.clear()
        if self._copying is not None:
            torch.cuda.empty_cache()

    def loaded(self) -> list[int]:
        """Numbers of the blocks on the device, or on their way."""
        return [index for index, flat in enumerate(self.flat) if flat.is_loaded]

    def _upcoming(self, index: int, order: Order) -> list[int]:
        """Streamed blocks after this one in the order in which they will be entered, each once."""
        position, streamed = self._position[index], self._streamed
        if order == "training forward":  # then backwards, the last one first
            return streamed[position + 1 :] + streamed[position::-1]
        if order == "training backward":  # then forwards again, from the first one
            return streamed[:position][::-1] + streamed[position:]
        if order == "backward alone":  # then backwards again, from the last one
            return streamed[:position][::-1] + streamed[position:][::-1]
        return streamed[position + 1 :] + streamed[: position + 1]

    def _make_room(self, wanted: Sequence[int]) -> None:
        """Releases streamed blocks that are not wanted until one more fits."""
        loaded = [index for index in self._streamed if self.flat[index].is_loaded]
        spare = [index for index in loaded if index not in wanted and index != self._in_use]
        while len(loaded) >= self.num_slots and spare:
            gone = spare.pop()
            loaded.remove(gone)
            self._arrived.pop(gone, None)
            self.flat[gone].release()

    def _load(self, index: int) -> None:
        if self.before_load is not None:
            self.before_load(index)
        if self._copying is None:
            self.flat[index].load()
            return
        # Whatever was released so far is used by work that is queued already: the copy comes after it.
        self._copying.wait_stream(torch.cuda.current_stream(self.device))
        if self._returning is not None:  # and after what is going back, from that memory or to this block's
            self._copying.wait_stream(self._returning)
        with torch.cuda.stream(self._copying):
            self.flat[index].load()
            event = self._arrived[index] = torch.cuda.Event()
            event.record(self._copying)


class StreamedBlocks(nn.ModuleList):
    """A model's blocks under their own names; whoever iterates finds each one on the device while it holds it."""

    def __init__(self, blocks: nn.ModuleList, stream: BlockStream) -> None:
        super().__init__(blocks)
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        """All blocks in turn."""
        return self.visit()

    def visit(self, first: int = 0, last: int | None = None) -> Iterator[Any]:
        """The blocks from `first` to before `last` in turn."""
        for index in range(len(self))[first:last]:
            order: Order = "training forward" if torch.is_grad_enabled() else "inference"
            self.stream.enter(index, order)
            try:
                yield self[index]
            finally:
                self.stream.leave(index, order)


def visit(blocks: nn.ModuleList, first: int = 0, last: int | None = None) -> Iterator[Any]:
    """Some of a model's blocks in turn, streamed or not."""
    if isinstance(blocks, StreamedBlocks):
        return blocks.visit(first, last)
    return iter(blocks[first:last])


def stream_blocks(
    model: nn.Module,
    name: str,
    device: torch.device,
    *,
    num_resident: int,
    num_slots: int = DEFAULT_SLOTS,
    prepare: Callable[[nn.Module], object] | None = None,
    select: Callable[[nn.Module], list[Tensor]] = frozen_tensors,
) -> BlockStream:
    """Puts a model on the device, but for the blocks in its list `name`, which wait on the host; in place.

    Adapters and fused projections come before, quantization as `prepare`, the optimizer after. The whole model is never
    on the device.
    """
    device = without_number(device)
    blocks = list(model.get_submodule(name).children())
    stream = BlockStream(blocks, device, num_resident=num_resident, num_slots=num_slots, prepare=prepare, select=select)
    attach_stream(model, name, stream)
    return stream


def without_number(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cpu:0" is another one than theirs to PyTorch, and what has no memory at the
    moment would be copied there."""
    return torch.device("cpu") if device.type == "cpu" else device


def attach_stream(model: nn.Module, name: str, stream: BlockStream) -> None:
    """Lets whoever iterates over the model's list `name` find each block on the device, and puts all else there."""
    parent_name, _, list_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    blocks = getattr(parent, list_name)
    setattr(parent, list_name, StreamedBlocks(blocks, stream))
    model.to(stream.device)
    # Every process has read the same weights; there is nothing to broadcast while they are away.
    frozen = {id(tensor) for block in blocks for tensor in frozen_tensors(block)}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    model._ddp_params_and_buffers_to_ignore = [key for key, tensor in named if id(tensor) in frozen]  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def find_stream(model: nn.Module) -> BlockStream | None:
    """The stream of a model whose blocks wait on the host, if they do."""
    for module in model.modules():
        if isinstance(module, StreamedBlocks):
            return module.stream
    return None
