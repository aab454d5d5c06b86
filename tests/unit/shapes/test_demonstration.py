"""The demo's table, its choice of prompts, and that base and adapter are told apart."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.errors import UserError
from cogtune.shapes import demonstration
from cogtune.shapes.captions import base_prompts, concept_prompts
from cogtune.shapes.demonstration import (
    Row,
    count_scorers,
    format_rows,
    pick_evenly,
    run_step,
    score_adapter,
    training_precision,
)
from cogtune.shapes.scoring import Scores


def test_prompts_are_spread_over_the_whole_list() -> None:
    prompts = concept_prompts()
    assert pick_evenly(prompts, 60) == prompts
    for count in (1, 7, 12):
        picked = pick_evenly(prompts, count)
        assert len(set(picked)) == count and picked[0] == prompts[0]
    assert {prompt.colour for prompt in pick_evenly(prompts, 12)} == {prompt.colour for prompt in prompts}
    for count in (0, 61):
        with pytest.raises(UserError, match=f"{count} prompts are asked for: give 1 to 60"):
            pick_evenly(prompts, count)


def test_the_table_is_in_percent() -> None:
    scores = Scores(num_videos=8, shape=8, colour=7, motion=4, right=2)
    head, row = format_rows([Row("the concept's", "adapter", scores)]).splitlines()
    assert head.split() == ["prompts", "model", "videos", "right", "shape", "colour", "motion"]
    assert row.split() == ["the", "concept's", "adapter", "8", "25", "%", "100", "%", "88", "%", "50", "%"]
    assert len(head) == len(row)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_base_and_adapter_meet_the_same_prompts_and_noise(num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process and in two: what scored is named after the calls' arguments."""

    def score(pipeline: Any, prompts: Any, *, seed: int, batch_size: int) -> Scores:
        asked = "+".join(prompt.text for prompt in prompts)
        return Scores(num_videos=len(prompts), reasons=Counter([f"{pipeline} {seed} {batch_size} {asked}"]))

    monkeypatch.setattr(demonstration, "load_scored_pipeline", lambda model, lora, device: f"{model} {lora} {device}")
    monkeypatch.setattr(demonstration, "score_prompts", score)
    rows = score_adapter("tiny", Path("final"), torch.device("cpu"), num_prompts=5, seed=3, num_processes=num_processes)
    prompts = {"the concept's": pick_evenly(concept_prompts(), 5), "the base's own": base_prompts(5, seed=0)}
    expected = [
        (kind, name, f"tiny {lora} cpu 3 1 {'+'.join(prompt.text for prompt in asked)}")
        for kind, asked in prompts.items()
        for name, lora in (("base", None), ("adapter", "final"))
    ]
    assert [(row.prompts, row.model, *row.scores.reasons) for row in rows] == expected


def test_two_processes_score_on_a_cpu_with_cores_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration.sys, "platform", "linux")
    for cores, device, expected in ((1, "cpu", 1), (2, "cpu", 2), (64, "cpu", 2), (64, "cuda", 1)):
        monkeypatch.setattr(demonstration.os, "cpu_count", lambda cores=cores: cores)
        assert count_scorers(torch.device(device)) == expected
    monkeypatch.setattr(demonstration.sys, "platform", "darwin")
    assert count_scorers(torch.device("cpu")) == 1


def test_a_failed_step_ends_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys; sys.exit(2)")
    with pytest.raises(UserError, match=r"fails\.py failed; its message is above"):
        run_step(str(script), "--name", "two words")
    assert f"$ python {script} --name 'two words'" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("found", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": False}, "auto")],
)
def test_bfloat16_is_for_processors_that_have_it(
    found: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_precision() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_precision() == "auto"


def test_older_torch_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert training_precision() == "auto"
