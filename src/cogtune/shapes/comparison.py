"""Compares ways to train on the world of shapes: many runs over several seeds, each scored by the judge.

A comparison is a YAML file: `config` (what every run starts from), `set` (dotted settings for all) and `runs` (name ->
dotted settings; `command` and `config` may differ too). `prior`, for all or for a run, adds so many clips of the base's
own world, against forgetting, and `weight` shows each of the concept's so often for one of those. Each run is one of
the project's own commands in a process of its own; the process that started it then scores what came out. A finished
run leaves `results/<name>.json` and is never made again.
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cogtune.cli import build_config, read_yaml
from cogtune.cluster.stopping import end_with_parent
from cogtune.errors import UserError, nearest
from cogtune.models import choose_device
from cogtune.shapes.captions import base_prompts, concept_prompts
from cogtune.shapes.scoring import default_batch_size, load_scored_pipeline, score_prompts
from cogtune.shapes.writing import write_clips
from cogtune.tracking import read_metrics

LORA, SFT = "train/lora.py", "train/sft.py"
BASE = "base model"
NUM_CLIPS, NUM_HELD_OUT = 24, 6
_NO_PRIOR = (0, 1.0)
_SPECIAL = ("config", "command", "prior", "weight")


@dataclass(frozen=True)
class Job:
    """One training of one run under one seed; without a command only the base model is scored."""

    name: str
    seed: int
    command: str | None
    settings: dict[str, Any]
    """The run's whole config, plain."""
    prior: tuple[int, float] = _NO_PRIOR
    """Clips of the base's world beside the concept's, and showings of a concept's clip for one of those."""

    @property
    def slug(self) -> str:
        """A name for files."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-") + f"-seed{self.seed}"

    def digest(self, scoring: "Scoring") -> str:
        """Changes with everything that the result depends on but the code and the model."""
        plain = [self.command, self.seed, self.settings, vars(scoring)]
        return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Scoring:
    """How much a run is scored."""

    num_concept: int
    num_base: int
    num_inference_steps: int
    batch_size: int | None = None


def read_jobs(path: Path, folder: Path, seeds: list[int], only: list[str] | None = None) -> list[Job]:
    """All jobs of a comparison: every run's first seed before any run's second; the base model first of each seed.

    Raises `UserError` for a wrong file, or for settings that no run could start with.
    """
    values = read_yaml(path)
    unknown = sorted(set(values) - {"config", "set", "runs", "prior", "weight"})
    if unknown:
        raise UserError(f"{path}: unknown key '{unknown[0]}'; a comparison has config, set, runs, prior and weight")
    if not isinstance(values.get("runs"), dict) or not values["runs"]:
        raise UserError(f"{path}: no runs; give `runs:` with a name and dotted settings for each")
    runs: dict[str, dict[str, Any]] = {str(name): changes or {} for name, changes in values["runs"].items()}
    for name in only or []:
        if name not in runs:
            raise UserError(f"--only {name}: no such run in {path}{nearest(name, list(runs))}")
    wanted = {name: changes for name, changes in runs.items() if not only or name in only}
    jobs = []
    for seed in seeds:
        made = [_make_job(values, folder, name, changes, seed) for name, changes in wanted.items()]
        jobs += [Job(BASE, seed, None, {"model": made[0].settings["model"]}), *made]
    slugs = [job.slug for job in jobs]
    for job in jobs:
        if slugs.count(job.slug) > 1:
            raise UserError(f"{path}: the run '{job.name}' has the same file name as another ({job.slug}); rename it")
    return jobs


def _make_job(values: dict[str, Any], folder: Path, name: str, changes: dict[str, Any], seed: int) -> Job:
    config = changes.get("config", values.get("config"))
    if config is None:
        raise UserError(f"run '{name}': no config; give `config: FILE` at the top or in the run")
    settings = read_yaml(Path(config))
    prior = (changes.get("prior", values.get("prior", 0)), changes.get("weight", values.get("weight", 1.0)))
    if not isinstance(prior[0], int) or prior[0] < 0:
        raise UserError(f"run '{name}': prior is {prior[0]!r}; give a number of clips, 0 or more")
    if not isinstance(prior[1], int | float) or prior[1] <= 0:
        raise UserError(f"run '{name}': weight is {prior[1]!r}; give showings of a concept's clip, above 0")
    prior = prior if prior[0] else _NO_PRIOR
    own = {
        "data.manifest": str(mixed_manifest(folder, prior) if prior[0] else folder / "clips"),
        "data.validation_manifest": str(folder / "held_out"),
        "data.cache_dir": str(folder / "cache"),
        "validation.prompts": [],
        "validation.every_steps": None,
        "train.seed": seed,
    }
    given = {key: value for key, value in changes.items() if key not in _SPECIAL}
    for key, value in ((values.get("set") or {}) | given | own).items():
        _set(settings, name, key, value)
    job = Job(name, seed, changes.get("command", LORA), settings, prior)
    if job.command not in (LORA, SFT):
        raise UserError(f"run '{name}': command '{job.command}' trains nothing; choose {LORA} or {SFT}")
    settings["output_dir"] = str(folder / "runs" / job.slug)
    try:
        settings["model"] = build_config(settings).to_plain()["model"]  # scoring needs it with its defaults
    except UserError as error:
        raise UserError(f"run '{name}': {error}") from None
    return job


def _set(settings: dict[str, Any], name: str, key: str, value: Any) -> None:
    """Sets `section.key`."""
    section, dot, rest = key.partition(".")
    if not dot:
        raise UserError(
            f"run '{name}': '{key}' is no dotted setting such as adapter.rank, nor config, command or prior"
        )
    settings[section] = dict(settings.get(section) or {}) | {rest: value}


def draw_clips(folder: Path, jobs: Sequence[Job] = ()) -> None:
    """The concept's clips and the held-out ones, where they are missing, and what else the jobs train on."""
    for name, split, count in (("clips", "concept", NUM_CLIPS), ("held_out", "concept_held_out", NUM_HELD_OUT)):
        if not (folder / name / "metadata.jsonl").is_file():
            write_clips(folder / name, split, count=count, seed=0)
    for prior in sorted({job.prior for job in jobs} - {_NO_PRIOR}):
        if not (mixed_manifest(folder, prior) / "metadata.jsonl").is_file():
            num_ordinary, weight = prior
            mixed = mixed_manifest(folder, prior)
            write_clips(mixed, "concept", count=NUM_CLIPS, seed=0, num_ordinary=num_ordinary, weight=weight)


