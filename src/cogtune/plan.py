"""The resolved plan of a run: everything that can be known and checked before a weight is loaded."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune import models
from cogtune.adapter import count_adapter_parameters
from cogtune.attention_backends import check_backend
from cogtune.buckets import assign_formats, make_formats
from cogtune.cache import Cache
from cogtune.config import RunConfig
from cogtune.decoding import default_workers
from cogtune.errors import UserError
from cogtune.float8 import check_float8_device
from cogtune.frozen import count_float8_parameters
from cogtune.manifest import Clip, ClipFormat, read_manifest, split_validation
from cogtune.memory import ACTIVATIONS_FAST_TO_SLOW, GIB, MemoryPlan, choose_activations, free_device_bytes, predict
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


@dataclass(frozen=True)
class TrainingPlan(DataPlan):
    """A whole training run."""

    world_size: int
    num_parameters: int
    num_trainable: int
    tokens: int
    memory: MemoryPlan
    free_bytes: int | None
    compiled: bool
    num_float8: int
    """Frozen weights that are multiplied by in float8."""
    autocast: bool
    """Float32 weights computed with in `dtype`: full fine-tuning in low precision."""

    @property
    def hold_prior(self) -> bool:
        """Whether prior clips are trained towards the base model's predictions."""
        there = any(clip.prior and clip.weight for clip in self.train_clips)
        return there and self.num_parameters > 0 and self.config.train.prior_target != "clip"

    @property
    def hold_dropped(self) -> bool:
        """Whether samples without caption are."""
        train = self.config.train
        return train.dropped_target == "base" and train.caption_dropout > 0

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step."""
        train = self.config.train
        return train.batch_size * train.gradient_accumulation_steps * self.world_size

    def describe(self) -> str:
        """The plan for a person, one fact a line."""
        config, facts = self.config, self.facts
        samples = config.train.max_steps * self.global_batch
        epoch = sum(clip.weight for clip in self.train_clips)
        free = "unknown" if self.free_bytes is None else f"{self.free_bytes / GIB:.1f} GiB"
        rows = {
            "model": f"{facts.variant} at {facts.folder}",
            "precision": f"{str(self.dtype)[6:]} base on {self.device.type}, float32 trained weights",
            "parameters": f"{self.num_parameters:,} frozen, {self.num_trainable:,} trained "
            f"({100 * self.num_trainable / (self.num_parameters or self.num_trainable):.2f} %)",
            "clips": f"{len(self.train_clips)} to train on, {len(self.validation_clips)} held out",
            "format": self.describe_formats(),
            "tokens": f"{self.tokens:,} a sample" + (" at most" if len(self.formats) > 1 else ""),
            "batch": f"{config.train.batch_size} x {config.train.gradient_accumulation_steps} accumulated x "
            f"{self.world_size} process(es) = {self.global_batch} samples a step",
            "steps": f"{config.train.max_steps:,} = {samples:,} samples = {samples / epoch:.1f} epochs",
            "memory": f"{self.memory.describe()}; free: {free}",
            "compiled": "each block" if self.compiled else "no",
            "output": str(config.output_dir),
        }
        if num_prior := sum(clip.prior for clip in self.train_clips):
            target = "the base model's predictions" if self.hold_prior else "themselves"
            rows["prior"] = f"{num_prior} of the clips, trained towards {target}"
        if rare := self._describe_rare_formats(samples / epoch):
            rows["rare"] = rare
        if facts.takes_image:
            given = sum(clip.image is not None for clip in self.train_clips)
            rows["image"] = (
                f"the first frame, or the manifest's image ({given} clip(s)); noise on its pixels, "
                f"dropped for {100 * self.image_dropout:g} %"
            )
        if self.num_float8:
            rows["float8"] = f"products with {self.num_float8:,} of the frozen parameters"
        return "\n".join(f"{name:<11} {value}" for name, value in rows.items())

    def _describe_rare_formats(self, num_epochs: float) -> str:
        """Formats whose clips don't fill a step in every epoch: when they first do, so that none is left out unsaid."""
        lines = []
        for form in self.formats if len(self.formats) > 1 else ():
            weight = sum(clip.weight for clip in self.train_clips if clip.form == form)
            if 0 < weight < self.global_batch:
                first = math.ceil(self.global_batch / weight)
                when = f"first in epoch {first}" if first <= num_epochs else "never in this run; lower the batch"
                lines.append(f"{form.describe()} fills a step of {self.global_batch} {when}")
        return ("\n" + 12 * " ").join(lines)


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


def _refuse_missing_files(clips: list[Clip], config: RunConfig) -> None:
    """With `data.bad_clips=skip` they are left out later, like clips that don't decode."""
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


