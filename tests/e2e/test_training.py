"""Whole training runs on a tiny random pipeline: exact resume, equal layouts, clean stops, usable results."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from patience import patient

ROOT = Path(__file__).resolve().parents[2]
BASIC: dict[str, Any] = {
    "data": {"validation_clips": 0, "num_workers": 0},
    "schedule": {"warmup_steps": 0},
    "train": {"max_steps": 4, "timestep_strata": 4},
    "validation": {"enabled": False},
    "checkpoint": {"every_steps": 2},
    "tracking": {"log_every_steps": 1},
}


@pytest.fixture
def make_config(tiny_folder: Path, clips_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a run's config; sections given as keywords are merged in. All runs of the tests share one cache."""
    cache = tmp_path_factory.getbasetemp() / "training-cache"

    def make(name: str, **sections: dict[str, Any]) -> Path:
        values = json.loads(json.dumps(BASIC))
        values["model"] = {"path": str(tiny_folder)}
        values["data"] |= {"manifest": str(clips_folder), "cache_dir": str(cache)}
        values["output_dir"] = str(tmp_path / name)
        for section, settings in sections.items():
            values[section] = values.get(section, {}) | settings
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


def read_rows(folder: Path, key: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def assert_same_tensors(first: Path, second: Path, *, atol: float = 0.0) -> None:
    """Tensor by tensor, exactly unless told otherwise; headers may list their entries in any order."""
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=f"{name} of {first} and {second}")


def start(
    script: str, config: Path, *options: str, launcher: str | None = None, driver: str | None = None
) -> subprocess.Popen[str]:
    """A command in a process group of its own, directly or through `accelerate launch` with one of our configs."""
    command = [sys.executable, driver or ROOT / script]
    if launcher is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", f"--main_process_port={port}"]
        command = [sys.executable, *launch, "--config_file", ROOT / "configs/accelerate" / launcher, ROOT / script]
    return subprocess.Popen(
        [*map(str, command), "--config", str(config), *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


FILES = {
    "train/lora.py": ("pytorch_lora_weights.safetensors", "optimizer.safetensors"),
    "train/sft.py": tuple(f"{group}-00000-0000.safetensors" for group in ("weights", "optimizer", "ema")),
}


@pytest.mark.parametrize("script", FILES)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    script: str, make_config: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"train": {"gradient_accumulation_steps": 2} | BASIC["train"]}
    if script == "train/lora.py":
        options["adapter"] = {"rank": 4, "dropout": 0.3}  # draws on the device must be keyed too
    else:
        options["train"]["ema_decay"] = 0.9
    config = make_config("run", **options)
    assert run_command(script, "--config", config).code == 0
    last = tmp_path / "run" / "checkpoints" / "step-000004"
    last.rename(tmp_path / "straight")
    rows = read_rows(tmp_path / "run", "loss")
    outcome = run_command(script, "--config", config)
    assert outcome.code == 0 and "resumed from" in outcome.out and "at step 2" in outcome.out
    for name in FILES[script]:
        assert_same_tensors(last / name, tmp_path / "straight" / name)
    resumed = read_rows(tmp_path / "run", "loss")
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in resumed] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in rows
    ]


