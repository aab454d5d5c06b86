"""Tensors of a file that are read one at a time: what every format here is opened as, and converted from.

A conversion wraps such a set in another one, so that a model passes from file to file tensor by tensor and its size
doesn't matter.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cogtune.errors import UserError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor that isn't read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Tensors:
    """Named tensors, each read when it is asked for."""

    label: str
    """The file or folder, for messages."""
    specs: Mapping[str, Spec]
    read: Callable[[str], torch.Tensor]
    """Gives one tensor in memory of its own."""


def spec_of(tensor: torch.Tensor) -> Spec:
    """Shape and type of a tensor."""
    return Spec(tuple(tensor.shape), tensor.dtype)


def hold(label: str, state: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors that are in memory already."""
    return Tensors(label, {name: spec_of(tensor) for name, tensor in state.items()}, lambda name: state[name])


def open_safetensors(path: Path) -> Tensors:
    """A safetensors file, or a folder's `*.safetensors` together; raises `UserError` for what is none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"{path}: no safetensors file there; give a component's folder or a .safetensors file")
    specs: dict[str, Spec] = {}
    owner: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    if name in owner:
                        raise UserError(f"{path}: {name} is in {owner[name].name} and in {file.name}; keep one of them")
                    specs[name] = Spec(tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()])
                    owner[name] = file
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); copy or download it again") from None

    def read(name: str) -> torch.Tensor:
        # Opened for each tensor: a file that stays open keeps all that was read of it in memory.
        with safe_open(owner[name], framework="pt") as opened:
            return opened.get_tensor(name).clone()

    return Tensors(str(path), specs, read)


def overlay(below: Tensors, above: Tensors) -> Tensors:
    """The tensors of `below`, those that `above` has too taken from there; raises `UserError` for a name or shape that
    `below` doesn't have."""
    for name, spec in above.specs.items():
        if name not in below.specs:
            raise UserError(f"{above.label}: {name} is no weight of {below.label}; it was trained from another model")
        remedy = f"it was trained from another model than {below.label}"
        check_shape(above.label, name, spec.shape, below.specs[name].shape, remedy=remedy)
    specs = {name: above.specs.get(name, spec) for name, spec in below.specs.items()}
    return Tensors(above.label, specs, lambda name: (above if name in above.specs else below).read(name))


def cast(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The same tensors in another precision (None: as they are); raises `UserError` where a value doesn't fit."""
    if dtype is None:
        return tensors

    def read(name: str) -> torch.Tensor:
        before = tensors.read(name)
        after = before.to(dtype) if before.is_floating_point() else before
        if before.is_floating_point() and bool((~after.isfinite() & before.isfinite()).any()):
            raise UserError(
                f"{tensors.label}: {name} has values up to {before.abs().max().item():.3g}, beyond what "
                f"{str(dtype).removeprefix('torch.')} holds; choose bfloat16 or float32"
            )
        return after

    specs = {n: Spec(s.shape, dtype if s.dtype.is_floating_point else s.dtype) for n, s in tensors.specs.items()}
    return Tensors(tensors.label, specs, read)


def check_names(label: str, found: Iterable[str], wanted: Iterable[str], *, remedy: str) -> None:
    """Raises `UserError` for the first missing and the first unknown name."""
    have, need = set(found), set(wanted)
    lines = []
    for kind, names in (("missing", sorted(need - have)), ("unknown", sorted(have - need))):
        if names:
            lines.append(f"{len(names)} {kind} key(s), first {names[0]}")
    if lines:
        raise UserError(f"{label}: {'; '.join(lines)}; {remedy}")


def check_shape(label: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...], *, remedy: str) -> None:
    """Raises `UserError` where a tensor's shape isn't the one the model has."""
    if tuple(found) != tuple(wanted):
        raise UserError(f"{label}: {name} is {list(found)} and should be {list(wanted)}; {remedy}")
