"""Runs whose weights and activations wait on the host: the same adapter bit for bit, resume, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cogtune.random_pipeline import ARCHITECTURES, write_random_pipeline

LORA, SFT = "train/lora.py", "train/sft.py"
STREAMED = {"memory__mode": "keep_attention", "memory__resident_blocks": 0, "memory__offloaded_blocks": 2}


@pytest.fixture
def options(options: Any) -> Any:
    """Options of a short run with one validation video of two steps."""
    videos = {"validation__enabled": "true", "validation__prompts": "waves", "validation__num_inference_steps": 2}
    return lambda name, **changes: options(name, **(videos | changes))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "eval_loss") if key in row} for row in rows]


def assert_equal_files(first: Path, second: Path) -> None:
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys() and all(torch.equal(one[key], value) for key, value in other.items())


def test_a_streamed_run_is_the_resident_one_bit_for_bit_with_its_videos_and_resumes(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    """Against a run with one block resident and activations on the device; resident weights as a whole lie at other
    addresses, which changes a CPU's last bits (`test_streamed_training.py` compares at equal ones)."""
    assert run_command(LORA, *options("whole", memory__mode="keep_attention")).code == 0
    few = options("plain", memory__mode="keep_attention", memory__resident_blocks=1, memory__offloaded_blocks=0)
    assert run_command(LORA, *few).code == 0
    outcome = run_command(LORA, *options("streamed", **STREAMED))
    assert outcome.code == 0, outcome.err
    assert "0 blocks resident, others streamed, activations of 2 blocks on the host" in outcome.out
    assert read_rows(tmp_path / "plain") == read_rows(tmp_path / "streamed")
    for whole, streamed in zip(read_rows(tmp_path / "whole"), read_rows(tmp_path / "streamed"), strict=True):
        assert whole == pytest.approx(streamed, rel=1e-4)
    for name in ("final/pytorch_lora_weights.safetensors", "checkpoints/step-000004/optimizer.safetensors"):
        assert_equal_files(tmp_path / "plain" / name, tmp_path / "streamed" / name)
    video = "samples/step-000004/00-0.mp4"
    assert (tmp_path / "plain" / video).read_bytes() == (tmp_path / "streamed" / video).read_bytes()
    mixed = options("mixed", **STREAMED | {"memory__mode": "keep_products", "memory__lean_blocks": 1})
    outcome = run_command(LORA, *mixed, "--memory.leaving_blocks=2")
    assert outcome.code == 0 and "keep_products, keep_attention for 1 blocks, 0 blocks resident" in outcome.out
    assert read_rows(tmp_path / "plain") == read_rows(tmp_path / "mixed")
    last = tmp_path / "streamed/checkpoints/step-000004"
    last.rename(tmp_path / "straight")
    outcome = run_command(
        LORA, *options("streamed", memory__resident_blocks=1, memory__lean_blocks=1, memory__mode="keep_all")
    )
    assert outcome.code == 0 and "at step 2" in outcome.out, "memory settings change no result and may change"
    for name in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
        assert_equal_files(tmp_path / "straight" / name, last / name)


