"""Which of a transformer's weights a full fine-tuning trains: all, or a part named by patterns."""

import re
from collections.abc import Sequence

from cogtune.errors import UserError, nearest

_ATTENTION = r"transformer_blocks\.\d+\.attn1\..*"
_LAST_BLOCKS = re.compile(r"last (\d+) blocks?")
_REGEX_CHARACTERS = "*+?[](){}|^$\\"


def choose_trained(names: Sequence[str], patterns: Sequence[str] | None, num_blocks: int) -> list[str]:
    """The parameters among `names` that the patterns take, all without patterns.

    A pattern is `attention`, `last N blocks`, the end of a layer's or a parameter's name (`attn1.to_q`, `bias`), or,
    where it has any of *+?[](){}|^$\\, a regular expression for a parameter's or a layer's whole name. Raises
    `UserError` for one that takes nothing, and names what is near.
    """
    if patterns is None:
        return list(names)
    taken: set[str] = set()
    for pattern in patterns:
        hits = _match(names, pattern, num_blocks)
        if not hits:
            raise UserError(
                f"train.trained_weights: {pattern!r} matches no weight{nearest(pattern, _endings(names))}; give "
                "`attention`, `last N blocks`, the end of a name such as ff.net.2, or a regular expression; names: "
                f"{', '.join(_layers(names)[:16])}"
            )
        taken.update(hits)
    return [name for name in names if name in taken]


def _match(names: Sequence[str], pattern: str, num_blocks: int) -> list[str]:
    if last := _LAST_BLOCKS.fullmatch(pattern):
        count = int(last[1])
        if not 1 <= count <= num_blocks:
            raise UserError(f"train.trained_weights: {pattern!r}: the model has {num_blocks} blocks; give 1 to that")
        first = num_blocks - count
        return [name for name in names if (number := _block_of(name)) is not None and number >= first]
    try:
        expression = re.compile(_ATTENTION if pattern == "attention" else _as_regex(pattern))
    except re.error as error:
        raise UserError(f"train.trained_weights: {pattern!r} is no regular expression ({error})") from None
    return [name for name in names if any(expression.fullmatch(part) for part in _itself_and_parents(name))]


def _as_regex(pattern: str) -> str:
    is_regex = any(character in pattern for character in _REGEX_CHARACTERS)
    return pattern if is_regex else rf"(?:.*\.)?{re.escape(pattern)}"


def _itself_and_parents(name: str) -> list[str]:
    """A parameter's name, and those of the modules that it is in."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _block_of(name: str) -> int | None:
    head, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if head == "transformer_blocks" else None


def _layers(names: Sequence[str]) -> list[str]:
    """Layers' names without their block's number, once each."""
    layers = (re.sub(r"^transformer_blocks\.\d+\.", "", name).rpartition(".")[0] for name in names)
    return sorted(set(layers))


def _endings(names: Sequence[str]) -> list[str]:
    layers = _layers(names)
    return [*layers, *{layer.rpartition("attn1.")[2] for layer in layers}, "attention", "last 1 blocks"]


def count_frozen_in_blocks(shapes: dict[str, int], trained: Sequence[str], num_blocks: int) -> int:
    """Frozen numbers in a block, the mean over all of them; `shapes`: how many numbers each parameter has."""
    own = set(trained)
    inside = (size for name, size in shapes.items() if name not in own and _block_of(name) is not None)
    return sum(inside) // num_blocks