_KILL_DURING_SAVE = """
import os, runpy, signal, sys
from cogtune import checkpoint

write = checkpoint._write_synced
saves = []

def write_and_die(path, text):
    saves.append(path)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # everything but the manifest of the second checkpoint is written
    write(path, text)

checkpoint._write_synced = write_and_die
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_killed_in_the_middle_of_a_save_it_resumes_exactly(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    straight, killed = make_config("straight"), make_config("killed")
    assert run_command("train/lora.py", "--config", straight).code == 0
    assert (tmp_path / "straight" / "report.html").is_file(), "validation is off; the report is written all the same"
    driver = tmp_path / "driver.py"
    driver.write_text(_KILL_DURING_SAVE.format(script=str(ROOT / "train/lora.py")))
    process = start("", killed, driver=str(driver))
    process.communicate(timeout=patient(120))
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".partial-step-000004", "step-000002"]
    outcome = run_command("train/lora.py", "--config", killed)
    assert outcome.code == 0 and "at step 2" in outcome.out
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]
    for name in FILES["train/lora.py"]:
        expected = tmp_path / "straight" / "checkpoints" / "step-000004" / name
        assert_same_tensors(folder / "step-000004" / name, expected)


@pytest.mark.parametrize("script", FILES)
def test_two_processes_equal_one_with_batch_two_or_accumulation(
    script: str, make_config: Callable[..., Path], run_command: Any, read_tensors: Any, tmp_path: Path
) -> None:
    train = {"max_steps": 3, "timestep_strata": 4} | ({"ema_decay": 0.9} if script == "train/sft.py" else {})
    options = {"optimizer": {"learning_rate": 1e-3}, "checkpoint": {"every_steps": 3}}
    layouts = {
        "processes": make_config("processes", train=train, **options),
        "batch": make_config("batch", train=train | {"batch_size": 2}, **options),
        "accumulation": make_config("accumulation", train=train | {"gradient_accumulation_steps": 2}, **options),
    }
    process = start(script, layouts.pop("processes"), launcher="ddp.yaml")  # two processes, gloo without GPUs
    output, _ = process.communicate(timeout=patient(180))
    assert process.returncode == 0, output
    for config in layouts.values():
        assert run_command(script, "--config", config).code == 0
    folders = {name: tmp_path / name for name in ("processes", "batch", "accumulation")}
    losses = {name: [r["loss"] for r in read_rows(folder, "loss")] for name, folder in folders.items()}
    seen = {name: [r["samples_seen"] for r in read_rows(folder, "loss")] for name, folder in folders.items()}
    assert seen["processes"] == seen["batch"] == seen["accumulation"] == [2, 4, 6]
    for name in layouts:
        assert losses["processes"] == pytest.approx(losses[name], rel=1e-5)
        # Sums run in another order; Adam turns rounding of tiny gradients into a few parts in a thousand of a step.
        two, one = (read_tensors(folders[which] / "checkpoints/step-000003") for which in ("processes", name))
        assert two.keys() == one.keys()
        for key in one:
            if not key.startswith("optimizer."):
                torch.testing.assert_close(two[key], one[key], rtol=0, atol=3e-5, msg=key)


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + patient(90)
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def test_sigterm_to_the_process_group_saves_and_the_run_goes_on(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    """Schedulers signal every process of a job, the loader's workers too."""
    settings = {"train": {"max_steps": 80, "timestep_strata": 4}, "checkpoint": {"every_steps": 1000}}
    stopped, straight = make_config("stopped", **settings), make_config("straight", **settings)
    process = start("train/lora.py", stopped, "--data.num_workers=2")
    wait_for_rows(tmp_path / "stopped", 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=patient(60))
    assert process.returncode == 0, output
    assert "stopped by a signal; the checkpoint is saved" in output
    saved = list((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and 2 <= int(saved[0].name[5:]) < 80
    assert not (tmp_path / "stopped" / "final").exists() and (tmp_path / "stopped" / "report.html").is_file()
    assert run_command("train/lora.py", "--config", stopped).code == 0
    assert run_command("train/lora.py", "--config", straight).code == 0
    weights = "final/pytorch_lora_weights.safetensors"
    assert_same_tensors(tmp_path / "stopped" / weights, tmp_path / "straight" / weights)


def test_sigterm_to_accelerate_launch_reaches_the_trainer(make_config: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"train": {"max_steps": 4000, "timestep_strata": 4}, "checkpoint": {"every_steps": 100000}}
    process = start("train/lora.py", make_config("launched", **settings), launcher="single.yaml")
    wait_for_rows(tmp_path / "launched", 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=patient(60))  # ends when the trainer, too, has closed the pipe
    assert "stopped by a signal; the checkpoint is saved" in output
    assert len(list((tmp_path / "launched" / "checkpoints").glob("step-*"))) == 1


def test_starting_from_another_runs_checkpoint(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    """`resume=PATH` starts a new folder there, and goes on from its own checkpoints afterwards."""
    first = make_config("first")
    assert run_command("train/lora.py", "--config", first).code == 0
    origin = tmp_path / "first" / "checkpoints" / "step-000002"
    second = make_config("second", checkpoint={"every_steps": 1, "resume": str(origin)})
    assert "at step 2" in run_command("train/lora.py", "--config", second).out
    weights = "final/pytorch_lora_weights.safetensors"
    assert_same_tensors(tmp_path / "first" / weights, tmp_path / "second" / weights)
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-000004")
    assert "at step 3" in run_command("train/lora.py", "--config", second).out


def test_changed_prompts_are_not_shown_beside_other_prompts_videos(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    videos = {"enabled": True, "num_inference_steps": 2, "prompts": ["waves"]}
    config = make_config("prompts", validation=videos)
    assert run_command("train/lora.py", "--config", config).code == 0
    samples = tmp_path / "prompts" / "samples" / "step-000004"
    assert (samples / "00-0-base.mp4").is_file()
    shutil.rmtree(samples)
    assert run_command("train/lora.py", "--config", config, "--validation.prompts=something else").code == 0
    assert (samples / "00-0.mp4").is_file() and not (samples / "00-0-base.mp4").exists()
    page = (tmp_path / "prompts" / "report.html").read_text().split("<h2>Clips</h2>")[0]
    assert page.count("data:video/mp4") == 1 and ">base model<" not in page


def test_missing_files_are_all_named_or_left_out(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path, clips_folder: Path
) -> None:
    rows = [{"video": name, "caption": "waves"} for name in ("gone.mp4", "clip0.mp4", "lost.mp4")]
    manifest = clips_folder / "partly.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config("missing", data=BASIC["data"] | {"manifest": str(manifest)})
    for options in ([], ["--dry-run"]):
        outcome = run_command("train/lora.py", "--config", config, *options)
        assert outcome.code == 2 and "2 clip(s) have no file" in outcome.err
        assert "gone.mp4" in outcome.err and "lost.mp4" in outcome.err and "data.bad_clips=skip" in outcome.err
    outcome = run_command("train/lora.py", "--config", config, "--data.bad_clips=skip")
    assert outcome.code == 0 and "leaving out 2 clip(s)" in outcome.out
    manifest.unlink()


def test_main_job_from_clips_to_video(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path, tiny_folder: Path
) -> None:
    config = make_config(
        "job",
        data=BASIC["data"] | {"validation_clips": 1, "id_token": "zib"},
        validation={
            "enabled": True,
            "every_steps": 2,
            "prompts": ["zib waves"],
            "seeds": [5],
            "num_inference_steps": 2,
        },
    )
    plan = run_command("train/lora.py", "--config", config, "--dry-run")
    assert plan.code == 0 and "5 to train on, 1 held out" in plan.out and not (tmp_path / "job").exists()
    check = run_command("data/check.py", "--config", config)
    assert check.code == 0 and "usable                  6" in check.out
    assert run_command("data/prepare.py", "--config", config).code == 0
    assert run_command("train/lora.py", "--config", config).code == 0
    job = tmp_path / "job"
    evaluations = read_rows(job, "eval_loss")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert list(evaluations[0]["eval_loss_by_quantile"]) == [f"0.{k}" for k in range(1, 10)]
    assert evaluations[0]["eval_loss"] != evaluations[2]["eval_loss"]
    expected = {"step", "loss", "learning_rate", "grad_norm", "step_seconds", "data_seconds", "samples_seen"}
    assert all(expected | {"peak_memory_gib"} <= row.keys() for row in read_rows(job, "loss"))
    for step in (2, 4):
        videos = sorted(path.name for path in (job / "samples" / f"step-{step:06d}").glob("*.mp4"))
        assert videos == ["00-5-base.mp4", "00-5.mp4"]
    page = (job / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") >= 2 and "zib coloured waves" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    card = (job / "final" / "README.md").read_text()
    assert "rank, alpha | 64, 64" in card and 'instance_prompt: "zib"' in card
    stock = CogVideoXPipeline.from_pretrained(tiny_folder)
    stock.load_lora_weights(job / "checkpoints" / "step-000004")
    arguments = ["--model", tiny_folder, "--lora", job / "final", "--prompt", "zib waves", "--steps", 2]
    made = run_command("scripts/generate.py", *arguments, "--output", tmp_path / "out.mp4")
    assert made.code == 0 and "8 layers" in made.out and (tmp_path / "out.mp4").stat().st_size > 1000


def test_validating_changes_nothing_in_the_run(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    data = BASIC["data"] | {"validation_clips": 1}
    plain = make_config("plain", data=data, adapter={"dropout": 0.2})
    often = {"enabled": True, "every_steps": 1, "prompts": ["waves"], "num_inference_steps": 2}
    watched = make_config("watched", data=data, adapter={"dropout": 0.2}, validation=often)
    for config in (plain, watched):
        assert run_command("train/lora.py", "--config", config).code == 0
    for name in FILES["train/lora.py"]:
        assert_same_tensors(*(tmp_path / run / "checkpoints" / "step-000004" / name for run in ("plain", "watched")))


def test_non_finite_loss_stops_with_the_sample_and_keeps_the_last_good_weights(
    make_config: Callable[..., Path], run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogtune import dataset

    def read_poisoned(cache: Any, entry: Any) -> Any:
        mean, std, embeddings = read(cache, entry)
        return (mean * float("nan") if entry.clip.id == "clip3.mp4" else mean), std, embeddings

    read = dataset.read_sample
    monkeypatch.setattr(dataset, "read_sample", read_poisoned)
    train = {"max_steps": 6, "timestep_strata": 4, "caption_dropout": 0.0}
    config = make_config("nan", train=train, checkpoint={"every_steps": 1}, tracking={"log_every_steps": 6})
    outcome = run_command("train/lora.py", "--config", config)
    assert outcome.code == 2
    assert "non-finite loss or gradients" in outcome.err and "clip 'clip3.mp4', timestep" in outcome.err
    assert "coloured waves, number 3" in outcome.err and "lower optimizer.learning_rate" in outcome.err
    bad = int(outcome.err.split("step ")[1].split(",")[0])
    saved = sorted((tmp_path / "nan" / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == [f"step-{step:06d}" for step in range(max(1, bad - 3), bad)]
    for path in saved:
        tensors = load_file(path / "pytorch_lora_weights.safetensors").values()
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_full_fine_tuning_learns_and_gives_a_stock_pipeline(
    make_config: Callable[..., Path], run_command: Any, read_tensors: Any, tmp_path: Path, tiny_folder: Path
) -> None:
    config = make_config(
        "sft",
        train={"max_steps": 30, "batch_size": 2, "timestep_strata": 4, "ema_decay": 0.5},
        optimizer={"learning_rate": 3e-3},
        checkpoint={"every_steps": 30},
        data=BASIC["data"] | {"validation_clips": 1},
        validation={"enabled": True, "prompts": []},
    )
    assert run_command("train/sft.py", "--config", config).code == 0
    first, last = read_rows(tmp_path / "sft", "eval_loss")
    assert last["eval_loss"] < 0.97 * first["eval_loss"]
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "sft" / "final")
    saved = read_tensors(tmp_path / "sft" / "checkpoints" / "step-000030")
    averaged = {name.removeprefix("ema."): tensor for name, tensor in saved.items() if name.startswith("ema.")}
    state, start_state = pipeline.transformer.state_dict(), CogVideoXPipeline.from_pretrained(tiny_folder).transformer
    assert averaged.keys() == dict(pipeline.transformer.named_parameters()).keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in averaged.items())
    assert not torch.equal(state["proj_out.weight"], start_state.proj_out.weight)


def test_adapter_section_is_refused_in_full_fine_tuning(make_config: Callable[..., Path], run_command: Any) -> None:
    outcome = run_command("train/sft.py", "--config", make_config("wrong", adapter={"rank": 4}))
    assert outcome.code == 2 and "adapter: has no effect in full fine-tuning" in outcome.err


@pytest.mark.parametrize("ratio", [1, 16])
def test_up_matrices_take_the_ratio_of_lora_plus(make_config: Any, execute: Any, tmp_path: Path, ratio: int) -> None:
    """AdamW's first step moves a number by its learning rate, whatever its gradient is."""
    optimizer = {"learning_rate": 1e-3, "lora_plus_ratio": ratio, "weight_decay": 0.0}
    config = make_config("plus", optimizer=optimizer, train={"max_steps": 1}, schedule={"name": "constant"})
    assert execute("train/lora.py", "--config", config) == 0
    weights = load_file(tmp_path / "plus/final/pytorch_lora_weights.safetensors")
    ups = [tensor.abs().max().item() for name, tensor in weights.items() if "lora_B" in name]
    assert ups == pytest.approx([ratio * 1e-3] * len(ups), rel=1e-3) and len(ups) > 4
