"""A rank's side of the watch: tells rank 0 where it is, meets the others, and ends when the job ends.

Its thread ends the process even while the main thread waits in a collective for a rank that is no more: NCCL would
wait for its time limit there.
"""

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from cogtune.cluster.hub import AGAIN, EXIT_LOST
from cogtune.cluster.lines import Line, Message
from cogtune.cluster.whereabouts import HERE, WAITING, enter, inside
from cogtune.errors import UserError

_CONNECT_SECONDS = 30
_ANSWER_SECONDS = 10


def connect(addresses: list[str], port: int) -> Line:
    """A connection to the hub at the first address that answers; raises `UserError` where none does."""
    problems = []
    for address in addresses:
        try:
            return Line(_open(address, port))
        except OSError as error:
            problems.append(f"{address}: {error}")
    raise UserError(
        f"rank 0 can't be reached from {socket.gethostname()} on port {port} ({'; '.join(problems)}); the nodes of a "
        "job need to reach each other on any port, as NCCL does: open the firewall between them"
    )


def _open(address: str, port: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
    connection.settimeout(None)
    return connection


class Watch:
    """Runs a thread from `start` to `close`."""

    def __init__(
        self,
        line: Line,
        token: str,
        *,
        rank: int,
        host: str,
        speaks: bool,
        beat_seconds: float = 1.0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """`speaks`: whether this rank says that rank 0 is lost. Rank 0 says everything else."""
        self._line, self._rank, self._speaks, self._beat, self._end = line, rank, speaks, beat_seconds, end
        self._sending, self._ending = threading.Lock(), threading.Lock()
        self._changed = threading.Condition()
        self._arrived = self._met = 0
        self._left = False
        self._rank0 = "rank 0"
        self._moves = -1
        self._send({"token": token, "rank": rank, "host": host} | self._state())
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Runs beside the caller."""
        self.thread.start()

    def meet(self) -> None:
        """Returns when every rank has come here as often; takes as long as it takes, while any rank gets on."""
        with inside(WAITING):
            self._arrived += 1
            self._send({"arrived": self._arrived} | self._state())
            with self._changed:
                self._changed.wait_for(lambda: self._met >= self._arrived)

    def fail(self, message: str, code: int) -> NoReturn:
        """Ends this process and all others with the message; rank 0 prints it."""
        self._send({"failed": message, "code": code})
        time.sleep(_ANSWER_SECONDS)  # the answer ends this process
        self._leave(f"rank {self._rank}: {message}", code, speak=True)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """A goodbye: this rank's end is no loss."""
        enter("the end")
        self._left = True
        self._send({"bye": True})
        self.thread.join(_ANSWER_SECONDS)

    def _state(self) -> Message:
        self._moves = HERE.moves
        return {"moves": HERE.moves, "step": HERE.step, "phase": HERE.phase}

    def _send(self, message: Message) -> None:
        with self._sending, contextlib.suppress(OSError):  # the thread reads the same, and deals with it
            self._line.send(message)

    def _run(self) -> None:
        poll = select.poll()  # `select` fails above 1,024 open files
        poll.register(self._line.socket, select.POLLIN)
        while True:
            readable = poll.poll(1000 * self._beat)
            if HERE.moves != self._moves:
                self._send(self._state())
            if not readable:
                continue
            try:
                messages = self._line.read()
            except OSError:
                if not self._left:
                    lost = f"{self._rank0}, has ended without a word (killed, crashed, or its node is gone)"
                    self._leave(f"{lost}\n       {AGAIN}", EXIT_LOST, speak=self._speaks)
                return None
            for message in messages:
                if "end" in message:
                    return self._leave(message["end"], message["code"], speak=self._rank == 0)
                if "bye" in message:
                    return None
                self._take(message)

    def _take(self, message: Message) -> None:
        self._rank0 = message.get("rank0", self._rank0)
        with self._changed:
            self._met = message.get("met", self._met)
            self._changed.notify_all()

    def _leave(self, text: str, code: int, *, speak: bool) -> None:
        with self._ending:  # whoever comes first ends the process, once
            if speak:
                print(f"\nerror: {text}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            self._end(code)
