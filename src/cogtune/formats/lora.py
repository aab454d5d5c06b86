"""Adapters in memory, and the files that they come from and go to."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from cogtune.errors import UserError
from cogtune.formats.file_names import WEIGHTS_NAME
from cogtune.formats.lora_keys import Style, make_key, make_sat_key, parse_key, parse_sat_key
from cogtune.formats.sat_folder import open_sat, write_sat_folder
from cogtune.formats.tensors import Spec, Tensors, cast, hold, open_safetensors
from cogtune.formats.writing import write_safetensors


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update, `scale * up @ down`."""

    down: torch.Tensor  # [rank, in]
    up: torch.Tensor  # [out, rank]
    scale: float
    magnitude: torch.Tensor | None = None
    """DoRA's trained row lengths, [out]."""

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.down.shape[0]

    def update(self) -> torch.Tensor:
        """The change of the weight, float32 [out, in]."""
        return self.scale * (self.up.float() @ self.down.float())

    def folded(self, scale: float = 1.0) -> "LoraLayer":
        """The same update at another scale, float32: half precision may not hold the product."""
        return replace(self, down=self.down.float(), up=self.up.float() * (self.scale / scale), scale=scale)


@dataclass(frozen=True)
class Adapter:
    """An adapter's layers, by the names of diffusers' modules."""

    label: str
    layers: dict[str, LoraLayer]
    header: dict[str, Any] = field(default_factory=dict)
    """PEFT's config from the file, {} where it has none."""
    says_alpha: bool = False
    """Whether the file says its strength, in the header or in alpha tensors."""

    def check_trained(self) -> None:
        """Raises `UserError` where every up matrix is zero: such an adapter changes nothing."""
        if not any(bool(layer.up.any()) for layer in self.layers.values()):
            raise UserError(
                f"{self.label}: every B matrix is zero; nothing was trained, or it was saved without gathering"
            )


def find_lora_file(path: Path) -> Path:
    """The adapter's file: itself, the one of a run's `final/` or checkpoint, or the only one in a folder."""
    if path.is_file():
        return path
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    raise UserError(f"{path}: no adapter there; give a .safetensors file, or a folder with {WEIGHTS_NAME}")


def read_adapter(path: Path, *, alpha: float | None = None, dtype: torch.dtype | None = None) -> Adapter:
    """An adapter in any of the safetensors styles; strict about every tensor.

    Its strength is the header's, or that of its alpha tensors; with neither, `alpha`, or else alpha = rank as every
    loader takes it. `dtype` casts its matrices.
    """
    file = find_lora_file(path)
    return make_adapter(open_safetensors(file), alpha=alpha, header=_read_header(file), dtype=dtype)


