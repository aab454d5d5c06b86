"""The resolved plan of a run: everything that can be known and checked before a weight is loaded."""

import math
import os
from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune import models
from cogtune.adapter import count_adapter_parameters
from cogtune.attention_backends import check_backend
from cogtune.config import RunConfig
from cogtune.data_plan import DataPlan, make_data_plan, refuse_missing_files
from cogtune.determinism import follow_determinism
from cogtune.errors import UserError
from cogtune.float8 import check_float8_device
from cogtune.frozen import count_float8_parameters
from cogtune.ladder import choose_rung, describe_rungs
from cogtune.launch import read_launch
from cogtune.loading import Loading, plan_loading
from cogtune.machine import Machine, measure_machine
from cogtune.memory import GIB, MemoryPlan, free_device_bytes
from cogtune.models import ModelFacts
from cogtune.optimizer_ways import check_optimizer
from cogtune.parallel.compatibility import check_strategy
from cogtune.parallel.shared_samples import check_context
from cogtune.parallel.strategy import Strategy, read_strategy
from cogtune.prior_penalty import check_prior_penalty
from cogtune.quantized_ways import check_quantized_base
from cogtune.recorded_pass import check_cuda_graph
from cogtune.shards.plan import count_saved_bytes, decide_asynchronous
from cogtune.streaming.host import free_host_bytes
from cogtune.trained_weights import choose_trained, count_frozen_in_blocks
from cogtune.training_rungs import list_training_rungs
from cogtune.ways import Ways, read_ways


