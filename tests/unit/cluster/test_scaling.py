"""Scaling on paper: sizes against the models, limits that arithmetic must keep, and the page against the command."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.adapter import count_adapter_parameters
from cogtune.cluster.scaling import (
    ARCHITECTURES,
    Links,
    Workload,
    choose_strategy,
    estimate_context,
    estimate_ddp,
    estimate_hsdp,
    reduce_seconds,
)
from cogtune.config import AdapterSettings
from cogtune.models import make_meta_transformer, read_facts

ROOT = Path(__file__).resolve().parents[3]
LORA = Workload(ARCHITECTURES["cogvideox-5b"], "lora", 2.05)
SFT = Workload(ARCHITECTURES["cogvideox-5b"], "sft", 2.28)
LINKS = Links()


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_sizes_are_the_models_own(model: str, skeleton_folder: Any) -> None:
    facts = read_facts(skeleton_folder(model))
    meta, ours = make_meta_transformer(facts), ARCHITECTURES[model]
    assert sum(p.numel() for p in meta.parameters()) == ours.num_parameters
    assert (meta.config.num_layers, meta.config.num_attention_heads) == (ours.num_layers, ours.num_heads)
    assert count_adapter_parameters(meta, AdapterSettings(rank=64)) == ours.num_adapter(64)
    assert facts.num_tokens(49, 480, 720) == Workload(ours, "lora", 1.0).num_tokens == 17_776


def test_a_sample_has_the_caches_bytes() -> None:
    latents, text = torch.zeros(2, 16, 13, 60, 90, dtype=torch.bfloat16), torch.zeros(226, 4096, dtype=torch.bfloat16)
    assert LORA.sample_bytes == latents.nbytes + text.nbytes


def test_an_all_reduce_by_hand() -> None:
    inside, between = reduce_seconds(1e9, 16, replace(LINKS, latency_seconds=0))
    assert inside == pytest.approx(2 * 7 / 8 / 300) and between == pytest.approx(2 * 1 / 2 / 40)
    assert reduce_seconds(1e9, 1, LINKS) == (0, 0)


@pytest.mark.parametrize("estimate", [estimate_ddp, estimate_hsdp])
@pytest.mark.parametrize("work", [LORA, SFT])
def test_efficiency_falls_with_gpus_and_slower_links(estimate: Any, work: Workload) -> None:
    assert estimate(work, 1, LINKS).efficiency == pytest.approx(1.0)
    rows = [estimate(work, count, LINKS) for count in (1, 8, 64, 512)]
    values = [row.efficiency for row in rows]
    assert values == sorted(values, reverse=True) and 0 < values[-1] <= values[0]
    slow = replace(LINKS, between=LINKS.between / 1000)
    assert estimate(work, 64, slow).efficiency < estimate(work, 64, LINKS).efficiency
    assert all(row.samples_per_second == pytest.approx(row.num_gpus / row.step_seconds) for row in rows)


def test_context_parallel_is_quicker_a_step_and_slower_in_all() -> None:
    alone = estimate_ddp(LORA, 64, LINKS)
    shared = estimate_context(LORA, 64, LINKS, ways=4, sharded=False)
    assert shared.samples_per_step == 16
    assert LORA.step_seconds / 4 < shared.step_seconds < LORA.step_seconds / 3
    assert shared.samples_per_second < alone.samples_per_second


def test_what_to_pick() -> None:
    def pick(work: Workload, count: int) -> str:
        return choose_strategy(work, count, gpu_bytes=80e9, most_samples=64)

    assert pick(LORA, 64) == "DDP" and pick(SFT, 64) == "HSDP"
    assert pick(LORA, 256) == "DDP x context 4"
    small = Workload(ARCHITECTURES["cogvideox-2b"], "sft", 1.0)
    assert pick(small, 128) == "DDP x context 2", "30 heads divide by 2, not by 4 or 8"
    assert "too many" in pick(small, 512)


def test_the_page_shows_what_the_command_prints(run_command: Any) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    blocks = re.findall(r"    python (scripts/scaling\.py [^\n]*)\n\n(\|.*?)(?=\n\n[^|]|\Z)", page, flags=re.DOTALL)
    assert len(blocks) == 4
    for command, table in blocks:
        outcome = run_command(*shlex.split(command))
        assert outcome.code == 0 and outcome.out.strip() == table.strip(), command


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpus", "12"], "whole nodes of 8"),
        (["--gpus", "a"], "expected numbers"),
        (["--context", "5"], "give a divisor of both"),
        (["--step-seconds", "0"], "expected more than 0"),
    ],
)
def test_wrong_numbers_are_refused(options: list[str], expected: str, run_command: Any) -> None:
    outcome = run_command("scripts/scaling.py", "--step-seconds", "2", *options)
    assert outcome.code == 2 and expected in outcome.err