def make_adapter(
    tensors: Tensors,
    *,
    alpha: float | None = None,
    header: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """An adapter from its tensors under the names of any safetensors style."""
    header = header or {}
    matrices = cast(tensors, dtype)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors.specs:
        parsed = parse_key(key)
        if parsed is None:
            extra = ": DoRA in ComfyUI's form is not read" if key.endswith("dora_scale") else ""
            raise UserError(
                f"{tensors.label}: tensor {key!r} is not one of a CogVideoX adapter{extra}; known styles: diffusers "
                "(transformer.<layer>.lora_A.weight), comfyui (diffusion_model.<layer>...), kohya (lora_unet__...)"
            )
        part = parts.setdefault(parsed[0], {})
        if parsed[1] in part:
            raise UserError(
                f"{tensors.label}: {parsed[0]} is in it twice, second as {key}; the file mixes two adapters"
            )
        part[parsed[1]] = (tensors if parsed[1] == "alpha" else matrices).read(key)
    layers = {name: _make_layer(tensors.label, name, part, header, alpha) for name, part in parts.items()}
    if not layers:
        raise UserError(f"{tensors.label}: no adapter's tensors in it")
    says_alpha = "lora_alpha" in header or any("alpha" in part for part in parts.values())
    return Adapter(tensors.label, layers, header, says_alpha)


def _read_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        text = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    metadata = json.loads(text.get("__metadata__", {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return {key.removeprefix("transformer."): value for key, value in metadata.items()}


def _make_layer(
    label: str, name: str, part: dict[str, torch.Tensor], header: dict[str, Any], alpha: float | None
) -> LoraLayer:
    missing = [role for role in ("down", "up") if role not in part]
    if missing:
        raise UserError(f"{label}: {name} has no {' and no '.join(missing)} matrix; the file is damaged or incomplete")
    down, up = part["down"], part["up"]
    if not down.numel() or not up.numel():
        raise UserError(
            f"{label}: {name} is empty: saved from a sharded model without gathering it; take the sharded checkpoint "
            "itself (scripts/convert.py checkpoint)"
        )
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise UserError(
            f"{label}: {name} is {list(down.shape)} and {list(up.shape)}, and should be [rank, in] and [out, rank]; "
            "only linear layers' adapters are known"
        )
    rank = down.shape[0]
    if "alpha" in part:
        strength = float(part["alpha"])
    else:
        own = {p: a for p, a in header.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({p})", name)}
        strength = float(next(iter(own.values()), header.get("lora_alpha", rank if alpha is None else alpha)))
    scale = strength / (math.sqrt(rank) if header.get("use_rslora") else rank)
    return LoraLayer(down, up, scale, part.get("magnitude"))


def read_sat_adapter(path: Path, *, alpha: float = 1.0) -> Adapter:
    """The LoRA in a SAT file, beside the weights or alone. Its scale is alpha / rank; SAT's default alpha is 1."""
    tensors = open_sat(path)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors.specs:
        if ".matrix_" not in key:
            continue
        parsed = parse_sat_key(key)
        if parsed is None:
            raise UserError(
                f"{tensors.label}: {key} is no LoRA tensor of a CogVideoX; known are attention's q, k, v, out"
            )
        parts.setdefault(parsed[0], {})[parsed[1]] = tensors.read(key)
    if not parts:
        raise UserError(f"{tensors.label}: no LoRA in it (no matrix_A, matrix_B); for the weights use 'transformer'")
    layers = {name: _make_layer(tensors.label, name, part, {}, alpha) for name, part in parts.items()}
    return Adapter(tensors.label, layers)


def check_fits(adapter: Adapter, specs: dict[str, Spec]) -> None:
    """Raises `UserError` naming the first layer that the model (names and shapes of its weights) has otherwise."""
    for name, layer in adapter.layers.items():
        spec = specs.get(f"{name}.weight")
        if spec is None:
            raise UserError(f"{adapter.label}: {name} does not exist in this model; the adapter is another model's")
        seen = (layer.up.shape[0], layer.down.shape[1])
        if spec.shape != seen:
            raise UserError(
                f"{adapter.label}: {name} is {list(seen)} in the adapter and {list(spec.shape)} in this model; "
                "the adapter is another model's"
            )


def write_adapter(adapter: Adapter, file: Path, style: Style, *, fold: bool = False) -> None:
    """Writes a safetensors file of one style. `fold`: the scale goes into the up matrices, else it is kept beside them.

    Raises `UserError` for DoRA in a style that has no place for it.
    """
    decomposed = [name for name, layer in adapter.layers.items() if layer.magnitude is not None]
    if decomposed and (style != "diffusers" or fold):
        raise UserError(
            f"{adapter.label}: is DoRA ({decomposed[0]}), which only diffusers' style holds; merge it into its base "
            "(scripts/export.py merge), and extract a LoRA from that if one is needed"
        )
    layers = {name: layer.folded() if fold else layer for name, layer in adapter.layers.items()}
    state: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        state[make_key(name, "down", style)] = layer.down
        state[make_key(name, "up", style)] = layer.up
        if layer.magnitude is not None:
            state[make_key(name, "magnitude", style)] = layer.magnitude
        if style != "diffusers":
            state[make_key(name, "alpha", style)] = torch.tensor(layer.scale * layer.rank)
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(_peft_header(layers, adapter.header), sort_keys=True)}
    write_safetensors(hold(adapter.label, state), file, metadata=metadata if style == "diffusers" else None)


def _peft_header(layers: dict[str, LoraLayer], before: dict[str, Any]) -> dict[str, Any]:
    """PEFT's config for the layers, under the names that a stock pipeline reads."""
    rslora = bool(before.get("use_rslora"))
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {n: layer.scale * (math.sqrt(layer.rank) if rslora else layer.rank) for n, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    header = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": before.get("lora_dropout", 0.0),
        "target_modules": before.get("target_modules") or sorted(layers),
        "use_rslora": rslora,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "bias": "none",
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }
    return {f"transformer.{key}": value for key, value in header.items()}


def write_sat_adapter(adapter: Adapter, folder: Path, *, fold: bool) -> float:
    """A SAT folder with the LoRA alone; gives the alpha that SAT's config must say (1, its default, where folded).

    Raises `UserError` where SAT's LoRA can't hold it: other layers, q, k, v of several ranks, several scales.
    """
    state: dict[str, torch.Tensor] = {}
    strengths = {round(layer.scale * layer.rank, 9) for layer in adapter.layers.values()}
    if not fold and len(strengths) > 1:
        raise UserError(f"{adapter.label}: layers have several scales, and SAT has one; use --scale fold")
    for name, layer in adapter.layers.items():
        key = make_sat_key(name, "up")
        if key is None or layer.magnitude is not None:
            what = "DoRA" if layer.magnitude is not None else f"layer {name}"
            raise UserError(
                f"{adapter.label}: {what} has no place in SAT's LoRA, which has attention's q, k, v and out"
            )
        held = layer.folded(1 / layer.rank) if fold else layer  # what SAT multiplies by, with alpha 1
        state |= {str(make_sat_key(name, "down")): held.down, key: held.up}
    _check_sat_blocks(adapter)
    write_sat_folder(Tensors(adapter.label, hold("", state).specs, lambda name: state[name]), folder)
    return 1.0 if fold else strengths.pop()


def _check_sat_blocks(adapter: Adapter) -> None:
    ranks = {layer.rank for layer in adapter.layers.values()}
    blocks: dict[str, set[str]] = {}
    for name in adapter.layers:
        block, _, layer = name.partition(".attn1.")
        blocks.setdefault(block, set()).add(layer)
    partial = [block for block, names in blocks.items() if names != {"to_q", "to_k", "to_v", "to_out.0"}]
    if len(ranks) > 1 or partial:
        why = (
            f"ranks {sorted(ranks)}"
            if len(ranks) > 1
            else f"{partial[0]} has only {', '.join(sorted(blocks[partial[0]]))}"
        )
        raise UserError(f"{adapter.label}: SAT's LoRA has q, k, v and out of one rank in each block ({why})")
