"""How a conversion's result is written: in place at once, with a model card, and to the hub where that is asked for."""

import argparse
from pathlib import Path
from typing import Any

from cogtune.errors import UserError
from cogtune.formats.file_names import WEIGHTS_NAME
from cogtune.formats.hub import push_folder
from cogtune.formats.lora import Adapter, write_adapter
from cogtune.formats.lora_keys import Style, describe_layers
from cogtune.formats.pipeline_folder import write_pipeline
from cogtune.formats.tensors import Tensors
from cogtune.formats.writing import fresh_folder, write_component
from cogtune.model_card import make_derived_card


def write_adapter_result(
    adapter: Adapter, options: argparse.Namespace, *, style: Style, fold: bool, made: str, base: str | None
) -> None:
    """The adapter as a `.safetensors` file, or a folder with the file and a model card."""
    out: Path = options.out
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    summary = f"rank {shown}, {describe_layers(adapter.layers)}"
    if out.suffix == ".safetensors":
        partial = out.with_name(f".partial-{out.name}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_adapter(adapter, partial, style, fold=fold)
            partial.rename(out)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror or error}); choose another output") from None
        finally:
            partial.unlink(missing_ok=True)
    else:
        with fresh_folder(out) as folder:
            name = WEIGHTS_NAME if style == "diffusers" else f"{out.name}-{style}.safetensors"
            write_adapter(adapter, folder / name, style, fold=fold)
            card = make_derived_card(out.name, base=base, made=f"{made} ({summary})", is_adapter=True)
            (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: {style} adapter, {summary}")
    push_result(options)


def write_model_result(
    tensors: Tensors,
    config: dict[str, Any],
    component: str,
    options: argparse.Namespace,
    *,
    base: str | None,
    made: str,
) -> None:
    """A component's folder, or a whole pipeline folder with a model card where a base gives the other components."""
    shard_bytes = int(options.max_shard_gb * 1e9)
    with fresh_folder(options.out) as folder:
        if base is None:
            write_component(tensors, config, folder, max_shard_bytes=shard_bytes)
        else:
            write_pipeline(base, component, tensors, config, folder, max_shard_bytes=shard_bytes)
            card = make_derived_card(options.out.name, base=base, made=made, is_adapter=False)
            (folder / "README.md").write_text(card, encoding="utf-8")
    size = sum(spec.num_bytes for spec in tensors.specs.values()) / 1e9
    kind = component if base is None else "pipeline"
    print(f"{options.out}: {kind}, {len(tensors.specs)} tensors of the {component}, {size:.2f} GB")
    push_result(options)


def push_result(options: argparse.Namespace) -> None:
    """Uploads what was written, where that is asked for."""
    if options.push_to_hub:
        print(push_folder(options.out, options.push_to_hub, public=options.public))
