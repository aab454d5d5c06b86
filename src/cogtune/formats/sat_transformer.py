"""SAT's transformer and diffusers' `CogVideoXTransformer3DModel`: the same weights under other names.

SAT keeps q, k and v in one matrix, and a block's twelve modulations too: shift, scale and gate of attention and of the
feed-forward, for video and then for text. diffusers' norm1 has attention's six, norm2 the feed-forward's.
"""

import json
import re
from typing import Any, Literal

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_sincos_pos_embed

from cogtune.errors import UserError
from cogtune.formats.renaming import Rule, join_parts, rename, split_whole
from cogtune.formats.tensors import Spec, Tensors, spec_of

PREFIX = "model.diffusion_model."
Positions = Literal["rotary", "sincos"]
_POSITIONS_KEY = f"{PREFIX}mixins.pos_embed.pos_embedding"
# Other parts of a whole training checkpoint, and what SAT computes from its config.
_OTHER_PARTS = ("first_stage_model.", "conditioner.", "denoiser.", "loss_fn.")
_COMPUTED = re.compile(r"embed_tokens|word_embeddings|position_embeddings?\b|freqs_sin|freqs_cos")
_LORA = re.compile(r"\.matrix_[AB]\.\d+$")
_IN_LAYER = {
    "transformer.layers.{}.attention.dense": "attn1.to_out.0",
    "transformer.layers.{}.mlp.dense_h_to_4h": "ff.net.0.proj",
    "transformer.layers.{}.mlp.dense_4h_to_h": "ff.net.2",
    "transformer.layers.{}.input_layernorm": "norm1.norm",
    "transformer.layers.{}.post_attention_layernorm": "norm2.norm",
    "mixins.adaln_layer.query_layernorm_list.{}": "attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{}": "attn1.norm_k",
}
_AT_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.linear": "proj_out",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SHAPES_REMEDY = "the weights belong to another model or config, or the file is damaged"


def _make_meta(config: dict[str, Any]) -> CogVideoXTransformer3DModel:
    try:
        with torch.device("meta"):
            model = CogVideoXTransformer3DModel.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the config makes no transformer ({str(error).splitlines()[0]}); give another --config"
        ) from None
    assert isinstance(model, CogVideoXTransformer3DModel)
    return model


def model_specs(config: dict[str, Any]) -> dict[str, Spec]:
    """Names and shapes of a diffusers transformer with this config."""
    return {name: spec_of(tensor) for name, tensor in _make_meta(config).state_dict().items()}


def _make_rules(part_specs: dict[str, Spec], num_layers: int) -> list[Rule]:
    rules = []
    for suffix in ("weight", "bias"):
        for layer in range(num_layers):
            block = f"transformer_blocks.{layer}"
            pairs = {name.format(layer): f"{block}.{part}" for name, part in _IN_LAYER.items()}
            rules += [rename(f"{PREFIX}{name}.{suffix}", f"{part}.{suffix}") for name, part in pairs.items()]
            qkv = tuple((f"{block}.attn1.to_{c}.{suffix}", (i,)) for i, c in enumerate("qkv"))
            rules.append(Rule(f"{PREFIX}transformer.layers.{layer}.attention.query_key_value.{suffix}", qkv))
            modulations = (
                (f"{block}.norm1.linear.{suffix}", (0, 1, 2, 6, 7, 8)),
                (f"{block}.norm2.linear.{suffix}", (3, 4, 5, 9, 10, 11)),
            )
            rules.append(Rule(f"{PREFIX}mixins.adaln_layer.adaLN_modulations.{layer}.1.{suffix}", modulations))
        rules += [rename(f"{PREFIX}{name}.{suffix}", f"{part}.{suffix}") for name, part in _AT_TOP.items()]
    rules.append(rename(_POSITIONS_KEY, "patch_embed.pos_embedding"))
    return [rule for rule in rules if rule.parts[0][0] in part_specs]


