"""`scripts/export.py`: adapters merged, extracted, added up, and weights cast."""

import argparse
from functools import partial
from pathlib import Path

from cogtune.errors import UserError
from cogtune.formats.algebra import add_adapters, compress, extract, merge
from cogtune.formats.arguments import (
    add_adapters as add_adapter_options,
)
from cogtune.formats.arguments import (
    add_command,
    add_output,
    add_precision,
    add_rank,
    add_shards,
    check_options,
    make_parser,
    read_adapters,
)
from cogtune.formats.lora import read_adapter
from cogtune.formats.pipeline_folder import open_component
from cogtune.formats.results import write_adapter_result, write_model_result
from cogtune.formats.tensors import cast
from cogtune.models import DTYPES, choose_device
from cogtune.variants import DTYPE_NAMES


def parse_export(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `run` is what carries them out."""
    parser = make_parser(description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = partial(add_command, commands)
    command = add("merge", merge_into_base, "a pipeline with adapters added into its weights")
    command.add_argument("base", help="pipeline folder, hub name or short name")
    add_output(command, "pipeline folder to write")
    add_adapter_options(command)
    add_precision(command)
    add_shards(command)
    _add_device(command)

    command = add("extract", extract_adapter, "the LoRA nearest to the difference of two models")
    command.add_argument("base", help="the model before: pipeline folder, hub name or short name")
    command.add_argument("tuned", help="the model after")
    add_output(command, ".safetensors file or folder to write")
    add_rank(command, required=True)
    _add_device(command)

    command = add("combine", combine_adapters, "the sum of adapters, each with its scale, as one adapter")
    add_output(command, ".safetensors file or folder to write")
    add_adapter_options(command)
    add_rank(command, required=False)

    command = add("cast", cast_weights, "a pipeline's transformer, or an adapter, in another precision")
    command.add_argument("source", help="pipeline folder, or adapter file or folder")
    add_output(command, "folder to write (adapter: or a .safetensors file)")
    command.add_argument("--dtype", choices=DTYPE_NAMES, required=True)
    add_shards(command)
    return check_options(parser.parse_args(argv))


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="where matrices are computed")


def merge_into_base(options: argparse.Namespace) -> None:
    """Adapters into a base's weights."""
    config, base = open_component(options.base, "transformer")
    given = [(read_adapter(path), scale) for path, scale in read_adapters(options)]
    dtype = DTYPES[options.dtype] if options.dtype else None
    # Cast before: the sum is rounded once.
    merged = merge(base, given, device=choose_device(options.device), dtype=dtype)
    names = ", ".join(f"{path.name} at {scale:g}" for path, scale in read_adapters(options))
    write_model_result(merged, config, "transformer", options, base=options.base, made=f"With merged adapters: {names}")


def extract_adapter(options: argparse.Namespace) -> None:
    """A LoRA from two models."""
    base, tuned = open_component(options.base, "transformer")[1], open_component(options.tuned, "transformer")[1]
    adapter, lines = extract(
        base, tuned, rank=options.rank, energy=options.energy, device=choose_device(options.device)
    )
    for line in lines:
        print(line)
    made = f"Extracted from {Path(options.tuned).name}: {lines[0]}"
    write_adapter_result(adapter, options, style="diffusers", fold=False, made=made, base=options.base)


def combine_adapters(options: argparse.Namespace) -> None:
    """Adapters added up, and compressed where that is asked for."""
    adapter = add_adapters([(read_adapter(path), scale) for path, scale in read_adapters(options)])
    if options.rank is not None or options.energy is not None:
        adapter, kept = compress(adapter, rank=options.rank, energy=options.energy)
        print(f"compressed: keeps {100 * kept:.4f} % of the squared norm")
    names = ", ".join(f"{path.name} at {scale:g}" for path, scale in read_adapters(options))
    write_adapter_result(adapter, options, style="diffusers", fold=False, made=f"The sum of {names}", base=None)


def cast_weights(options: argparse.Namespace) -> None:
    """Weights in another precision."""
    dtype, source = DTYPES[options.dtype], Path(options.source)
    if (source.is_dir() and (source / "model_index.json").is_file()) or not source.exists():
        config, tensors = open_component(options.source, "transformer")
        made = f"The transformer's weights cast to {options.dtype}"
        write_model_result(cast(tensors, dtype), config, "transformer", options, base=options.source, made=made)
        return
    if options.out.suffix not in ("", ".safetensors"):
        raise UserError(f"{options.out}: must be a folder or a .safetensors file")
    adapter = read_adapter(source, dtype=dtype)
    made = f"{source.name} cast to {options.dtype}"
    write_adapter_result(adapter, options, style="diffusers", fold=False, made=made, base=None)
