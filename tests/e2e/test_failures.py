"""What goes wrong on one rank: killed, frozen, mistaken, signalled. All ranks end soon, say why, and go on exactly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patience import patient
from ranks import Ranks, find_free_port, start_ranks

ROOT = Path(__file__).resolve().parents[2]
LORA = "train/lora.py"
WITHIN_SECONDS = 60


def rows_of(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if key in row]


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder)]


def wait_until(there: Callable[[], bool], seconds: float = 120, what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + patient(seconds)
    while not there():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def find_ranks(launcher: int) -> dict[int, int]:
    """Process ids by rank below a launcher."""
    found, open_ = {}, [launcher]
    while open_:
        pid = open_.pop()
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                open_ += map(int, (task / "children").read_text().split())
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        except OSError:
            continue
        rank = re.search(r"(?:^|\0)RANK=(\d+)\0", environment)
        if rank and LORA in arguments and "\0-m\0" not in arguments:
            found.setdefault(int(rank[1]), pid)
    return found


def launch(options: list[str], *launcher: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *map(str, launcher), str(ROOT / LORA), *options]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.fixture
def straight(options: Any, execute: Callable[..., int], tmp_path: Path) -> list[float]:
    """Losses of the undisturbed run: one process with the samples of two ranks in a batch."""
    assert execute(LORA, *options("straight", train__max_steps=10, train__batch_size=2)) == 0
    return losses_of(tmp_path / "straight")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_torchrun_restarts_after_a_killed_rank_and_loses_nothing(
    options: Any, straight: list[float], tmp_path: Path
) -> None:
    process = launch(
        options("elastic", train__max_steps=10),
        "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
    )  # fmt: skip
    wait_until(lambda: len(rows_of(tmp_path / "elastic")) >= 3)
    os.kill(find_ranks(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=patient(120))
    assert process.returncode == 0, output
    assert re.search(r"rank 1 \(node \S+\) last seen at step \d+ in '.*' \d+ s ago, has ended without a word", output)
    assert "resumed from" in output
    assert [row["step"] for row in rows_of(tmp_path / "elastic")] == list(range(1, 11))
    assert losses_of(tmp_path / "elastic") == pytest.approx(straight, rel=1e-5)


def test_accelerate_launch_ends_on_all_ranks_after_a_killed_one(
    options: Any, straight: list[float], execute: Callable[..., int], tmp_path: Path
) -> None:
    process = launch(
        options("killed", train__max_steps=1000, schedule__name="constant"),
        "accelerate.commands.accelerate_cli", "launch", f"--main_process_port={find_free_port()}",
        "--config_file", ROOT / "configs/accelerate/ddp.yaml",
    )  # fmt: skip
    wait_until(lambda: len(rows_of(tmp_path / "killed")) >= 3)
    pids = find_ranks(process.pid)
    assert set(pids) == {0, 1}
    os.kill(pids[0], signal.SIGKILL)  # the one that the others' connections lead to
    killed = time.monotonic()
    output, _ = process.communicate(timeout=WITHIN_SECONDS)
    assert time.monotonic() - killed < WITHIN_SECONDS and process.returncode != 0
    assert re.search(r"rank 0 \(node \S+\), last seen at step \d+ in '.*', has ended without a word", output), output
    assert not any(is_alive(pid) for pid in pids.values())
    done = len(rows_of(tmp_path / "killed"))
    assert execute(LORA, *options("killed", train__max_steps=done, schedule__name="constant", train__batch_size=2)) == 0
    assert len(losses_of(tmp_path / "killed")) == done


def test_killed_ranks_resume_to_the_same_losses(
    options: Any, straight: list[float], execute: Callable[..., int], tmp_path: Path
) -> None:
    arguments = options("copies", train__max_steps=10)
    ranks = start_ranks(execute, tmp_path / "first", LORA, [arguments] * 2)
    wait_until(lambda: len(rows_of(tmp_path / "copies")) >= 5, what=ranks.text)
    ranks.kill(1)
    assert ranks.wait(WITHIN_SECONDS) == [3, -signal.SIGKILL]
    assert "is lost; the job ends on all ranks; start the same command again" in ranks.outputs[0].read_text()
    assert start_ranks(execute, tmp_path / "second", LORA, [arguments] * 2).wait(120) == [0, 0]
    assert losses_of(tmp_path / "copies") == pytest.approx(straight, rel=1e-5)


def hide_the_cache(rank: int) -> None:
    """From its third sample on, rank 1 finds nothing in the cache."""
    from cogtune import dataset

    read, seen = dataset.Cache.read, []

    def watched(self: Any, kind: str, key: str) -> Any:
        seen.extend([kind] if sys._getframe(1).f_code.co_name == "read_sample" else [])
        return None if rank == 1 and len(seen) > 4 else read(self, kind, key)

    dataset.Cache.read = watched  # type: ignore[method-assign]


def test_a_mistake_that_one_rank_finds_ends_all_with_its_message(
    options: Any, execute: Callable[..., int], tmp_path: Path
) -> None:
    arguments = options("mistake", train__max_steps=50)
    ranks = start_ranks(execute, tmp_path / "out", LORA, [arguments] * 2, prepare=hide_the_cache)
    assert ranks.wait(WITHIN_SECONDS) == [2, 2], ranks.text()
    assert re.search(
        r"error: rank 1 \(node \S+\): cache entry of clip '.*' .* is missing", ranks.outputs[0].read_text()
    )
    assert "Traceback" not in ranks.text()


def test_a_rank_that_hangs_is_named_after_the_time_limit(
    options: Any, execute: Callable[..., int], tmp_path: Path
) -> None:
    arguments = options("frozen", train__max_steps=1000, train__timeout_minutes=0.05)
    ranks = start_ranks(execute, tmp_path / "out", LORA, [arguments] * 2)
    wait_until(lambda: len(rows_of(tmp_path / "frozen")) >= 3, what=ranks.text)
    ranks.kill(1, signal.SIGSTOP)
    wait_until(lambda: "no rank got on" in ranks.outputs[0].read_text(), WITHIN_SECONDS, ranks.text)
    ranks.kill(1, signal.SIGCONT)
    assert ranks.wait(20) == [3, 3]
    said = ranks.outputs[0].read_text()
    assert "(train.timeout_minutes=0.05)" in said
    assert re.search(r"rank 1 \(node \S+\) last seen at step \d+ in '.*' \d+ s ago", said), said


def test_four_ranks_validate_three_videos_and_two_clips(
    options: Any, execute: Callable[..., int], tmp_path: Path
) -> None:
    """More ranks than either, during training and at the end; and a run that is finished repeats nothing."""
    settings: dict[str, Any] = {
        "validation__enabled": "true", "validation__prompts": '["waves", "a tree", "rain"]',
        "validation__num_inference_steps": 1, "validation__base_videos": "false", "validation__every_steps": 1,
        "data__validation_clips": 2, "train__max_steps": 2,
    }  # fmt: skip
    ranks = start_ranks(execute, tmp_path / "out", LORA, [options("four", **settings)] * 4)
    assert ranks.wait(200) == [0] * 4, ranks.text()
    folder = tmp_path / "four"
    assert [row["step"] for row in rows_of(folder, "eval_loss")] == [0, 1, 2]
    videos = {step: sorted(path.name for path in (folder / "samples" / step).glob("*.mp4")) for step in
              ("step-000001", "step-000002")}  # fmt: skip
    assert set(map(tuple, videos.values())) == {("00-0.mp4", "01-0.mp4", "02-0.mp4")}
    made = {path: path.stat().st_mtime_ns for path in (folder / "samples").rglob("*.mp4")}
    one = options("four", **settings | {"train__batch_size": 4})
    assert execute(LORA, *one) == 0
    assert [row["step"] for row in rows_of(folder, "eval_loss")] == [0, 1, 2]
    assert made == {path: path.stat().st_mtime_ns for path in made}
    (folder / "samples" / "step-000002" / "01-0.mp4").unlink()
    assert execute(LORA, *one) == 0
    assert (folder / "samples" / "step-000002" / "01-0.mp4").is_file()


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_signal_while_validating_saves_and_ends_soon(
    step: int, options: Any, execute: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, between and at the end; the run that goes on does that validation and ends as ever."""
    from cogtune import validation

    evaluate_, calls = validation.Denoiser.losses, []

    def signalled(self: Any, *arguments: Any, weighted: bool = True) -> Any:
        if not weighted:
            calls.append(arguments)
            if len(calls) == 1 + 9 * step // 2:  # in the first pass of that step's validation
                os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate_(self, *arguments, weighted=weighted)

    monkeypatch.setattr(validation.Denoiser, "losses", signalled)
    arguments = options("signalled", validation__enabled="true", validation__every_steps=2, checkpoint__every_steps=100)
    assert execute(LORA, *arguments) == 0
    folder = tmp_path / "signalled"
    assert len(calls) == 1 + 9 * step // 2, "nothing is evaluated after it"
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == [f"step-{step:06d}"]
    assert not (folder / "final").exists()
    assert execute(LORA, *arguments) == 0
    assert [row["step"] for row in rows_of(folder, "eval_loss")] == [0, 2, 4]
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3, 4] and (folder / "final").is_dir()


