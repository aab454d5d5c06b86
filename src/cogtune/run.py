"""A training run from its plan: folder, encoded data, transformer, loop, final weights. Used by `train/*.py`."""

import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader

from cogtune.cache import Cache, make_key
from cogtune.checkpoint import Checkpoint, CheckpointFolder, find_differences, read_checkpoint
from cogtune.config import RunConfig
from cogtune.dataset import Batch, Entry, PositionSampler, TrainingSet, make_loader
from cogtune.denoiser import Denoiser
from cogtune.draws import derive_seed
from cogtune.encoding import CacheKeys, Share, encode_captions, encode_clips
from cogtune.errors import UserError
from cogtune.execution import configure_blocks
from cogtune.generation import Request
from cogtune.manifest import Clip
from cogtune.memory import GIB, explain_out_of_memory
from cogtune.optimization import StepGuard, make_optimizer
from cogtune.plan import DataPlan, TrainingPlan
from cogtune.report import write_report
from cogtune.tracking import MetricsLog
from cogtune.trainer import Trained, Trainer
from cogtune.validation import VideoJob, evaluate, generate_videos, mean_losses
from cogtune.video import ClipError

# Settings that may differ between a run and its continuation: they change no training result.
_FREE_SETTINGS = frozenset(
    {
        "validation",
        "checkpoint",
        "tracking",
        "output_dir",
        "memory",
        "model.device",
        "train.compile",
        "train.batch_size",
        "train.gradient_accumulation_steps",  # their product with the processes is compared instead
        "data.manifest",
        "data.validation_manifest",
        "data.validation_clips",  # the clips are compared instead
        "data.cache_dir",
        "data.num_workers",
        "data.decode_timeout_seconds",
        "data.bad_clips",
        "data.allow_outside_root",
    }
)


def check_output_folder(config: RunConfig) -> None:
    """Raises `UserError` for an output folder that holds something else than this run; reads no large file."""
    folder, resume = config.output_dir, config.checkpoint.resume
    saved_config = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder}: is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not saved_config.is_file():
        raise UserError(f"output_dir={folder}: holds files that are no run's; choose another folder")
    if resume == "never" and saved_config.is_file():
        raise UserError(
            f"output_dir={folder}: holds a run and checkpoint.resume is 'never'; "
            "choose another folder, delete this one, or set checkpoint.resume=auto"
        )
    has_checkpoints = any((folder / "checkpoints").glob("step-*/manifest.json"))
    if saved_config.is_file() and has_checkpoints and resume == "auto":
        saved = yaml.safe_load(saved_config.read_text(encoding="utf-8"))
        _refuse_differences(folder, find_differences(saved, config.to_plain(), _free_settings(config)))


def _free_settings(config: RunConfig) -> frozenset[str]:
    # With a decaying schedule the number of steps shapes every step's learning rate.
    return _FREE_SETTINGS | ({"train.max_steps"} if config.schedule.name == "constant" else set())


def _refuse_differences(folder: Path, differences: list[str]) -> None:
    if differences:
        listed = "\n       ".join(differences)
        raise UserError(
            f"output_dir={folder}: holds another run; resuming it with these changes would be wrong:\n"
            f"       {listed}\n       choose another output_dir, or undo them"
        )


@dataclass(frozen=True)
class EncodedData:
    """The clips that a run uses, all of them in the cache."""

    cache: Cache
    keys: CacheKeys
    train: list[Entry]
    validation: list[Entry]

    def digest(self) -> str:
        """Identity of the training clips, captions and weights, in order."""
        rows = [[e.clip.id, e.latents_key, e.text_key, e.clip.weight] for e in self.train]
        return make_key(entries=rows)


def start_accelerator(plan: DataPlan) -> Accelerator:
    """The process group and device. Precision is ours: no autocast, so training computes what inference computes."""
    return Accelerator(
        mixed_precision="no",
        cpu=plan.device.type == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )


