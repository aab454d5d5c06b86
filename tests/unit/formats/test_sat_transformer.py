"""SAT's transformer to diffusers and back: equal outputs by SAT's own rules, equal bits, wrong keys refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from sat_reference import forward

from cogtune.errors import UserError
from cogtune.formats import sat_transformer as sat
from cogtune.formats.sat_folder import open_sat, write_sat_folder
from cogtune.formats.tensors import Spec, Tensors, hold
from cogtune.random_pipeline import ARCHITECTURES

SMALL = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "time_embed_dim": 24,
    "text_embed_dim": 20,
    "max_text_seq_length": 6,
    "sample_frames": 9,
    "sample_height": 8,
    "sample_width": 12,
    "norm_eps": 1e-6,  # SAT's; the released diffusers configs have 1e-5
}
ROTARY = {"use_rotary_positional_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "2B, added positions": SMALL,
    "5B, rotary": SMALL | ROTARY,
    "5B-I2V, learned positions": SMALL | ROTARY | {"in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5, patches in time": SMALL | ROTARY | {"patch_size_t": 2, "patch_bias": False, "sample_frames": 13},
    "1.5-I2V, ofs": SMALL
    | ROTARY
    | {"in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 24, "patch_bias": False, "sample_frames": 13},
    "seven layers": SMALL | ROTARY | {"num_layers": 7},
}


def make_model(name: str, dtype: torch.dtype = torch.float64) -> CogVideoXTransformer3DModel:
    """Random weights in which nothing is near zero or one."""
    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(**MODELS[name]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    if model.config.use_learned_positional_embeddings:
        model.patch_embed.pos_embedding.normal_()
    return model.to(dtype)


def make_config(model: CogVideoXTransformer3DModel) -> dict[str, Any]:
    return sat.complete_config(dict(model.config))


def plain_state(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name.removeprefix(sat.PREFIX): tensors.read(name) for name in tensors.specs}


def make_inputs(model: CogVideoXTransformer3DModel) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    config = model.config
    frames = (config.sample_frames - 1) // 4 + 1
    inputs: dict[str, Any] = {
        "latents": torch.randn(2, frames, config.in_channels, 8, 12, generator=generator, dtype=torch.float64),
        "text": torch.randn(2, 6, 20, generator=generator, dtype=torch.float64),
        "timestep": torch.tensor([437, 12]),
        "ofs": torch.full((2,), 2.0) if config.ofs_embed_dim else None,
    }
    return inputs


def run_diffusers(model: CogVideoXTransformer3DModel, inputs: dict[str, Any]) -> torch.Tensor:
    config = model.config
    frames, rotary = inputs["latents"].shape[1] // (config.patch_size_t or 1), None
    if config.use_rotary_positional_embeddings:
        cosines, sines = get_3d_rotary_pos_embed(
            16, None, grid_size=(4, 6), temporal_size=frames, grid_type="slice", max_size=(4, 6)
        )
        rotary = (cosines.double(), sines.double())
    return model(
        inputs["latents"],
        inputs["text"],
        inputs["timestep"],
        ofs=inputs["ofs"],
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]


def run_reference(model: CogVideoXTransformer3DModel, state: dict[str, torch.Tensor], inputs: dict[str, Any]) -> Any:
    config = model.config
    patch = (config.patch_size_t or 1, 2, 2)
    return forward(state, **inputs, patch=patch, rotary=config.use_rotary_positional_embeddings)


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_computes_what_sat_computes(name: str, tmp_path: Path) -> None:
    """From random SAT tensors through a SAT folder to diffusers; both sides in float64."""
    shapes = sat.to_sat(hold("model", make_model(name).state_dict()), make_config(make_model(name))).specs
    generator = torch.Generator().manual_seed(3)
    state = {
        key: 0.2 * torch.randn(spec.shape, generator=generator, dtype=torch.float64) for key, spec in shapes.items()
    }
    model = make_model(name)
    if not model.config.use_rotary_positional_embeddings:
        state[f"{sat.PREFIX}mixins.pos_embed.pos_embedding"] = sat.make_sincos_table(dict(model.config)).double()
    write_sat_folder(hold("sat", state), tmp_path / "sat", iteration="1000")
    opened, notes = sat.split_off(open_sat(tmp_path / "sat"))
    assert not notes
    converted = sat.from_sat(opened, make_config(model))
    model.load_state_dict({key: converted.read(key) for key in converted.specs}, strict=True)
    inputs = make_inputs(model)
    ours, reference = run_diffusers(model, inputs), run_reference(model, plain_state(hold("", state)), inputs)
    assert reference.shape == ours.shape and reference.std() > 0.1
    # The positions of 2B are float32 on the one side; all else differs by float64's rounding.
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(name, dtype)
    config, state = make_config(model), model.state_dict()
    first = sat.to_sat(hold("model", state), config)
    write_sat_folder(first, tmp_path / "sat")
    back = sat.from_sat(sat.split_off(open_sat(tmp_path / "sat"))[0], config)
    assert list(back.specs) == list(state)
    for key, tensor in state.items():
        assert torch.equal(back.read(key), tensor) and back.specs[key].dtype == dtype, key
    again = sat.to_sat(back, config)
    assert again.specs == first.specs
    assert all(torch.equal(again.read(key), first.read(key)) for key in first.specs)
    if model.config.patch_size_t:
        return
    # SAT's newer code keeps version 1.0's patches in a linear layer.
    key = f"{sat.PREFIX}mixins.patch_embed.proj.weight"
    newer = {name: again.read(name) for name in again.specs}
    newer[key] = newer[key].flatten(1)
    assert torch.equal(sat.from_sat(hold("newer", newer), config).read("patch_embed.proj.weight"), again.read(key))


@pytest.mark.parametrize("name", MODELS)
def test_config_is_derived_from_the_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but sizes, which only the table of positions shows; those are the released ones."""
    sizes = {key: SMALL[key] for key in ("max_text_seq_length", "sample_height", "sample_width")}
    model = make_model(name)
    tensors = sat.to_sat(hold("model", model.state_dict()), make_config(model))
    wanted = make_config(model)
    if "2B" in name or "learned" in name:
        with pytest.raises(UserError, match=r"its table of positions is \[1, 78, 32\]; .* --config"):
            sat.derive_config(tensors)
        return
    with pytest.raises(UserError, match="give --positions rotary"):
        sat.derive_config(tensors)
    found = sat.derive_config(tensors, "rotary")
    free = {*sizes, "sample_frames", "norm_eps"}
    assert {k: v for k, v in found.items() if k not in free} == {k: v for k, v in wanted.items() if k not in free}
    if model.config.patch_size_t is None:  # as SAT's newer code has it, in a linear layer
        key = f"{sat.PREFIX}mixins.patch_embed.proj.weight"
        flat = {**tensors.specs, key: Spec((32, 64), torch.float64)}
        assert sat.derive_config(Tensors("flat", flat, tensors.read), "rotary") == found
    released = ARCHITECTURES["cogvideox-5b" if model.config.patch_size_t is None else "cogvideox-1.5-5b"][0]
    assert all(found[key] == released[key] for key in (*sizes, "sample_frames"))