@dataclass(frozen=True)
class TrainingPlan(DataPlan):
    """A whole training run."""

    world_size: int
    strategy: Strategy
    num_parameters: int
    num_trainable: int
    tokens: int
    memory: MemoryPlan
    rungs: list[MemoryPlan]
    """What was chosen from, fastest first."""
    machine: Machine
    free_bytes: int | None
    free_host: int | None
    """Host memory for each process."""
    compiled: bool
    num_float8: int
    """Frozen weights that are multiplied by in float8."""
    autocast: bool
    """Float32 weights computed with in `dtype`: full fine-tuning in low precision."""
    full: bool
    """The model's own weights are trained, not an adapter's."""
    trained_names: list[str]
    """Which of them: all, or those of `train.trained_weights`."""
    saves_beside_training: bool
    """Checkpoints are written from a copy in host memory."""
    ways: Ways | None
    """What a deterministic run that goes on came to before."""
    saved_bytes: int
    """Of a checkpoint of full fine-tuning, in each process's files."""

    @property
    def hold_prior(self) -> bool:
        """Whether prior clips are trained towards the base model's predictions."""
        there = any(clip.prior and clip.weight for clip in self.train_clips)
        return there and not self.full and self.config.train.prior_target != "clip"

    @property
    def loading(self) -> Loading:
        """How the transformer's weights come from their files."""
        return plan_loading(self.facts, self.memory, self.strategy, self.dtype, full=self.full)

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step."""
        train = self.config.train
        return train.batch_size * train.gradient_accumulation_steps * (self.world_size // train.context_parallel)

    def describe(self) -> str:
        """The plan for a person, one fact a line."""
        config, facts = self.config, self.facts
        samples = config.train.max_steps * self.global_batch
        epoch = sum(clip.weight for clip in self.train_clips)
        sharing = config.train.context_parallel
        shared = f" / {sharing} that share a sample" if sharing > 1 else ""
        free = "unknown" if self.free_bytes is None else f"{self.free_bytes / GIB:.1f} GiB"
        rows = {
            "model": f"{facts.variant} at {facts.folder}",
            "precision": f"{str(self.dtype)[6:]} base on {self.device.type}, "
            f"{'bfloat16' if self.memory.eight_bit else 'float32'} trained weights",
            "parameters": f"{self.num_parameters:,} frozen, {self.num_trainable:,} trained "
            f"({100 * self.num_trainable / self._num_model:.2f} %)",
            "clips": f"{len(self.train_clips)} to train on, {len(self.validation_clips)} held out",
            "format": self.describe_formats(),
            "tokens": f"{self.tokens:,} a sample" + (" at most" if len(self.formats) > 1 else ""),
            "batch": f"{config.train.batch_size} x {config.train.gradient_accumulation_steps} accumulated x "
            f"{self.world_size} process(es){shared} = {self.global_batch} samples a step",
            "strategy": self.strategy.describe(),
            "steps": f"{config.train.max_steps:,} = {samples:,} samples = {samples / epoch:.1f} epochs",
            "memory": f"{self.memory.describe()}; free: {free}",
            "loading": self.loading.describe(),
            "compiled": "each block" if self.compiled else "no",
            "output": str(config.output_dir),
        }
        if num_prior := sum(clip.prior for clip in self.train_clips):
            target = "the base model's predictions" if self.hold_prior else "themselves"
            penalty = config.train.prior_penalty
            beside = "" if penalty is None else f"; a penalty of {penalty:g} on what the adapter changes there"
            rows["prior"] = f"{num_prior} of the clips, trained towards {target}{beside}"
        if rare := self._describe_rare_formats(samples / epoch):
            rows["rare"] = rare
        if facts.takes_image:
            given = sum(clip.image is not None for clip in self.train_clips)
            rows["image"] = (
                f"the first frame, or the manifest's image ({given} clip(s)); noise on its pixels, "
                f"dropped for {100 * self.image_dropout:g} %"
            )
        if self.memory.eight_bit:
            rows["optimizer"] = (
                "AdamW with 8-bit state, stepping inside the backward pass; weights are rounded stochastically, "
                "gradients clipped by recent steps' norms (docs/memory.md): not the result of float32"
            )
        if self.full and self.num_parameters:
            rows["part"] = f"{len(self.trained_names)} tensors: {', '.join(config.train.trained_weights or [])}"
        if self.full:
            how = (
                "beside training, from a copy in host memory" if self.saves_beside_training else "while training waits"
            )
            rows["checkpoints"] = f"{self.saved_bytes / 1e9:.2f} GB by each process, written {how}"
        if config.train.deterministic:
            rows["repeats"] = "bit for bit: only kernels that sum in one order"
            if self.ways is not None and not self.ways.match(self.memory):
                before = self.ways.memory["activations"]
                rows["repeats"] = f"up to rounding from here on: {before}, with which the run began, doesn't fit now"
        if self.num_float8:
            rows["float8"] = f"products with {self.num_float8:,} of the frozen parameters"
        elif self.memory.quantized:
            rows["base"] = f"the blocks' frozen linear weights in {self.memory.quantized}: not the exact base's result"
        return "\n".join(f"{name:<11} {value}" for name, value in rows.items())

    @property
    def _num_model(self) -> int:
        return self.num_trainable + self.num_parameters if self.full else self.num_parameters

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

    def describe_rungs(self) -> str:
        """The table of `--dry-run`: what each rung of memory takes and costs on this machine."""
        assumed = "" if self.device.type == "cuda" else " (assumed, there is no GPU)"
        host = "unknown" if self.free_host is None else f"{self.free_host / GIB:.1f} GiB"
        return "\n".join(
            [
                f"{'machine':<11} {self.machine.describe()}{assumed}; free host memory: {host}",
                describe_rungs(self.rungs, self.memory, self.free_bytes, self.free_host),
            ]
        )


def make_adapter_plan(config: RunConfig) -> TrainingPlan:
    """The plan of a LoRA run; raises `UserError` for anything that can be known to fail."""
    if config.train.trained_weights is not None:
        raise UserError(
            "train.trained_weights: is for full fine-tuning (train/sft.py); a LoRA has adapter.target_modules"
        )
    if config.checkpoint.asynchronous == "on":
        raise UserError("checkpoint.asynchronous=on: is for full fine-tuning (train/sft.py); an adapter is small")
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
    if config.train.prior_target == "base":
        raise UserError(
            "train.prior_target=base: full fine-tuning (train/sft.py) keeps no base model to ask; set clip, or use "
            "train/lora.py"
        )
    data = make_data_plan(config)
    shapes = {name: p.numel() for name, p in _make_meta(data.facts).named_parameters()}
    trained = choose_trained(list(shapes), config.train.trained_weights, data.facts.num_layers)
    num_trainable = sum(shapes[name] for name in trained)
    frozen_in_block = count_frozen_in_blocks(shapes, trained, data.facts.num_layers)
    num_frozen = sum(shapes.values()) - num_trainable
    return _add_training(data, num_frozen, num_trainable, 0, trained=trained, frozen_in_block=frozen_in_block)


def _add_training(
    data: DataPlan,
    num_parameters: int,
    num_trainable: int,
    num_float8: int,
    *,
    trained: list[str] | None = None,
    frozen_in_block: int | None = None,
) -> TrainingPlan:
    """`trained`: names of the model's weights, in full fine-tuning."""
    config, full = data.config, trained is not None
    follow_determinism(config.train.deterministic)
    refuse_missing_files([*data.train_clips, *data.validation_clips], config)
    check_cuda_graph(data)
    strategy = read_strategy(os.environ)
    check_strategy(config, strategy, data.dtype, full=full)
    check_context(config, data.facts)
    check_optimizer(config, data.dtype, strategy, full=full)
    check_quantized_base(config, strategy, full=full)
    check_backend(
        config.train.attention,
        num_heads=data.facts.num_heads,
        head_dim=data.facts.head_dim,
        dtype=data.dtype,
        device=data.device,
    )
    tokens = max(data.facts.num_tokens(form.num_frames, form.height, form.width) for form in data.formats)
    free = free_device_bytes(data.device)
    free_host = free_host_bytes()
    free_host = None if free_host is None else free_host // read_launch().num_local
    machine = measure_machine(data.device, data.dtype)
    rungs = list_training_rungs(
        data.facts,
        config,
        dtype=data.dtype,
        machine=machine,
        tokens=tokens,
        free_bytes=free,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        num_float8=num_float8,
        image_pixels=max(form.height * form.width for form in data.formats),
        strategy=strategy,
        full=full,
        frozen_in_block=frozen_in_block,
    )
    ways = read_ways(config, data.device)
    memory = choose_rung(rungs if ways is None else ways.prefer(rungs), config.memory, free, free_host)
    check_prior_penalty(config, strategy, memory, data.train_clips, full=full)
    compiled = {"on": True, "off": False, "auto": data.device.type == "cuda"}[config.train.compile]
    has_ema = config.train.ema_decay is not None
    saved_bytes = count_saved_bytes(num_trainable, eight_bit=memory.eight_bit, has_ema=has_ema)
    saved_bytes //= strategy.num_processes
    beside = full and decide_asynchronous(
        config.checkpoint, num_bytes=saved_bytes, other_bytes=memory.host, free_host=free_host
    )
    return TrainingPlan(
        **vars(data),
        world_size=strategy.num_processes,
        strategy=strategy,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        tokens=tokens,
        memory=memory,
        rungs=rungs,
        machine=machine,
        free_bytes=free,
        free_host=free_host,
        compiled=compiled,
        num_float8=num_float8,
        autocast=full
        and data.dtype != torch.float32
        and not (memory.on_host or memory.eight_bit or strategy.is_fsdp or strategy.is_deepspeed),
        full=full,
        trained_names=trained or [],
        saves_beside_training=beside,
        ways=ways,
        saved_bytes=saved_bytes,
    )