def derive_config(tensors: Tensors, positions: Positions | None = None) -> dict[str, Any]:
    """The diffusers config that a SAT transformer's own tensors give, released values for what no tensor shows.

    `positions` is needed where the file has no table: rotary (5B, 1.5) and added sines (2B) leave no trace in it.
    """

    def shape(name: str) -> tuple[int, ...]:
        if f"{PREFIX}{name}" not in tensors.specs:
            raise UserError(f"{tensors.label}: no {PREFIX}{name}; is this the weights file of a SAT CogVideoX?")
        return tensors.specs[f"{PREFIX}{name}"].shape

    pattern = re.compile(re.escape(PREFIX) + r"mixins\.adaln_layer\.adaLN_modulations\.(\d+)\.1\.weight")
    layers = {int(match[1]) for match in map(pattern.fullmatch, tensors.specs) if match}
    patch, width = shape("mixins.patch_embed.proj.weight"), shape("mixins.patch_embed.text_proj.weight")[0]
    head_dim = shape("mixins.adaln_layer.query_layernorm_list.0.weight")[0]
    out_channels, patch_size = 16, 2
    out_features = shape("mixins.final_layer.linear.weight")[0]
    depth = out_features // (out_channels * patch_size**2)
    patch_size_t = None if len(patch) == 4 or depth == 1 else depth
    newer = patch_size_t is not None
    config = {
        "num_layers": len(layers),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": patch[1] if len(patch) == 4 else patch[1] // (patch_size**2 * depth),
        "out_channels": out_channels,
        "patch_size": patch_size,
        "patch_size_t": patch_size_t,
        "patch_bias": not newer,
        "time_embed_dim": shape("time_embed.0.weight")[0],
        "text_embed_dim": shape("mixins.patch_embed.text_proj.weight")[1],
        "ofs_embed_dim": shape("ofs_embed.0.weight")[0] if f"{PREFIX}ofs_embed.0.weight" in tensors.specs else None,
        "max_text_seq_length": 224 if newer else 226,
        # The native size, which the stock pipeline makes unless told otherwise. For 1.5, diffusers' own converter and
        # the hub's first configs say 300 x 300 (2400x2400 pixels); positions are the same values.
        "sample_frames": 81 if newer else 49,
        "sample_height": 96 if newer else 60,
        "sample_width": 170 if newer else 90,
    }
    if _POSITIONS_KEY in tensors.specs:
        config = complete_config(config)
        found, wanted = shape("mixins.pos_embed.pos_embedding"), make_sincos_table(config).shape
        if found != wanted:
            raise UserError(
                f"{tensors.label}: its table of positions is {list(found)}; the released size gives {list(wanted)}; "
                "give --config with the transformer's config.json"
            )
        learned = not _is_sincos(tensors.read(_POSITIONS_KEY), config)
        rotary = learned
    elif positions is None:
        raise UserError(
            f"{tensors.label}: has no table of positions, and doesn't say which are computed; "
            "give --positions rotary (5B, 1.5), --positions sincos (2B), or --config with the transformer's config.json"
        )
    else:
        learned, rotary = False, positions == "rotary"
    config |= {"use_rotary_positional_embeddings": rotary, "use_learned_positional_embeddings": learned}
    return complete_config(config)


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config with every entry that diffusers writes."""
    return json.loads(_make_meta(config).to_json_string())


def make_sincos_table(config: dict[str, Any]) -> torch.Tensor:
    """The added positions of 2B with zeros before them for the text: [1, text + video tokens, width], float32."""
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    patch = config["patch_size"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    video = get_3d_sincos_pos_embed(
        width,
        (config["sample_width"] // patch, config["sample_height"] // patch),
        frames,
        config["spatial_interpolation_scale"],
        config["temporal_interpolation_scale"],
        output_type="pt",
    )
    assert isinstance(video, torch.Tensor)
    return torch.cat([torch.zeros(config["max_text_seq_length"], width), video.flatten(0, 1).float()])[None]


def _is_sincos(table: torch.Tensor, config: dict[str, Any]) -> bool:
    expected = make_sincos_table(config)
    # Half precision rounds numbers up to 1 by at most 2^-9 (bfloat16).
    return table.shape == expected.shape and bool((table.float() - expected).abs().max() < 4e-3)


def split_off(tensors: Tensors, *, without_lora: bool = False) -> tuple[Tensors, list[str]]:
    """The transformer's own tensors under their plain names, and what was left out and why.

    Raises `UserError` for a LoRA in the file, unless it is to be left out.
    """
    lora = [name for name in tensors.specs if _LORA.search(name)]
    if lora and not without_lora:
        raise UserError(
            f"{tensors.label}: holds a LoRA beside the weights ({len(lora)} tensors, first {lora[0]}); convert it by "
            "'from-sat lora', and give --without-lora to convert the weights without it"
        )
    others = [name for name in tensors.specs if name.startswith(_OTHER_PARTS)]
    computed = [name for name in tensors.specs if name.startswith(PREFIX) and _COMPUTED.search(name)]
    left = {*lora, *others, *computed}
    # A layer with a LoRA has its own weight under `original`.
    origin = {name.replace(".original.", "."): name for name in tensors.specs if name not in left}
    notes = [
        f"left out: {len(names)} tensor(s) {why}, first {names[0]}"
        for names, why in ((lora, "of a LoRA"), (others, "of other parts"), (computed, "that are computed"))
        if names
    ]
    specs = {name: tensors.specs[o] for name, o in origin.items()}
    patch, bias = f"{PREFIX}mixins.patch_embed.proj.weight", f"{PREFIX}mixins.patch_embed.proj.bias"
    zeros: dict[str, torch.Tensor] = {}
    if patch in specs and len(specs[patch].shape) == 2 and bias not in specs:
        zeros[bias] = torch.zeros(specs[patch].shape[0], dtype=specs[patch].dtype)
        specs[bias] = spec_of(zeros[bias])
        notes.append("added: a patch bias of zeros, which the file doesn't have and diffusers' layer does")

    def read(name: str) -> torch.Tensor:
        return zeros[name] if name in zeros else tensors.read(origin[name])

    return Tensors(tensors.label, specs, read), notes


def from_sat(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """diffusers' tensors of a SAT transformer; strict about every key and shape. `tensors`: of `split_off`."""
    specs, config = model_specs(config), complete_config(config)
    rules = _make_rules(specs, config["num_layers"])
    if _POSITIONS_KEY in tensors.specs and "patch_embed.pos_embedding" not in specs:
        if config["use_rotary_positional_embeddings"] or not _is_sincos(tensors.read(_POSITIONS_KEY), config):
            raise UserError(f"{tensors.label}: {_POSITIONS_KEY} is a table that the config's model doesn't have")
        kept = {name: spec for name, spec in tensors.specs.items() if name != _POSITIONS_KEY}
        tensors = Tensors(tensors.label, kept, tensors.read)  # diffusers computes the same table
    return split_whole(_as_convolution(tensors, specs), rules, specs, remedy=_SHAPES_REMEDY)


