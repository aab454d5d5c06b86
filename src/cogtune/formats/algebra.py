"""Adapters added, scaled, compressed, merged into a model, and taken from the difference of two models."""

import torch

from cogtune.errors import UserError
from cogtune.formats.lora import Adapter, LoraLayer, check_fits
from cogtune.formats.tensors import Tensors, cast, check_names, check_shape


def add_adapters(parts: list[tuple[Adapter, float]]) -> Adapter:
    """The sum of scaled adapters, exact: ranks add up, scales go into the up matrices (float32)."""
    layers: dict[str, list[tuple[LoraLayer, float]]] = {}
    for adapter, weight in parts:
        for name, layer in adapter.layers.items():
            if layer.magnitude is not None:
                raise UserError(
                    f"{adapter.label}: is DoRA ({name}), which can't be added up or scaled without its base; "
                    "merge it into the base (scripts/export.py merge)"
                )
            others = layers.setdefault(name, [])
            if others and _size(others[0][0]) != _size(layer):
                raise UserError(
                    f"{adapter.label}: {name} is {list(_size(layer))} and {list(_size(others[0][0]))} in "
                    f"{parts[0][0].label}; they are adapters of different models"
                )
            others.append((layer, weight))
    summed = {
        name: LoraLayer(
            torch.cat([layer.down.float() for layer, _ in found]),
            torch.cat([weight * layer.scale * layer.up.float() for layer, weight in found], dim=1),
            1.0,
        )
        for name, found in layers.items()
    }
    return Adapter(" + ".join(adapter.label for adapter, _ in parts), summed)


def _size(layer: LoraLayer) -> tuple[int, int]:
    return layer.up.shape[0], layer.down.shape[1]


def compress(adapter: Adapter, *, rank: int | None, energy: float | None) -> tuple[Adapter, float]:
    """The nearest adapter of a smaller rank, layer by layer, and the share of the squared norm that it keeps.

    Exact by the singular values of `up @ down`, found without forming it: up = Q R, down' = P S, R S' is rank x rank.
    """
    kept = total = 0.0
    layers = {}
    for name, layer in adapter.layers.items():
        if layer.magnitude is not None:
            raise UserError(
                f"{adapter.label}: is DoRA ({name}), which can't be compressed; merge it into the base first"
            )
        left, upper = torch.linalg.qr(layer.up.double() * layer.scale)
        right, lower = torch.linalg.qr(layer.down.double().T)
        u, s, v = torch.linalg.svd(upper @ lower.T)
        width = _choose_rank(s, rank, energy)
        root = s[:width].sqrt()
        layers[name] = LoraLayer(
            (root[:, None] * (v[:width] @ right.T)).float(), ((left @ u[:, :width]) * root).float(), 1.0
        )
        kept, total = kept + float((s[:width] ** 2).sum()), total + float((s**2).sum())
    return Adapter(adapter.label, layers), kept / total if total else 1.0


def _choose_rank(s: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """Singular values to keep: `rank`, or as few as hold the share `energy` of the squared norm; at least 1."""
    if rank is not None:
        return min(rank, len(s))
    assert energy is not None
    shares = (s**2).cumsum(0) / (s**2).sum().clamp_min(torch.finfo(s.dtype).tiny)
    return min(int((shares < energy).sum()) + 1, len(s))


def extract(
    base: Tensors, tuned: Tensors, *, rank: int | None, energy: float | None, device: torch.device
) -> tuple[Adapter, list[str]]:
    """The LoRA nearest to the difference of two transformers, and lines on what it keeps and what it can't hold.

    Each changed weight matrix by its singular values (exact, float32 on `device`); what isn't a matrix has no LoRA.
    """
    check_names(tuned.label, tuned.specs, base.specs, remedy=f"it is another model than {base.label}")
    for name, spec in base.specs.items():
        check_shape(
            tuned.label, name, tuned.specs[name].shape, spec.shape, remedy=f"it is another model than {base.label}"
        )
    layers: dict[str, LoraLayer] = {}
    kept = total = 0.0
    lost: list[str] = []
    lost_norm = 0.0
    for name, spec in base.specs.items():
        if not spec.dtype.is_floating_point:
            continue
        delta = tuned.read(name).to(device, torch.float32) - base.read(name).to(device, torch.float32)
        if not bool(delta.any()):
            continue
        if delta.ndim != 2 or not name.endswith(".weight"):
            lost.append(name)
            lost_norm += float(delta.double().square().sum())
            continue
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        width = _choose_rank(s, rank, energy)
        root = s[:width].sqrt()
        down, up = (root[:, None] * v[:width]).cpu(), (u[:, :width] * root).cpu()
        layers[name.removesuffix(".weight")] = LoraLayer(down.contiguous(), up.contiguous(), 1.0)
        kept, total = kept + float((s[:width].double() ** 2).sum()), total + float((s.double() ** 2).sum())
    if not layers:
        raise UserError(f"{tuned.label}: no weight matrix differs from {base.label}'s; there is nothing to extract")
    ranks = sorted({layer.rank for layer in layers.values()})
    lines = [
        f"{len(layers)} layers, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") + ", "
        f"{100 * kept / total:.2f} % of the squared difference of their weights"
    ]
    if lost:
        share = 100 * lost_norm / (lost_norm + total)
        lines.append(
            f"left out: {len(lost)} changed tensor(s) that are no matrix (biases, norms), first {lost[0]}; "
            f"{share:.2g} % of all squared difference"
        )
    return Adapter(f"{tuned.label} - {base.label}", layers), lines


def merge(
    base: Tensors, adapters: list[tuple[Adapter, float]], *, device: torch.device, dtype: torch.dtype | None = None
) -> Tensors:
    """The base with adapters added into its weights: summed in float32, rounded once, to `dtype` or the base's own.

    All other weights stay as they are, or are cast.
    """
    for adapter, _ in adapters:
        check_fits(adapter, dict(base.specs))
    touched = {f"{name}.weight" for adapter, _ in adapters for name in adapter.layers}
    others = cast(base, dtype)

    def read(name: str) -> torch.Tensor:
        if name not in touched:
            return others.read(name)
        weight = base.read(name).to(device, torch.float32)
        change = torch.zeros_like(weight)
        for adapter, strength in adapters:
            layer = adapter.layers.get(name.removesuffix(".weight"))
            if layer is not None:
                change += strength * _weight_change(layer, weight, strength)
        merged = (weight + change).to("cpu", others.specs[name].dtype)
        if not bool(merged.isfinite().all()):
            raise UserError(f"{name}: the merged weight is beyond what {merged.dtype} holds; use --dtype bfloat16")
        return merged

    return Tensors(base.label, others.specs, read)


def _weight_change(layer: LoraLayer, weight: torch.Tensor, strength: float) -> torch.Tensor:
    moved = LoraLayer(layer.down.to(weight.device), layer.up.to(weight.device), layer.scale)
    update = moved.update()
    if layer.magnitude is None:
        return update
    if strength != 1:
        raise UserError(f"a scale of {strength:g}: DoRA can be merged at its trained strength only (scale 1)")
    # DoRA (arXiv:2402.09353): each row of the sum is brought to its trained length.
    total = weight + update
    rows = layer.magnitude.float().to(weight.device) / total.norm(dim=1)
    return rows[:, None] * total - weight
