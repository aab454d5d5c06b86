"""The one training loop. LoRA and full fine-tuning differ in the `Trained` that they pass in.

The host waits for the device on logging steps only (and before a checkpoint). In a distributed run it also stays at
most one step ahead, so that all ranks agree on when to save and stop.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from cogtune.checkpoint import Checkpoint
from cogtune.cluster.stopping import StopRequest
from cogtune.cluster.whereabouts import enter, inside, seconds_by_phase
from cogtune.config import RunConfig
from cogtune.dataset import Batch
from cogtune.denoiser import Denoiser
from cogtune.draws import derive_seed
from cogtune.ema import Ema
from cogtune.errors import UserError
from cogtune.formats.tensors import Tensors
from cogtune.memory import GIB
from cogtune.optimization import learning_rate_at, set_learning_rate
from cogtune.parallel.engine import Engine
from cogtune.prior_penalty import PriorPenalty
from cogtune.recorded_pass import RecordedPass
from cogtune.saving import AdapterFiles, Saver
from cogtune.tracking import MetricsLog, Progress


class Trained(Protocol):
    """What a run trains: the adapter of a transformer, or all of it."""

    transformer: Any

    host: Any
    """Weights in host memory (`host_training.HostWeights`), or None."""

    @property
    def files(self) -> AdapterFiles | None:
        """What is small is saved in whole files; None: checkpoints are in shards, written by all processes."""
        ...

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name."""
        ...

    def initial(self) -> Tensors | None:
        """The trained weights before the first step, read one by one; None: they are nowhere more exact than here."""
        ...

    @property
    def base(self) -> Callable[[], contextlib.AbstractContextManager[None]] | None:
        """Inside this context the transformer is the base model; None where that is not kept."""
        ...

    def export(self, folder: Path, weights: Tensors) -> None:
        """Writes the final weights, given by parameter, into an empty folder, in the form that users load."""
        ...