RELEASED = {"2B": (30, 64, 16, 1.875, False), "5B-I2V": (48, 64, 32, 1.875, True)}


@pytest.mark.parametrize("name", RELEASED)
def test_tables_of_released_sizes_tell_added_from_learned_positions(name: str) -> None:
    """One layer of the released widths: the table alone says which of the two it is."""
    heads, head_dim, channels, _, learned = RELEASED[name]
    config = {
        "num_layers": 1,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "time_embed_dim": 512,
        "use_rotary_positional_embeddings": learned,
        "use_learned_positional_embeddings": learned,
    }
    config = sat.complete_config(config)
    shapes = sat.model_specs(config)
    specs = sat.to_sat(Tensors("meta", shapes, lambda key: torch.zeros(shapes[key].shape)), config).specs
    table = sat.make_sincos_table(config).half() if not learned else torch.randn(1, 17776, heads * head_dim)
    tensors = Tensors(name, {key: Spec(spec.shape, torch.float16) for key, spec in specs.items()}, lambda key: table)
    assert sat.derive_config(tensors) == config


def break_missing(state: dict[str, torch.Tensor]) -> None:
    del state[f"{sat.PREFIX}transformer.layers.1.attention.dense.bias"]


def break_unknown(state: dict[str, torch.Tensor]) -> None:
    state[f"{sat.PREFIX}mixins.lora.matrix"] = torch.zeros(1)


