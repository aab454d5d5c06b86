"""A run's checkpoints in shards: its weights, optimizer state and average, named, saved and put back.

What was saved by any number of processes, or as the whole files of one, is put back into whatever division a run has:
each process reads its own ranges alone.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from cogtune.ema import Ema
from cogtune.errors import UserError
from cogtune.shards.parts import Parts, make_saved_state
from cogtune.shards.pieces import Piece, find_piece
from cogtune.shards.ranks import Ranks
from cogtune.shards.stored import StoredTensors
from cogtune.shards.writer import CheckpointWriter


class ShardedState:
    """The named tensors of a run."""

    def __init__(self, parts: Parts, ema: Ema | None, ranks: Ranks) -> None:
        self._parts, self._ema, self._ranks = parts, ema, ranks

    def collect(self) -> dict[str, Tensor | Piece]:
        """Everything that is saved, sharing its memory: `weights.<name>`, `optimizer.<name>.<key>`, `ema.<name>`."""
        found = {f"weights.{name}": weight for name, weight in self._parts.weights().items()}
        found |= {f"optimizer.{name}": value for name, value in self._parts.state().items()}
        if self._ema is not None:
            found |= self._ema.pieces(rank=self._ranks.rank, world_size=self._ranks.world_size)
        return found

    def restore(self, folder: Path) -> None:
        """Reads this process's ranges; raises `UserError` where names or shapes differ from the run's."""
        stored, weights = StoredTensors(folder), self._parts.weights()
        wrong = sorted(set(stored.names("weights")) ^ set(weights))
        if wrong:
            raise UserError(f"{folder}: the saved weights differ from the model's at {wrong[0]} ({len(wrong)} tensors)")
        targets = [find_piece(f"weights.{name}", weight) for name, weight in weights.items()]
        if self._ema is not None:
            targets += self._ema.pieces().values()
        state = make_saved_state(self._parts, stored.group("optimizer"))
        targets += [find_piece(f"optimizer.{name}", value) for name, value in state.items()]
        stored.read_all(targets)
        self._parts.publish()


class ShardedSaver:
    """Saves and puts back a run's state (`saving.Saver`); every process calls each method, in step."""

    def __init__(self, state: ShardedState, writer: CheckpointWriter) -> None:
        self._state, self.writer = state, writer
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
