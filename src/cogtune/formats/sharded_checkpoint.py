"""Checkpoints of many processes as one set of tensors, under the names that diffusers and PEFT give them."""

import re
from pathlib import Path

from cogtune.checkpoint import MANIFEST, read_checkpoint
from cogtune.errors import UserError
from cogtune.formats.dcp_folder import open_dcp
from cogtune.formats.deepspeed_folder import find_deepspeed, open_deepspeed
from cogtune.formats.tensors import Tensors
from cogtune.formats.torch_file import open_torch_file
from cogtune.shards.stored import StoredTensors

_WHOLE_FSDP = "pytorch_model_fsdp.bin"  # accelerate's file for FULL_STATE_DICT
_WRAPPERS = re.compile(
    r"^(?:module|model|transformer|base_model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_INNER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight)\w+(\.weight)?$")


def is_own(path: Path) -> bool:
    """Whether a folder is a checkpoint of cogtune's."""
    return (path / MANIFEST).is_file()


def open_own(path: Path, *, raw: bool) -> tuple[Tensors, bool]:
    """The weights in a checkpoint of a full fine-tuning, and whether a part of them was trained.

    The averaged ones where there are any, unless `raw`. Every digest is checked. Raises `UserError` for a damaged
    one, and for an adapter's, which is one already.
    """
    checkpoint = read_checkpoint(path)
    stored = StoredTensors(path)
    if not stored.names("weights"):
        raise UserError(f"{path}: holds an adapter, which every program here takes as it is; nothing to convert")
    is_averaged = bool(stored.names("ema"))
    print(f"{path}: step {checkpoint.step}, {'averaged' if is_averaged and not raw else 'trained'} weights")
    part = checkpoint.state["config"]["train"].get("trained_weights")
    return stored.group("ema" if is_averaged and not raw else "weights"), part is not None


def open_sharded(path: Path) -> Tensors:
    """The weights of a DeepSpeed or FSDP folder, under diffusers' and PEFT's names."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the checkpoint's folder")
    if (path / ".metadata").is_file():
        return _plain_names(open_dcp(path))
    folders = sorted(file.parent for file in path.rglob(".metadata"))
    weights = [folder for folder in folders if not folder.name.startswith("optimizer")]
    weights += sorted(path.rglob(_WHOLE_FSDP))
    if len(weights) > 1:
        raise UserError(f"{path}: several checkpoints in it ({weights[0]}, {weights[1]}); give the folder of one")
    if weights:
        return _plain_names(open_dcp(weights[0]) if weights[0].is_dir() else open_torch_file(weights[0]))
    return _plain_names(open_deepspeed(*find_deepspeed(path)))


def _plain_names(tensors: Tensors) -> Tensors:
    """Without the names that wrappers put before and between a model's own."""
    origin: dict[str, str] = {}
    for name in tensors.specs:
        plain = name
        while _WRAPPERS.match(plain):
            plain = _WRAPPERS.sub("", plain)
        plain = _ADAPTER_NAME.sub(r".\1\2", _INNER.sub("", plain))
        if plain in origin:
            raise UserError(
                f"{tensors.label}: {origin[plain]} and {name} are the same weight; the folder holds two models"
            )
        origin[plain] = name
    specs = {plain: tensors.specs[name] for plain, name in origin.items()}
    return Tensors(tensors.label, specs, lambda plain: tensors.read(origin[plain]))


def is_adapter(tensors: Tensors) -> bool:
    """Whether a LoRA was trained."""
    return any(".lora_" in name for name in tensors.specs)


def adapter_tensors(tensors: Tensors) -> Tensors:
    """The LoRA's tensors alone."""
    specs = {name: spec for name, spec in tensors.specs.items() if ".lora_" in name}
    return Tensors(tensors.label, specs, tensors.read)
