"""The folder of SAT, the vendor's training framework: `latest` names the iteration whose folder has the weights."""

import re
from pathlib import Path

from cogtune.errors import UserError
from cogtune.formats.tensors import Tensors
from cogtune.formats.torch_file import open_torch_file
from cogtune.formats.writing import write_torch_file

LATEST, WEIGHTS_NAME = "latest", "mp_rank_00_model_states.pt"


def find_sat_file(path: Path) -> Path:
    """The weights of a SAT folder, or the file itself; raises `UserError` with what is missing."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a SAT folder (with 'latest') or its {WEIGHTS_NAME}")
    if (path / WEIGHTS_NAME).is_file():
        folder = path
    else:
        latest = path / LATEST
        if not latest.is_file():
            raise UserError(
                f"{path}: no '{LATEST}' file, which names the iteration to take; write it (its text is the folder's "
                f"name, such as 1000), or give that folder"
            )
        iteration = latest.read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"[\w.-]+", iteration) or not (path / iteration).is_dir():
            raise UserError(f"{latest}: names {iteration!r}, and there is no such folder beside it; correct it")
        folder = path / iteration
    others = sorted(file.name for file in folder.glob("mp_rank_*_model_states.pt") if file.name != WEIGHTS_NAME)
    if others:
        raise UserError(
            f"{folder}: split over model-parallel ranks ({others[0]}); merge them with SAT's own tool first"
        )
    if not (folder / WEIGHTS_NAME).is_file():
        raise UserError(f"{folder}: no {WEIGHTS_NAME} in it; the download or copy is incomplete")
    return folder / WEIGHTS_NAME


def open_sat(path: Path) -> Tensors:
    """The tensors of a SAT folder or file."""
    return open_torch_file(find_sat_file(path))


def write_sat_folder(tensors: Tensors, folder: Path, *, iteration: str = "1") -> None:
    """A folder that SAT's `load_checkpoint` reads: it wants a number above 0, or `release`."""
    (folder / iteration).mkdir(parents=True)
    write_torch_file(tensors, folder / iteration / WEIGHTS_NAME, under="module")
    (folder / LATEST).write_text(iteration, encoding="utf-8")
