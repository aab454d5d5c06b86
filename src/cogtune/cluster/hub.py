"""Rank 0's side of the watch: knows where every rank is, notices who is lost, ends the job on all ranks at once.

A thread beside training. Each rank holds a connection to it: one that closes without a goodbye is a process that was
killed, one that is silent for the kernel's probes is a dead host. Where no rank at all gets on for the time limit, the
job hangs. In each case all ranks get the same message and end.
"""

import contextlib
import hmac
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

from cogtune.cluster.lines import Line, Message
from cogtune.cluster.whereabouts import WAITING

EXIT_LOST = 3
"""Exit code of a job that lost a rank, or hung: starting it again is what helps."""
AGAIN = "the job ends on all ranks; start the same command again, it goes on from the newest checkpoint"
_POLL_SECONDS = 0.25
_LISTED = 8


@dataclass
class Peer:
    """What the hub knows of a rank."""

    line: Line
    rank: int | None = None
    host: str = "?"
    step: int | None = None
    phase: str = "starting"
    moves: int = -1
    moved_at: float = field(default_factory=time.monotonic)
    arrived: int = 0
    """At how many meetings."""
    left: bool = False

    def who(self) -> str:
        """Rank and node."""
        return f"rank {self.rank} (node {self.host})"

    def place(self) -> str:
        """Step and phase."""
        return ("" if self.step is None else f"at step {self.step} ") + f"in {self.phase!r}"

    def describe(self) -> str:
        """Who, and where and when it was seen last."""
        return f"{self.who()} last seen {self.place()} {time.monotonic() - self.moved_at:.0f} s ago"


@dataclass(frozen=True)
class Failure:
    """Why the job ends."""

    rank: int
    where: str
    message: str
    code: int


