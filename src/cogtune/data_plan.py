"""What the data commands and a run know of its data: the model's facts, the clips, their formats; all checked."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from cogtune import models
from cogtune.buckets import assign_formats, make_formats
from cogtune.cache import Cache
from cogtune.config import RunConfig
from cogtune.decoding import default_workers
from cogtune.errors import UserError
from cogtune.manifest import Clip, ClipFormat, read_manifest, split_validation
from cogtune.models import ModelFacts
from cogtune.video import ClipError, read_image_size

IMAGE_DROPOUT = 0.05
"""What the released image-to-video models were trained with (SAT `noised_image_dropout`)."""


@dataclass(frozen=True)
class DataPlan:
    """What the data commands need: the model's facts, the clips and their format."""

    config: RunConfig
    facts: ModelFacts
    device: torch.device
    dtype: torch.dtype
    clip_format: ClipFormat
    """Of clips without a bucket, and of validation's videos: of the bucket with the most clips."""
    train_clips: list[Clip]
    validation_clips: list[Clip]
    num_workers: int

    @property
    def formats(self) -> dict[ClipFormat, int]:
        """The formats in use, with their number of clips to train on."""
        counts = Counter(clip.form or self.clip_format for clip in self.train_clips)
        return {form: counts[form] for form in sorted(counts, key=ClipFormat.describe)}

    @property
    def image_dropout(self) -> float:
        """Part of the samples that train without their image."""
        wanted = self.config.train.image_dropout
        return IMAGE_DROPOUT if wanted is None else wanted

    def describe_formats(self) -> str:
        """Frames, size and rate, for each bucket."""
        rows = [
            f"{form.num_frames} frames of {form.width}x{form.height} at {form.fps:g} fps"
            + (f": {count} clip(s)" if len(self.formats) > 1 else "")
            for form, count in self.formats.items()
        ]
        return ("\n" + 12 * " ").join(rows)

    def make_cache(self) -> Cache:
        """The run's cache, checked to be writable."""
        cache = Cache(self.config.data.cache_dir)
        cache.check_writable()
        return cache

    def extra_texts(self) -> list[str]:
        """Every text beside the captions that a run needs: validation's prompts and the empty caption, as set."""
        validation, train = self.config.validation, self.config.train
        wanted = validation.enabled and bool(validation.prompts)
        prompts = [*validation.prompts, validation.negative_prompt] if wanted else []
        return prompts + ([""] if train.dropped_caption == "empty" and train.caption_dropout else [])


def make_data_plan(config: RunConfig) -> DataPlan:
    """Reads the model's configs and the manifests; raises `UserError` for anything wrong in them."""
    data = config.data
    if data.manifest is None:
        raise UserError("data.manifest is not set; give a folder of clips with captions, a .jsonl or a .csv file")
    device = models.choose_device(config.model.device)
    facts = models.read_facts(models.find_folder(config.model.path))
    _check_images(config, facts)
    formats = make_formats(data, facts)

    def read(manifest: Path) -> list[Clip]:
        return read_manifest(manifest, id_token=data.id_token, allow_outside_root=data.allow_outside_root)

    clips = read(data.manifest)
    if data.validation_manifest is not None:
        train, validation = clips, read(data.validation_manifest)
    else:
        train, validation = split_validation(clips, data.validation_clips, config.train.seed)
    train, validation = assign_formats(train, formats), assign_formats(validation, formats)
    if not any(clip.weight for clip in train):
        raise UserError(f"data.manifest={data.manifest}: every clip has weight 0; give at least one a weight above it")
    return DataPlan(
        config=config,
        facts=facts,
        device=device,
        dtype=models.choose_dtype(config.model.dtype, facts, device),
        clip_format=Counter(clip.form or formats[0] for clip in train).most_common(1)[0][0],
        train_clips=train,
        validation_clips=validation,
        num_workers=default_workers() if data.num_workers is None else data.num_workers,
    )


def _check_images(config: RunConfig, facts: ModelFacts) -> None:
    """Settings about images fit the model, and every prompt has its image."""
    prompts, images = config.validation.prompts, config.validation.images or []
    if not facts.takes_image:
        for name, value in (("train.image_dropout", config.train.image_dropout), ("validation.images", images or None)):
            if value is not None:
                raise UserError(f"{name}: {facts.variant} is a text-to-video model and takes no image; remove it")
        return
    if config.validation.enabled and len(images) != len(prompts):
        raise UserError(
            f"validation.images: {len(images)} for {len(prompts)} prompt(s); an image-to-video model needs the first "
            "frame of each, in the same order: --validation.images=FILE, repeated"
        )
    for image in images:
        try:
            read_image_size(image)
        except ClipError as error:
            raise UserError(f"validation.images: {error}; give a readable image") from None


def refuse_missing_files(clips: list[Clip], config: RunConfig) -> None:
    """Raises `UserError` for files that are not there.

    With `data.bad_clips=skip` they are left out later, like clips that don't decode.
    """
    files = [(clip, file) for clip in clips for file in (clip.video, clip.image) if file is not None]
    missing = [(clip, file) for clip, file in files if not file.is_file()]
    if missing and config.data.bad_clips == "error":
        lines = [f"{clip.id}: {file} does not exist" for clip, file in missing[:20]]
        listed = "\n       ".join(lines)
        raise UserError(
            f"{len({clip for clip, _ in missing})} clip(s) have no file:\n       {listed}\n"
            "       correct the manifest or remove the rows, "
            "or set data.bad_clips=skip to train without them"
        )
