"""Several ranks on a CPU as copies of the test's own process: no launcher, and no seconds of imports.

`run_worker` has a launcher for who wants one.
"""

import os
import runpy
import signal
import socket
import subprocess
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

    def wait(self, seconds: float, *, fail_together: bool = False) -> list[int]:
        """Exit codes by rank (minus the signal's number for a killed one); none may take longer than that.

        `fail_together`: as soon as one fails the others are ended, as a launcher does.
        """
        deadline = time.monotonic() + patient(seconds)
        try:
            while len(self.codes) < len(self.pids) and time.monotonic() < deadline:
                if fail_together and any(self.codes.values()):
                    time.sleep(2)  # others may have more to say of it
                    self.end()
                self._look()
            missing = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        finally:  # the test's own time limit too
            self.end()
        assert not missing, f"ranks {missing} are still there after {seconds} s:\n{self.text()}"
        return [self.codes[rank] for rank in range(len(self.pids))]

    def wait_for(self, rank: int, seconds: float) -> int:
        """One rank's exit code; the others may go on."""
        deadline = time.monotonic() + patient(seconds)
        while rank not in self.codes:
            assert time.monotonic() < deadline, f"rank {rank} is still there after {seconds} s:\n{self.text()}"
            self._look()
        return self.codes[rank]

    def _look(self) -> None:
        """Notes who has ended, a moment later."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)

    def end(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def text(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-6000:]}" for path in self.outputs)


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
                os.environ.update({"MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""} | environment(rank))
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


def run_worker(
    num_ranks: int, script: Path, *arguments: object, folder: Path, seconds: float = 240, launched: bool = False
) -> None:
    """A script as the main program of several ranks, which must succeed; what they print goes to `folder`.

    `launched`: under torchrun, as on GPUs, since a process that has used one can't be copied; nothing is printed then.
    """
    if launched:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        command += [str(script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=patient(seconds), check=False)
        assert done.returncode == 0, done.stderr.partition("Traceback")[2][:8000] or done.stderr[-8000:]
        return
    ranks = start_ranks(_run_as_main, folder, str(script), [list(map(str, arguments))] * num_ranks)
    assert ranks.wait(seconds, fail_together=True) == [0] * num_ranks, ranks.text()


def _run_as_main(script: str, *arguments: str) -> int:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    return 0
