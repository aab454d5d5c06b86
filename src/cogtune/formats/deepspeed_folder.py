"""DeepSpeed's ZeRO 1-3 folders, put together by DeepSpeed's own tool.

Its files are pickles, and the tool reads them as such. Here torch is told to make nothing but tensors and DeepSpeed's
plain records, so that a file with anything else is refused before it does something.
"""

import contextlib
import importlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cogtune.errors import UserError
from cogtune.formats.tensors import Spec, Tensors
from cogtune.formats.torch_file import load_plain


def find_deepspeed(path: Path) -> tuple[Path, str]:
    """(folder, tag): the files lie in folder/tag. accelerate writes the tag `pytorch_model` and `latest` beside it."""
    if any(path.glob("*_model_states.pt")):
        return path.parent, path.name
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"[\w.-]+", tag) or not (path / tag).is_dir():
            raise UserError(f"{latest}: names {tag!r}, and there is no such folder beside it; give the folder itself")
        return path, tag
    inside = sorted({file.parent for file in path.glob("*/*_model_states.pt")})
    if len(inside) == 1:
        return path, inside[0].name
    raise UserError(
        f"{path}: neither DeepSpeed's files (*_model_states.pt, or 'latest' that names their folder) nor "
        "FSDP's (.metadata, or pytorch_model_fsdp.bin); give the checkpoint's folder"
    )


def open_deepspeed(folder: Path, tag: str) -> Tensors:
    """The float32 master weights in folder/tag; where an adapter was trained, without its frozen base."""
    label = str(folder / tag)
    try:
        # An optional dependency, and slow to import.
        from deepspeed.utils import zero_to_fp32
    except ImportError:
        raise UserError(f"{label}: is DeepSpeed's, which is not installed; pip install deepspeed") from None
    optimizer_files = sorted((folder / tag).glob("*_optim_states.pt"))
    if not optimizer_files:
        return _open_unpartitioned(folder / tag)
    for file in [*sorted((folder / tag).glob("*_model_states.pt")), *optimizer_files]:
        load_plain(file, allowed=_deepspeed_records())  # says which file is wrong, and how

    def collect(*, only_trained: bool) -> Any:
        with _tensors_only(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag, exclude_frozen_parameters=only_trained, lazy_mode=True
            )

    try:
        state = collect(only_trained=True)
        if not any(".lora_" in name for name in state):  # an adapter's frozen base isn't wanted, and may not fit
            state = collect(only_trained=False)
    except (ValueError, KeyError, FileNotFoundError, NotImplementedError, RuntimeError, AssertionError) as error:
        raise UserError(f"{label}: DeepSpeed can't put it together ({str(error).splitlines()[0]})") from None
    specs = {name: Spec(tuple(piece.shape), piece.dtype) for name, piece in state.items()}
    return Tensors(label, specs, lambda name: state[name].contiguous())


def _open_unpartitioned(folder: Path) -> Tensors:
    """A folder without the optimizer's pieces: weights as they were computed with; ZeRO-3's are not in it."""
    files = sorted(folder.glob("*_model_states.pt"))
    if any(file.name.startswith("zero_pp_rank") for file in files):
        raise UserError(
            f"{folder}: ZeRO-3's weights are in the *_optim_states.pt files, and there are none; copy them too"
        )
    found: dict[str, Any] = load_plain(files[0], allowed=_deepspeed_records())
    module: dict[str, Any] = found.get("module") or {}
    state = {n: t for n, t in module.items() if isinstance(t, torch.Tensor)}
    return Tensors(
        str(folder), {n: Spec(tuple(t.shape), t.dtype) for n, t in state.items()}, lambda n: state[n].clone()
    )


def _deepspeed_records() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Makes every `torch.load` inside read tensors and plain records only, mapped; DeepSpeed's tool asks for all."""
    # A module to import, an object with methods once imported.
    config: Any = importlib.import_module("torch.utils.serialization").config

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load's own switch, which goes before its argument
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_records()), config.patch({"load.mmap": True}):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
