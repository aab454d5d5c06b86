"""The watch: meeting, losing a rank, failing on one, standing still; several ranks in this process, nothing ends it."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cogtune.cluster import watch as watch_module
from cogtune.cluster import whereabouts as whereabouts_module
from cogtune.cluster.hub import EXIT_LOST, Failure, Hub, compose
from cogtune.cluster.watch import Watch, connect
from cogtune.cluster.whereabouts import HERE, Whereabouts, enter, inside, move
from cogtune.errors import UserError
from patience import patient

TOKEN = "secret"


class Job:
    """Ranks of one job in this process; `ended[rank]` is the exit code that a rank would have ended with."""

    def __init__(self, size: int, timeout_seconds: float | None = None) -> None:
        self.hub = Hub(size, TOKEN, timeout_seconds=timeout_seconds, grace_seconds=0.3)
        self.hub.start()
        self.ended: dict[int, int] = {}
        self.ranks = [self._join(rank) for rank in range(size)]

    def _join(self, rank: int) -> Watch:
        line = connect(["127.0.0.1"], self.hub.port)
        end: Callable[[int], Any] = lambda code: self.ended.setdefault(rank, code)  # noqa: E731
        watch = Watch(line, TOKEN, rank=rank, host=f"n{rank}", speaks=rank == 1, beat_seconds=0.05, end=end)
        watch.start()
        return watch

    def kill(self, rank: int) -> None:
        """What the kernel does to a killed process's connections."""
        self.ranks[rank]._left = True  # its thread belongs to the dead
        self.ranks[rank]._line.socket.shutdown(socket.SHUT_RDWR)

    def wait(self, *ranks: int) -> None:
        deadline = time.monotonic() + patient(5)
        while not set(ranks) <= self.ended.keys():
            assert time.monotonic() < deadline, self.ended
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def whereabouts() -> Iterator[None]:
    before = vars(HERE).copy()
    yield
    vars(HERE).update(before)