def break_prefix(state: dict[str, torch.Tensor]) -> None:
    state["ema.decay"] = torch.zeros(1)


def break_shape(state: dict[str, torch.Tensor]) -> None:
    key = f"{sat.PREFIX}transformer.layers.0.attention.query_key_value.weight"
    state[key] = state[key][:90]


def break_layers(state: dict[str, torch.Tensor]) -> None:
    for key in [key for key in state if ".layers.2." in key]:
        del state[key]


BROKEN = {
    "missing": (break_missing, r"1 missing key\(s\), first model.diffusion_model.transformer.layers.1.attention.dense"),
    "unknown": (break_unknown, r"1 unknown key\(s\), first model.diffusion_model.mixins.lora.matrix"),
    "unknown elsewhere": (break_prefix, r"1 unknown key\(s\), first ema.decay"),
    "shape": (break_shape, r"query_key_value.weight is \[90, 32\] and should be \[96, 32\]"),
    "too few layers": (break_layers, r"12 missing key\(s\), first .*layers.2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_wrong_key_is_refused(case: str) -> None:
    change, message = BROKEN[case]
    model = make_model("5B, rotary")
    tensors = sat.to_sat(hold("model", model.state_dict()), make_config(model))
    state = {key: tensors.read(key) for key in tensors.specs}
    change(state)
    with pytest.raises(UserError, match=message):
        sat.from_sat(hold("file.pt", state), make_config(model))


def test_other_parts_and_computed_tensors_are_left_out_and_named() -> None:
    model = make_model("5B, rotary")
    tensors = sat.to_sat(hold("model", model.state_dict()), make_config(model))
    state = {key: tensors.read(key) for key in tensors.specs}
    extra = ("first_stage_model.encoder.conv_in.conv.weight", "conditioner.embedders.0.weight")
    computed = (f"{sat.PREFIX}mixins.pos_embed.freqs_sin", f"{sat.PREFIX}transformer.word_embeddings.weight")
    opened, notes = sat.split_off(hold("file.pt", state | {key: torch.zeros(2) for key in (*extra, *computed)}))
    assert set(opened.specs) == set(state)
    assert len(notes) == 2 and "2 tensor(s) of other parts" in notes[0] and "2 tensor(s) that are computed" in notes[1]


def test_a_patch_without_bias_is_one_with_zeros() -> None:
    """diffusers' linear patch layer always has a bias, whatever its config says."""
    model = make_model("1.5, patches in time")
    model.patch_embed.proj.bias.zero_()
    tensors = sat.to_sat(hold("model", model.state_dict()), make_config(model))
    state = {key: tensors.read(key) for key in tensors.specs}
    del state[f"{sat.PREFIX}mixins.patch_embed.proj.bias"]
    opened, notes = sat.split_off(hold("file.pt", state))
    converted = sat.from_sat(opened, make_config(model))
    assert all(torch.equal(converted.read(key), tensor) for key, tensor in model.state_dict().items())
    assert notes == ["added: a patch bias of zeros, which the file doesn't have and diffusers' layer does"]


def test_a_model_of_another_kind_is_refused_by_its_table() -> None:
    model = make_model("5B-I2V, learned positions")
    tensors = sat.to_sat(hold("model", model.state_dict()), make_config(model))
    config = make_config(model) | {"use_learned_positional_embeddings": False}
    with pytest.raises(UserError, match="is a table that the config's model doesn't have"):
        sat.from_sat(tensors, config)