def test_the_dry_run_shows_the_ladder(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(LORA, *options("run"), "--dry-run")
    assert outcome.code == 0 and "rungs" in outcome.out and "<- fastest that fits" in outcome.out
    outcome = run_command(LORA, *options("run", **STREAMED), "--dry-run")
    assert "keep_attention, 0 blocks resident" in outcome.out


def test_what_can_not_be_streamed_is_refused(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(SFT, *options("run", memory__resident_blocks=0))
    assert outcome.code == 2 and "memory.resident_blocks=0" in outcome.err and "freezes no weight" in outcome.err


def test_full_fine_tuning_with_weights_and_optimizer_on_the_host(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    settings = {"optimizer__learning_rate": 1e-3, "memory__mode": "recompute"}
    assert run_command(SFT, *options("device", **settings)).code == 0
    outcome = run_command(SFT, *options("host", memory__optimizer="host", memory__offloaded_blocks=1, **settings))
    assert outcome.code == 0, outcome.err
    assert "weights and optimizer on the host" in outcome.out
    for device, host in zip(read_rows(tmp_path / "device"), read_rows(tmp_path / "host"), strict=True):
        assert host == pytest.approx(device, rel=2e-3)
    weights = "final/transformer/diffusion_pytorch_model.safetensors"
    device, host = (load_file(tmp_path / name / weights) for name in ("device", "host"))
    assert device.keys() == host.keys()
    for name, value in device.items():
        torch.testing.assert_close(host[name], value, rtol=0, atol=5e-4)
    last = tmp_path / "host/checkpoints/step-000004"
    last.rename(tmp_path / "straight")
    outcome = run_command(SFT, *options("host", memory__optimizer="host", memory__offloaded_blocks=1, **settings))
    assert outcome.code == 0 and "at step 2" in outcome.out
    for name in ("weights-00000-0000.safetensors", "optimizer-00000-0000.safetensors"):
        assert_equal_files(tmp_path / "straight" / name, last / name)


def test_where_the_optimizer_can_not_be_on_the_host(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(LORA, *options("run", memory__optimizer="host"))
    assert outcome.code == 2 and "memory.optimizer=host: it is for full fine-tuning" in outcome.err
    outcome = run_command(SFT, *options("run", memory__optimizer="host", train__ema_decay=0.9))
    assert outcome.code == 2 and "train.ema_decay must be null" in outcome.err


def test_full_fine_tuning_with_8_bit_state_says_so_and_resumes_bit_for_bit(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"optimizer__learning_rate": 1e-3, "memory__mode": "recompute"}
    settings |= {"model__dtype": "bfloat16", "checkpoint__keep_last": 2}
    eight = settings | {"memory__optimizer": "8bit", "memory__offloaded_blocks": 1}
    assert run_command(SFT, *options("device", **settings)).code == 0
    outcome = run_command(SFT, *options("eight", **eight))
    assert outcome.code == 0, outcome.err
    assert "bfloat16 weights and 8-bit optimizer state" in outcome.out
    assert "stepping inside the backward pass" in outcome.out and "bfloat16 trained weights" in outcome.out
    for device, small in zip(read_rows(tmp_path / "device"), read_rows(tmp_path / "eight"), strict=True):
        assert small == pytest.approx(device, rel=0.1)
    final, last = tmp_path / "eight/final", tmp_path / "eight/checkpoints/step-000004"
    weights = load_file(final / "transformer/diffusion_pytorch_model.safetensors")
    stored = {group: load_file(last / f"{group}-00000-0000.safetensors") for group in ("weights", "optimizer")}
    saved = {name.removeprefix("weights."): tensor for name, tensor in stored["weights"].items()}
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved.values())
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights.items() if name in saved)
    state = stored["optimizer"]
    assert {name.rsplit(".", 1)[1] for name, tensor in state.items() if tensor.dtype == torch.uint8} == {
        "exp_avg_codes",
        "exp_avg_sq_codes",
    }
    assert "8-bit optimizer state" in (tmp_path / "eight/config.yaml").read_text().splitlines()[0]
    assert "8-bit state" in (tmp_path / "eight/report.html").read_text()
    assert "AdamW's state 8 bits" in (final / "README.md").read_text()

    last.rename(tmp_path / "straight")
    outcome = run_command(SFT, *options("eight", **eight))
    assert outcome.code == 0 and "at step 2" in outcome.out
    for name in ("weights-00000-0000.safetensors", "optimizer-00000-0000.safetensors"):
        assert_equal_files(tmp_path / "straight" / name, last / name)
    outcome = run_command(SFT, *options("eight", **settings))
    assert outcome.code == 2 and "memory.optimizer: 8bit state -> float32 state" in outcome.err


def test_trained_blocks_that_come_and_go_give_the_same_run_and_go_on_anywhere(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, videos too; another number of those that stay takes over at a checkpoint. 5 blocks: some leave."""
    transformer, *others = ARCHITECTURES["tiny"]
    monkeypatch.setitem(ARCHITECTURES, "tiny-deep", (transformer | {"num_layers": 5}, *others))
    write_random_pipeline(tmp_path / "deep", "tiny-deep")
    settings: dict[str, object] = {"optimizer__learning_rate": 1e-3, "memory__mode": "recompute"}
    settings["model__path"] = tmp_path / "deep"
    settings |= {"model__dtype": "bfloat16", "memory__optimizer": "8bit", "memory__offloaded_blocks": 1}
    for name, resident in (("most", 4), ("none", 0)):
        outcome = run_command(
            SFT, *options(name, **settings, memory__resident_blocks=resident, checkpoint__keep_last=2)
        )
        assert outcome.code == 0, outcome.err
        assert f"{resident} blocks resident, others streamed" in outcome.out
    assert read_rows(tmp_path / "most") == read_rows(tmp_path / "none")
    names = [f"checkpoints/step-000004/{group}-00000-0000.safetensors" for group in ("weights", "optimizer")]
    for name in (*names, "final/transformer/diffusion_pytorch_model.safetensors"):
        assert_equal_files(tmp_path / "most" / name, tmp_path / "none" / name)
    video = "samples/step-000004/00-0.mp4"
    assert (tmp_path / "most" / video).read_bytes() == (tmp_path / "none" / video).read_bytes()

    last = tmp_path / "none/checkpoints/step-000004"
    last.rename(tmp_path / "straight")
    outcome = run_command(SFT, *options("none", **settings, memory__resident_blocks=2))
    assert outcome.code == 0 and "at step 2" in outcome.out
    for group in ("weights", "optimizer"):
        file = f"{group}-00000-0000.safetensors"
        assert_equal_files(tmp_path / "straight" / file, last / file)


def test_bad_gradients_end_a_run_with_8_bit_state_and_leave_its_weights(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    settings = {"model__dtype": "bfloat16", "memory__optimizer": "8bit", "validation__enabled": "false"}
    outcome = run_command(SFT, *options("run", optimizer__learning_rate=1e30, schedule__name="constant", **settings))
    assert outcome.code == 2 and "non-finite loss or gradients" in outcome.err
    assert "lower optimizer.learning_rate" in outcome.err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "weights are kept in bfloat16, not float32; set model.dtype=bfloat16"),
        ({"model__dtype": "bfloat16", "train__ema_decay": 0.9}, "train.ema_decay must be null"),
        ({"model__dtype": "bfloat16", "train__gradient_accumulation_steps": 2}, "accumulation_steps must be 1"),
        ({"memory__optimizer": "host", "memory__allow_8bit_optimizer": "true"}, "no effect beside memory.optimizer"),
    ],
)
def test_where_the_state_can_not_be_8_bits(
    changes: dict[str, object], message: str, options: Callable[..., list[str]], run_command: Any
) -> None:
    outcome = run_command(SFT, *options("run", **{"memory__optimizer": "8bit"} | changes))
    assert outcome.code == 2 and message in outcome.err


def test_an_adapter_has_no_8_bit_state(options: Callable[..., list[str]], run_command: Any) -> None:
    outcome = run_command(LORA, *options("run", memory__optimizer="8bit"))
    assert outcome.code == 2 and "memory.optimizer=8bit: it is for full fine-tuning" in outcome.err
    outcome = run_command(LORA, *options("run", memory__allow_8bit_optimizer="true"))
    assert outcome.code == 2 and "memory.allow_8bit_optimizer=true: it is for full fine-tuning" in outcome.err