def mixed_manifest(folder: Path, prior: tuple[int, float]) -> Path:
    """Where the concept's clips lie beside so many of the base's world, each of theirs weighing so much."""
    return folder / f"with-{prior[0]}-prior-{prior[1]:g}"


def result_path(folder: Path, job: Job) -> Path:
    """Where a finished job's result is."""
    return folder / "results" / f"{job.slug}.json"


def read_result(folder: Path, job: Job, scoring: Scoring) -> dict[str, Any] | None:
    """A finished job's result; None where it isn't finished. Raises `UserError` for one of other settings."""
    path = result_path(folder, job)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["digest"] != job.digest(scoring):
        raise UserError(f"{path}: a result of other settings; choose another --out, or delete it to make it again")
    return result


def perform(folder: Path, job: Job, scoring: Scoring) -> dict[str, Any]:
    """Trains and scores one job, in the process that calls it; raises `UserError` where training fails."""
    started = time.perf_counter()
    if job.command is not None:
        _train(folder, job)
    trained = time.perf_counter()
    result: dict[str, Any] = {"name": job.name, "seed": job.seed, "digest": job.digest(scoring)}
    if job.command is not None:
        result |= {"train_seconds": round(trained - started, 2)} | summarise_metrics(
            read_metrics(Path(job.settings["output_dir"]) / "metrics.jsonl")
        )
    result |= _score(job, scoring) | {"score_seconds": round(time.perf_counter() - trained, 2)}
    path = result_path(folder, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(path)
    return result


def _train(folder: Path, job: Job) -> None:
    """Runs the job's command; a run that is complete, or was interrupted, goes on where it was."""
    assert job.command is not None
    config, log = (folder / kind / f"{job.slug}.{kind}" for kind in ("yaml", "log"))
    for path in (config, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(job.settings, sort_keys=False), encoding="utf-8")
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, job.command, "--config", str(config)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        raise UserError(f"run '{job.name}', seed {job.seed}: exit code {code}; see {log}: {' '.join(last)}")


def summarise_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Evaluation loss before and after, and the median seconds of a step."""
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    seconds = sorted(row["step_seconds"] for row in rows if "step_seconds" in row)
    found = {"eval_loss_before": evaluations[0], "eval_loss": evaluations[-1]} if evaluations else {}
    return found | ({"step_seconds": seconds[len(seconds) // 2]} if seconds else {})


def _score(job: Job, scoring: Scoring) -> dict[str, Any]:
    device = choose_device(job.settings["model"].get("device", "auto"))
    model, lora = job.settings["model"]["path"], None
    if job.command is not None:
        final = Path(job.settings["output_dir"]) / "final"
        model, lora = (str(final), None) if job.command == SFT else (model, final)
    pipeline = load_scored_pipeline(model, lora, device)
    prompts = {"concept": concept_prompts()[: scoring.num_concept], "base": base_prompts(scoring.num_base, seed=0)}
    return {
        kind: score_prompts(
            pipeline,
            asked,
            seed=job.seed,
            batch_size=scoring.batch_size or default_batch_size(device),
            num_inference_steps=scoring.num_inference_steps,
        ).to_plain()
        for kind, asked in prompts.items()
    }


def perform_all(
    folder: Path, jobs: list[Job], scoring: Scoring, pool: Executor, *, num_workers: int, minutes: float | None
) -> list[dict[str, Any]]:
    """The results of all jobs that finish, `num_workers` at once; after `minutes` no new one starts.

    A failed job is reported and left out; the others go on.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    results, waiting = [], []
    for job in jobs:
        found = read_result(folder, job, scoring)
        results += [found] if found else []
        waiting += [] if found else [job]
    print(f"{len(results)} of {len(jobs)} jobs are finished already", flush=True)
    running: dict[Future[dict[str, Any]], Job] = {}
    while waiting or running:
        late = deadline is not None and time.monotonic() > deadline
        while waiting and len(running) < num_workers and not late:
            job = waiting.pop(0)
            running[pool.submit(perform, folder, job, scoring)] = job
        if late and waiting:
            print(f"{minutes:g} minutes are over: {len(waiting)} jobs are left for next time", flush=True)
            waiting = []
        for future in [future for future in running if future.done()]:
            job = running.pop(future)
            try:
                results.append(future.result())
            except UserError as error:
                print(f"FAILED {error}", flush=True)
            except torch.OutOfMemoryError as error:  # with several at once on one GPU; the training is kept
                print(f"FAILED to score {job.slug}: {str(error).splitlines()[0]}; lower --jobs or --batch-size")
            else:
                print(f"{job.slug}: {_describe(results[-1])}", flush=True)
        time.sleep(0.05)
    return results


def _describe(result: dict[str, Any]) -> str:
    shares = ", ".join(f"{kind} right {100 * result[kind]['right']:.1f} %" for kind in ("concept", "base"))
    loss = f", evaluation loss {result['eval_loss']:.4f}" if "eval_loss" in result else ""
    return f"{shares}{loss}; {result.get('train_seconds', 0):.0f} s + {result['score_seconds']:.0f} s for scoring"


def end_with_command() -> None:
    """Lets a pool's process, and the training it waits for, end when the command that made it is killed (Linux)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # subprocess.run then ends its child
    end_with_parent(signal.SIGTERM)


def limit_threads(num_workers: int, num_cores: int) -> str:
    """`OMP_NUM_THREADS` with which that many processes share the cores."""
    return str(max(1, num_cores // num_workers))


def describe_device() -> str:
    """The device for the head of a table."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