def test_nodes_with_caches_of_their_own_fill_each(options: Any, execute: Callable[..., int], tmp_path: Path) -> None:
    """Two ranks share a cache, a third has another one: the third encodes everything, the two share the work."""
    caches = [tmp_path / "a", tmp_path / "a", tmp_path / "b"]
    settings = [options("none", data__cache_dir=cache) for cache in caches]

    def count(rank: int) -> None:
        from cogtune import models

        for name in ("load_vae", "load_text_encoder"):
            load = getattr(models, name)

            def noted(*arguments: Any, load: Any = load, name: str = name) -> Any:
                print(f"{name} on rank {rank}")
                return load(*arguments)

            setattr(models, name, noted)

    ranks = start_ranks(execute, tmp_path / "first", "data/prepare.py", settings, prepare=count)
    assert ranks.wait(120) == [0, 0, 0], ranks.text()
    entries = {cache: sorted(path.name for path in cache.rglob("*.safetensors")) for cache in caches}
    assert len(entries[caches[0]]) == 12 and entries[caches[0]] == entries[caches[2]]
    assert "nodes have their own" in ranks.outputs[0].read_text()
    for name in ("load_vae", "load_text_encoder"):
        assert [path.read_text().count(name) for path in ranks.outputs] == [1, 1, 1], "spread, and once each"
    assert not list(tmp_path.rglob(".seen-*"))
    again = start_ranks(execute, tmp_path / "again", "data/prepare.py", settings, prepare=count)
    assert again.wait(60) == [0, 0, 0] and "load_" not in again.text(), "what is there needs no model"


def test_output_folders_of_nodes_must_be_one(options: Any, execute: Callable[..., int], tmp_path: Path) -> None:
    assert execute(LORA, *options("one", train__batch_size=2)) == 0
    settings = [options(name) for name in ("one", "other")]
    ranks: Ranks = start_ranks(execute, tmp_path / "out", LORA, settings)
    assert ranks.wait(60) == [2, 2]
    assert "the nodes find different checkpoints there" in ranks.text()
    assert ranks.text().count("error:") == 1
