"""Folders of torch.distributed.checkpoint, which FSDP writes.

Their index is a pickle; it is read by an unpickler that knows the index's few classes only. The data are torch files
that torch itself reads with `weights_only`.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from cogtune.errors import UserError
from cogtune.formats.tensors import Spec, Tensors

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Makes what torch.distributed.checkpoint's index is made of and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _INDEX_CLASSES.get(module, set()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads the index once, and without running code."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            self._index = _IndexUnpickler(file).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if getattr(self._index, "storage_meta", None) is None:
            self._index.storage_meta = StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index


def open_dcp(folder: Path) -> Tensors:
    """The tensors of a folder with `.metadata`, the optimizer's left out; raises `UserError` for a damaged one."""
    try:
        reader = _Reader(folder)
        entries = reader.read_metadata().state_dict_metadata
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{folder}/.metadata: names {error}, which is no part of a checkpoint's index; it is not read"
        ) from None
    except (EOFError, AttributeError, OSError) as error:
        raise UserError(f"{folder}/.metadata: damaged ({error}); copy the checkpoint again") from None
    specs = {
        name: Spec(tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(("optimizer.", "optim.", "state."))
    }
    missing = sorted(
        {info.relative_path for info in reader.read_metadata().storage_data.values()}
        - {f.name for f in folder.iterdir()}
    )
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing, which the index names; the copy is incomplete")

    def read(name: str) -> torch.Tensor:
        state: dict[str, Any] = {name: torch.empty(specs[name].shape, dtype=specs[name].dtype)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch tells that there is one process, as is meant
            dcp.load(state, storage_reader=reader, no_dist=True)
        return state[name]

    return Tensors(str(folder), specs, read)
