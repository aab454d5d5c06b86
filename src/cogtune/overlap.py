"""Keeps a GPU encoding without a break: reading and decoding before it, copies beside it, writing after it.

    a thread       makes batches (decoding runs in processes of its own) in page-locked memory
    this thread    queues copy, encoding and copy back, on a stream each, a few batches ahead
    threads        wait for a batch's results and write them: digests and files take longer than encoding captions

On a CPU there is nothing to overlap: batches are made, encoded and written in turn.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = tuple[list[str], Tensor]
Encode = Callable[[Tensor], tuple[Tensor, ...]]
Write = Callable[[list[str], tuple[Tensor, ...]], None]

_AHEAD = 2
_WRITERS = 4
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class EncodingTimes:
    """How long it took, from the first batch's arrival to the last one's results."""

    num_items: int
    busy_seconds: float
    """Of the device, from the first kernel of each batch's encoding to its last; the copies are not in it."""
    wall_seconds: float

    @property
    def busy_share(self) -> float:
        """Part of the time that the device was encoding."""
        return self.busy_seconds / self.wall_seconds if self.wall_seconds else 0.0


def encode_overlapped(batches: Iterator[Batch], encode: Encode, write: Write, device: torch.device) -> EncodingTimes:
    """Encodes (keys, tensor) batches on the device and hands (keys, tensors on the host) to `write`.

    Where the device is a GPU, `batches` runs in a thread of its own, and `write` in several at once. What they raise is
    raised here.
    """
    if device.type != "cuda":
        return _encode_in_turn(batches, encode, write)
    copying_in, copying_out = torch.cuda.Stream(device), torch.cuda.Stream(device)
    computing = torch.cuda.current_stream(device)
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    written: list[Future[None]] = []
    num_items, started = 0, 0.0
    with Producer(batches, prepare=Tensor.pin_memory) as producer, ThreadPoolExecutor(max_workers=_WRITERS) as writers:
        for keys, pinned in producer:
            started = started or time.perf_counter()
            with torch.cuda.stream(copying_in):
                inputs = pinned.to(device, non_blocking=True)
            computing.wait_stream(copying_in)
            inputs.record_stream(computing)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(computing)
            outputs = encode(inputs)
            end.record(computing)
            spans.append((begin, end))
            copying_out.wait_event(end)
            with torch.cuda.stream(copying_out):
                results = tuple(_copy_out(output, copying_out) for output in outputs)
                copied = torch.cuda.Event()
                copied.record(copying_out)
            written.append(writers.submit(_write_after, copied, write, keys, pinned, results))
            num_items += len(keys)
            if len(written) > _WRITERS:
                written[-1 - _WRITERS].result()
        for future in written:
            future.result()
    wall = time.perf_counter() - started if started else 0.0
    return EncodingTimes(num_items, sum(begin.elapsed_time(end) for begin, end in spans) / 1e3, wall)


def _copy_out(output: Tensor, stream: torch.cuda.Stream) -> Tensor:
    output.record_stream(stream)
    host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    return host.copy_(output, non_blocking=True)


def _write_after(
    copied: torch.cuda.Event, write: Write, keys: list[str], _pinned: Tensor, results: tuple[Tensor, ...]
) -> None:
    """`_pinned` is held until the device has read it."""
    copied.synchronize()
    write(keys, results)


def _encode_in_turn(batches: Iterator[Batch], encode: Encode, write: Write) -> EncodingTimes:
    num_items, busy, started = 0, 0.0, 0.0
    for keys, inputs in batches:
        before = time.perf_counter()
        started = started or before
        outputs = encode(inputs)
        busy += time.perf_counter() - before
        write(keys, outputs)
        num_items += len(keys)
    return EncodingTimes(num_items, busy, time.perf_counter() - started if started else 0.0)


class Producer:
    """Runs an iterator in a thread, `_AHEAD` batches ahead, and prepares each tensor there; a context manager."""

    def __init__(self, batches: Iterator[Batch], *, prepare: Callable[[Tensor], Tensor]) -> None:
        self._batches, self._prepare = batches, prepare
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="batches", daemon=True)

    def __enter__(self) -> "Producer":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """The iterator is at rest afterwards, also where the consumer gave up early."""
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _produce(self) -> None:
        try:
            for keys, tensor in self._batches:
                if not self._put((keys, self._prepare(tensor))):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001  # raised again in the consumer's thread
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
