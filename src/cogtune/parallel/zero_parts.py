"""What a process has of the float32 weights and of AdamW's state that DeepSpeed has divided, in DeepSpeed's memory.

ZeRO-1 and 2 cut all weights, one behind the other, into equal parts; ZeRO-3 cuts each weight. In both a process's share
of a weight is a range of its numbers in a flat float32 tensor, and AdamW's moments lie in tensors of the same layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogtune.formats.tensors import Spec
from cogtune.shards.pieces import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Place:
    """A process's range of a weight: where it begins in the weight, and in which flat tensor it lies where."""

    shape: tuple[int, ...]
    start: int
    flat: int
    offset: int
    count: int

    def cut(self, name: str, flat: Tensor) -> Piece:
        return Piece(name, self.shape, self.start, flat.detach()[self.offset : self.offset + self.count])


class ZeroParts:
    """`shards.parts.Parts` of a DeepSpeed engine's optimizer."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._zero, self._in_parts = engine.optimizer, engine.zero_optimization_stage() == 3
        find = self._find_part_of_each if self._in_parts else self._find_part_of_all
        self._places = {name: find(parameter) for name, parameter in parameters.items()}

    def _flats(self) -> list[Tensor]:
        """The float32 weights of this process, which AdamW updates: one tensor, or several under ZeRO-3."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._in_parts else zero.single_partition_of_fp32_groups

    def _find_part_of_all(self, parameter: Any) -> _Place:
        shape, found = tuple(parameter.shape), parameter._hp_mapping
        if found is None:
            return _Place(shape, 0, 0, 0, 0)
        weight, flat = found.lp_fragment_address, found.hp_fragment_address
        return _Place(shape, weight.start, found.param_group_index, flat.start, flat.numel)

    def _find_part_of_each(self, parameter: Any) -> _Place:
        """Equal parts of the flat tensor, the last ones filled up."""
        flat, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = min(dist.get_rank() * size, parameter.ds_numel)
        count = min(size, parameter.ds_numel - start)
        return _Place(tuple(parameter.ds_shape), start if count else 0, flat, offset, count)

    def weights(self) -> Mapping[str, Tensor | Piece]:
        """`Parts.weights`: float32."""
        return self.pieces()

    def pieces(self) -> dict[str, Piece]:
        """The float32 weights."""
        flats = self._flats()
        return {name: place.cut(name, flats[place.flat]) for name, place in self._places.items()}

    def moments(self) -> dict[str, Piece]:
        """AdamW's, by `<weight>.<key>`; nothing before the first step."""
        states = [self._zero.optimizer.state.get(flat) or {} for flat in self._flats()]
        if not all(states):
            return {}
        return {
            f"{name}.{key}": place.cut(f"{name}.{key}", states[place.flat][key])
            for name, place in self._places.items()
            for key in MOMENTS
        }

    def step(self) -> Tensor:
        """AdamW's number of steps, one for all weights."""
        return self._zero.optimizer.state[self._flats()[0]]["step"]

    def state(self) -> Mapping[str, Tensor | Piece]:
        """`Parts.state`."""
        moments = self.moments()
        return {**moments, **{f"{name}.step": self.step() for name in self._places}} if moments else {}

    def make_state(self, saved: Mapping[str, Spec]) -> Mapping[str, Tensor | Piece]:
        """`Parts.make_state`."""
        del saved  # always float32, whoever saved it
        steps = {}
        for index, flat in enumerate(self._flats()):
            step = torch.zeros((), device=flat.device)
            moments = {key: torch.zeros_like(flat.detach()) for key in MOMENTS}
            self._zero.optimizer.state[flat] = {"step": step, **moments}
            first = next(name for name, place in self._places.items() if place.flat == index)
            steps[f"{first}.step"] = step
        return {**self.moments(), **steps}

    @torch.no_grad()
    def publish(self) -> None:
        """`Parts.publish`: the copies that compute get the float32 weights, rounded."""
        zero = self._zero
        if not self._in_parts:
            zero.update_lp_params()
            return
        # As DeepSpeed's own step does it after AdamW's.
        zero._partition_all_parameters()
        for index in range(len(self._flats())):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
