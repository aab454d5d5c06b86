"""Reads torch's own files without running code in them and without loading them: mapped, one tensor at a time."""

import argparse
import ctypes
import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogtune.errors import UserError
from cogtune.formats.tensors import Tensors, spec_of

# Plain data beside the tensors of a training checkpoint: options, and the state of numpy's random numbers.
_PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    type(np.dtype(np.float64)),
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]
_MADV_DONTNEED = 4  # linux/mman.h


def load_plain(file: Path, *, mapped: bool = True, allowed: list[Any] | None = None) -> Any:
    """`torch.load` that makes tensors and plain data only; raises `UserError` for anything else."""
    try:
        with torch.serialization.safe_globals([*_PLAIN_DATA, *(allowed or [])]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = str(error).split(".")[0].splitlines()[0]
        raise UserError(
            f"{file}: holds more than tensors and plain data, which could run code when read ({reason}); "
            "it is not read; get one with weights alone"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: not a readable torch file ({str(error).splitlines()[0]}); copy it again") from None


def open_torch_file(file: Path) -> Tensors:
    """The tensors of a torch file, wherever they lie in it: under `module`, `model`, `state_dict` or at the top."""
    found = load_plain(file)
    for key in ("module", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    state = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)} if isinstance(found, dict) else {}
    if not state:
        raise UserError(f"{file}: no tensors in it; give the file with the model's weights")

    def read(name: str) -> torch.Tensor:
        tensor = state[name].detach().clone()
        _drop_pages(state[name])
        return tensor

    return Tensors(str(file), {name: spec_of(tensor) for name, tensor in state.items()}, read)


def _drop_pages(tensor: torch.Tensor) -> None:
    """Gives back the memory that a mapped tensor's pages took; the file still has them."""
    if not tensor.numel() or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
