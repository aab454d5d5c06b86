"""Checkpoints of two processes under DeepSpeed and FSDP become an adapter and a pipeline that stock code loads."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from ranks import run_worker

ROOT = Path(__file__).resolve().parents[2]
CONVERT = "scripts/convert.py"
LORA = ["zero1-lora", "zero2-lora", "zero3-lora", "fsdp-lora", "fsdp-whole-lora"]
FULL = ["zero2-full", "zero3-full", "fsdp-full", "fsdp-whole-full"]


@pytest.fixture(scope="module")
def saved(tiny_2b_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained and saved by two processes in one go; copy one before changing it."""
    out = tmp_path_factory.mktemp("sharded")
    run_worker(2, ROOT / "tests/e2e/sharded_worker.py", tiny_2b_folder, out, folder=out / "printed")
    return out


def plain(name: str) -> str:
    return name.replace(".default.", ".")


@pytest.mark.parametrize("case", LORA)
def test_adapter_comes_out_as_it_was_trained(
    case: str, saved: Path, tiny_2b_folder: Path, tmp_path: Path, run_command: Callable
) -> None:
    outcome = run_command(CONVERT, "checkpoint", saved / case, tmp_path / "out", "--base", tiny_2b_folder, "--alpha", 6)
    assert outcome.code == 0, outcome.err
    truth = torch.load(saved / f"{case}.pt", weights_only=True)
    found = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    trained = {f"transformer.{plain(name)}": tensor for name, tensor in truth.items() if "lora_" in name}
    assert len(trained) == 16 and found.keys() == trained.keys()
    for name, tensor in trained.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name
    stock = CogVideoXPipeline.from_pretrained(tiny_2b_folder)
    stock.load_lora_weights(tmp_path / "out")
    layer = stock.transformer.transformer_blocks[0].attn1.to_q
    assert layer.scaling["default_0"] == 2.0
    assert torch.equal(layer.lora_B["default_0"].weight, truth[next(n for n in truth if "0.attn1.to_q.lora_B" in n)])
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize("case", FULL)
def test_pipeline_comes_out_as_it_was_trained(
    case: str, saved: Path, tiny_2b_folder: Path, tmp_path: Path, run_command: Callable
) -> None:
    outcome = run_command(CONVERT, "checkpoint", saved / case, tmp_path / "out", "--base", tiny_2b_folder)
    assert outcome.code == 0, outcome.err
    truth = torch.load(saved / f"{case}.pt", weights_only=True)
    state = CogVideoXPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    before = CogVideoXPipeline.from_pretrained(tiny_2b_folder).transformer.state_dict()
    assert state.keys() == truth.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in truth.items())
    assert not torch.equal(state["proj_out.weight"], before["proj_out.weight"])


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.fixture
def refused(run_command: Callable, tiny_2b_folder: Path, tmp_path: Path) -> Callable[..., str]:
    def call(source: Path, *options: object, base: Path = tiny_2b_folder) -> str:
        outcome = run_command(CONVERT, "checkpoint", source, tmp_path / "out", "--base", base, *options)
        assert outcome.code == 2 and "Traceback" not in outcome.err and outcome.err.count("error: ") == 1, outcome.err
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))
        return outcome.err

    return call


def test_what_the_folder_does_not_say_is_asked_for(saved: Path, refused: Callable[..., str]) -> None:
    assert "holds an adapter, and not its lora_alpha" in refused(saved / "zero2-lora")
    assert "holds all weights and no adapter; leave it out" in refused(saved / "zero2-full", "--alpha", 2)


@pytest.mark.parametrize("case", ["zero2-full", "fsdp-full", "fsdp-whole-full"])
def test_another_base_is_refused_by_its_first_difference(
    case: str, saved: Path, tiny_folder: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    from cogtune.random_pipeline import ARCHITECTURES, write_random_pipeline

    transformer, vae, shift = ARCHITECTURES["tiny-2b"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "wide", (transformer | {"num_attention_heads": 3}, vae, shift))
        write_random_pipeline(tmp_path / "wide", "wide")
    message = refused(saved / case, base=tmp_path / "wide")
    assert "is [32" in message and "should be [48" in message and "trained from another model" in message


def test_incomplete_folders_say_what_is_missing(saved: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    zero = copied(saved / "zero3-lora", tmp_path / "zero")
    (zero / "latest").write_text("elsewhere")
    assert "names 'elsewhere', and there is no such folder" in refused(zero, "--alpha", 6)
    pieces = sorted((zero / "pytorch_model").glob("*_optim_states.pt"))
    pieces[1].unlink()
    assert "can't put it together (Expected 2" in refused(zero / "pytorch_model", "--alpha", 6)
    pieces[0].unlink()
    assert "there are none; copy them too" in refused(zero / "pytorch_model", "--alpha", 6)
    fsdp = copied(saved / "fsdp-lora" / "pytorch_model_fsdp_0", tmp_path / "fsdp")
    (fsdp / "__1_0.distcp").unlink()
    assert "__1_0.distcp is missing, which the index names" in refused(fsdp, "--alpha", 6)
    both = copied(saved / "fsdp-lora", tmp_path / "both")
    shutil.copy(saved / "fsdp-whole-lora" / "pytorch_model_fsdp.bin", both)
    assert "several checkpoints in it" in refused(both, "--alpha", 6)
    (tmp_path / "none").mkdir()
    assert "neither DeepSpeed's files" in refused(tmp_path / "none")
    assert "no such folder" in refused(tmp_path / "nowhere")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("which", ["model states", "optimizer states", "index", "whole model"])
def test_code_in_a_checkpoint_is_not_run(which: str, saved: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    if which == "index":
        folder = copied(saved / "fsdp-lora" / "pytorch_model_fsdp_0", tmp_path / "bad")
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        message = refused(folder, "--alpha", 6)
        assert "which is no part of a checkpoint's index" in message
    elif which == "whole model":
        folder = copied(saved / "fsdp-whole-lora", tmp_path / "bad")
        torch.save({"extra": Payload(tmp_path / "ran")}, folder / "pytorch_model_fsdp.bin")
        assert "could run code when read" in refused(folder, "--alpha", 6)
    else:
        folder = copied(saved / "zero2-lora", tmp_path / "bad")
        pattern = "mp_rank*_model_states.pt" if which == "model states" else "*rank_1*_optim_states.pt"
        (file,) = (folder / "pytorch_model").glob(pattern)
        found = torch.load(file, weights_only=False)
        torch.save(found | {"extra": Payload(tmp_path / "ran")}, file)
        assert "could run code when read" in refused(folder, "--alpha", 6)
    assert not (tmp_path / "ran").exists()