class Hub:
    """Listens on a port of its own; `start` runs it in a thread, which ends with the job."""

    def __init__(
        self, world_size: int, token: str, *, timeout_seconds: float | None, grace_seconds: float = 1.0
    ) -> None:
        """`grace_seconds`: how long after a failure others are waited for, which may have the cause."""
        self._world_size, self._token = world_size, token
        self._timeout, self._grace = timeout_seconds, grace_seconds
        self._peers: list[Peer] = []
        self._failures: list[Failure] = []
        self._end_at: float | None = None
        self._met = 0
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listening = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world_size)
        self.port: int = self._listening.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._run, name="hub", daemon=True)

    def start(self) -> None:
        """Runs beside the caller."""
        self.thread.start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(_POLL_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            self._let_go()
            self._look_for_standstill()
            members = [peer for peer in self._peers if peer.rank is not None]
            if self._end_at is not None and (time.monotonic() >= self._end_at or self._everyone_failed()):
                text, code = compose(self._failures)
                return self._close({"end": text, "code": code})
            if len(members) == self._world_size and all(peer.left for peer in members):
                return self._close({"bye": True})

    def _everyone_failed(self) -> bool:
        return len({failure.rank for failure in self._failures}) >= self._world_size

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return  # gone before it was let in; a rank of ours tries again or says why not
        connection.settimeout(10)  # a rank that reads nothing can't hold the hub up for long
        peer = Peer(Line(connection))
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: Peer) -> None:
        try:
            for message in peer.line.read():
                self._take(peer, message)
        except OSError:
            self._part_from(peer)

    def _take(self, peer: Peer, message: Message) -> None:
        if peer.rank is None:
            if not hmac.compare_digest(str(message.get("token")).encode(), self._token.encode()):
                raise ConnectionError("not a rank of this job")
            peer.rank, peer.host = int(message["rank"]), str(message["host"])
        if (moves := message.get("moves", peer.moves)) != peer.moves:
            peer.moves, peer.moved_at = moves, time.monotonic()
            peer.step, peer.phase = message["step"], message["phase"]
            if peer.rank == 0:  # the others say where it was, should they lose it
                self._tell_all({"rank0": f"{peer.who()}, last seen {peer.place()}"})
        peer.arrived = message.get("arrived", peer.arrived)
        peer.left = message.get("bye", peer.left)
        if "failed" in message:
            self._note(Failure(peer.rank, peer.who(), str(message["failed"]), int(message["code"])))

    def _part_from(self, peer: Peer) -> None:
        self._selector.unregister(peer.line.socket)
        peer.line.close()
        if peer.rank is None:
            self._peers.remove(peer)  # a stranger, or one that never got to say its name
        elif not peer.left:
            peer.left = True
            if all(failure.rank != peer.rank for failure in self._failures):
                # At once: a launcher that notices the same may end this process within the second.
                lost = f"{peer.describe()}, has ended without a word (killed, crashed, or its node is gone)"
                print(f"\nerror: {lost}", file=sys.stderr, flush=True)
                self._note(Failure(peer.rank, peer.who(), f"{peer.who()} is lost; {AGAIN}", EXIT_LOST))

    def _note(self, failure: Failure) -> None:
        self._failures.append(failure)
        self._end_at = self._end_at or time.monotonic() + self._grace

    def _let_go(self) -> None:
        """Everyone met: the ranks that wait go on."""
        members = [peer for peer in self._peers if peer.rank is not None]
        if len(members) == self._world_size and min(peer.arrived for peer in members) > self._met:
            self._met = min(peer.arrived for peer in members)
            self._tell_all({"met": self._met})

    def _look_for_standstill(self) -> None:
        there = [peer for peer in self._peers if peer.rank is not None and not peer.left]
        now = time.monotonic()
        if self._timeout is None or self._end_at is not None or not there:
            return
        idle = now - max(peer.moved_at for peer in there)
        if idle > self._timeout:
            slowest = min(there, key=_suspicion)
            lines = [f"no rank got on for {idle:.0f} s (train.timeout_minutes={self._timeout / 60:g}):"]
            lines += [peer.describe() for peer in sorted(there, key=_suspicion)[:_LISTED]]
            lines += [f"and {len(there) - _LISTED} more"] if len(there) > _LISTED else []
            if missing := sorted(set(range(self._world_size)) - {peer.rank for peer in self._peers}):
                lines += [f"and rank(s) {', '.join(map(str, missing[:_LISTED]))} never came"]
            lines += [f"{AGAIN}; look at the first of these nodes, or raise the limit where such work takes so long"]
            self._note(Failure(slowest.rank or 0, slowest.who(), "\n       ".join(lines), EXIT_LOST))

    def _tell_all(self, message: Message) -> None:
        for peer in self._peers:
            if peer.rank is not None and not peer.left:
                self._send(peer, message)

    def _send(self, peer: Peer, message: Message) -> None:
        with contextlib.suppress(OSError):  # reading from it says the same, and is where it is dealt with
            peer.line.send(message)

    def _close(self, message: Message) -> None:
        # Rank 0 last: its end is this thread's too.
        for peer in sorted(self._peers, key=lambda peer: peer.rank or 0, reverse=True):
            self._send(peer, message)
        self._listening.close()


def _suspicion(peer: Peer) -> tuple[int, bool, float]:
    """Whoever is behind, or does something while others wait for it, comes first."""
    return (-1 if peer.step is None else peer.step, peer.phase == WAITING, peer.moved_at)


def compose(failures: list[Failure]) -> tuple[str, int]:
    """One message and exit code of what happened on several ranks: a lost rank is why others failed."""
    lost = [failure for failure in failures if failure.code == EXIT_LOST]
    rest = [failure for failure in failures if failure.code != EXIT_LOST]
    if lost:
        lines = [failure.message for failure in lost]
        lines += [f"       then {failure.where}: {failure.message.splitlines()[0]}" for failure in rest[:_LISTED]]
        return "\n".join(lines), EXIT_LOST
    causes = [failure for failure in rest if failure.code == 2] or rest
    by_message: dict[str, list[str]] = {}
    for failure in causes:
        by_message.setdefault(failure.message, []).append(failure.where)
    # A mistake that every rank stumbles over is shown once, without a rank.
    lines = [message if len(where) > 1 else f"{where[0]}: {message}" for message, where in by_message.items()]
    return "\n".join(lines[:_LISTED]), causes[0].code
