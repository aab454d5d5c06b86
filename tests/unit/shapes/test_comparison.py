"""Which jobs a comparison has and in what order, what is refused, what is made again, and the table's arithmetic."""

import json
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.cli import build_config
from cogtune.errors import UserError
from cogtune.manifest import read_manifest
from cogtune.shapes import comparison
from cogtune.shapes.comparison import (
    BASE,
    SFT,
    Job,
    Scoring,
    draw_clips,
    perform_all,
    read_jobs,
    read_result,
    result_path,
)
from cogtune.shapes.statistics import describe_points, describe_range, describe_spread
from cogtune.shapes.tables import make_table

ROOT = Path(__file__).resolve().parents[3]
SCORING = Scoring(num_concept=4, num_base=8, num_inference_steps=2)


class Inline(Executor):
    """A pool that does the work at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except UserError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a comparison of two configs, with changes, and gives its path."""
    (tmp_path / "lora.yaml").write_text("adapter: {rank: 8}\ntrain: {max_steps: 5}\n")
    (tmp_path / "sft.yaml").write_text("train: {max_steps: 7}\n")

    def make(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "config": str(tmp_path / "lora.yaml"),
            "set": {"train.batch_size": 2},
            "runs": {
                "plain": {},
                "rank 4": {"adapter.rank": 4},
                "SFT": {"command": SFT, "config": str(tmp_path / "sft.yaml")},
            },
        }
        path = tmp_path / "runs.yaml"
        path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
        return path

    return make