def encode_data(plan: DataPlan, accelerator: Accelerator) -> EncodedData:
    """Clips and captions through VAE and T5 into the cache where they are missing, over all processes.

    Clips go first: a bad one shows before the large text encoder loads. Raises `UserError` with all bad clips, or
    leaves them out where `data.bad_clips` is `skip`.
    """
    cache = plan.make_cache()
    quiet = not accelerator.is_main_process
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    clips = [*plan.train_clips, *plan.validation_clips]
    for clip in clips:
        if not clip.video.is_file():
            raise UserError(f"clip {clip.id!r}: {clip.video} does not exist; correct the manifest or remove the row")
    keys = CacheKeys(cache, plan.facts, plan.clip_format, plan.dtype)
    before = cache.size_bytes()
    problems: list[str] = []

    def note_problem(clip: Clip, problem: ClipError) -> None:
        problems.append(f"{clip.id}: {problem}")

    data = plan.config.data
    encode_clips(
        clips,
        keys,
        cache,
        plan.facts,
        plan.clip_format,
        device=accelerator.device,
        dtype=plan.dtype,
        share=share,
        num_workers=max(1, plan.num_workers),
        timeout_seconds=data.decode_timeout_seconds,
        on_problem=note_problem,
        quiet=quiet,
    )
    _judge_problems(gather_object(problems), plan, accelerator)
    entries = {clip: Entry(clip, keys.latents(clip), keys.text(clip.caption)) for clip in clips}
    usable = {clip for clip in clips if cache.has("latents", entries[clip].latents_key)}
    captions = [clip.caption for clip in clips if clip in usable] + plan.prompts()
    encode_captions(
        captions, keys, cache, plan.facts, device=accelerator.device, dtype=plan.dtype, share=share, quiet=quiet
    )
    accelerator.wait_for_everyone()
    train = [entries[clip] for clip in plan.train_clips if clip in usable]
    if not train:
        raise UserError(f"data.manifest={data.manifest}: no usable clip; run data/check.py on it")
    accelerator.print(
        f"cache: {len(usable)} clips, {len(set(captions))} texts; {before / GIB:.2f} GiB before, "
        f"{cache.size_bytes() / GIB:.2f} GiB now in {cache.folder}"
    )
    return EncodedData(cache, keys, train, [entries[clip] for clip in plan.validation_clips if clip in usable])


def _judge_problems(problems: list[str], plan: DataPlan, accelerator: Accelerator) -> None:
    if not problems:
        return
    listed = "\n       ".join([*problems[:20], *([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])])
    if plan.config.data.bad_clips == "error":
        raise UserError(
            f"{len(problems)} clip(s) can't be used:\n       {listed}\n       mend or remove them, or set "
            "data.bad_clips=skip to train without them (data/check.py lists every problem)"
        )
    accelerator.print(f"leaving out {len(problems)} clip(s):\n       {listed}")


