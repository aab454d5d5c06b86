"""Adapters in every style: equal outputs in a stock pipeline after a round trip, SAT's scale, wrong files refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from sat_reference import forward
from trained_adapters import KINDS, run, train

from cogtune import adapter as training
from cogtune import models
from cogtune.config import AdapterSettings
from cogtune.errors import UserError
from cogtune.formats import sat_transformer
from cogtune.formats.lora import (
    Adapter,
    LoraLayer,
    check_fits,
    read_adapter,
    read_sat_adapter,
    write_adapter,
    write_sat_adapter,
)
from cogtune.formats.lora_keys import Style, make_key, make_sat_key, parse_key, parse_sat_key
from cogtune.formats.sat_folder import open_sat, write_sat_folder
from cogtune.formats.tensors import hold


def load_stock(folder: Path, adapter: Path) -> CogVideoXTransformer3DModel:
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    return pipeline.transformer


@pytest.mark.parametrize("fold", [False, True], ids=["kept", "folded"])
@pytest.mark.parametrize("style", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_gives_the_same_video(
    kind: str, style: Style, fold: bool, tiny_2b_folder: Path, tmp_path: Path
) -> None:
    trained = train(tiny_2b_folder, tmp_path / "run", KINDS[kind])
    there = tmp_path / "there.safetensors"
    write_adapter(read_adapter(tmp_path / "run"), there, style, fold=fold)
    back = tmp_path / "back.safetensors"
    write_adapter(read_adapter(there), back, "diffusers")
    base = run(models.load_transformer(models.read_facts(tiny_2b_folder), torch.float32))
    ours, stock = run(trained), run(load_stock(tiny_2b_folder, back))
    torch.testing.assert_close(stock, ours, rtol=0, atol=3e-6)
    assert (ours - base).abs().max() > 1e-2
    if fold:
        assert {layer.scale for layer in read_adapter(there).layers.values()} == {1.0}
    else:
        before, after = load_file(tmp_path / "run" / training.WEIGHTS_NAME), load_file(back)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_dora_passes_through_diffusers_style_and_no_other(tiny_2b_folder: Path, tmp_path: Path) -> None:
    trained = train(tiny_2b_folder, tmp_path, AdapterSettings(rank=2, alpha=3.0, use_dora=True))
    read = read_adapter(tmp_path)
    write_adapter(read, tmp_path / "again.safetensors", "diffusers")
    stock = load_stock(tiny_2b_folder, tmp_path / "again.safetensors")
    torch.testing.assert_close(run(stock), run(trained), rtol=0, atol=3e-6)
    with pytest.raises(UserError, match=r"is DoRA .* only diffusers' style holds"):
        write_adapter(read, tmp_path / "x.safetensors", "comfyui")


def test_layers_of_several_ranks_and_strengths_reach_a_stock_pipeline(tiny_2b_folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)

    def make(rank: int, scale: float) -> LoraLayer:
        return LoraLayer(torch.randn(rank, 32, generator=generator), torch.randn(32, rank, generator=generator), scale)

    names = [f"transformer_blocks.{block}.attn1.{layer}" for block in (0, 1) for layer in ("to_q", "to_k", "to_v")]
    layers = {name: make(1 + place % 3, 0.05 * (place + 1)) for place, name in enumerate(names)}
    write_adapter(Adapter("made", layers), tmp_path / "mixed.safetensors", "diffusers")
    stock = load_stock(tiny_2b_folder, tmp_path / "mixed.safetensors")
    plain = models.load_transformer(models.read_facts(tiny_2b_folder), torch.float32)
    before = run(plain)
    for name, layer in layers.items():
        plain.get_submodule(name).weight.data += layer.scale * (layer.up @ layer.down)
    torch.testing.assert_close(run(stock), run(plain), rtol=0, atol=1e-5)
    assert (run(plain) - before).abs().max() > 1e-2


def test_a_file_without_a_strength_takes_what_is_given_or_its_rank(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.ones(4, 8), name.format("B"): torch.ones(8, 4)}, tmp_path / "a.safetensors")
    (plain,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    (given,) = read_adapter(tmp_path / "a.safetensors", alpha=2.0).layers.values()
    assert (plain.scale, given.scale) == (1.0, 0.5)


@pytest.mark.parametrize("fold", [False, True], ids=["kept", "folded"])
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_sat_lora_computes_what_diffusers_computes(fold: bool, alpha: float, tmp_path: Path) -> None:
    """Both ways, against SAT's own rule: A and B for each of q, k, v, times alpha / rank."""
    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(
        num_layers=5,
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=24,
        text_embed_dim=20,
        max_text_seq_length=6,
        sample_frames=9,
        sample_height=8,
        sample_width=12,
        norm_eps=1e-6,
    ).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    config = sat_transformer.complete_config(dict(model.config))
    weights = sat_transformer.to_sat(hold("model", model.state_dict()), config)
    state = {name: weights.read(name) for name in weights.specs}
    for block in range(5):
        for place, count in (("query_key_value", 3), ("dense", 1)):
            name = f"{sat_transformer.PREFIX}transformer.layers.{block}.attention.{place}"
            for kind in ("weight", "bias"):  # SAT moves a layer's own weight where it puts a LoRA
                state[f"{name}.original.{kind}"] = state.pop(f"{name}.{kind}")
            for index in range(count):
                state[f"{name}.matrix_A.{index}"] = torch.randn(4, 32)
                state[f"{name}.matrix_B.{index}"] = 0.3 * torch.randn(32, 4)
    write_sat_folder(hold("sat", state), tmp_path / "sat")
    with pytest.raises(UserError, match=r"holds a LoRA beside the weights \(40 tensors"):
        sat_transformer.split_off(open_sat(tmp_path / "sat"))
    own, notes = sat_transformer.split_off(open_sat(tmp_path / "sat"), without_lora=True)
    assert "40 tensor(s) of a LoRA" in notes[0]
    base = sat_transformer.from_sat(own, config)
    assert all(torch.equal(base.read(name), tensor) for name, tensor in model.state_dict().items())

    inputs: dict[str, Any] = {
        "latents": torch.randn(1, 3, 16, 8, 12),
        "text": torch.randn(1, 6, 20),
        "timestep": torch.tensor([300]),
    }
    names = {name.removeprefix(sat_transformer.PREFIX): tensor for name, tensor in state.items()}
    expected = forward(names, **inputs, patch=(1, 2, 2), rotary=False, alpha=alpha).float()
    write_adapter(
        read_sat_adapter(tmp_path / "sat", alpha=alpha), tmp_path / "lora.safetensors", "diffusers", fold=fold
    )
    header = json.loads((tmp_path / "lora.safetensors").read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}")
    strength = json.loads(header["__metadata__"]["lora_adapter_metadata"])["transformer.lora_alpha"]
    assert strength == (4 if fold else alpha)
    model.load_lora_adapter(
        load_file(tmp_path / "lora.safetensors"),
        metadata={f"transformer.{k}": v for k, v in read_adapter(tmp_path / "lora.safetensors").header.items()},
        prefix="transformer",
    )
    result = model(inputs["latents"], inputs["text"], inputs["timestep"], return_dict=False)[0]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    plain = forward({n: t for n, t in names.items() if "matrix" not in n}, **inputs, patch=(1, 2, 2), rotary=False)
    assert (expected - plain).abs().max() > 1e-2

    # And back: SAT's rule with the alpha that its config is to have gives the same again.
    wanted = write_sat_adapter(read_adapter(tmp_path / "lora.safetensors"), tmp_path / "back", fold=fold)
    matrices = open_sat(tmp_path / "back")
    names |= {n.removeprefix(sat_transformer.PREFIX): matrices.read(n) for n in matrices.specs}
    again = forward(names, **inputs, patch=(1, 2, 2), rotary=False, alpha=wanted).float()
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)
    assert wanted == (1 if fold else alpha)


