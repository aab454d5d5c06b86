"""Checkpoints of several processes: written together beside training, read by any number, never half."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from cogtune.shards.stored import StoredTensors
from ranks import run_worker

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests/e2e/checkpoint_worker.py"
SFT = "train/sft.py"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes saved; everything that `checkpoint_worker.py` checks while it does has passed."""
    folder = tmp_path_factory.mktemp("shards")
    run_worker(4, WORKER, "save", folder, folder=folder / "printed")
    return folder


def test_two_processes_read_what_four_wrote_under_every_division(saved: Path, tmp_path: Path) -> None:
    run_worker(2, WORKER, "load", saved, folder=tmp_path)


@pytest.mark.parametrize("case", ["fsdp", "hsdp", "ddp"])
def test_one_process_reads_what_four_wrote(case: str, saved: Path) -> None:
    stored, truth = StoredTensors(saved / case / "step-000003"), load_file(saved / f"{case}.safetensors")
    assert stored.tensors.keys() == truth.keys()
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in truth.items())
    assert {name.partition(".")[0] for name in truth} == {"weights", "optimizer", "ema"}


def test_a_divided_run_goes_on_in_one_process_and_the_other_way_round(
    options: Callable[..., list[str]], run_command: Any, read_tensors: Any, tmp_path: Path
) -> None:
    """FSDP2 on two processes and plain training on one: each resumes the other's checkpoints to the same weights."""
    settings: dict[str, object] = {"train__ema_decay": 0.9, "optimizer__learning_rate": 1e-3}
    settings |= {"train__max_steps": 4, "schedule__name": "constant", "train__timestep_strata": 4}
    alone = settings | {"train__gradient_accumulation_steps": 2}
    part = {"train__trained_weights": '["attention", "last 1 blocks"]'}

    assert run_command(SFT, *options("alone", **alone)).code == 0
    assert run_command(SFT, *options("half", **alone | {"train__max_steps": 2})).code == 0
    cases = [
        {"script": SFT, "environment": FSDP, "arguments": options("divided", **settings)},
        {"script": SFT, "environment": FSDP, "arguments": options("half", **settings)},  # goes on from one process
        {"script": SFT, "environment": FSDP, "arguments": options("part", **settings | part)},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker, printed = ROOT / "tests/e2e/strategies_worker.py", tmp_path / "printed"
    run_worker(2, worker, tmp_path / "cases.json", folder=printed, launched=True)
    expected = read_tensors(tmp_path / "alone/checkpoints/step-000004")
    for name in ("divided", "half"):
        close(read_tensors(tmp_path / name / "checkpoints/step-000004"), expected)
    assert len(list((tmp_path / "divided/checkpoints/step-000004").glob("weights-*"))) == 2, "each wrote its own"
    final = load_file(tmp_path / "divided/final/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(final[name], t) for name, t in group(tmp_path / "divided", "ema", read_tensors).items())

    assert run_command(SFT, *options("part-alone", **alone | part)).code == 0
    trained = group(tmp_path / "part", "weights", read_tensors)
    close(trained, group(tmp_path / "part-alone", "weights", read_tensors))
    assert 0 < len(trained) < len(final)

    (tmp_path / "divided/checkpoints/step-000004").rename(tmp_path / "straight")
    outcome = run_command(SFT, *options("divided", **alone))
    assert outcome.code == 0 and "at step 2" in outcome.out, outcome.err
    close(read_tensors(tmp_path / "divided/checkpoints/step-000004"), expected)


def group(run: Path, name: str, read_tensors: Any) -> dict[str, torch.Tensor]:
    found = read_tensors(run / "checkpoints/step-000004")
    return {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Sums run in another order; Adam turns rounding of tiny gradients into a few parts in a hundred of a step."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.startswith("optimizer."):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)


_KILL_WHILE_WRITING = """
import os, runpy, signal, sys, time
from cogtune.shards import writer

write, calls = writer.write_file, []

def write_and_die(folder, file, chunks):
    calls.append(file.name)
    if "step-000004" in folder.name:  # the second checkpoint, beside training
        (folder / file.name).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, file, chunks)

writer.write_file = write_and_die
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_killed_while_a_checkpoint_is_written_beside_training_it_resumes_exactly(
    options: Callable[..., list[str]], run_command: Any, run_process: Any, read_tensors: Any, tmp_path: Path
) -> None:
    settings = {"train__max_steps": 6, "checkpoint__keep_last": 1, "checkpoint__asynchronous": "on"}
    assert run_command(SFT, *options("straight", **settings)).code == 0
    driver = tmp_path / "driver.py"
    driver.write_text(_KILL_WHILE_WRITING.format(script=str(ROOT / SFT)))
    done = run_process(driver, *options("killed", **settings))
    assert done.code == -signal.SIGKILL, done.err
    folder = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".partial-step-000004", "step-000002"]
    outcome = run_command(SFT, *options("killed", **settings))
    assert outcome.code == 0 and "at step 2" in outcome.out, outcome.err
    assert [path.name for path in folder.iterdir()] == ["step-000006"]
    found, expected = (read_tensors(tmp_path / n / "checkpoints/step-000006") for n in ("killed", "straight"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("asynchronous", ["on", "off"])
def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(
    asynchronous: str,
    options: Callable[..., list[str]],
    run_command: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from cogtune.shards import writer

    write = writer.write_file

    def fail_later(folder: Path, *rest: Any) -> str:
        if "step-000004" in folder.name:
            raise OSError(28, "No space left on device")
        return write(folder, *rest)

    monkeypatch.setattr(writer, "write_file", fail_later)
    arguments = options("run", train__max_steps=200, checkpoint__asynchronous=asynchronous)
    outcome = run_command(SFT, *arguments)
    assert outcome.code == 2 and outcome.err.count("error: ") == 1, outcome.err
    for part in ("checkpoint at step 4", "No space left", "complete checkpoints: step-000002", "free some space"):
        assert part in outcome.err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] < 8, "soon, not at the next save's end"


def test_the_plan_says_how_checkpoints_are_written(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(SFT, *options("run"), "--dry-run")
    assert outcome.code == 0 and "by each process, written beside training" in outcome.out
    outcome = run_command(SFT, *options("run", checkpoint__asynchronous="off"), "--dry-run")
    assert "written while training waits" in outcome.out
    outcome = run_command("train/lora.py", *options("run", checkpoint__asynchronous="on"))
    assert outcome.code == 2 and "checkpoint.asynchronous=on: is for full fine-tuning" in outcome.err


@pytest.mark.parametrize("part", [False, True])
def test_a_checkpoint_becomes_a_pipeline(
    part: bool,
    options: Callable[..., list[str]],
    run_command: Any,
    read_tensors: Any,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    changes = {"train__trained_weights": '["last 1 blocks"]'} if part else {"train__ema_decay": 0.9}
    assert run_command(SFT, *options("run", **changes)).code == 0
    step = tmp_path / "run/checkpoints/step-000002"
    names = {"default": [], "raw": ["--raw-weights"], "cast": ["--dtype", "bfloat16"]}
    for name, extra in names.items():
        outcome = run_command("scripts/convert.py", "checkpoint", step, tmp_path / name, "--base", tiny_folder, *extra)
        assert outcome.code == 0, outcome.err
    saved = read_tensors(step)
    before = load_file(tiny_folder / "transformer/diffusion_pytorch_model.safetensors")
    for name, kind in (("default", "weights" if part else "ema"), ("raw", "weights"), ("cast", "ema")):
        state = CogVideoXPipeline.from_pretrained(tmp_path / name).transformer.state_dict()
        for key, tensor in state.items():
            expected = saved.get(f"{kind}.{key}", saved.get(f"weights.{key}", before.get(key)))
            assert expected is None or torch.equal(tensor, expected.bfloat16().float() if name == "cast" else expected)
    assert not torch.equal(
        saved["weights.transformer_blocks.1.ff.net.2.weight"], before["transformer_blocks.1.ff.net.2.weight"]
    )

    def refused(*arguments: object) -> str:
        outcome = run_command("scripts/convert.py", "checkpoint", *arguments)
        assert outcome.code == 2 and not (tmp_path / "out").exists(), outcome.err
        return outcome.err

    damaged = next(step.glob("weights-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert "is damaged" in refused(step, tmp_path / "out", "--base", tiny_folder)
    if not part:
        assert run_command("train/lora.py", *options("lora")).code == 0
        lora = tmp_path / "lora/checkpoints/step-000004"
        assert "holds an adapter" in refused(lora, tmp_path / "out", "--base", tiny_folder)
