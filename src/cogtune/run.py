"""A training run from its plan: folder, encoded data, transformer, loop, final weights. Used by `train/*.py`."""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from cogtune.attention_backends import Backend
from cogtune.checkpoint import Checkpoint, CheckpointFolder, find_differences, read_checkpoint
from cogtune.cluster.accelerator import WatchedAccelerator
from cogtune.cluster.sharing import check_shared_folder
from cogtune.cluster.stopping import StopRequest, follow_the_launcher
from cogtune.cluster.whereabouts import enter
from cogtune.config import RunConfig
from cogtune.data_plan import DataPlan
from cogtune.dataset import Batch, PositionSampler, TrainingSet, join_samples, make_loader
from cogtune.denoiser import Denoiser
from cogtune.draws import derive_seed
from cogtune.ema import Ema
from cogtune.errors import UserError
from cogtune.execution import allow_shapes, configure_blocks
from cogtune.head_start import keep_kernels
from cogtune.image_encoder import load_image_encoder
from cogtune.kernel_choice import choose_attention
from cogtune.machine import avoid_fragments
from cogtune.memory import explain_out_of_memory
from cogtune.parallel.assembly import divide_transformer, make_engine, place_transformer
from cogtune.parallel.engine import Engine
from cogtune.parallel.shared_samples import share_samples, teams_of
from cogtune.parallel.strategy import settings_of_our_own
from cogtune.plan import TrainingPlan
from cogtune.preparation import EncodedData
from cogtune.prior_penalty import PriorPenalty, collect_factors
from cogtune.report import write_report
from cogtune.run_identity import free_settings, refuse_differences
from cogtune.saving import Saver, Store, WholeSaver, read_final_weights
from cogtune.shards.ranks import Ranks
from cogtune.shards.saver import ShardedSaver, ShardedState
from cogtune.shards.writer import CheckpointWriter
from cogtune.tracking import MetricsLog
from cogtune.trainer import Trained, Trainer
from cogtune.validation_notes import ValidationNotes
from cogtune.validator import Validator
from cogtune.ways import write_ways


def start_accelerator(plan: DataPlan) -> Accelerator:
    """The process group and device. Precision is ours: no autocast, so training computes what inference computes."""
    follow_the_launcher()
    keep_kernels()
    avoid_fragments(plan.device)
    with settings_of_our_own():
        return WatchedAccelerator(
            timeout_minutes=plan.config.train.timeout_minutes,
            mixed_precision="no",
            cpu=plan.device.type == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )


class Run:
    """One run's folder, its checkpoint to resume from, and what ties the parts together."""

    def __init__(self, plan: TrainingPlan, accelerator: Accelerator, data: EncodedData) -> None:
        self.plan, self.accelerator, self.data = plan, accelerator, data
        self.config = plan.config
        self.teams = teams_of(plan.config, accelerator.process_index, accelerator.num_processes)
        self.folder = plan.config.output_dir
        self.identity: dict[str, Any] = {
            "config": self.config.to_plain(),
            "global_batch": plan.global_batch,
            "dataset": data.digest(),
            "optimizer_state": "8bit" if plan.memory.eight_bit else "float32",
            "frozen_base": plan.memory.quantized or "exact",
        }
        self._ema: Ema | None = None
        self._store: Store | None = None
        self._ranks = Ranks.connect()
        self._newest: Path | None = None
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", keep_last=self.config.checkpoint.keep_last)

    def open_folder(self) -> Checkpoint | None:
        """Prepares the output folder and finds the checkpoint to continue from, if any.

        Raises `UserError` for a folder that holds another run, or can't be written.
        """
        resume = self.config.checkpoint.resume
        check_shared_folder(self.folder, self.checkpoints.list_steps())  # what is found is read by all ranks together
        # A path starts this run; what the run itself has saved since then is newer.
        checkpoint = self.checkpoints.find_newest(self.accelerator.print, self._ranks)
        if checkpoint is None and resume not in ("auto", "never"):
            checkpoint = read_checkpoint(Path(resume), self._ranks)
        if checkpoint is not None:
            self._check_same_run(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.remove_partial()
                self.folder.mkdir(parents=True, exist_ok=True)
                text = yaml.safe_dump(self.config.to_plain(), sort_keys=False)
                (self.folder / "config.yaml").write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"output_dir={self.folder}: cannot be written ({error.strerror})") from None
        return checkpoint

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.state
        differences = find_differences(saved["config"], self.identity["config"], free_settings(self.config))
        differences += [
            f"{name}: {saved[name]} -> {self.identity[name]}"
            for name in ("global_batch", "dataset")
            if saved[name] != self.identity[name]
        ]
        # What `auto` comes to depends on the machine, and a run is older than the setting.
        before, now = saved.get("optimizer_state", "float32"), self.identity["optimizer_state"]
        if before != now:
            wanted = "8bit" if before == "8bit" else "device, or host where it was there"
            differences.append(f"memory.optimizer: {before} state -> {now} state (set memory.optimizer={wanted})")
        before, now = saved.get("frozen_base", "exact"), self.identity["frozen_base"]
        if before != now:
            wanted = "none" if before == "exact" else before
            differences.append(f"memory.quantized_base: {before} -> {now} (set memory.quantized_base={wanted})")
        refuse_differences(self.folder, differences)

    def train(self, trained: Trained) -> bool:
        """Trains to the end or to a signal; True at the end. Everything but the trained weights is made here."""
        try:
            return self._train(trained)
        except torch.OutOfMemoryError as error:
            raise UserError(explain_out_of_memory(self.plan.memory, error)) from error

    def _train(self, trained: Trained) -> bool:
        plan, config, accelerator = self.plan, self.config, self.accelerator
        enter("preparing to train")
        checkpoint = self.open_folder()
        torch.backends.cuda.matmul.allow_tf32 = config.memory.allow_tf32
        set_seed(config.train.seed)
        transformer, memory = trained.transformer, plan.memory
        place_transformer(plan, trained, accelerator.device)
        denoiser = Denoiser(
            plan.facts,
            device=accelerator.device,
            dtype=plan.dtype,
            min_snr_gamma=config.train.min_snr_gamma,
            autocast=plan.autocast,
            base=trained.base if plan.hold_prior else None,
            ask_base=self._when_to_ask_base(),
            image_encoder=load_image_encoder(plan.facts, plan.dtype, accelerator.device)
            if plan.facts.takes_image
            else None,
        )
        first_step = checkpoint.step if checkpoint else 0
        penalty = None
        if config.train.prior_penalty is not None and first_step < config.train.max_steps:
            penalty = self._measure_penalty(trained, denoiser, config.train.prior_penalty)
        shared = share_samples(config, plan.facts.num_heads, self.teams)
        backend = choose_attention(plan, accelerator, transformer, shared)
        enter("preparing to train")
        mesh = divide_transformer(plan, trained, accelerator.device)
        self._note_ways(backend)
        configure_blocks(
            transformer,
            memory.activations,
            compiled=plan.compiled,
            has_dropout=config.adapter.dropout > 0,
            num_lean=memory.num_lean,
            num_offloaded=memory.num_offloaded,
            num_leaving=memory.num_leaving,
            gradients=None if trained.host is None else trained.host.gradients,
            hooked=plan.strategy.shards_weights,
            shared=shared is not None,
        )
        if shared is not None:
            shared.split(transformer)
        allow_shapes(len({clip.form for clip in [*plan.train_clips, *plan.validation_clips]}))
        engine = make_engine(accelerator, plan, trained, mesh)
        self._store = engine.store
        tracking = config.tracking
        with MetricsLog(
            self.folder,
            active=accelerator.is_main_process,
            first_step=first_step,
            report_to=tracking.report_to,
            project=tracking.project,
            wandb_mode=tracking.wandb_mode,
            config=config.to_plain(),
        ) as log:
            if config.train.ema_decay is not None:
                decay, on_host = config.train.ema_decay, config.train.ema_on_host
                self._ema = Ema(engine.store.parts.weights(), decay, on_host=on_host)
            stop = StopRequest()
            validate = Validator(
                plan,
                accelerator,
                self.data,
                stop=stop,
                done=ValidationNotes(self.folder, after=checkpoint.step if checkpoint else None),
                transformer=transformer,
                denoiser=denoiser,
                log=log,
                averaged_weights=self._averaged_weights,
            )
            trainer = Trainer(
                accelerator,
                config,
                trained=trained,
                engine=engine,
                denoiser=denoiser,
                make_loader=self._make_loader,
                saver=self._make_saver(trained, engine),
                log=log,
                validate=validate,
                identity=self.identity,
                ema=self._ema,
                penalty=penalty,
                stop=stop,
            )
            if checkpoint is not None:
                trainer.resume(checkpoint)
                accelerator.print(f"resumed from {checkpoint.folder} at step {checkpoint.step}")
            finished = trainer.fit()
            own = self.checkpoints.place(trainer.step)
            self._newest = own if checkpoint is None or own.is_dir() else checkpoint.folder
        return finished

    def _measure_penalty(self, trained: Trained, denoiser: Denoiser, strength: float) -> PriorPenalty:
        """What `train.prior_penalty` needs to know of the base model: the same on every process."""
        train, transformer = self.config.train, trained.transformer
        assert trained.base is not None, "the plan has seen to it that there is a base model to ask"
        started = time.perf_counter()
        dataset, teams = self._make_dataset(), self.teams
        count = max(train.prior_penalty_samples, teams.num_teams)
        positions = dataset.prior_positions(count)[teams.team :: teams.num_teams]
        size = train.batch_size if len(self.plan.formats) == 1 else 1
        chunks = [positions[i : i + size] for i in range(0, len(positions), size)]
        device = self.accelerator.device

        def read() -> Iterator[Batch]:
            for chunk in chunks:
                enter("asking the base model about prior clips")  # one move each: it may take minutes
                yield join_samples([dataset[p] for p in chunk]).to(device)

        factors = collect_factors(
            transformer,
            read(),
            denoiser,
            base=trained.base,
            seed=train.seed,
            add_up=torch.distributed.all_reduce if teams.num_teams > 1 else None,
        )
        seconds = time.perf_counter() - started
        self.accelerator.print(f"penalty     from {count} prior samples, in {seconds:.1f} s")
        enter("preparing to train")
        return PriorPenalty(transformer, factors, strength)

    def _make_saver(self, trained: Trained, engine: Engine) -> Saver:
        if trained.files is not None:
            return WholeSaver(self.accelerator, self.checkpoints, trained.files, engine.store, self._ema)
        state = ShardedState(engine.store.parts, self._ema, self._ranks)
        writer = CheckpointWriter(self.checkpoints, self._ranks, asynchronous=self.plan.saves_beside_training)
        return ShardedSaver(state, writer)

    def _when_to_ask_base(self) -> Literal["samples", "batch", "always"]:
        if self.config.train.cuda_graph or self.plan.strategy.shards_weights:
            return "always"  # with divided weights, whenever any process asks
        return "samples" if self.accelerator.device.type == "cpu" else "batch"

    def _note_ways(self, backend: Backend) -> None:
        """Says in config.yaml what `auto` came to, and what is not exact; keeps it for a run that has to repeat it."""
        plan = self.plan
        if self.accelerator.is_main_process:
            how = "each block compiled" if plan.compiled else "not compiled"
            base = ", frozen base in float8" if plan.num_float8 else ""
            order = ", deterministic" if self.config.train.deterministic else ""
            line = f"# Ran with: attention {backend}, activations {plan.memory.name()}, {how}{base}{order}\n"
            path = self.folder / "config.yaml"
            path.write_text(line + path.read_text(encoding="utf-8"), encoding="utf-8")
            if self.config.train.deterministic:
                write_ways(self.folder, plan.device, backend, plan.memory)

    def finish(self, trained: Trained) -> None:
        """Writes `final/` and the report on the main process."""
        assert self._store is not None and self._newest is not None, "a run is trained before it is finished"
        enter("writing the final weights")
        weights = read_final_weights(self._store, self._ema, self._newest, in_shards=trained.files is None)
        if self.accelerator.is_main_process:
            final, partial = self.folder / "final", self.folder / ".partial-final"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            trained.export(partial, weights)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self.write_report()
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"final weights: {self.folder / 'final'}\nreport: {self.folder / 'report.html'}")

    def write_report(self) -> None:
        """Brings `report.html` up to date."""
        memory, data = self.plan.memory, self.data
        ways = {"eight_bit": memory.eight_bit, "quantized": memory.quantized}
        write_report(self.folder, self.config, data.train, data.validation, **ways)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self._ema is None:
            yield
            return
        assert self._store is not None
        with self._ema.swapped_in():
            self._store.parts.publish()
            yield
        self._store.parts.publish()

    def _make_dataset(self) -> TrainingSet:
        train = self.config.train
        return TrainingSet(
            self.data.train,
            self.data.cache,
            seed=train.seed,
            scaling_factor=self.plan.facts.scaling_factor,
            caption_dropout=train.caption_dropout,
            timestep_strata=train.timestep_strata,
            dropped_caption_key=self.data.keys.text("") if train.dropped_caption == "empty" else None,
            prior_weight=train.prior_weight,
            hold_prior=self.plan.hold_prior,
            patch_size_t=self.plan.facts.patch_size_t,
            image_dropout=self.plan.image_dropout,
            global_batch=self.plan.global_batch,
        )

    def _make_loader(self, first_step: int) -> DataLoader[Batch]:
        train = self.config.train
        sampler = PositionSampler(
            first_step=first_step,
            last_step=train.max_steps,
            batch_size=train.batch_size,
            accumulation=train.gradient_accumulation_steps,
            rank=self.teams.team,
            world_size=self.teams.num_teams,
        )
        return make_loader(
            self._make_dataset(), sampler, num_workers=self.plan.num_workers, pin_memory=self.plan.device.type == "cuda"
        )


def derive_init_seed(config: RunConfig) -> int:
    """Seed of the fresh adapter's weights."""
    return derive_seed("init", config.train.seed)


def exit_after_signal(run: Run) -> None:
    """Says where the run can go on, and ends the process cleanly; to job scripts by the file that they name."""
    accelerator, folder = run.accelerator, run.folder
    if accelerator.is_main_process:
        run.write_report()
        if mark := os.environ.get("COGTUNE_STOPPED"):
            Path(mark).touch()
    accelerator.print(f"stopped by a signal; the checkpoint is saved, start the same command again to go on ({folder})")
    accelerator.end_training()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(0)
