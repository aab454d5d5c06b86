"""`scripts/convert.py`: the same weights in another format."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from cogtune.errors import UserError
from cogtune.formats import sat_transformer, sat_vae
from cogtune.formats.arguments import (
    add_command,
    add_output,
    add_precision,
    add_shards,
    check_options,
    make_parser,
)
from cogtune.formats.lora import (
    Adapter,
    check_fits,
    find_lora_file,
    make_adapter,
    read_adapter,
    read_sat_adapter,
    write_sat_adapter,
)
from cogtune.formats.pipeline_folder import open_component, read_config
from cogtune.formats.results import write_adapter_result, write_model_result
from cogtune.formats.sat_folder import LATEST, WEIGHTS_NAME, open_sat, write_sat_folder
from cogtune.formats.sharded_checkpoint import adapter_tensors, is_adapter, is_own, open_own, open_sharded
from cogtune.formats.tensors import Tensors, cast, check_names, check_shape, overlay
from cogtune.formats.torch_file import open_torch_file
from cogtune.formats.writing import fresh_folder, write_torch_file
from cogtune.models import DTYPES, find_folder, make_meta_transformer, read_facts

_SCALES = ("keep", "fold")


def parse_conversion(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `run` is what carries them out."""
    parser = make_parser(description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = partial(add_command, commands)
    command = add("from-sat", from_sat, "SAT's files to diffusers")
    command.add_argument("part", choices=["transformer", "vae", "lora"])
    command.add_argument("source", type=Path, help="SAT folder (with 'latest'), or a .pt file")
    add_output(command, "folder to write (lora: or a .safetensors file)")
    command.add_argument("--base", help="model whose other components make a whole pipeline of it")
    command.add_argument("--config", type=Path, help="the component's config.json; default: the base's own")
    command.add_argument("--positions", choices=["rotary", "sincos"], help="transformer: 5B, 1.5: rotary; 2B: sincos")
    command.add_argument("--scaling-factor", type=float, help="vae: 1.15258426 (2B) or 0.7 (the others)")
    command.add_argument("--without-lora", action="store_true", help="transformer: leave a LoRA in the file out")
    command.add_argument("--alpha", type=float, help="lora: lora_alpha of SAT's config; default 1, as there")
    command.add_argument("--scale", choices=_SCALES, default="keep", help="lora: in the header, or in the matrices")
    add_precision(command)
    add_shards(command)

    command = add("to-sat", to_sat, "diffusers' files to SAT")
    command.add_argument("part", choices=["transformer", "vae", "lora"])
    command.add_argument("source", help="pipeline, component folder, or adapter")
    add_output(command, "folder to write")
    command.add_argument(
        "--scale", choices=_SCALES, default="fold", help="lora: in the matrices (alpha 1), or as it is"
    )
    add_precision(command)

    command = add("adapter", convert_adapter, "an adapter under other programs' names")
    command.add_argument("source", type=Path, help="adapter file or folder; its style is recognized")
    add_output(command, ".safetensors file or folder to write")
    command.add_argument("--keys", choices=["diffusers", "comfyui", "kohya"], required=True)
    command.add_argument("--scale", choices=_SCALES, default="keep", help="beside the matrices, or in them")
    command.add_argument("--alpha", type=float, help="for a file that doesn't say it; default: its rank")
    command.add_argument("--base", help="model to check the adapter's layers against")

    command = add(
        "checkpoint", convert_checkpoint, "a checkpoint of this program, DeepSpeed or FSDP to an adapter or pipeline"
    )
    command.add_argument("source", type=Path, help="checkpoints/step-001000, or another program's folder")
    add_output(command, "folder to write")
    command.add_argument("--base", required=True, help="model that was trained: shapes, and the other components")
    command.add_argument(
        "--alpha", type=float, help="adapter: lora_alpha of the training, which the folder doesn't say"
    )
    command.add_argument(
        "--raw-weights", action="store_true", help="of this program: not their average (train.ema_decay)"
    )
    add_precision(command)
    add_shards(command)
    return check_options(parser.parse_args(argv))


def from_sat(options: argparse.Namespace) -> None:
    """SAT to diffusers."""
    if options.part == "lora":
        _refuse(options, "transformer", "config", "positions", "scaling_factor", "without_lora", "dtype")
        adapter = read_sat_adapter(options.source, alpha=options.alpha or 1.0)
        _check_base(adapter, options.base)
        fold = options.scale == "fold"
        write_adapter_result(
            adapter, options, style="diffusers", fold=fold, made="Converted from SAT", base=options.base
        )
        return
    _refuse(options, "lora", "alpha")
    if options.push_to_hub and options.base is None:
        raise UserError("--push-to-hub: a component by itself has no model card; give --base to make a pipeline of it")
    config = _given_config(options)
    if options.part == "vae":
        _refuse(options, "transformer", "positions", "without_lora")
        tensors, notes = sat_vae.split_off(open_torch_file(options.source))
        if config is None:
            if options.scaling_factor is None:
                raise UserError("--scaling-factor: no tensor says it; give 1.15258426 (2B), 0.7 (5B, 1.5), or --config")
            config = sat_vae.derive_config(tensors, options.scaling_factor)
            notes.append("version 1.5's image-to-video autoencoder also has invert_scale_latents: give --base for it")
        converted = sat_vae.from_sat(tensors, config)
    else:
        _refuse(options, "vae", "scaling_factor")
        tensors, notes = sat_transformer.split_off(open_sat(options.source), without_lora=options.without_lora)
        if config is None:
            config = sat_transformer.derive_config(tensors, options.positions)
        converted = sat_transformer.from_sat(tensors, config)
    for note in notes:
        print(note)
    write_model_result(
        _cast(converted, options), config, options.part, options, base=options.base, made="Converted from SAT"
    )


def _given_config(options: argparse.Namespace) -> dict[str, Any] | None:
    """The file's, or else the base's; None where the tensors are to give it."""
    if options.config is not None:
        return read_config(options.config, options.part)
    if options.base is None or options.positions is not None:
        return None
    config = open_component(options.base, options.part)[0]
    return config if options.scaling_factor is None else config | {"scaling_factor": options.scaling_factor}


def to_sat(options: argparse.Namespace) -> None:
    """diffusers to SAT."""
    if options.push_to_hub:
        raise UserError("--push-to-hub: SAT's torch files are not uploaded; the hub's libraries read diffusers' format")
    if options.part == "lora":
        _refuse(options, "transformer", "dtype")
        adapter = read_adapter(Path(options.source))
        with fresh_folder(options.out) as folder:
            alpha = write_sat_adapter(adapter, folder, fold=options.scale == "fold")
        print(f"{options.out}: SAT LoRA, {len(adapter.layers)} layers; SAT's config must say lora_alpha: {alpha:g}")
        return
    config, tensors = open_component(options.source, options.part)
    tensors = _cast(tensors, options)
    with fresh_folder(options.out) as folder:
        if options.part == "vae":
            write_torch_file(sat_vae.to_sat(tensors, config), folder / "3d-vae.pt", under="state_dict")
            wrote = "3d-vae.pt"
        else:
            write_sat_folder(sat_transformer.to_sat(tensors, config), folder)
            wrote = f"{LATEST}, 1/{WEIGHTS_NAME}"
    print(f"{options.out}: SAT {options.part} ({wrote})")


def convert_adapter(options: argparse.Namespace) -> None:
    """An adapter from any style to one of them."""
    adapter = read_adapter(options.source, alpha=options.alpha)
    if options.alpha is not None and adapter.says_alpha:
        raise UserError(f"--alpha {options.alpha:g}: {find_lora_file(options.source)} says its own; leave --alpha out")
    _check_base(adapter, options.base)
    made = f"Converted from {find_lora_file(options.source).name}"
    write_adapter_result(
        adapter, options, style=options.keys, fold=options.scale == "fold", made=made, base=options.base
    )


def convert_checkpoint(options: argparse.Namespace) -> None:
    """A checkpoint of many processes to what one process loads."""
    own = is_own(options.source)
    if options.raw_weights and not own:
        raise UserError(f"--raw-weights: {options.source} is no checkpoint of cogtune's; leave it out")
    config, base = open_component(options.base, "transformer")
    tensors, is_part = (
        open_own(options.source, raw=options.raw_weights) if own else (open_sharded(options.source), False)
    )
    made = f"Put together from the checkpoint {options.source.name}"
    if is_adapter(tensors):
        if options.alpha is None:
            raise UserError(
                f"{options.source}: holds an adapter, and not its lora_alpha, which decides its strength; give --alpha "
                "(the vendor's trainer: 64 unless --lora_alpha was given)"
            )
        adapter = make_adapter(adapter_tensors(tensors), alpha=options.alpha, dtype=_dtype(options))
        adapter.check_trained()
        check_fits(adapter, dict(base.specs))
        write_adapter_result(adapter, options, style="diffusers", fold=False, made=made, base=options.base)
        return
    if options.alpha is not None:
        raise UserError(f"--alpha {options.alpha:g}: {options.source} holds all weights and no adapter; leave it out")
    remedy = f"it was trained from another model than --base {options.base}"
    if own:
        # Buffers are in no checkpoint, and of a part only what was trained: they are the base's.
        merged = overlay(base, tensors)
        if not is_part:
            check_names(tensors.label, tensors.specs, _parameter_names(options.base), remedy=remedy)
        write_model_result(_cast(merged, options), config, "transformer", options, base=options.base, made=made)
        return
    check_names(tensors.label, tensors.specs, base.specs, remedy=remedy)
    for name, spec in base.specs.items():
        check_shape(tensors.label, name, tensors.specs[name].shape, spec.shape, remedy=remedy)
    ordered = Tensors(tensors.label, {name: tensors.specs[name] for name in base.specs}, tensors.read)
    write_model_result(_cast(ordered, options), config, "transformer", options, base=options.base, made=made)


def _parameter_names(base: str) -> list[str]:
    """What a full fine-tuning of a model trains."""
    return [name for name, _ in make_meta_transformer(read_facts(find_folder(base))).named_parameters()]


def _dtype(options: argparse.Namespace) -> Any:
    return DTYPES[options.dtype] if options.dtype else None


def _cast(tensors: Tensors, options: argparse.Namespace) -> Tensors:
    return cast(tensors, _dtype(options))


def _check_base(adapter: Adapter, base: str | None) -> None:
    if base is not None:
        check_fits(adapter, dict(open_component(base, "transformer")[1].specs))


def _refuse(options: argparse.Namespace, part: str, *names: str) -> None:
    """Raises `UserError` for an option that means something for another part only."""
    for name in names:
        if getattr(options, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: has no meaning for {options.part}, only for {part}; leave it out")
