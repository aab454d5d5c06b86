"""Two names for the same weights: rules that rename, split and join tensors, in both directions.

A rule takes one tensor on the one side, cut along dimension 0 into equal chunks, to one or more on the other side, each
made of some of the chunks. Plain renaming is one chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cogtune.errors import UserError
from cogtune.formats.tensors import Spec, Tensors, check_names, check_shape


@dataclass(frozen=True)
class Rule:
    """`whole` on the one side is `parts` on the other: each part's name, with the chunks that it takes in order."""

    whole: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole."""
        return sum(len(chunks) for _, chunks in self.parts)

    def whole_shape(self, part_specs: Mapping[str, Spec]) -> tuple[int, ...]:
        """The whole's shape from its first part's."""
        name, chunks = self.parts[0]
        shape = part_specs[name].shape
        if self.num_chunks == 1:
            return shape
        return (shape[0] // len(chunks) * self.num_chunks, *shape[1:])


def rename(whole: str, part: str) -> Rule:
    """A rule for a tensor that keeps its values."""
    return Rule(whole, ((part, (0,)),))


def split_whole(wholes: Tensors, rules: list[Rule], part_specs: Mapping[str, Spec], *, remedy: str) -> Tensors:
    """The parts, in the model's order; strict about every name and shape before anything is read.

    `part_specs`: names and shapes that the parts' model has; the types are the wholes'.
    """
    _check_rules(rules, part_specs)
    check_names(wholes.label, wholes.specs, [rule.whole for rule in rules], remedy=remedy)
    origin: dict[str, tuple[Rule, tuple[int, ...]]] = {}
    for rule in rules:
        check_shape(
            wholes.label, rule.whole, wholes.specs[rule.whole].shape, rule.whole_shape(part_specs), remedy=remedy
        )
        origin |= {name: (rule, chunks) for name, chunks in rule.parts}

    def read(name: str) -> torch.Tensor:
        rule, chunks = origin[name]
        whole = wholes.read(rule.whole)
        if rule.num_chunks == 1:
            return whole
        cut = whole.chunk(rule.num_chunks, dim=0)
        return torch.cat([cut[index] for index in chunks])

    specs = {name: Spec(spec.shape, wholes.specs[origin[name][0].whole].dtype) for name, spec in part_specs.items()}
    return Tensors(wholes.label, specs, read)


def join_parts(parts: Tensors, rules: list[Rule], part_specs: Mapping[str, Spec], *, remedy: str) -> Tensors:
    """The wholes, in the rules' order; as strict as `split_whole`."""
    _check_rules(rules, part_specs)
    check_names(parts.label, parts.specs, part_specs, remedy=remedy)
    for name, spec in part_specs.items():
        check_shape(parts.label, name, parts.specs[name].shape, spec.shape, remedy=remedy)
    for rule in rules:
        dtypes = {str(parts.specs[name].dtype).removeprefix("torch.") for name, _ in rule.parts}
        if len(dtypes) > 1:
            raise UserError(
                f"{parts.label}: {', '.join(name for name, _ in rule.parts)} become one tensor and have several types "
                f"({', '.join(sorted(dtypes))}); give --dtype"
            )
    by_whole = {rule.whole: rule for rule in rules}

    def read(name: str) -> torch.Tensor:
        rule = by_whole[name]
        if rule.num_chunks == 1:
            return parts.read(rule.parts[0][0])
        placed: dict[int, torch.Tensor] = {}
        for part, chunks in rule.parts:
            placed |= dict(zip(chunks, parts.read(part).chunk(len(chunks), dim=0), strict=True))
        return torch.cat([placed[index] for index in sorted(placed)])

    specs = {r.whole: Spec(r.whole_shape(part_specs), parts.specs[r.parts[0][0]].dtype) for r in rules}
    return Tensors(parts.label, specs, read)


def _check_rules(rules: list[Rule], part_specs: Mapping[str, Spec]) -> None:
    named = [name for rule in rules for name, _ in rule.parts]
    assert sorted(named) == sorted(part_specs), f"rules and model differ at {sorted(set(named) ^ set(part_specs))[:3]}"