def test_names_of_every_layer_survive_every_style(tiny_2b_folder: Path) -> None:
    names = training.linear_names(models.make_meta_transformer(models.read_facts(tiny_2b_folder)))
    assert len(names) > 16
    for name in names:
        for role in ("down", "up"):
            for style in ("diffusers", "comfyui", "kohya"):
                assert parse_key(make_key(name, role, style)) == (name, role)
            key = make_sat_key(name, role)
            assert (key is None) != ("attn1.to" in name)
            assert key is None or parse_sat_key(key) == (name, role)
    for written in ("transformer_blocks.3.attn1.to_q.lora_A.weight", "base_model.model.proj_out.lora_B.default.weight"):
        assert parse_key(written) is not None
    assert make_key("transformer_blocks.1.attn1.to_out.0", "up", "kohya") == (
        "lora_unet__transformer_blocks_1_attn1_to_out_0.lora_up.weight"
    )
    assert make_key("transformer_blocks.1.attn1.to_q", "alpha", "comfyui") == (
        "diffusion_model.transformer_blocks.1.attn1.to_q.alpha"
    )


FOREIGN = {
    "a key of another model": ({"unet.conv.weight": torch.zeros(1)}, "'unet.conv.weight' is not one of a CogVideoX"),
    "another model's layer in kohya's names": (
        {"lora_unet_down_blocks_0_conv.lora_up.weight": torch.zeros(1)},
        "is not one of a CogVideoX",
    ),
    "half a pair": ({"transformer.proj_out.lora_A.weight": torch.zeros(2, 4)}, "proj_out has no up matrix"),
    "empty": (
        {"proj_out.lora_A.weight": torch.zeros(0), "proj_out.lora_B.weight": torch.zeros(0)},
        "proj_out is empty: saved from a sharded model",
    ),
    "a convolution": (
        {"p.lora_A.weight": torch.zeros(2, 4, 1, 1), "p.lora_B.weight": torch.zeros(4, 2, 1, 1)},
        "only linear layers",
    ),
    "two ranks": (
        {"p.lora_A.weight": torch.zeros(2, 4), "p.lora_B.weight": torch.zeros(4, 3)},
        r"p is \[2, 4\] and \[4, 3\], and should be \[rank, in\]",
    ),
    "two adapters": (
        {"p.lora_A.weight": torch.zeros(2, 4), "diffusion_model.p.lora_A.weight": torch.zeros(2, 4)},
        "is in it twice",
    ),
    "dora of others": ({"diffusion_model.p.dora_scale": torch.zeros(1)}, "DoRA in ComfyUI's form is not read"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_and_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    state, message = FOREIGN[case]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a.safetensors")


def test_an_adapter_of_another_model_is_refused_by_its_first_layer(tiny_2b_folder: Path, tmp_path: Path) -> None:
    specs = dict(hold("m", models.make_meta_transformer(models.read_facts(tiny_2b_folder)).state_dict()).specs)
    layer = LoraLayer(torch.zeros(2, 3072), torch.zeros(3072, 2), 1.0)
    with pytest.raises(UserError, match=r"attn1.to_q is \[3072, 3072\] in the adapter and \[32, 32\] in this model"):
        check_fits(Adapter("a", {"transformer_blocks.0.attn1.to_q": layer}), specs)
    with pytest.raises(UserError, match=r"transformer_blocks.41.attn1.to_q does not exist in this model"):
        check_fits(Adapter("a", {"transformer_blocks.41.attn1.to_q": layer}), specs)


def test_sat_refuses_what_its_lora_has_no_place_for(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 0.5)
    block = {f"transformer_blocks.0.attn1.{name}": layer for name in ("to_q", "to_k", "to_v", "to_out.0")}
    with pytest.raises(UserError, match=r"layer transformer_blocks.0.ff.net.2 has no place in SAT's LoRA"):
        write_sat_adapter(Adapter("a", block | {"transformer_blocks.0.ff.net.2": layer}), tmp_path / "x", fold=True)
    del block["transformer_blocks.0.attn1.to_k"]
    with pytest.raises(UserError, match=r"has only to_out.0, to_q, to_v"):
        write_sat_adapter(Adapter("a", block), tmp_path / "x", fold=True)