class Run:
    """One run's folder, its checkpoint to resume from, and what ties the parts together."""

    def __init__(self, plan: TrainingPlan, accelerator: Accelerator, data: EncodedData) -> None:
        self.plan, self.accelerator, self.data = plan, accelerator, data
        self.config = plan.config
        self.folder = plan.config.output_dir
        self.identity: dict[str, Any] = {
            "config": self.config.to_plain(),
            "global_batch": plan.global_batch,
            "dataset": data.digest(),
        }
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", keep_last=self.config.checkpoint.keep_last)

    def open_folder(self) -> Checkpoint | None:
        """Prepares the output folder and finds the checkpoint to continue from, if any.

        Raises `UserError` for a folder that holds another run, or can't be written.
        """
        resume = self.config.checkpoint.resume
        if resume not in ("auto", "never"):
            checkpoint: Checkpoint | None = read_checkpoint(Path(resume))
        else:
            checkpoint = self.checkpoints.find_newest(self.accelerator.print)
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
        differences = find_differences(saved["config"], self.identity["config"], _free_settings(self.config))
        differences += [
            f"{name}: {saved[name]} -> {self.identity[name]}"
            for name in ("global_batch", "dataset")
            if saved[name] != self.identity[name]
        ]
        _refuse_differences(self.folder, differences)

    def train(self, trained: Trained) -> bool:
        """Trains to the end or to a signal; True at the end. Everything but the trained weights is made here."""
        plan, config, accelerator = self.plan, self.config, self.accelerator
        checkpoint = self.open_folder()
        torch.backends.cuda.matmul.allow_tf32 = config.memory.allow_tf32
        set_seed(config.train.seed)
        transformer = trained.transformer.to(accelerator.device)
        configure_blocks(
            transformer, plan.memory.activations, compiled=plan.compiled, has_dropout=config.adapter.dropout > 0
        )
        model = accelerator.prepare_model(transformer)
        denoiser = Denoiser(
            plan.facts,
            num_latent_frames=self._latent_shape()[0],
            height=plan.clip_format.height,
            width=plan.clip_format.width,
            device=accelerator.device,
            dtype=plan.dtype,
            min_snr_gamma=config.train.min_snr_gamma,
        )
        optimizer = make_optimizer(list(trained.parameters().values()), config.optimizer)
        guard = StepGuard(
            accelerator.device, use_loss_scale=plan.dtype == torch.float16, max_grad_norm=config.optimizer.max_grad_norm
        )
        first_step = checkpoint.step if checkpoint else 0
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
            validate = self._make_validation(transformer, denoiser, log)
            trainer = Trainer(
                accelerator,
                config,
                trained=trained,
                model=model,
                denoiser=denoiser,
                optimizer=optimizer,
                guard=guard,
                make_loader=self._make_loader,
                checkpoints=self.checkpoints,
                log=log,
                validate=validate,
                identity=self.identity,
            )
            if checkpoint is not None:
                trainer.resume(checkpoint)
                accelerator.print(f"resumed from {checkpoint.folder} at step {checkpoint.step}")
            try:
                finished = trainer.fit()
            except torch.OutOfMemoryError as error:
                raise UserError(explain_out_of_memory(plan.memory, error)) from error
            if finished:
                validate(trainer.step)
        return finished

    def finish(self, trained: Trained) -> None:
        """Writes `final/` and the report on the main process."""
        if self.accelerator.is_main_process:
            final, partial = self.folder / "final", self.folder / ".partial-final"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            trained.save(partial, trained=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"final weights: {self.folder / 'final'}\nreport: {self.folder / 'report.html'}")

    def _latent_shape(self) -> tuple[int, int, int, int]:
        form = self.plan.clip_format
        return self.plan.facts.latent_shape(form.num_frames, form.height, form.width)

    def _make_loader(self, first_step: int) -> DataLoader[Batch]:
        train, accelerator = self.config.train, self.accelerator
        dataset = TrainingSet(
            self.data.train,
            self.data.cache,
            seed=train.seed,
            scaling_factor=self.plan.facts.scaling_factor,
            caption_dropout=train.caption_dropout,
            timestep_strata=train.timestep_strata,
        )
        sampler = PositionSampler(
            first_step=first_step,
            last_step=train.max_steps,
            batch_size=train.batch_size,
            accumulation=train.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return make_loader(
            dataset, sampler, num_workers=self.plan.num_workers, pin_memory=self.plan.device.type == "cuda"
        )

    def _make_validation(
        self, transformer: torch.nn.Module, denoiser: Denoiser, log: MetricsLog
    ) -> Callable[[int], None]:
        """The validation of a step: evaluation loss, videos, report. Step 0 is the base model's."""
        settings, accelerator, facts = self.config.validation, self.accelerator, self.plan.facts
        rank, count = accelerator.process_index, accelerator.num_processes
        jobs = self._video_jobs()

        def validate(step: int) -> None:
            if not settings.enabled:
                return
            sums = evaluate(
                transformer,
                denoiser,
                self.data.validation[rank::count],
                self.data.cache,
                scaling_factor=facts.scaling_factor,
                device=accelerator.device,
            )
            losses = mean_losses(sums, lambda tensor: accelerator.reduce(tensor, reduction="sum"))  # pyright: ignore[reportArgumentType]
            if losses is not None:
                mean = sum(losses.values()) / len(losses)
                log.write({"step": step, "eval_loss": mean, "eval_loss_by_quantile": losses})
            folder, base_folder = self.folder / "samples" / f"step-{step:06d}", self.folder / "samples" / "step-000000"
            if step > 0 or settings.base_videos:
                generate_videos(
                    transformer,
                    jobs[rank::count],
                    folder,
                    self.data.cache,
                    facts,
                    device=accelerator.device,
                    dtype=self.plan.dtype,
                    quiet=not accelerator.is_main_process,
                )
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for job in jobs:
                    base = base_folder / job.file_name()
                    if step > 0 and base.is_file():
                        shutil.copyfile(base, folder / job.file_name("-base"))
                write_report(self.folder, self.config, [*self.data.train], [*self.data.validation])

        return validate

    def _video_jobs(self) -> list[VideoJob]:
        settings, form = self.config.validation, self.plan.clip_format
        return [
            VideoJob(
                number,
                Request(
                    prompt,
                    form.num_frames,
                    form.height,
                    form.width,
                    seed,
                    settings.negative_prompt,
                    settings.num_inference_steps,
                    settings.guidance_scale,
                ),
                self.data.keys.text(prompt),
                self.data.keys.text(settings.negative_prompt),
            )
            for number, prompt in enumerate(settings.prompts)
            for seed in settings.seeds
        ]


def derive_init_seed(config: RunConfig) -> int:
    """Seed of the fresh adapter's weights."""
    return derive_seed("init", config.train.seed)


def exit_after_signal(accelerator: Accelerator, folder: Path) -> None:
    """Says where the run can go on, and ends the process cleanly."""
    accelerator.print(f"stopped by a signal; the checkpoint is saved, start the same command again to go on ({folder})")
    accelerator.end_training()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(0)
