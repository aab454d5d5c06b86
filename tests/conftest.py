"""What tests share: tiny pipelines and clips made once, commands run in this process or in one of their own."""

import os
import tempfile

# Before torch is imported: the machines that run the tests have few cores, and sums must not depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("COGTUNE_CACHE", f"{tempfile.gettempdir()}/cogtune-tests")  # not the user's own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patience import OVER, SLOW, UNTIL, patient, skip_when_over

torch.set_num_threads(1)

# What was let go of before a fork is never collected in the copy: of a process group, whose threads are not there, that
# would be a crash.
os.register_at_fork(after_in_child=gc.freeze)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where time is limited the main job comes first, then single parts, then other whole runs."""
    if math.isfinite(UNTIL):
        items.sort(key=lambda item: (item.path.name != "test_training.py", item.path.parent.name == "e2e"))


def pytest_runtest_setup() -> None:
    skip_when_over()


def _count_skipped(reporter: pytest.TerminalReporter, reason: str) -> Counter[str]:
    """Tests of each file that were skipped for this reason."""
    skipped = reporter.getreports("skipped")
    return Counter(report.nodeid.split("::")[0] for report in skipped if reason in str(report.longrepr))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that left out more for want of time than it passed."""
    reporter: Any = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter and _count_skipped(reporter, OVER).total() > len(reporter.getreports("passed")):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many tests were left out for want of time, and of which files."""
    for reason in (OVER, SLOW):
        if left := _count_skipped(terminalreporter, reason):
            files = ", ".join(f"{count} of {file}" for file, count in sorted(left.items()))
            terminalreporter.write_line(f"NOT RUN: {left.total()} tests, {reason}: {files}")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def _write_pipeline(factory: pytest.TempPathFactory, model: str) -> Path:
    from cogtune.random_pipeline import write_random_pipeline

    folder = factory.mktemp("pipelines") / model
    write_random_pipeline(folder, model)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline like 5B (rotary positions, no shift); 17 frames of 96x64. Copy it before changing it."""
    return _write_pipeline(tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def tiny_2b_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline like 2B (added positions, shift 3)."""
    return _write_pipeline(tmp_path_factory, "tiny-2b")


@pytest.fixture(scope="session")
def variant_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives a random pipeline like a variant: tiny, tiny-2b, tiny-i2v, tiny-1.5, tiny-1.5-i2v."""
    made: dict[str, Path] = {}

    def get(model: str) -> Path:
        if model not in made:
            made[model] = _write_pipeline(tmp_path_factory, model)
        return made[model]

    return get


def _write_empty_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A bfloat16 safetensors file with these names and shapes, its data a hole that takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.fixture(scope="session")
def skeleton_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives a pipeline folder of a released architecture with all configs and empty weights."""
    made: dict[str, Path] = {}

    def make(model: str) -> Path:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

        from cogtune.random_pipeline import ARCHITECTURES

        transformer, vae, shift = ARCHITECTURES[model]
        with torch.device("meta"):
            denoiser = CogVideoXTransformer3DModel(**transformer)
            configs = {
                "transformer/config.json": dict(denoiser.config),
                "vae/config.json": dict(AutoencoderKLCogVideoX(**vae).config),
                "text_encoder/config.json": {"d_model": transformer["text_embed_dim"]},
                "tokenizer/tokenizer_config.json": {},
                "scheduler/scheduler_config.json": {
                    "prediction_type": "v_prediction",
                    "rescale_betas_zero_snr": True,
                    "snr_shift_scale": shift,
                },
                "model_index.json": {
                    name: ["library", "Class"]
                    for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
                },
            }
        folder = tmp_path_factory.mktemp("skeletons") / model
        for name, config in configs.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(config))
        for name, tensors in (
            ("transformer", denoiser.state_dict()),
            ("vae", {"weight": torch.empty(1)}),
            ("text_encoder", {"weight": torch.empty(1)}),
        ):
            _write_empty_weights(folder / name / "weights.safetensors", tensors)
        return folder

    def get(model: str) -> Path:
        if model not in made:
            made[model] = make(model)
        return made[model]

    return get


def _draw_clip(seed: int, num_frames: int = 17, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth moving colours, uint8 [F, H, W, 3]: different for every seed."""
    generator = np.random.default_rng(seed)
    frame, row, column, channel = np.ogrid[:num_frames, :height, :width, :3]
    waves = np.zeros((num_frames, height, width, 3))
    for _ in range(3):
        speed, down, across = generator.uniform(-0.15, 0.15, 3)
        waves = waves + np.sin(speed * frame + down * row + across * column + generator.uniform(0, 6) + channel)
    return np.clip(127.5 + 40 * waves, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def draw_clip() -> Callable[..., np.ndarray]:
    """A function that draws a clip, uint8 [F, H, W, 3], for a seed, frames, height and width."""
    return _draw_clip


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 17 frames, 96x64, 8 fps, each with a caption beside it."""
    from cogtune.video import write_video

    folder = tmp_path_factory.mktemp("clips")
    for index in range(6):
        write_video(folder / f"clip{index}.mp4", _draw_clip(index), 8)
        (folder / f"clip{index}.txt").write_text(f"coloured waves, number {index}\n")
    return folder


def _execute(script: str, *arguments: Any) -> int:
    """A command of train/, data/ or scripts/ in this process; its exit code."""
    from cogtune.errors import run_command as run

    spec = importlib.util.spec_from_file_location("command_under_test", ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        spec.loader.exec_module(module)
        run(module.main)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="session")
def execute() -> Callable[..., int]:
    """Runs a command in this process for what it leaves on disk: `execute("train/lora.py", "--key=value")`."""
    return _execute


def _read_checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, whoever wrote it."""
    from cogtune.shards.stored import StoredTensors

    stored = StoredTensors(folder)
    return {name: stored.read(name) for name in stored.tensors}


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Reads a checkpoint's tensors: `weights.<name>`, `optimizer.<name>.<key>`, `ema.<name>`."""
    return _read_checkpoint_tensors


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Like `execute`, with what the command prints.

    A subprocess would spend seconds on imports; `run_process` is for the few tests that need a real one.
    """

    def call(script: str, *arguments: Any) -> Outcome:
        capsys.readouterr()
        code = _execute(script, *arguments)
        seen = capsys.readouterr()
        return Outcome(code, seen.out, seen.err)

    return call


@pytest.fixture
def good(run_command: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must succeed; gives what it prints."""

    def call(*arguments: object) -> str:
        outcome = run_command(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return call


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the test's own; for a whole file: `pytestmark = pytest.mark.usefixtures(...)`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an adapter of a pipeline folder's transformer that has left its start, to `lora`."""

    def make(base: Path, settings: Any) -> Path:
        from cogtune import adapter, models

        transformer = models.load_transformer(models.read_facts(base), torch.float32)
        adapter.add_lora(transformer, settings, seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in adapter.adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3, generator=generator)
        (tmp_path / "lora").mkdir()
        adapter.save_adapter(transformer, tmp_path / "lora", trained=True)
        return tmp_path / "lora"

    return make


@pytest.fixture
def run_process() -> Callable[..., Outcome]:
    """Runs `python <arguments>` in a process of its own, from the repository's root."""

    def call(*arguments: Any, timeout_seconds: float = 120, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=patient(timeout_seconds),
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def options(tiny_folder: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Any:
    """Options of a short run without validation; `options("name", train__seed=3)` changes it. All share one cache."""

    def make(name: str, **changes: object) -> list[str]:
        values = {
            "model.path": tiny_folder,
            "model.device": "cpu",
            "data.manifest": clips_folder,
            "data.cache_dir": tmp_path_factory.getbasetemp() / "options-cache",
            "data.num_workers": 0,
            "data.validation_clips": 1,
            "output_dir": tmp_path / name,
            "schedule.warmup_steps": 0,
            "train.max_steps": 4,
            "checkpoint.every_steps": 2,
            "tracking.log_every_steps": 1,
            "validation.enabled": "false",
        } | {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in values.items()]

    return make