@dataclass
class Recent:
    """Samples since the last logging step, in case one of them turns out to be bad."""

    samples: list[tuple[int, torch.Tensor, Batch]] = field(default_factory=list)
    data_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class Trainer:
    """Runs a config's steps from where the newest checkpoint left off."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: RunConfig,
        *,
        trained: Trained,
        engine: Engine,
        denoiser: Denoiser,
        make_loader: Callable[[int], DataLoader[Batch]],
        saver: Saver,
        log: MetricsLog,
        validate: Callable[[int], bool],
        identity: dict[str, Any],
        ema: Ema | None = None,
        penalty: PriorPenalty | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """`validate` says whether it came to its end, or a signal cut it short."""
        self._accelerator, self._config, self._engine, self._denoiser = accelerator, config, engine, denoiser
        self._model, self._optimizer, self._guard = engine.model, engine.optimizer, engine.guard
        self._make_loader, self._saver, self._log, self._validate = make_loader, saver, log, validate
        self._identity, self._ema, self._penalty = identity, ema, penalty
        self._parameters = trained.parameters()
        num_teams = accelerator.num_processes // config.train.context_parallel
        self._global_batch = config.train.batch_size * config.train.gradient_accumulation_steps * num_teams
        self._pass: Callable[[Batch], torch.Tensor] = self._run_pass
        if config.train.cuda_graph:
            self._pass = RecordedPass(self._run_pass, list(self._parameters.values()))
        self.step = 0
        self._saved_step = -1
        self._last_save = time.monotonic()
        self._stop = stop or StopRequest()
        self._gradients_checked = self._asked = self._start_noted = False
        self._pending_flags: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues after a checkpoint: weights, optimizer and position; everything else follows from the config."""
        self._saver.load(checkpoint.folder)
        self._guard.load(checkpoint.state["guard"])
        self.step = self._saved_step = checkpoint.step

    def fit(self) -> bool:
        """Trains and validates to the end; False where a signal ended the run early (a checkpoint is then saved)."""
        max_steps, every = self._config.train.max_steps, self._config.validation.every_steps
        due = self.step == 0 or (every is not None and self.step % every == 0)
        with self._stop, self._complete_saves():
            # A run that was stopped while it validated does what is missing of it.
            if due and self.step < max_steps and not self._validate(self.step):
                self.save_checkpoint()
                return False
            active = self._accelerator.is_main_process
            with Progress(first_step=self.step, max_steps=max_steps, active=active) as progress:
                return self._run_steps(progress) and self._validate(self.step)

    def _run_steps(self, progress: Progress) -> bool:
        """All steps; False where a signal ended them early."""
        train, every = self._config.train, self._config.validation.every_steps
        batches = iter(self._make_loader(self.step))
        recent = Recent()
        self._model.train()
        while self.step < train.max_steps:
            grad_norm = self.run_step(batches, recent)
            self.step += 1
            progress.advance()
            is_last = self.step == train.max_steps
            if self.step % self._config.tracking.log_every_steps == 0 or is_last or self.step == 1:
                progress.show(self._write_row(recent, grad_norm))
                self._saver.prepare()
                recent = Recent()
            stop, save = self._agree(is_last)
            validate = every is not None and self.step % every == 0 and not is_last and not stop
            if save or stop or is_last or validate:
                self._check_finite(recent)  # waits for the device, so that the pause below is only the pause
                paused = time.perf_counter()
                if save or stop or is_last:
                    self.save_checkpoint()
                if validate and not self._validate(self.step):
                    self.save_checkpoint()
                    return False
                recent.started += time.perf_counter() - paused
            if stop and not is_last:
                return False
        return True

    def run_step(self, batches: Iterator[Batch], recent: Recent) -> torch.Tensor:
        """One optimizer step over all micro-batches; returns the gradient norm on the device."""
        train, accelerator = self._config.train, self._accelerator
        rate = learning_rate_at(self.step, train.max_steps, self._config.optimizer.learning_rate, self._config.schedule)
        set_learning_rate(self._optimizer, rate)
        for micro in range(train.gradient_accumulation_steps):
            asked = time.perf_counter()
            enter("waiting for data", self.step + 1)
            try:
                host_batch = next(batches)
            except UserError as error:  # from a worker it comes with the worker's traceback around the message
                raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
            recent.data_seconds += time.perf_counter() - asked
            enter("forward and backward pass")
            batch = host_batch.to(accelerator.device)
            if self._config.adapter.dropout:
                torch.manual_seed(derive_seed("dropout", train.seed, host_batch.positions[0]))
            is_last = micro == train.gradient_accumulation_steps - 1
            with self._engine.accumulating(is_last):
                losses = self._pass(batch)
            host_batch.release()
            recent.samples.append((self.step, losses, host_batch))
        enter("optimizer step")
        if self._penalty is not None:
            self._penalty.add_gradients(self._guard.scale)
        grad_norm = self._guard.apply(self._optimizer, list(self._parameters.values()))
        if self._ema is not None:
            self._ema.wait()
        self._optimizer.step()
        if not train.cuda_graph:  # a graph writes its gradients anew
            self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update(self.step + 1)
        return grad_norm

    def _run_pass(self, batch: Batch) -> torch.Tensor:
        """Forward and backward pass of a micro-batch: losses [B], gradients added to the parameters'."""
        losses = self._denoiser.losses(self._model, batch)
        scale = self._guard.scale / self._config.train.gradient_accumulation_steps
        self._engine.backward(losses.mean() * scale)
        return losses.detach()

    def _write_row(self, recent: Recent, grad_norm: torch.Tensor) -> dict[str, Any]:
        """Waits for the device, checks what happened since the last row, and logs it."""
        self._check_finite(recent)
        losses = torch.cat([losses for _, losses, _ in recent.samples]).mean()
        loss = self._accelerator.reduce(losses, reduction="mean")
        assert isinstance(loss, torch.Tensor)
        if loss.item():  # an adapter at its start agrees with the base on prior clips: no loss, and rightly no gradient
            self._check_gradients_arrived()
        steps = len({step for step, _, _ in recent.samples})
        row: dict[str, Any] = {
            "step": self.step,
            "loss": loss.item(),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
            "step_seconds": (time.perf_counter() - recent.started) / steps,
            "data_seconds": recent.data_seconds / steps,
            "samples_seen": self.step * self._global_batch,
            "peak_memory_gib": _peak_memory_gib(self._accelerator.device),
        }
        if num_skipped := self._guard.num_skipped:
            row["skipped_steps"] = num_skipped
        if not self._start_noted:
            self._start_noted = True
            row["start_seconds"] = seconds_by_phase()
        self._log.write(row)
        return row

    def _check_finite(self, recent: Recent) -> None:
        """Raises `UserError` naming the samples where loss or gradients were not finite; weights are the last good."""
        if not self._guard.has_failed():
            return
        mine: list[str] = []
        for step, losses, batch in recent.samples:
            lines = zip(losses.tolist(), batch.describe(), strict=True)
            mine += [
                f"step {step + 1}, loss {loss:g}: {line}"
                for loss, line in lines
                if loss != loss or abs(loss) == float("inf")
            ]
        everyone = list(dict.fromkeys(gather_object(mine)))  # ranks may share a sample
        if not everyone:
            last = recent.samples[-1]
            everyone = [
                f"step {last[0] + 1}: every loss is finite, the gradients are not; last sample: {last[2].describe()[0]}"
            ]
        self._accelerator.wait_for_everyone()
        listed = "\n       ".join(everyone[:8])
        raise UserError(
            f"non-finite loss or gradients:\n       {listed}\n       the weights were not updated with them and the "
            "newest checkpoint is untouched; look at those clips and captions, or lower optimizer.learning_rate"
        )

    def _check_gradients_arrived(self) -> None:
        """Once, at the first row with a loss: raises `UserError` where a block's layer never had a gradient but zero.

        torch 2.11 compiled an autograd function that ended in a cast without effect to a gradient of zero: training
        went on, and the layers before it learned nothing. AdamW's first moment remembers what came.
        """
        if self._gradients_checked or self.step <= self._guard.num_skipped:
            return
        self._gradients_checked = True
        moments: dict[str, list[torch.Tensor]] = {}
        for name, largest in self._engine.store.largest_moments().items():
            if "transformer_blocks." in name:
                # By layer: at the start one factor of an adapter is zero, and with it the other one's gradient.
                layer = name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".bias")
                moments.setdefault(layer, []).append(largest)
        if not moments:
            return
        by_layer = torch.stack([torch.stack(values).max() for values in moments.values()]).tolist()
        missing = [layer for layer, value in zip(moments, by_layer, strict=True) if not value]
        if missing:
            raise UserError(
                f"no gradient reached {len(missing)} of {len(moments)} trained layers, such as {missing[0]}: PyTorch "
                f"{torch.__version__} seems to compile the step wrongly; set train.compile=off, or take another release"
            )

    def save_checkpoint(self) -> None:
        """Saves weights, optimizer and position, unless this step is saved already."""
        if self._saved_step == self.step:
            return
        state = {"guard": self._guard.state(), "samples_seen": self.step * self._global_batch, **self._identity}
        with inside("saving a checkpoint"):
            self._saver.save(self.step, state)
        self._saved_step, self._last_save = self.step, time.monotonic()

    def _agree(self, is_last: bool) -> tuple[bool, bool]:
        """Whether to stop and whether to save now, the same on every rank (there one step late)."""
        settings = self._config.checkpoint
        due = settings.every_steps is not None and self.step % settings.every_steps == 0
        minutes = (time.monotonic() - self._last_save) / 60
        timed = settings.every_minutes is not None and minutes >= settings.every_minutes
        failed = self._saver.has_failed()
        if self._accelerator.num_processes == 1:
            stop, save = self._stop.requested, timed
        else:
            # Asked for once: what is sent off now is obeyed after the next step.
            asked, self._asked = self._asked, timed and not self._asked
            asks = timed and not asked and self._accelerator.is_main_process
            stop, save, failed = self._exchange(self._stop.requested, asks, failed)
            stop = stop and not is_last
        if failed:
            self._saver.wait()  # raises, on all ranks
        return stop, save or due

    def _exchange(self, *wanted: bool) -> list[bool]:
        """The previous step's flags over all ranks; this step's are sent off meanwhile."""
        device = self._accelerator.device
        flags = torch.zeros(len(wanted), device=device)
        for index, flag in enumerate(wanted):
            flags[index].fill_(float(flag))
        torch.distributed.all_reduce(flags)
        event = None
        if device.type == "cuda":
            flags = torch.empty(len(wanted), pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        previous, self._pending_flags = self._pending_flags, (flags, event)
        if previous is None:
            return [False] * len(wanted)
        if previous[1] is not None:
            previous[1].synchronize()
        return [value > 0 for value in previous[0].tolist()]

    @contextlib.contextmanager
    def _complete_saves(self) -> Iterator[None]:
        """At the end, and where the run ends on a mistake of the user, what is being saved is completed."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            with contextlib.suppress(UserError):
                self._saver.wait()
            raise
        self._saver.wait()


def _peak_memory_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
