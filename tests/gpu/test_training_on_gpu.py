"""Training on a GPU: fast paths against the plain one, float16 with loss scaling, no waiting for the device, memory."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune import models
from cogtune.adapter import adapter_parameters, add_lora
from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.config import AdapterSettings
from cogtune.execution import configure_blocks
from cogtune.trainer import Trainer

WIDTH, TOKENS_TEXT = 512, 226
LOSS_SCALE = 1024.0
pytestmark = pytest.mark.usefixtures("clean_gpu")


def make_blocks(dtype: torch.dtype, seed: int = 0, settings: AdapterSettings | None = None) -> Any:
    """A transformer of 5B's kind, two layers of eight heads, with an adapter that has left its start."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    with torch.device("cuda"):
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=8, num_layers=2, text_embed_dim=64, use_rotary_positional_embeddings=True
        ).to(dtype)
    transformer.requires_grad_(False)
    add_lora(transformer, settings or AdapterSettings(rank=16), seed=1)
    transformer.to("cuda")
    with torch.no_grad():
        for name, parameter in adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(2))
    return transformer


def compute_loss(transformer: torch.nn.Module) -> torch.Tensor:
    """On the same random input each time: 5 latent frames of 240x352 pixels."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    generator = torch.Generator("cuda").manual_seed(3)
    dtype = next(transformer.parameters()).dtype
    latents = torch.randn(1, 5, 16, 30, 44, device="cuda", generator=generator)
    text = torch.randn(1, TOKENS_TEXT, 64, device="cuda", generator=generator)
    rotary = get_3d_rotary_pos_embed(64, ((0, 0), (15, 22)), (15, 22), 5, device="cuda")
    output = transformer(
        latents.to(dtype),
        text.to(dtype),
        torch.tensor([500], device="cuda"),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    return (output.float() - latents).square().mean()


def loss_and_gradients(transformer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64; a scale keeps float16's gradients in its range, and changes no bit of the others'."""
    transformer.zero_grad(set_to_none=True)
    loss = compute_loss(transformer)
    (loss * LOSS_SCALE).backward()
    gradients = [p.grad.flatten().double() for p in adapter_parameters(transformer).values() if p.grad is not None]
    return loss.detach().double(), torch.cat(gradients) / LOSS_SCALE


@pytest.mark.parametrize("activations", ["keep_all", "keep_products", "keep_attention", "recompute"])
def test_compiled_low_precision_is_near_eager_float32(activations: Activations) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, gradients = loss_and_gradients(make_blocks(torch.float32))
    plain_loss, plain = loss_and_gradients(make_blocks(torch.bfloat16))
    fast = make_blocks(torch.bfloat16)
    install_attention(fast, "default")
    configure_blocks(fast, activations, compiled=True, has_dropout=False)
    fast_loss, fast_gradients = loss_and_gradients(fast)
    error = (fast_gradients - gradients).norm() / gradients.norm()
    plain_error = (plain - gradients).norm() / gradients.norm()
    assert abs(fast_loss - loss) / loss < 2e-3
    # bfloat16 itself is this far from float32; the fast path may not be further off.
    assert error < max(0.03, 1.2 * plain_error), (error, plain_error)
    assert abs(plain_loss - loss) / loss < 2e-3


