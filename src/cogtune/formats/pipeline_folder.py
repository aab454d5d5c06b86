"""diffusers' folders as conversions see them: a pipeline with its components, or one component by itself."""

import json
from pathlib import Path
from typing import Any

from cogtune.errors import UserError
from cogtune.formats.tensors import Tensors, open_safetensors
from cogtune.formats.writing import MAX_SHARD_BYTES, link_tree, write_component
from cogtune.models import COMPONENTS, find_folder, read_facts

_CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}


def open_component(path: str | Path, component: str) -> tuple[dict[str, Any], Tensors]:
    """Config and weights of a component, from its own folder, a pipeline folder, or a name that `model.path` takes."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        pipeline = find_folder(str(path))
        if not (pipeline / component).is_dir():
            raise UserError(f"{pipeline}: no model_index.json and {component}/ there; give a pipeline's folder")
        folder = pipeline / component
    return read_config(folder / "config.json", component), open_safetensors(folder)


def read_config(file: Path, component: str) -> dict[str, Any]:
    """A component's config.json; raises `UserError` for another component's."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a component's config.json") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: no config of a component")
    found = config.get("_class_name", _CLASSES[component])
    if found != _CLASSES[component]:
        raise UserError(f"{file}: is a {found}, and should be a {_CLASSES[component]}")
    return config


def write_pipeline(
    base: str, component: str, tensors: Tensors, config: dict[str, Any], folder: Path, *, max_shard_bytes: int = 0
) -> None:
    """A pipeline folder: the given component, and the base's others (hard-linked where the file system allows).

    `max_shard_bytes`: of a file of weights; 0: diffusers' own limit.
    """
    source = find_folder(base)
    read_facts(source)  # raises for what is no complete pipeline
    names = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    link_tree(source / "model_index.json", folder / "model_index.json")
    for name in COMPONENTS:
        if name != component and name in names:
            link_tree(source / name, folder / name)
    write_component(tensors, config, folder / component, max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES)