def test_every_run_has_its_first_seed_before_any_has_its_second(write: Any, tmp_path: Path) -> None:
    jobs = read_jobs(write(), tmp_path / "out", [3, 5])
    order = [BASE, "plain", "rank 4", "SFT"]
    assert [(job.name, job.seed) for job in jobs] == [(name, seed) for seed in (3, 5) for name in order]
    assert len({job.slug for job in jobs}) == len({job.digest(SCORING) for job in jobs}) == 8
    assert {(job.settings.get("adapter") or {}).get("rank") for job in jobs} == {8, 4, None}
    trained = [job for job in jobs if job.command]
    assert {job.settings["train"]["max_steps"] for job in trained} == {5, 7}
    for job in trained:
        config = build_config(job.settings)
        assert (config.train.seed, config.train.batch_size) == (job.seed, 2)
        assert config.output_dir == tmp_path / "out" / "runs" / job.slug and config.validation.prompts == []
    assert [job.name for job in read_jobs(write(), tmp_path, [0], ["SFT"])] == [BASE, "SFT"]


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"runs": {"a": {"adapter.rnk": 4}}}, ["run 'a'", "unknown setting adapter.rnk", "did you mean adapter.rank?"]),
        ({"runs": {"a": {"rank": 4}}}, ["run 'a'", "'rank' is no dotted setting"]),
        ({"runs": {"a": {"adapter.rank": 0}}}, ["run 'a'", "adapter.rank", "got 0"]),
        ({"runs": {"a": {"command": "train/dpo.py"}}}, ["'train/dpo.py' trains nothing", "train/lora.py"]),
        ({"runs": {"a": {"prior": -1}}}, ["run 'a'", "prior is -1", "0 or more"]),
        ({"prior": 2, "weight": 0}, ["weight is 0", "above 0"]),
        ({"runs": {"a b": {}, "a-b": {}}}, ["'a b' has the same file name as another", "rename it"]),
        ({"runs": {}}, ["no runs"]),
        ({"run": {}}, ["unknown key 'run'"]),
    ],
)
def test_wrong_comparisons_are_refused(write: Any, tmp_path: Path, changes: dict, parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        read_jobs(write(**changes), tmp_path, [0])
    for part in parts:
        assert part in str(refused.value)


def test_an_unknown_run_is_named(write: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--only rank4: no such run.*did you mean rank 4\?"):
        read_jobs(write(), tmp_path, [0], ["rank4"])


def test_the_shipped_comparison_has_jobs_that_could_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in Path("configs/compare").glob("*.yaml"):
        assert len(read_jobs(path, tmp_path, [0, 1])) > 10


def test_prior_clips_stand_beside_the_concepts(write: Any, tmp_path: Path) -> None:
    jobs = read_jobs(write(prior=2, weight=3.0, runs={"alone": {"prior": 0}, "mixed": {}}), tmp_path, [0])
    draw_clips(tmp_path, jobs)
    alone, mixed = (read_manifest(Path(job.settings["data"]["manifest"])) for job in jobs[1:])
    assert [clip.caption for clip in mixed[:24]] == [clip.caption for clip in alone] and len(mixed) == 26
    assert [clip.weight for clip in mixed] == 24 * [3.0] + 2 * [1.0]
    assert all(clip.video.is_file() for clip in mixed)
    assert not any("zibber" in clip.caption for clip in mixed[24:])


def make_result(job: Job, right: float = 0.5) -> dict[str, Any]:
    shares = {"right": right, "shape": 1.0, "colour": 1.0, "motion": right, "num_videos": 4}
    return {"name": job.name, "seed": job.seed, "digest": job.digest(SCORING), "concept": shares, "base": shares} | {
        "score_seconds": 1.0
    }


def test_finished_jobs_are_not_made_again_and_failed_ones_do_not_end_the_others(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = read_jobs(write(), tmp_path, [0])
    done = result_path(tmp_path, jobs[1])
    done.parent.mkdir()
    done.write_text(json.dumps(make_result(jobs[1])))
    made = []

    def perform(folder: Path, job: Job, scoring: Scoring) -> dict[str, Any]:
        made.append(job.name)
        if job.name == "rank 4":
            raise UserError("run 'rank 4', seed 0: exit code 2")
        return make_result(job)

    monkeypatch.setattr(comparison, "perform", perform)
    results = perform_all(tmp_path, jobs, SCORING, Inline(), num_workers=1, minutes=None)
    assert made == [BASE, "rank 4", "SFT"]
    assert [result["name"] for result in results] == ["plain", BASE, "SFT"]
    assert "FAILED run 'rank 4', seed 0: exit code 2" in capsys.readouterr().out


def test_no_job_starts_after_the_time_limit(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "perform", lambda *_: pytest.fail("a job started"))
    assert perform_all(tmp_path, read_jobs(write(), tmp_path, [0]), SCORING, Inline(), num_workers=2, minutes=0) == []
    assert "0 minutes are over: 4 jobs are left for next time" in capsys.readouterr().out


def test_results_of_other_settings_are_refused(write: Any, tmp_path: Path) -> None:
    job = read_jobs(write(), tmp_path, [0])[1]
    result_path(tmp_path, job).parent.mkdir()
    result_path(tmp_path, job).write_text(json.dumps(make_result(job)))
    assert read_result(tmp_path, job, SCORING) is not None
    with pytest.raises(UserError, match="a result of other settings; choose another --out"):
        read_result(tmp_path, job, Scoring(4, 8, 3))


def test_metrics_are_summarised() -> None:
    rows = [{"eval_loss": 0.5}, *({"step_seconds": s} for s in (9.0, 1.0, 2.0)), {"eval_loss": 0.25}]
    assert comparison.summarise_metrics(rows) == {"eval_loss_before": 0.5, "eval_loss": 0.25, "step_seconds": 2.0}
    assert comparison.summarise_metrics([]) == {}


def test_threads_are_shared() -> None:
    assert [comparison.limit_threads(jobs, 16) for jobs in (1, 3, 16, 40)] == ["16", "5", "1", "1"]


def test_the_table_compares_each_seed_with_the_base_of_that_seed() -> None:
    def row(name: str, seed: int, concept: float, base: float, **more: float) -> dict[str, Any]:
        return {"name": name, "seed": seed, "concept": {"right": concept}, "base": {"right": base}} | more

    table = make_table(
        [
            row("demo", 1, 0.75, 0.875, eval_loss=0.25, step_seconds=0.5),
            row("demo", 0, 0.5, 0.5, eval_loss=0.125, step_seconds=0.25),
            row(BASE, 0, 0.0, 0.625),
            row(BASE, 1, 0.0, 0.75),
            row("lone", 7, 1.0, 1.0),
        ]
    )
    head, rule, *lines = table.splitlines()
    assert head.count("|") == rule.count("|") == 8
    assert lines == [
        "| base model | 0.0 % (0.0 to 0.0) | 68.8 % (62.5 to 75.0) |  |  |  | 2 |",
        "| demo | 62.5 % (50.0 to 75.0) | 68.8 % (50.0 to 87.5) | +0.0 (-12.5 to +12.5) | 0.1875 (0.1250 to 0.2500)"
        " | 0.375 | 2 |",
        "| lone | 100.0 % | 100.0 % |  |  |  | 1 |",
    ]


def test_spreads_are_described() -> None:
    assert describe_spread([0.91, 0.93, 0.92]) == "92.0 % (91.0 to 93.0, 3 seeds)"
    assert describe_spread([0.5, 1.0], count=False) == "75.0 % (50.0 to 100.0)"
    assert describe_spread([0.125]) == "12.5 %"
    assert describe_points([-0.02, 0.004]) == "-0.8 (-2.0 to +0.4)" and describe_points([0.01]) == "+1.0"
    assert describe_range([1.0, 3.0], 2) == "2.00 (1.00 to 3.00)" and describe_range([0.12345], 3) == "0.123"