def test_each_rung_keeps_less_memory_and_nothing_is_compiled_again() -> None:
    """What is kept between forward and backward; the peak of so few layers is a block's own workspace."""
    kept = {}
    for activations in ("keep_all", "keep_products", "keep_attention", "recompute"):
        torch._dynamo.reset()
        transformer = make_blocks(torch.bfloat16)
        install_attention(transformer, "default")
        configure_blocks(transformer, activations, compiled=True, has_dropout=False)
        loss_and_gradients(transformer)
        transformer.zero_grad(set_to_none=True)
        gc.collect()
        before = torch.cuda.memory_allocated()
        with torch.compiler.set_stance("fail_on_recompile"):
            loss = compute_loss(transformer)
            kept[activations] = torch.cuda.memory_allocated() - before
            loss.backward()
    assert kept["recompute"] < kept["keep_attention"] < kept["keep_products"] <= 1.05 * kept["keep_all"], kept


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", ["train/lora.py", "train/sft.py"])
@pytest.mark.parametrize(("pipeline_fixture", "dtype"), [("tiny_folder", "bfloat16"), ("tiny_2b_folder", "float16")])
@pytest.mark.parametrize("deterministic", [False, True])
def test_whole_job_in_low_precision_resumes_exactly(
    script: str, pipeline_fixture: str, dtype: str, deterministic: bool, make_job: Callable[..., Path],
    run_command: Any, request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    """Bit for bit where that is asked for; else as far as attention's backward pass adds up in the same order."""
    folder = request.getfixturevalue(pipeline_fixture)
    assert models.read_facts(folder).dtype == getattr(torch, dtype)
    job = make_job(folder, train={"deterministic": deterministic})
    outcome = run_command(script, "--config", job)
    assert outcome.code == 0, outcome.err
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    straight = [row["loss"] for row in rows_of(tmp_path / "run") if "loss" in row]
    final = read_final(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    assert "at step 6" in run_command(script, "--config", job).out
    resumed = [row["loss"] for row in rows_of(tmp_path / "run") if "loss" in row]
    assert resumed[-1] == pytest.approx(straight[-1], rel=0 if deterministic else 1e-4)
    assert all(loss == loss and loss < 10 for loss in straight)
    if deterministic:
        again = read_final(tmp_path / "run" / "final")
        assert again.keys() == final.keys() and [name for name in final if again[name] != final[name]] == []


def read_final(folder: Path) -> dict[str, bytes]:
    """The files of the final weights."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


@pytest.mark.parametrize("script", ["train/lora.py", "train/sft.py"])
def test_a_replayed_pass_equals_a_plain_one(
    script: str, make_job: Callable[..., Path], run_command: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """Losses of a run with `train.cuda_graph`, also resumed, against those without it."""
    # A row is the mean of the steps since the last one, so there is one where the run goes on.
    job = make_job(tiny_folder, validation={"enabled": False}, tracking={"log_every_steps": 3})
    losses = {}
    for graph in (False, True):
        out = tmp_path / f"graph-{graph}"
        options = (f"--train.cuda_graph={str(graph).lower()}", f"--output_dir={out}")
        outcome = run_command(script, "--config", job, *options)
        assert outcome.code == 0, outcome.err
        losses[graph] = [row["loss"] for row in rows_of(out) if "loss" in row]
        shutil.rmtree(out / "checkpoints" / "step-000012")
        assert "at step 6" in run_command(script, "--config", job, *options).out
        assert [row["loss"] for row in rows_of(out) if "loss" in row] == pytest.approx(losses[graph], rel=1e-3)
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)


@pytest.mark.parametrize(("float8", "base"), [(False, "none"), (True, "none"), (False, "nf4")])
def test_no_step_waits_for_the_device(
    float8: bool,
    base: str,
    make_job: Callable[..., Path],
    run_command: Any,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CUDA's synchronisation check set to raise inside every step, training goes through."""
    run_step = Trainer.run_step
    steps = []

    def watched(self: Trainer, *args: Any) -> Any:
        if self.step >= 3:  # the first ones compile
            torch.cuda.set_sync_debug_mode("error")
        try:
            steps.append(self.step)
            return run_step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "run_step", watched)
    if float8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9 or newer")
    settings = {"train": {"float8_base": float8}, "memory": {"quantized_base": base}}
    job = make_job(tiny_folder, validation={"enabled": False}, **settings)
    outcome = run_command("train/lora.py", "--config", job)
    assert outcome.code == 0, outcome.err
    assert len(steps) == 12


def test_out_of_memory_says_what_to_turn(
    make_job: Callable[..., Path], run_command: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    job = make_job(tiny_folder, memory={"mode": "keep_all"}, train={"max_steps": 2, "batch_size": 64, "compile": "off"})
    assert run_command("data/prepare.py", "--config", job).code == 0
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    limit = torch.cuda.memory_reserved() + (48 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        outcome = run_command("train/lora.py", "--config", job, "--validation.enabled=false")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome.code == 2
    assert "out of memory on the device" in outcome.err and "memory.mode=recompute" in outcome.err
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
