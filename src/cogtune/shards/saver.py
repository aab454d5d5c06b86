"""A run's checkpoints in shards: its weights, optimizer state and average, named, saved and put back.

Weights may be plain tensors (equal on every process), or `DTensor`s of `fully_shard`. What was saved by any number of
processes, or as the whole files of one, is put back into any of these: each process reads its own ranges alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogtune.ema import Ema
from cogtune.errors import UserError
from cogtune.shards.pieces import Piece, find_piece
from cogtune.shards.ranks import Ranks
from cogtune.shards.stored import StoredTensors
from cogtune.shards.writer import CheckpointWriter


class ShardedState:
    """The named tensors of a run."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        ranks: Ranks,
    ) -> None:
        self._parameters, self._optimizer, self._ema, self._ranks = parameters, optimizer, ema, ranks

    def collect(self) -> dict[str, Tensor | Piece]:
        """Everything that is saved, sharing its memory: `weights.<name>`, `optimizer.<name>.<key>`, `ema.<name>`."""
        found: dict[str, Tensor | Piece] = {f"weights.{name}": p for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        if self._ema is not None:
            found |= self._ema.pieces(rank=self._ranks.rank, world_size=self._ranks.world_size)
        return found

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Reads this process's ranges; raises `UserError` where names or shapes differ from the run's."""
        stored = StoredTensors(folder)
        wrong = sorted(set(stored.names("weights")) ^ set(self._parameters))
        if wrong:
            raise UserError(f"{folder}: the saved weights differ from the model's at {wrong[0]} ({len(wrong)} tensors)")
        targets = [find_piece(f"weights.{name}", parameter) for name, parameter in self._parameters.items()]
        if self._ema is not None:
            targets += self._ema.pieces().values()
        for name in stored.names("optimizer"):
            owner, key = name.rsplit(".", 1)
            if owner not in self._parameters:
                raise UserError(f"{folder}: optimizer state of {owner}, which this config doesn't train")
            parameter = self._parameters[owner]
            saved = stored.tensors[f"optimizer.{name}"]
            value = (
                torch.zeros_like(parameter.detach(), dtype=saved.dtype)  # as sharded as the weight
                if saved.shape == tuple(parameter.shape)
                else torch.zeros(saved.shape, dtype=saved.dtype, device=parameter.device)
            )
            self._optimizer.state[parameter][key] = value
            targets.append(find_piece(f"optimizer.{name}", value))
        stored.read_all(targets)


class ShardedSaver:
    """Saves and puts back a run's state (`saving.Saver`); every process calls each method, in step."""

    def __init__(self, state: ShardedState, writer: CheckpointWriter, *, host: Any = None) -> None:
        """`host`: weights in host memory, whose copies for the device follow what is read."""
        self._state, self.writer, self._host = state, writer, host
        self._is_prepared = False

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Returns when the weights may change again; raises `UserError` where the save before this one failed."""
        self.writer.save(step, state, self._state.collect())

    def prepare(self) -> None:
        """After the first step: takes the host memory for saving, beside training."""
        if not self._is_prepared:
            self._is_prepared = True
            self.writer.prepare(self._state.collect())

    def has_failed(self) -> bool:
        """Whether the last save failed, as far as is known yet; never waits."""
        return self.writer.has_failed()

    def wait(self) -> None:
        """Until the last checkpoint is complete; raises `UserError` where it failed, on every process."""
        self.writer.wait()

    def load(self, folder: Path) -> None:
        """Weights, optimizer and average from a checkpoint."""
        self._state.restore(folder)
        if self._host is not None:
            self._host.publish_all()