def make_adapter_plan(config: RunConfig) -> TrainingPlan:
    """The plan of a LoRA run; raises `UserError` for anything that can be known to fail."""
    data = make_data_plan(config)
    meta = _make_meta(data.facts)
    num_trainable = count_adapter_parameters(meta, config.adapter)
    num_float8 = _plan_float8(data, meta) if config.train.float8_base else 0
    return _add_training(data, sum(p.numel() for p in meta.parameters()), num_trainable, num_float8)


def _make_meta(facts: ModelFacts) -> CogVideoXTransformer3DModel:
    meta = models.make_meta_transformer(facts)
    models.check_transformer_weights(facts, meta)
    return meta


def _plan_float8(data: DataPlan, meta: CogVideoXTransformer3DModel) -> int:
    """How many weights go to float8; raises `UserError` where they can't."""
    setting = "train.float8_base=true"
    check_float8_device(data.device, setting=setting, remedy="set train.float8_base=false")
    if data.config.adapter.use_dora:
        raise UserError(
            f"{setting}: can't go with adapter.use_dora, which reads the base weights; turn off one of them"
        )
    count = count_float8_parameters(meta)
    if not count:
        raise UserError(f"{setting}: no layer of this model has sizes that are multiples of 16; set it to false")
    return count


def make_full_plan(config: RunConfig) -> TrainingPlan:
    """The plan of a full fine-tuning; raises `UserError` for anything that can be known to fail."""
    if "adapter" in config.model_fields_set:
        raise UserError(
            "adapter: has no effect in full fine-tuning (train/sft.py); remove the section, or use train/lora.py"
        )
    if config.train.float8_base:
        raise UserError(
            "train.float8_base=true: full fine-tuning (train/sft.py) freezes no weight; remove it, or use train/lora.py"
        )
    for name in ("prior_target", "dropped_target"):
        if getattr(config.train, name) == "base":
            raise UserError(
                f"train.{name}=base: full fine-tuning (train/sft.py) keeps no base model to ask; set clip, or use "
                "train/lora.py"
            )
    data = make_data_plan(config)
    num_parameters = sum(p.numel() for p in _make_meta(data.facts).parameters())
    return _add_training(data, 0, num_parameters, 0)


def _check_cuda_graph(data: DataPlan) -> None:
    config = data.config
    reasons = {
        "it needs a GPU": data.device.type != "cuda",
        "it needs one process": int(os.environ.get("WORLD_SIZE", "1")) > 1,
        "train.gradient_accumulation_steps must be 1": config.train.gradient_accumulation_steps > 1,
        "adapter.dropout must be 0": config.adapter.dropout > 0,
        "a graph holds one shape; remove data.buckets": len(data.formats) > 1,
        "image-to-video encodes an image in every step": data.facts.takes_image,
        "float16's loss scale changes between steps; use bfloat16 or float32": data.dtype == torch.float16,
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if config.train.cuda_graph and wrong:
        raise UserError(f"train.cuda_graph: {'; '.join(wrong)}; or set train.cuda_graph=false")


def _add_training(data: DataPlan, num_parameters: int, num_trainable: int, num_float8: int) -> TrainingPlan:
    config = data.config
    _refuse_missing_files([*data.train_clips, *data.validation_clips], config)
    _check_cuda_graph(data)
    check_backend(
        config.train.attention,
        num_heads=data.facts.num_heads,
        head_dim=data.facts.head_dim,
        dtype=data.dtype,
        device=data.device,
    )
    tokens = max(data.facts.num_tokens(form.num_frames, form.height, form.width) for form in data.formats)
    num_encoder = models.count_image_encoder(data.facts)
    image_pixels = max(form.height * form.width for form in data.formats)
    plans = [
        predict(
            data.facts,
            activations,
            num_parameters=num_parameters,
            num_trainable=num_trainable,
            tokens=tokens,
            batch_size=config.train.batch_size,
            dtype=data.dtype,
            num_float8=num_float8,
            num_encoder=num_encoder,
            image_pixels=image_pixels,
        )
        for activations in ACTIVATIONS_FAST_TO_SLOW
    ]
    free = free_device_bytes(data.device)
    compiled = {"on": True, "off": False, "auto": data.device.type == "cuda"}[config.train.compile]
    return TrainingPlan(
        **vars(data),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        tokens=tokens,
        memory=choose_activations(plans, config.memory.mode, free),
        free_bytes=free,
        compiled=compiled,
        num_float8=num_float8,
        autocast=num_parameters == 0 and data.dtype != torch.float32,
    )
