"""Checkpoints that all processes write together, beside training.

Training stands still while each process copies its pieces to host memory. Then a thread on each writes, syncs and
digests them; the first process adds the manifest, puts the folder in place and deletes what is too old, when it has
heard from all others. What goes wrong on one of them is known to all.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from cogtune.checkpoint import CheckpointFolder
from cogtune.errors import UserError
from cogtune.shards.files import MAX_FILE_BYTES, ShardFile, lay_out, write_file
from cogtune.shards.pieces import Piece, choose_written, find_piece
from cogtune.shards.ranks import Ranks
from cogtune.shards.snapshot import Snapshot, chunks_without_copy

MAX_WRITERS = 4
"""Threads that write and digest a process's files: SHA-256 alone keeps a core busy."""


class CheckpointWriter:
    """One process's part in saving; every process calls the same methods in the same order."""

    def __init__(
        self,
        folder: CheckpointFolder,
        ranks: Ranks,
        *,
        asynchronous: bool,
        max_file_bytes: int = MAX_FILE_BYTES,
        num_writers: int | None = None,
    ) -> None:
        self._folder, self._ranks, self._asynchronous = folder, ranks, asynchronous
        self._max_file_bytes = max_file_bytes
        self._num_writers = num_writers or min(MAX_WRITERS, max(1, (os.cpu_count() or 1) // 2))
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._crash: BaseException | None = None
        self.written_bytes = 0
        """Of this process, in the last save."""
        self.write_seconds = 0.0
        """From the end of the copy until the last checkpoint was in place."""

    def prepare(self, tensors: Mapping[str, Tensor | Piece]) -> None:
        """Takes the host memory for saving such tensors, beside training: the first save won't wait for it."""
        if self._asynchronous:
            self._snapshot.prepare(self._lay_out(tensors))

    def wait_until_prepared(self) -> None:
        """Until the host memory is there."""
        self._snapshot.wait()

    def _lay_out(self, tensors: Mapping[str, Tensor | Piece]) -> list[ShardFile]:
        rank, size = self._ranks.rank, self._ranks.world_size
        pieces = {name: find_piece(name, tensor, rank=rank, world_size=size) for name, tensor in tensors.items()}
        return lay_out(choose_written(pieces), rank=rank, max_bytes=self._max_file_bytes)

    def save(self, step: int, state: dict[str, Any], tensors: Mapping[str, Tensor | Piece]) -> None:
        """Returns as soon as the tensors may change; waits for the save before this one, and raises its `UserError`."""
        self.wait()
        files = self._lay_out(tensors)
        self.written_bytes = sum(file.num_bytes for file in files)
        if not self._asynchronous:
            self._run(step, state, files, lambda index: chunks_without_copy(files[index]))
            self.wait()
            return
        error = None
        try:
            self._snapshot.take(files)
        except UserError as refused:  # host memory that can't be page-locked: the others are to hear of it
            error = str(refused)
        arguments = (step, state, files, self._snapshot.chunks, error)
        # A daemon: where the process ends on an error, it does not wait for messages that never come.
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def has_failed(self) -> bool:
        """Whether `wait` would raise; never waits."""
        return self._error is not None or self._crash is not None

    def is_writing(self) -> bool:
        """Whether a checkpoint isn't complete yet."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until the checkpoint is complete; raises `UserError`, on every process, where one of them could not write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(error)

    def _run(
        self,
        step: int,
        state: dict[str, Any],
        files: Sequence[ShardFile],
        chunks: Callable[[int], Any],
        error: str | None = None,
    ) -> None:
        started = time.perf_counter()
        try:
            self._error = self._write_together(step, state, files, chunks, error)
        except Exception as crash:  # noqa: BLE001  # raised by `wait`, on the thread that trains
            self._crash = crash
        self.write_seconds = time.perf_counter() - started

    def _write_together(
        self,
        step: int,
        state: dict[str, Any],
        files: Sequence[ShardFile],
        chunks: Callable[[int], Any],
        error: str | None,
    ) -> str | None:
        """What went wrong on any process, the same on all; None where the checkpoint is in place."""
        ranks, is_first = self._ranks, self._ranks.rank == 0
        partial = self._folder.partial(step)
        if error is None and is_first:
            error = _attempt(lambda: self._folder.begin(step))
        found = ranks.first_error(error)
        digests: dict[str, str] = {}
        if found is None:
            error = _attempt(lambda: digests.update(self._write_files(partial, files, chunks)))
            found = ranks.first_error(error)
            everyone = ranks.gather(digests)
            if found is None and is_first:
                listed = {name: digest for part in everyone for name, digest in part.items()}
                error = _attempt(lambda: self._folder.complete(step, state, listed))
            if found is None:
                found = ranks.first_error(error)
        if found is None:
            return None
        if is_first:
            self._folder.discard(step)
        ranks.gather(None)  # what is left of it is gone when the first process hears of the error
        return self._folder.explain(step, found)

    def _write_files(self, partial: Path, files: Sequence[ShardFile], chunks: Callable[[int], Any]) -> dict[str, str]:
        """Each file's digest."""
        if not partial.is_dir():
            raise OSError(f"{partial} is not there; output_dir must be on storage that all nodes share")
        count = self._num_writers if self._asynchronous else 1
        with ThreadPoolExecutor(count, thread_name_prefix="write") as pool:
            jobs = {
                file.name: pool.submit(write_file, partial, file, chunks(index)) for index, file in enumerate(files)
            }
            return {name: job.result() for name, job in jobs.items()}


def _attempt(work: Callable[[], object]) -> str | None:
    """What went wrong, for all processes: one that said nothing would leave them waiting."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  # told by `wait`, everywhere
        return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return None
