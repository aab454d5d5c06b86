"""Reads a run's config: YAML file and dotted command-line overrides, checked in one go.

accelerate launch train/lora.py --config configs/lora/cogvideox-5b.yaml --train.max_steps=500 [--dry-run]
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliSettingsSource

from cogtune.config import RunConfig
from cogtune.errors import UserError, nearest

_TEXT_LISTS = (("validation", "prompts"), ("adapter", "target_modules"))


@dataclass(frozen=True)
class Invocation:
    """A command line, resolved."""

    config: RunConfig
    dry_run: bool


class CommandParser(argparse.ArgumentParser):
    """Unknown options name the nearest known one; wrong usage is a `UserError` like any other."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].split("=")[0]
            raise UserError(f"unknown option {unknown[0]}{nearest(option, list(self._option_string_actions))}")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_adapter(text: str) -> tuple[Path, float]:
    """`PATH[:scale]`; a colon that no number follows belongs to the path."""
    path, colon, scale = text.rpartition(":")
    if colon:
        try:
            return Path(path), float(scale)
        except ValueError:
            pass  # no scale behind the colon
    return Path(text), 1.0


def parse_run(description: str, argv: list[str] | None = None) -> Invocation:
    """The config of a training or data command from its arguments (default: the process's own).

    Raises `UserError` with every wrong setting in one message.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = CommandParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML file with the run's settings")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, load no weights")
    options, _ = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    values = read_yaml(options.config) if options.config else {}
    if options.config and "output_dir" not in values:
        values["output_dir"] = f"runs/{options.config.stem}"
    texts, rest = _take_text_lists(argv)
    source: CliSettingsSource[Any] = CliSettingsSource(
        RunConfig,
        root_parser=parser,
        cli_parse_args=rest,
        cli_hide_none_type=True,
        parse_args_method=CommandParser.parse_args,
    )
    overrides = _merge(source(), texts)
    return Invocation(build_config(_merge(values, overrides)), options.dry_run)


def _take_text_lists(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Lists of texts, exactly as written, and the other arguments.

    pydantic-settings would cut `--validation.prompts=A ship, at sea` at its comma and fail on a quotation mark, and
    it would double the backslashes of a pattern. A JSON list (`["a", "b"]`) is taken as one.
    """
    parser = CommandParser(add_help=False, allow_abbrev=False)
    for section, key in _TEXT_LISTS:
        parser.add_argument(f"--{section}.{key}", action="append", dest=key)
    given, rest = parser.parse_known_args(argv)
    texts = {
        section: {key: [text for value in vars(given)[key] for text in _read_texts(value)]}
        for section, key in _TEXT_LISTS
        if vars(given)[key] is not None
    }
    return texts, rest


def _read_texts(value: str) -> list[Any]:
    try:
        texts = json.loads(value) if value.lstrip().startswith("[") else value
    except json.JSONDecodeError:
        texts = value  # a pattern or a prompt may begin with a bracket
    return texts if isinstance(texts, list) else [value]


def build_config(values: dict[str, Any]) -> RunConfig:
    """A checked config from plain values; all errors in one `UserError`."""
    try:
        return RunConfig(**values)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise UserError("\n       ".join(["the config is wrong:", *lines]) if len(lines) > 1 else lines[0]) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A config file as a dictionary."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected sections (model:, data:, ...), found {type(values).__name__}")
    return values


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _describe(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    if item["type"] == "extra_forbidden":
        section: type[BaseModel] | None = RunConfig
        for part in location[:-1]:
            field = section.model_fields.get(part) if section else None
            section = field.annotation if field and isinstance(field.annotation, type) else None
        known = [".".join([*location[:-1], key]) for key in section.model_fields] if section else []
        return f"unknown setting {name}{nearest(name, known)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (got {item['input']!r})" if location and item["type"] != "value_error" else message