def test_seconds_of_each_phase_add_up_to_the_process_s_age(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(whereabouts_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(whereabouts_module, "_process_age", lambda: 20.0)
    vars(HERE).update(vars(Whereabouts()))
    for phase, at in (("loading", 101.0), ("training", 104.0), ("loading", 110.0)):
        now[0] = at
        enter(phase)
    now[0] = 112.0
    assert whereabouts_module.seconds_by_phase() == {"starting": 9.0, "loading": 5.0, "training": 6.0}


def test_a_process_knows_its_age() -> None:
    started = time.time()
    code = "from cogtune.cluster import whereabouts as w; print(w._process_age(), sum(w.seconds_by_phase().values()))"
    done = subprocess.run(
        [sys.executable, "-c", f"import time; time.sleep(0.3); {code}"], capture_output=True, text=True
    )
    age, total = map(float, done.stdout.split())
    assert 0.25 < age <= total + 0.02 < time.time() - started + 0.1, done.stderr


def test_ranks_meet_however_late_one_comes() -> None:
    job = Job(3)
    passed: list[int] = []
    for turn in (1, 2):
        threads = [
            threading.Thread(target=lambda rank=rank: (job.ranks[rank].meet(), passed.append(rank))) for rank in (0, 1)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert len(passed) == 2 * (turn - 1), "nobody goes on before the last one is there"
        job.ranks[2].meet()
        for thread in threads:
            thread.join(5)
        assert len(passed) == 2 * turn
    for watch in job.ranks:
        watch._left = True
    for watch in job.ranks:
        watch._send({"bye": True})
    job.hub.thread.join(5)
    assert not job.hub.thread.is_alive() and not job.ended


def test_a_lost_rank_ends_the_others_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(3)
    enter("validation", 120)
    time.sleep(0.3)
    job.kill(2)
    started = time.monotonic()
    job.wait(0, 1)
    assert time.monotonic() - started < patient(3)
    assert job.ended == {0: EXIT_LOST, 1: EXIT_LOST}
    said = capfd.readouterr().err
    assert "rank 2 (node n2) last seen at step 120 in 'validation' 0 s ago, has ended without a word" in said
    assert "rank 2 (node n2) is lost; the job ends on all ranks; start the same command again" in said


def test_losing_rank_0_ends_the_others_too(capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(3)
    enter("saving a checkpoint", 7)
    time.sleep(0.3)
    for peer in list(job.hub._peers):  # its process and with it the hub
        peer.line.socket.shutdown(socket.SHUT_RDWR)
    job.wait(1, 2)
    assert job.ended[1] == job.ended[2] == EXIT_LOST
    said = capfd.readouterr().err
    expected = "error: rank 0 (node n0), last seen at step 7 in 'saving a checkpoint', has ended without a word"
    assert said.count(expected) == 1, "one rank says it"


def test_a_mistake_found_by_one_rank_ends_all_with_its_message(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_ANSWER_SECONDS", 2)
    job = Job(2)
    with pytest.raises(AssertionError):
        job.ranks[1].fail("clip 'a' is damaged; mend it", 2)
    job.wait(0, 1)
    assert job.ended == {0: 2, 1: 2}
    assert "error: rank 1 (node n1): clip 'a' is damaged; mend it" in capfd.readouterr().err


def test_standing_still_is_noticed_with_the_slowest_rank_first(capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(3, timeout_seconds=0.6)
    enter("forward and backward pass", 9)
    for _ in range(8):  # one rank that gets on is enough
        time.sleep(0.15)
        move()
    assert not job.ended
    time.sleep(0.2)  # the last beat is through
    job.ranks[1]._send({"moves": -2, "step": 8, "phase": "waiting for data"})
    job.wait(0, 1, 2)
    assert set(job.ended.values()) == {EXIT_LOST}
    said = capfd.readouterr().err
    assert "(train.timeout_minutes=0.01)" in said and "no rank got on for" in said
    assert said.index("rank 1 (node n1) last seen at step 8 in 'waiting for data'") < said.index("rank 0 (node n0)")


def test_strangers_are_not_heard() -> None:
    job = Job(2)
    for garbage in (
        b'{"token": "wrong", "failed": "x", "code": 2}\n',
        b"GET / HTTP/1.1\n\n",
        b"[1]\n",
        b"[" * 99999 + b"\n",
        '{"token": "\u00e9"}\n'.encode(),
    ):
        with socket.create_connection(("127.0.0.1", job.hub.port)) as stranger:
            stranger.sendall(garbage)
            assert stranger.recv(10) == b"", "the hub hangs up"
    threads = [threading.Thread(target=watch.meet) for watch in job.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not job.ended


def test_causes_come_before_what_they_caused() -> None:
    lost = Failure(3, "rank 3 (node d)", "rank 3 (node d) is lost", EXIT_LOST)
    broken = Failure(0, "rank 0 (node a)", "RuntimeError: Connection closed by peer\nmore", 1)
    assert compose([broken, lost]) == (
        "rank 3 (node d) is lost\n       then rank 0 (node a): RuntimeError: Connection closed by peer",
        EXIT_LOST,
    )
    same = [Failure(rank, f"rank {rank} (node a)", "the disk is full", 2) for rank in range(4)]
    assert compose([broken, *same]) == ("the disk is full", 2)
    assert compose([broken])[1] == 1


def test_phases_nest_and_an_error_keeps_the_innermost() -> None:
    here: Whereabouts = HERE
    enter("training", 3)
    with inside("saving"):
        assert (here.phase, here.step) == ("saving", 3)
    assert here.phase == "training"
    with pytest.raises(ValueError), inside("validation"):
        raise ValueError
    assert here.phase == "validation"


def test_an_address_that_does_not_answer_says_what_to_open() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(UserError, match="open the firewall"):
            connect(["127.0.0.1"], port)
