"""Several ranks of a command on a CPU, as copies of the test's own process: no launcher, and no seconds of imports."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patience import patient


def find_free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Ranks:
    """Running copies; `outputs` are the files that they print to."""

    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes by rank (minus the signal's number for a killed one); none may take longer than that."""
        deadline = time.monotonic() + patient(seconds)
        while len(self.codes) < len(self.pids) and time.monotonic() < deadline:
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        missing = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        self.end()
        assert not missing, f"ranks {missing} are still there after {seconds} s:\n{self.text()}"
        return [self.codes[rank] for rank in range(len(self.pids))]

    def end(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.codes[rank] = -signal.SIGKILL

    def text(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in self.outputs)


def start_ranks(
    execute: Callable[..., int],
    folder: Path,
    script: str,
    options: Sequence[Sequence[str]],
    *,
    prepare: Callable[[int], Any] = lambda _rank: None,
    environment: Callable[[int], dict[str, str]] = lambda _rank: {},
) -> Ranks:
    """One rank for each row of options; `prepare(rank)` runs in each first."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = str(find_free_port()), Ranks([], [])
    for rank, arguments in enumerate(options):
        output = folder / f"rank{rank}.txt"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with output.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                _forget_the_parent()
                os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(options))})
                os.environ.update({"LOCAL_WORLD_SIZE": str(len(options)), "MASTER_ADDR": "127.0.0.1"})
                os.environ.update({"MASTER_PORT": port} | environment(rank))
                prepare(rank)
                code = execute(script, *arguments)
            except BaseException:  # noqa: BLE001  # a copy of the tests must not go on with the next one
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.pids.append(pid)
        ranks.outputs.append(output)
    return ranks


def _forget_the_parent() -> None:
    """Accelerate remembers the process group of earlier runs in this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
