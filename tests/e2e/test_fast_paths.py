"""Whole runs by the ways that are not the plain one: float8 (emulated on a CPU), attention kernels, their guards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cogtune import plan, run
from cogtune.errors import UserError
from cogtune.frozen import Float8Base

LORA, SFT = "train/lora.py", "train/sft.py"


@pytest.fixture
def emulated_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU does the arithmetic of float8 products in float32."""
    monkeypatch.setattr(plan, "check_float8_device", lambda *_arguments, **_options: None)


def read_losses(folder: Path) -> list[float]:
    rows = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.usefixtures("emulated_float8")
def test_a_float8_run_is_near_the_exact_one_and_says_what_it_is(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(LORA, *options("exact")).code == 0
    outcome = run_command(LORA, *options("float8", train__float8_base="true", validation__enabled="true"))
    assert outcome.code == 0, outcome.err
    exact, float8 = (read_losses(tmp_path / name) for name in ("exact", "float8"))
    assert float8 == pytest.approx(exact, rel=0.02) and float8 != exact
    assert "float8      products with 24,576 of the frozen parameters" in outcome.out
    text = (tmp_path / "float8" / "config.yaml").read_text()
    assert "frozen base in float8" in text.splitlines()[0]
    assert yaml.safe_load(text)["train"]["float8_base"] is True
    assert "float8" not in (tmp_path / "exact" / "config.yaml").read_text().splitlines()[0]
    assert "train.float8_base" in (tmp_path / "float8" / "report.html").read_text()
    assert "float8" in (tmp_path / "float8" / "final" / "README.md").read_text()
    weights = [load_file(tmp_path / name / "final/pytorch_lora_weights.safetensors") for name in ("exact", "float8")]
    assert {k: (v.shape, v.dtype) for k, v in weights[0].items()} == {
        k: (v.shape, v.dtype) for k, v in weights[1].items()
    }
    outcome = run_command(LORA, *options("float8", validation__enabled="true"))
    assert outcome.code == 2 and "train.float8_base: True -> False" in outcome.err, "it changes what a run learns"


@pytest.mark.usefixtures("emulated_float8")
def test_a_float8_run_resumes_exactly(options: Callable[..., list[str]], run_command: Any, tmp_path: Path) -> None:
    settings = options("run", train__float8_base="true")
    assert run_command(LORA, *settings).code == 0
    last = tmp_path / "run" / "checkpoints" / "step-000004"
    last.rename(tmp_path / "straight")
    assert "at step 2" in run_command(LORA, *settings).out
    for name in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
        straight, resumed = load_file(tmp_path / "straight" / name), load_file(last / name)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], value) for key, value in resumed.items())


@pytest.mark.usefixtures("emulated_float8")
def test_where_float8_cannot_go(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(LORA, *options("run", train__float8_base="true", adapter__use_dora="true"))
    assert outcome.code == 2 and "train.float8_base=true: can't go with adapter.use_dora" in outcome.err
    outcome = run_command(SFT, *options("run", train__float8_base="true"))
    assert outcome.code == 2 and "full fine-tuning (train/sft.py) freezes no weight" in outcome.err


def test_nothing_is_loaded_before_a_kernel_is_refused(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(wanted: str, **shape: Any) -> None:
        assert shape["num_heads"] == 2 and shape["head_dim"] == 16 and shape["dtype"] == torch.float32
        raise UserError(f"train.attention={wanted}: refused")

    monkeypatch.setattr(plan, "check_backend", refuse)
    for script in (LORA, SFT):
        outcome = run_command(script, *options("run", train__attention="cudnn"))
        assert outcome.code == 2 and "train.attention=cudnn: refused" in outcome.err
    assert not (tmp_path / "run").exists()


def test_each_run_follows_its_own_setting_of_determinism(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    """On a CPU it changes nothing but the kernels that PyTorch would refuse, of which a run has none."""
    rows = []
    for wanted in ("true", "false"):
        outcome = run_command(LORA, *options(wanted, train__deterministic=wanted, train__compile="on"))
        assert outcome.code == 0, outcome.err
        assert torch.are_deterministic_algorithms_enabled() == (wanted == "true")
        rows.append(read_losses(tmp_path / wanted))
        first_line = (tmp_path / wanted / "config.yaml").read_text().splitlines()[0]
        assert first_line.endswith(", deterministic") == (wanted == "true")
    assert rows[0] == rows[1] and rows[0]


def test_a_deterministic_run_goes_on_with_what_it_began_with(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    begin = options("run", train__deterministic="true", schedule__name="constant")
    outcome = run_command(LORA, *begin)
    assert outcome.code == 0 and "repeats     bit for bit" in outcome.out
    path = tmp_path / "run" / "ways.json"
    ways = json.loads(path.read_text())
    assert ways["attention"] == "default" and ways["memory"]["activations"] in outcome.out
    other = "recompute" if ways["memory"]["activations"] != "recompute" else "keep_all"
    path.write_text(json.dumps(ways | {"memory": ways["memory"] | {"activations": other}}))
    further = run_command(LORA, *begin, "--train.max_steps=8")
    assert further.code == 0, further.err
    assert f"memory      {other}" in further.out and "repeats     bit for bit" in further.out
    assert json.loads(path.read_text())["memory"]["activations"] == other
    path.write_text(json.dumps(ways | {"memory": ways["memory"] | {"num_lean": 77}}))
    assert "doesn't fit now" in run_command(LORA, *begin, "--train.max_steps=8", "--dry-run").out


def test_a_layer_that_no_gradient_reaches_ends_the_run(
    options: Callable[..., list[str]], run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.11's compiler did it, silently, to the layers before an autograd function."""
    configure = run.configure_blocks

    def spoil(transformer: Any, *arguments: Any, **settings: Any) -> None:
        configure(transformer, *arguments, **settings)
        for name, parameter in transformer.named_parameters():
            if "blocks.0.attn1.to_q.lora_" in name:
                parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(run, "configure_blocks", spoil)
    outcome = run_command(LORA, *options("run"))
    assert outcome.code == 2, outcome.err
    assert "no gradient reached 1 of 8 trained layers, such as transformer_blocks.0.attn1.to_q" in outcome.err
    assert "train.compile=off" in outcome.err


def test_float8_layers_live_under_ddp(tmp_path: Path) -> None:
    """It broadcasts every buffer at the start; those of one byte a number too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer = torch.nn.Sequential(torch.nn.Linear(16, 16), Float8Base(torch.randn(16, 16), None))
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        wrapped = torch.nn.parallel.DistributedDataParallel(layer, broadcast_buffers=False)
        wrapped(torch.randn(4, 16)).sum().backward()
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8)), name
    finally:
        torch.distributed.destroy_process_group()