def _as_convolution(tensors: Tensors, specs: dict[str, Spec]) -> Tensors:
    """SAT's newer code has version 1.0's patches in a linear layer, the released files in a convolution: same order."""
    name = f"{PREFIX}mixins.patch_embed.proj.weight"
    wanted = specs["patch_embed.proj.weight"].shape
    found = tensors.specs.get(name)
    if found is None or len(found.shape) != 2 or len(wanted) != 4 or found.shape[1] != torch.Size(wanted[1:]).numel():
        return tensors
    changed = {**tensors.specs, name: Spec((found.shape[0], *wanted[1:]), found.dtype)}

    def read(key: str) -> torch.Tensor:
        return tensors.read(key).reshape(changed[key].shape)

    return Tensors(tensors.label, changed, read)


def to_sat(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """SAT's tensors of a diffusers transformer; added positions, which SAT keeps in its file, are made again."""
    specs, config = model_specs(config), complete_config(config)
    wholes = join_parts(tensors, _make_rules(specs, config["num_layers"]), specs, remedy=_SHAPES_REMEDY)
    if config["use_rotary_positional_embeddings"]:
        return wholes
    dtype = wholes.specs[f"{PREFIX}mixins.patch_embed.proj.weight"].dtype
    table = make_sincos_table(config).to(dtype)

    def read(name: str) -> torch.Tensor:
        return table if name == _POSITIONS_KEY else wholes.read(name)

    return Tensors(wholes.label, {**wholes.specs, _POSITIONS_KEY: spec_of(table)}, read)
