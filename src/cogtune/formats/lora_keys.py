"""The names that adapters' tensors have in other people's files.

| style | a tensor's name |
|---|---|
| diffusers | `transformer.<layer>.lora_A.weight`; strength in the file's header |
| comfyui | `diffusion_model.<layer>.lora_A.weight` and `diffusion_model.<layer>.alpha` |
| kohya | `lora_unet__<layer with _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha` |
| sat | `model.diffusion_model.transformer.layers.<n>.attention.query_key_value.matrix_A.<0, 1, 2 for q, k, v>` |
"""

import re
from collections.abc import Iterable
from typing import Literal

from cogtune.errors import UserError

Style = Literal["diffusers", "comfyui", "kohya", "sat"]
Role = Literal["down", "up", "alpha", "magnitude"]
_ROLES: dict[str, Role] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
}
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "")
_KOHYA_PREFIXES = ("lora_unet__", "lora_transformer_", "lora_unet_")
# Every linear layer of a CogVideoX transformer: underscores can't be told from dots without knowing them.
_BLOCK_LAYERS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"),
)
_TOP_LAYERS = (
    *("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"),
    *("time_embedding.linear_1", "time_embedding.linear_2", "ofs_embedding.linear_1", "ofs_embedding.linear_2"),
)
_FLAT_BLOCK = {name.replace(".", "_"): name for name in _BLOCK_LAYERS}
_FLAT_TOP = {name.replace(".", "_"): name for name in _TOP_LAYERS}
_SAT = re.compile(
    r"(?:model\.diffusion_model\.)?transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d)"
)
_SAT_LAYERS = {("query_key_value", i): f"attn1.to_{c}" for i, c in enumerate("qkv")} | {("dense", 0): "attn1.to_out.0"}


def parse_key(key: str) -> tuple[str, Role] | None:
    """(layer as diffusers names it, role) of a tensor's name in any style but SAT's; None where it is no adapter's."""
    for ending, role in _ROLES.items():
        if not key.endswith(f".{ending}"):
            continue
        stem = key[: -len(ending) - 1]
        if stem.startswith("lora_"):
            layer = _unflatten(stem)
            return None if layer is None else (layer, role)
        prefix = next(prefix for prefix in _PREFIXES if stem.startswith(prefix))
        return stem.removeprefix(prefix), role
    return None


def _unflatten(stem: str) -> str | None:
    flat = next((stem.removeprefix(prefix) for prefix in _KOHYA_PREFIXES if stem.startswith(prefix)), "")
    block = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", flat)
    if block is None:
        return _FLAT_TOP.get(flat)
    layer = _FLAT_BLOCK.get(block[2])
    return None if layer is None else f"transformer_blocks.{block[1]}.{layer}"


def make_key(layer: str, role: Role, style: Style) -> str:
    """A tensor's name in a style that isn't SAT's."""
    if style == "diffusers":
        return f"transformer.{layer}." + {"down": "lora_A.weight", "up": "lora_B.weight"}.get(
            role, "lora_magnitude_vector"
        )
    if style == "comfyui":
        return f"diffusion_model.{layer}." + {"down": "lora_A.weight", "up": "lora_B.weight"}.get(role, role)
    flat = layer.replace(".", "_")
    return f"lora_unet__{flat}." + {"down": "lora_down.weight", "up": "lora_up.weight"}.get(role, role)


def parse_sat_key(key: str) -> tuple[str, Role] | None:
    """(layer as diffusers names it, role) of a LoRA tensor in a SAT file; None for its other tensors."""
    match = _SAT.fullmatch(key)
    if match is None or (layer := _SAT_LAYERS.get((match[2], int(match[4])))) is None:
        return None
    return f"transformer_blocks.{match[1]}.{layer}", "down" if match[3] == "A" else "up"


def make_sat_key(layer: str, role: Role) -> str | None:
    """SAT's name of a LoRA tensor; None for a layer that SAT's LoRA doesn't have."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    places = {name: place for place, name in _SAT_LAYERS.items()}
    if match is None or match[2] not in places:
        return None
    module, index = places[match[2]]
    matrix = "A" if role == "down" else "B"
    return f"model.diffusion_model.transformer.layers.{match[1]}.attention.{module}.matrix_{matrix}.{index}"


def describe_layers(layers: Iterable[str]) -> str:
    """`transformer_blocks.{0..41}: attn1.to_q, ...` in short, for what is printed and the model card."""
    blocks: dict[str, set[int]] = {}
    others = []
    for layer in layers:
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
        if match:
            blocks.setdefault(match[2], set()).add(int(match[1]))
        else:
            others.append(layer)
    if not blocks and not others:
        raise UserError("no layer in the adapter")
    count = len(set().union(*blocks.values())) if blocks else 0
    return ", ".join([*sorted(blocks), *sorted(others)]) + (f" in {count} block(s)" if count else "")
