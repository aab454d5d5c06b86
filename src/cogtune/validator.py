"""Validates a run at a step: evaluation loss over all ranks, videos beside the base model's, the report."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator

from cogtune.denoiser import Denoiser
from cogtune.parallel.lockstep import share_out
from cogtune.parallel.training import teams_of
from cogtune.plan import TrainingPlan
from cogtune.preparation import EncodedData
from cogtune.report import write_report
from cogtune.tracking import MetricsLog
from cogtune.validation import VideoJob, evaluate, generate_videos, mean_losses, read_requests, write_requests
from cogtune.video_request import Request

T = TypeVar("T")
BASE_STEP = "step-000000"  # before the first step the model is the base model


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
        averaged_weights: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._plan, self._accelerator, self._data = plan, accelerator, data
        self._transformer, self._denoiser, self._log = transformer, denoiser, log
        self._averaged_weights = averaged_weights
        self._teams = teams_of(plan.config, accelerator.process_index, accelerator.num_processes)
        self._folder = plan.config.output_dir
        self._jobs = _make_jobs(plan, data)

    def __call__(self, step: int) -> None:
        """Evaluation loss, videos and report of a step; step 0 is the base model's."""
        if not self._plan.config.validation.enabled:
            return
        folder = self._folder / "samples" / f"step-{step:06d}"
        with self._averaged_weights():
            self._evaluate(step)
            if step > 0 or self._plan.config.validation.base_videos:
                self._generate(folder)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            if self._jobs and folder.is_dir():
                write_requests(folder, self._jobs)
            if step > 0:
                self._copy_base_videos(folder)
            entries = self._data.train, self._data.validation
            write_report(self._folder, self._plan.config, *entries, eight_bit=self._plan.memory.eight_bit)

    def _evaluate(self, step: int) -> None:
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
        losses = mean_losses(accelerator.reduce(sums, reduction="sum"))  # pyright: ignore[reportArgumentType]
        if losses is not None:
            mean = sum(losses.values()) / len(losses)
            self._log.write({"step": step, "eval_loss": mean, "eval_loss_by_quantile": losses})

    def _generate(self, folder: Path) -> None:
        accelerator = self._accelerator
        mine, num_own = self._share_out(self._jobs)
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
