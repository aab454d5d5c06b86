"""The demo's table, its choice of prompts, and that base and adapter are told apart."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogtune.errors import UserError
from cogtune.shapes import demonstration
from cogtune.shapes.captions import base_prompts, concept_prompts
from cogtune.shapes.demonstration import Row, format_rows, pick_evenly, run_step, score_adapter, training_precision
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


def test_base_and_adapter_meet_the_same_prompts_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    state: list[str] = []
    pipeline = SimpleNamespace(disable_lora=lambda: state.append("off"), enable_lora=lambda: state.append("on"))
    seen: list[Any] = []

    def score(given: Any, prompts: Any, *, seed: int, batch_size: int) -> Scores:
        assert given is pipeline
        seen.append((state[-1], prompts, seed, batch_size))
        return Scores(num_videos=len(prompts))

    monkeypatch.setattr(demonstration, "load_scored_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(demonstration, "score_prompts", score)
    rows = score_adapter("tiny", Path("final"), torch.device("cpu"), num_prompts=5, seed=3)
    kinds = [(row.prompts, row.model) for row in rows]
    assert kinds == [(kind, model) for kind in ("the concept's", "the base's own") for model in ("base", "adapter")]
    assert [entry[0] for entry in seen] == ["off", "on", "off", "on"]
    assert seen[0][1:] == seen[1][1:] == (pick_evenly(concept_prompts(), 5), 3, 1)
    assert seen[2][1:] == seen[3][1:] == (base_prompts(5, seed=0), 3, 1)


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
