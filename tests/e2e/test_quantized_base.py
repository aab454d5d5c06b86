"""Runs over a frozen base in int8 and NF4: near the exact one, named in all that is written, resumed bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cogtune.quantized_linear import QuantizedLinear

LORA, SFT = "train/lora.py", "train/sft.py"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("loss", "eval_loss") if key in row} for row in rows]


def assert_equal_files(first: Path, second: Path) -> None:
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys() and all(torch.equal(one[key], value) for key, value in other.items())


def test_runs_over_a_quantized_base_are_near_the_exact_one_and_say_so(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    """With evaluation and videos; streamed and resident; the config's own word and what the plan took."""
    validation = {"validation__enabled": "true", "validation__prompts": "waves", "validation__num_inference_steps": 2}
    assert run_command(LORA, *options("none", **validation)).code == 0
    for kind, bound in (("int8", 2e-3), ("nf4", 2e-2)):
        streamed: dict[str, Any] = (
            {} if kind == "int8" else {"memory__resident_blocks": 0, "memory__offloaded_blocks": 1}
        )
        outcome = run_command(LORA, *options(kind, memory__quantized_base=kind, **validation, **streamed))
        assert outcome.code == 0, outcome.err
        assert f"frozen base in {kind}" in outcome.out and f"frozen linear weights in {kind}" in outcome.out
        exact, rounded = read_rows(tmp_path / "none"), read_rows(tmp_path / kind)
        for one, other in zip(exact, rounded, strict=True):
            assert other == pytest.approx(one, rel=bound)
        assert rounded != exact
        folder = tmp_path / kind
        assert f"frozen base in {kind}" in (folder / "config.yaml").read_text().splitlines()[0]
        assert f"its blocks' linear weights in {kind}".replace("'", "&#39;") in (folder / "report.html").read_text()
        assert f"linear weights in {kind}" in (folder / "final/README.md").read_text()
        weights = [load_file(tmp_path / name / "final/pytorch_lora_weights.safetensors") for name in ("none", kind)]
        shapes = [{key: (value.shape, value.dtype) for key, value in file.items()} for file in weights]
        assert shapes[0] == shapes[1]
        assert (folder / "samples/step-000004/00-0.mp4").is_file()
    assert "frozen base" not in (tmp_path / "none/config.yaml").read_text().splitlines()[0]


def test_a_run_over_a_quantized_base_resumes_exactly_and_never_over_another(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    """Streamed before, resident after: nothing but the base's codes decides."""
    nf4 = {"memory__quantized_base": "nf4", "memory__mode": "keep_attention"}
    assert run_command(LORA, *options("run", memory__resident_blocks=0, **nf4)).code == 0
    last = tmp_path / "run/checkpoints/step-000004"
    last.rename(tmp_path / "straight")
    outcome = run_command(LORA, *options("run", memory__resident_blocks=1, **nf4))
    assert outcome.code == 0 and "at step 2" in outcome.out, outcome.err
    for name in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
        assert_equal_files(tmp_path / "straight" / name, last / name)
    for other in ("none", "int8"):
        outcome = run_command(LORA, *options("run", memory__quantized_base=other))
        now = "exact" if other == "none" else other
        assert outcome.code == 2 and f"memory.quantized_base: nf4 -> {now}" in outcome.err


def test_codes_live_under_ddp(tmp_path: Path) -> None:
    """It broadcasts every buffer at the start, whatever its type."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layers = [QuantizedLinear(torch.randn(64, 64), torch.randn(64), kind) for kind in ("int8", "nf4")]
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), *layers)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        wrapped(torch.randn(4, 64)).sum().backward()
        assert len(before) == 7 and all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    finally:
        torch.distributed.destroy_process_group()


def test_the_dry_run_lists_the_ways_that_are_allowed(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(LORA, *options("run"), "--dry-run")
    assert "frozen base in" not in outcome.out
    outcome = run_command(LORA, *options("run", memory__allow_quantized_base="true"), "--dry-run")
    assert outcome.code == 0 and "frozen base in int8" in outcome.out and "frozen base in nf4" in outcome.out
    (chosen,) = [line for line in outcome.out.splitlines() if "<-" in line]
    assert "frozen base" not in chosen, "all fits"


def test_where_a_base_can_not_be_quantized(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(SFT, *options("run", memory__quantized_base="nf4"))
    assert outcome.code == 2 and "is for LoRA" in outcome.err
    outcome = run_command(LORA, *options("run", memory__quantized_base="nf4", adapter__use_dora="true"))
    assert outcome.code == 2 and "can't go with adapter.use_dora" in outcome.err
