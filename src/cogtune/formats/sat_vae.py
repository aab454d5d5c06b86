"""SAT's autoencoder file (`3d-vae.pt`) and diffusers' `AutoencoderKLCogVideoX`: the same weights under other names."""

import json
import re
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX

from cogtune.errors import UserError
from cogtune.formats.renaming import Rule, join_parts, rename, split_whole
from cogtune.formats.tensors import Spec, Tensors, spec_of

_REMEDY = "the weights belong to another autoencoder or config, or the file is damaged"
_ENGINE_PREFIX = "first_stage_model."


def vae_specs(config: dict[str, Any]) -> dict[str, Spec]:
    """Names and shapes of a diffusers autoencoder with this config."""
    return {name: spec_of(tensor) for name, tensor in _make(config).state_dict().items()}


def _make(config: dict[str, Any]) -> AutoencoderKLCogVideoX:
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX.from_config(config)
    assert isinstance(model, AutoencoderKLCogVideoX)
    return model


def sat_name(name: str, num_levels: int) -> str:
    """SAT's name of a diffusers weight. The decoder's levels are numbered from the outside in SAT."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{num_levels - 1 - int(m[1])}", name)
    for ours, theirs in (
        ("down_blocks.", "down."),
        ("resnets.", "block."),
        ("downsamplers.0.", "downsample."),
        ("upsamplers.0.", "upsample."),
        ("conv_shortcut.", "nin_shortcut."),
    ):
        name = name.replace(ours, theirs)
    return name


def _make_rules(specs: dict[str, Spec], config: dict[str, Any]) -> list[Rule]:
    return [rename(sat_name(name, len(config["block_out_channels"])), name) for name in specs]


def split_off(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The autoencoder's tensors, also out of a whole training checkpoint; its loss's networks are left out."""
    inside = [name for name in tensors.specs if name.startswith(_ENGINE_PREFIX)]
    own = {name.removeprefix(_ENGINE_PREFIX): name for name in (inside or tensors.specs)}
    loss = [name for name in own if re.match(r"loss\.", name)]
    origin = {name: whole for name, whole in own.items() if name not in loss}
    specs = {name: tensors.specs[whole] for name, whole in origin.items()}
    notes = [f"left out: {len(loss)} tensor(s) of the training loss, first {loss[0]}"] if loss else []
    return Tensors(tensors.label, specs, lambda name: tensors.read(origin[name])), notes


def derive_config(tensors: Tensors, scaling_factor: float) -> dict[str, Any]:
    """The diffusers config that the file's own tensors give. The factor that latents are scaled by is in no tensor."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors.specs:
            raise UserError(f"{tensors.label}: no {name}; is this the autoencoder's file of a SAT CogVideoX?")
        return tensors.specs[name].shape

    levels = [int(m[1]) for m in (re.match(r"encoder\.down\.(\d+)\.", name) for name in tensors.specs) if m]
    blocks = [int(m[1]) for m in (re.match(r"encoder\.down\.0\.block\.(\d+)\.", name) for name in tensors.specs) if m]
    shape("encoder.down.0.block.0.conv1.conv.weight")
    num_levels = max(levels) + 1
    channels = [shape(f"encoder.down.{level}.block.0.conv2.conv.weight")[0] for level in range(num_levels)]
    config = {
        "block_out_channels": channels,
        "layers_per_block": max(blocks) + 1,
        "latent_channels": shape("decoder.conv_in.conv.weight")[1],
        "in_channels": shape("encoder.conv_in.conv.weight")[1],
        "out_channels": shape("decoder.conv_out.conv.weight")[0],
        "down_block_types": ["CogVideoXDownBlock3D"] * num_levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * num_levels,
        "scaling_factor": scaling_factor,
    }
    return json.loads(_make(config).to_json_string())


def from_sat(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """diffusers' tensors of a SAT autoencoder; strict about every key and shape. `tensors`: of `split_off`."""
    specs = vae_specs(config)
    return split_whole(tensors, _make_rules(specs, config), specs, remedy=_REMEDY)


def to_sat(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """SAT's tensors of a diffusers autoencoder."""
    specs = vae_specs(config)
    return join_parts(tensors, _make_rules(specs, config), specs, remedy=_REMEDY)
