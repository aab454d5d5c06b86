"""Options that `scripts/convert.py`, `scripts/export.py` and `scripts/push.py` share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogtune.cli import CommandParser, parse_adapter
from cogtune.errors import UserError
from cogtune.formats.hub import check_push
from cogtune.variants import DTYPE_NAMES


def make_parser(description: str) -> CommandParser:
    """A parser whose mistakes are `UserError`s."""
    return CommandParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help_: str) -> Any:
    """A subcommand's parser; `run` is what carries it out."""
    command = commands.add_parser(name, help=help_, description=help_, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Where the result goes, and the hub."""
    parser.add_argument("out", type=Path, help=what)
    add_hub(parser, required=False)


def add_hub(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The hub's options."""
    help_ = "upload the result with its model card; the token is HF_TOKEN's or the hub's own login's"
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", required=required, help=help_)
    parser.add_argument("--public", action="store_true", help="a new repository is private without this")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The precision of what is written."""
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="cast to this; default: as it is, bit for bit")


def add_shards(parser: argparse.ArgumentParser) -> None:
    """The size of a weights file."""
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weights file, 10^9 bytes; default 5")


def add_rank(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """How much of singular values is kept."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--rank", type=int, help="rank of every layer")
    group.add_argument("--energy", type=float, help="share of the squared norm to keep in each layer, such as 0.99")


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adapters with their scales."""
    help_ = "adapter file or folder of any style, and its scale; may be repeated"
    parser.add_argument("--lora", action="append", required=True, metavar="PATH[:SCALE]", help=help_)


def read_adapters(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """Paths and scales of `--lora`."""
    given = [parse_adapter(text) for text in options.lora]
    for path, scale in given:
        if not math.isfinite(scale):
            raise UserError(f"--lora {path}:{scale}: the scale must be a finite number")
    return given


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    """Raises `UserError` for values that can't be, before any work is done."""
    given = vars(options)
    if given.get("rank") is not None and options.rank < 1:
        raise UserError(f"--rank {options.rank}: must be at least 1")
    if given.get("energy") is not None and not 0 < options.energy <= 1:
        raise UserError(f"--energy {options.energy:g}: must be above 0 and at most 1")
    if given.get("alpha") is not None and not options.alpha > 0:
        raise UserError(f"--alpha {options.alpha:g}: must be above 0")
    if given.get("max_shard_gb") is not None and not options.max_shard_gb > 0:
        raise UserError(f"--max-shard-gb {options.max_shard_gb:g}: must be above 0")
    out = given.get("out")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another output")
    if given.get("push_to_hub"):
        if out is not None and out.suffix:
            raise UserError(f"--push-to-hub: {out} is a file; give a folder as output, which gets a model card")
        check_push(options.push_to_hub)
    elif given.get("public"):
        raise UserError("--public: says how a repository is made by --push-to-hub, which is not given")
    return options
