"""What a checkpoint holds of weights and optimizer, read from and put back to wherever they are.

A `Store` knows where the tensors are: whole on each device (`DeviceStore`), or in shards (`parallel`). Files are the
same whatever the store, weights by name and the optimizer's state, so that a run goes on under another strategy.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from cogtune.checkpoint import CheckpointFolder
from cogtune.ema import Ema
from cogtune.formats.tensors import Tensors, hold
from cogtune.shards.parts import ParameterParts, Parts, make_saved_state, write_parts
from cogtune.shards.stored import StoredTensors
from cogtune.streaming.trained import TrainedStream

OPTIMIZER = "optimizer.safetensors"
EMA = "ema.safetensors"


class AdapterFiles(Protocol):
    """An adapter's own files, which checkpoints hold whole."""

    def save(self, folder: Path, weights: Mapping[str, Tensor], *, trained: bool) -> None:
        """Writes the trained weights, given by parameter, and what a user needs to use them."""
        ...

    def read(self, folder: Path) -> Tensors:
        """What `save` wrote, by parameter; raises `UserError` where names or shapes differ from the config's."""
        ...


class Store(Protocol):
    """A run's trained weights by parameter, and its optimizer's state by `<parameter>.<key>`.

    Every process calls each method, in step. What is read is whole and in host memory, on the main process everything,
    on others maybe nothing; it may be the memory that is trained, so it is used before the next step.
    """

    @property
    def parts(self) -> Parts:
        """What this process has of all that, where it is: `shards` saves and reads it there."""
        ...

    def read_weights(self) -> dict[str, Tensor]:
        """The weights, in the precision that they are trained in."""
        ...

    def read_optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state; nothing before the first step."""
        ...

    def largest_moments(self) -> dict[str, Tensor]:
        """The largest entry of each parameter's first moment, where it has one."""
        ...

    def write_weights(self, weights: Tensors) -> None:
        """Puts weights back, whose names and shapes are right."""
        ...

    def write_optimizer(self, state: Tensors) -> None:
        """Puts the optimizer's state back; raises `UserError` for state of a parameter that isn't trained."""
        ...


class Saver(Protocol):
    """Writes and reads checkpoints; every process calls, in step."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves weights, optimizer and the loop's `state` (plain JSON values)."""
        ...

    def prepare(self) -> None:
        """After the first step: takes what memory saving needs."""
        ...

    def has_failed(self) -> bool:
        """Whether a save beside training failed, as far as this process knows; never waits."""
        ...

    def wait(self) -> None:
        """Until what was saved is complete; raises `UserError`, on all processes, where it failed."""
        ...

    def load(self, folder: Path) -> None:
        """Puts a checkpoint's weights and optimizer state back."""
        ...


class DeviceStore:
    """Weights and state that are whole on this process's device, or its host, or now here, now there."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        host: Any = None,
        stream: TrainedStream | None = None,
        is_main: bool = True,
    ) -> None:
        """`host`: float32 weights there (`host_training.HostWeights`). `stream`: blocks that come and go with their
        state; of these the host's copies are read and written."""
        self._is_main = is_main
        publish = stream.forget if stream is not None else None if host is None else host.publish_all
        self.parts = ParameterParts(parameters, optimizer, publish=publish, copies=stream)

    def read_weights(self) -> dict[str, Tensor]:
        """`Store.read_weights`."""
        if not self._is_main:
            return {}
        return {name: p.detach().cpu().contiguous() for name, p in self.parts.weights().items()}

    def read_optimizer(self) -> dict[str, Tensor]:
        """`Store.read_optimizer`."""
        if not self._is_main:
            return {}
        return {name: value.detach().cpu().contiguous() for name, value in self.parts.state().items()}

    def largest_moments(self) -> dict[str, Tensor]:
        """`Store.largest_moments`; of 8-bit state, the scales'."""
        found = {}
        for name, value in self.parts.state().items():
            owner, key = name.rsplit(".", 1)
            if key in ("exp_avg", "exp_avg_scales"):
                found[owner] = value.abs().max()
        return found

    def write_weights(self, weights: Tensors) -> None:
        """`Store.write_weights`."""
        write_parts(self.parts.weights(), weights)
        self.parts.publish()

    def write_optimizer(self, state: Tensors) -> None:
        """`Store.write_optimizer`; on each parameter's device."""
        write_parts(make_saved_state(self.parts, state), state)
        self.parts.publish()


class WholeSaver:
    """Checkpoints of whole tensors, an adapter's, which the main process writes; what is divided is gathered there."""

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoints: CheckpointFolder,
        files: AdapterFiles,
        store: Store,
        ema: Ema | None,
    ) -> None:
        self._accelerator, self._checkpoints = accelerator, checkpoints
        self._files, self._store, self._ema = files, store, ema

    def save(self, step: int, state: dict[str, Any]) -> None:
        """`Saver.save`."""
        weights, moments = self._store.read_weights(), self._store.read_optimizer()
        averages = {} if self._ema is None else _copy_weights(self._store, self._ema)

        def write(folder: Path) -> None:
            self._files.save(folder, weights, trained=step > 0)
            save_file(moments, folder / OPTIMIZER)
            if averages:
                save_file(averages, folder / EMA)

        if self._accelerator.is_main_process:
            self._checkpoints.save(step, state, write)
        self._accelerator.wait_for_everyone()

    def prepare(self) -> None:
        """`Saver.prepare`: nothing."""

    def has_failed(self) -> bool:
        """`Saver.has_failed`: `save` has raised what there was."""
        return False

    def wait(self) -> None:
        """`Saver.wait`: `save` has waited."""

    def load(self, folder: Path) -> None:
        """`Saver.load`, from shards too."""
        stored = StoredTensors(folder)
        self._store.write_weights(self._files.read(folder))
        self._store.write_optimizer(stored.group("optimizer"))
        if self._ema is not None:
            averages = stored.group("ema")
            self._ema.write({name: averages.read(name) for name in averages.specs})


def read_final_weights(store: Store, ema: Ema | None, newest: Path, *, in_shards: bool) -> Tensors:
    """What `final/` gets, averaged where that is on; every process calls it.

    `in_shards`: they are read from the newest checkpoint tensor by tensor, so that no process holds them all.
    """
    if in_shards:
        return StoredTensors(newest).group("weights" if ema is None else "ema")
    return hold(str(newest), _copy_weights(store, ema))


def _copy_weights(store: Store, ema: Ema | None) -> dict[str, Tensor]:
    """An adapter's weights, averaged where that is on; every process calls it."""
    with contextlib.nullcontext() if ema is None else ema.swapped_in():
        # What is read may be the memory that the average leaves again.
        return {name: tensor.clone() for name, tensor in store.read_weights().items()}
