"""Decodes clips in worker processes under a time limit: decord hangs on some files, and some files kill a decoder.

A worker that is late or dies is ended and replaced; the clip is then tried once more with PyAV alone.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType

import numpy as np

from cogtune.host_threads import available_cores
from cogtune.manifest import Clip, ClipFormat
from cogtune.video import ClipError


@dataclass
class Decoded:
    """The outcome for one clip: its pixels, or why there are none."""

    index: int
    frames: np.ndarray | None  # uint8 [F, H, W, 3]
    problem: ClipError | None = None


@dataclass
class _Task:
    index: int
    decoders: tuple[str, ...]
    deadline: float = 0.0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    task: _Task | None = field(default=None)
    started: bool = False


def default_workers() -> int:
    """Decoding processes for this machine: up to 4, leaving one core for the rest."""
    return max(1, min(4, available_cores() - 1))


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    worker.pipe.close()


class ClipDecoder:
    """A pool of decoding processes; a context manager. `decode` yields outcomes in the order of the clips.

    `clip_format` is for clips that have none of their own.
    """

    def __init__(self, clip_format: ClipFormat, *, num_workers: int, timeout_seconds: float) -> None:
        self._format = clip_format
        self._timeout = timeout_seconds
        self._workers: list[_Worker] = []
        self._size = max(1, num_workers)

    def __enter__(self) -> "ClipDecoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            _end(worker)
        self._workers.clear()

    def _start_worker(self) -> _Worker:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "cogtune.decode_worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        return _Worker(process, Connection(ours.detach()))

    def _await_start(self, worker: _Worker) -> None:
        """Importing takes seconds and must not count against a clip's time limit."""
        if worker.started:
            return
        try:
            worker.pipe.recv()
            worker.started = True
        except EOFError:
            raise RuntimeError("a decoding process died while starting; see its traceback above") from None

    def decode(self, clips: Sequence[Clip]) -> Iterator[Decoded]:
        """Pixels or problem of each clip, in order; at most twice as many clips are held as there are workers."""
        while len(self._workers) < min(self._size, len(clips)):
            self._workers.append(self._start_worker())
        for worker in self._workers:
            self._await_start(worker)
        tasks = [_Task(index, ("decord", "pyav")) for index in reversed(range(len(clips)))]
        done: dict[int, Decoded] = {}
        next_index = 0
        while next_index < len(clips):
            for worker in self._workers:
                if worker.task is None and tasks and tasks[-1].index < next_index + 2 * self._size:
                    self._give(worker, tasks.pop(), clips)
            for outcome, retry in self._collect(clips):
                if retry is not None:
                    tasks.append(retry)
                elif outcome is not None:
                    done[outcome.index] = outcome
            while next_index in done:
                yield done.pop(next_index)
                next_index += 1

    def _give(self, worker: _Worker, task: _Task, clips: Sequence[Clip]) -> None:
        task.deadline = time.monotonic() + self._timeout
        worker.task = task
        clip = clips[task.index]
        options = {"path": clip.video, "start": clip.start, "end": clip.end, "decoders": task.decoders}
        worker.pipe.send(vars(clip.form or self._format) | options)

    def _collect(self, clips: Sequence[Clip]) -> Iterator[tuple[Decoded | None, _Task | None]]:
        busy = {worker.pipe: worker for worker in self._workers if worker.task is not None}
        if not busy:
            return
        soonest = min(worker.task.deadline for worker in busy.values() if worker.task)
        ready = wait(list(busy), timeout=max(0.0, soonest - time.monotonic()))
        for pipe, worker in busy.items():
            task = worker.task
            assert task is not None
            if pipe in ready:
                try:
                    frames, kind, message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    yield self._replace(worker, task, clips, "the decoder crashed")
                    continue
                worker.task = None
                yield Decoded(task.index, frames, ClipError(kind, message) if kind else None), None
            elif time.monotonic() >= task.deadline and not pipe.poll():  # it may have answered meanwhile
                yield self._replace(worker, task, clips, f"no frame within {self._timeout:g} s")

    def _replace(
        self, worker: _Worker, task: _Task, clips: Sequence[Clip], reason: str
    ) -> tuple[Decoded | None, _Task | None]:
        _end(worker)
        fresh = self._start_worker()
        self._await_start(fresh)
        self._workers[self._workers.index(worker)] = fresh
        if task.decoders != ("pyav",):
            return None, _Task(task.index, ("pyav",))
        problem = ClipError("unreadable", f"{clips[task.index].video}: {reason}; re-encode the file")
        return Decoded(task.index, None, problem), None
