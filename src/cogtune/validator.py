"""Validates a run at a step: evaluation loss over all ranks, videos beside the base model's, the report."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cogtune.cache import make_key
from cogtune.cluster.stopping import StopRequest
from cogtune.cluster.whereabouts import enter, move
from cogtune.dataset import Entry
from cogtune.denoiser import Denoiser
from cogtune.parallel.lockstep import share_out
from cogtune.parallel.shared_samples import teams_of
from cogtune.plan import TrainingPlan
from cogtune.preparation import EncodedData
from cogtune.report import write_report
from cogtune.tracking import MetricsLog
from cogtune.validation import VideoJob, evaluate, generate_videos, mean_losses, read_requests, write_requests
from cogtune.validation_notes import ValidationNotes
from cogtune.video_request import Request

T = TypeVar("T")
BASE_STEP = "step-000000"  # before the first step the model is the base model


class Interrupted(Exception):  # noqa: N818  # no error: a signal came
    """A signal asked this rank to stop validating."""


class Validator:
    """Called with a step; validates the weights that `averaged_weights` puts in place."""

    def __init__(
        self,
        plan: TrainingPlan,
        accelerator: Accelerator,
        data: EncodedData,
        *,
        transformer: torch.nn.Module,
        denoiser: Denoiser,
        log: MetricsLog,
        stop: StopRequest,
        done: ValidationNotes,
        averaged_weights: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._plan, self._accelerator, self._data = plan, accelerator, data
        self._transformer, self._denoiser, self._log = transformer, denoiser, log
        self._averaged_weights, self._stop, self._done = averaged_weights, stop, done
        self._teams = teams_of(plan.config, accelerator.process_index, accelerator.num_processes)
        self._folder = plan.config.output_dir
        self._jobs = _make_jobs(plan, data)

    def __call__(self, step: int) -> bool:
        """Evaluation loss, videos and report of a step; step 0 is the base model's. What is done already stays.

        False, on all ranks, where a signal cut it short; it can be called again later.
        """
        if not self._plan.config.validation.enabled:
            return True
        enter("validation", step)
        folder = self._folder / "samples" / f"step-{step:06d}"
        wanted = {"clips": make_key(clips=[_identify(entry) for entry in self._data.validation])}
        if self._jobs and (step > 0 or self._plan.config.validation.base_videos):
            wanted["videos"] = make_key(videos=[job.describe() for job in self._jobs])
        missing = [self._find_missing(step, wanted, folder) if self._accelerator.is_main_process else []]
        broadcast_object_list(missing)  # one rank decides: others may see files later
        with self._averaged_weights(), self._interruptible():
            for part, work in (("clips", self._evaluate), ("videos", self._generate)):
                if part in missing[0]:
                    if not self._do_part(work, step):
                        return False
                    if self._accelerator.is_main_process:
                        self._done.note(step, part, wanted[part])
        if self._accelerator.is_main_process:
            if self._jobs and folder.is_dir():
                write_requests(folder, self._jobs)
            if step > 0:
                self._copy_base_videos(folder)
            entries = self._data.train, self._data.validation
            memory = self._plan.memory
            ways = {"eight_bit": memory.eight_bit, "quantized": memory.quantized}
            write_report(self._folder, self._plan.config, *entries, **ways)
        if self._accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._accelerator.device)  # training's rows show training's
        return True

    def _find_missing(self, step: int, wanted: dict[str, str], folder: Path) -> list[str]:
        """The parts that this run has not done yet with these clips and requests."""
        done = self._done.find(step)
        if not all((folder / job.file_name()).is_file() for job in self._jobs):
            done.pop("videos", None)
        return [part for part, digest in wanted.items() if done.get(part) != digest]

    def _do_part(self, work: Callable[[int], Callable[[bool], None]], step: int) -> bool:
        """One part on all ranks, each with as much of it as it has; False where a signal came."""
        finish: Callable[[bool], None] | None = None
        if not self._anyone(self._stop.requested):
            with contextlib.suppress(Interrupted):
                finish = work(step)
        self._accelerator.wait_for_everyone()
        complete = not self._anyone(finish is None)
        if finish is not None:
            finish(complete)
        return complete

    def _anyone(self, flag: bool) -> bool:
        told = torch.tensor([float(flag)], device=self._accelerator.device)
        return bool(self._accelerator.reduce(told, reduction="sum").item() > 0)  # pyright: ignore[reportAttributeAccessIssue]

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Each forward pass is progress, and a place where a signal ends the validation.

        Where a forward pass is a collective (sharded weights, shared samples), no rank may leave alone: there it ends
        after its part.
        """
        alone = not self._plan.strategy.shards_weights and self._teams.size == 1

        def check(_module: torch.nn.Module, _arguments: tuple[object, ...]) -> None:
            move()
            if alone and self._stop.requested:
                raise Interrupted

        handle = self._transformer.register_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()

    def _evaluate(self, step: int) -> Callable[[bool], None]:
        accelerator = self._accelerator
        mine, num_own = self._share_out(self._data.validation)
        sums = evaluate(
            self._transformer,
            self._denoiser,
            mine,
            self._data.cache,
            facts=self._plan.facts,
            device=accelerator.device,
            num_own=num_own,
        )

        def log(complete: bool) -> None:
            losses = mean_losses(accelerator.reduce(sums, reduction="sum")) if complete else None  # pyright: ignore[reportArgumentType]
            if losses is not None:
                mean = sum(losses.values()) / len(losses)
                self._log.write({"step": step, "eval_loss": mean, "eval_loss_by_quantile": losses})

        return log

    def _generate(self, step: int) -> Callable[[bool], None]:
        accelerator = self._accelerator
        mine, num_own = self._share_out(self._jobs)
        folder = self._folder / "samples" / f"step-{step:06d}"
        generate_videos(
            self._transformer,
            mine,
            folder,
            self._data.cache,
            self._plan.facts,
            device=accelerator.device,
            dtype=self._plan.dtype,
            autocast=self._plan.autocast,
            quiet=not accelerator.is_main_process,
            image_encoder=self._denoiser.image_encoder,
            num_own=num_own,
            decode=self._teams.place == 0,
        )
        return lambda _complete: None

    def _share_out(self, items: Sequence[T]) -> tuple[list[T], int]:
        """This rank's part, and how many of it are its own: with divided weights all ranks go through as many."""
        teams, even = self._teams, self._plan.strategy.shards_weights
        return share_out(items, teams.team, teams.num_teams, even=even)

    def _copy_base_videos(self, folder: Path) -> None:
        """The base model's videos of the same requests; after a change of prompts there may be none."""
        base_folder = self._folder / "samples" / BASE_STEP
        made = read_requests(base_folder)
        for job in self._jobs:
            name = job.file_name()
            if made.get(name) == job.describe() and (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, folder / job.file_name("-base"))


def _identify(entry: Entry) -> list[str | None]:
    return [entry.clip.id, entry.latents_key, entry.text_key, entry.image_key]


def _make_jobs(plan: TrainingPlan, data: EncodedData) -> list[VideoJob]:
    settings, form = plan.config.validation, plan.clip_format
    jobs = []
    for number, prompt in enumerate(settings.prompts):
        for seed in settings.seeds:
            request = Request(
                prompt,
                form.num_frames,
                form.height,
                form.width,
                seed,
                settings.negative_prompt,
                settings.num_inference_steps,
                settings.guidance_scale,
                image=str(settings.images[number]) if settings.images else None,
            )
            jobs.append(VideoJob(number, request, data.keys.text(prompt), data.keys.text(settings.negative_prompt)))
    return jobs
