"""Times sampling step by step and whole, and decoding, with guidance, on random or given weights.

    python scripts/bench.py generate --model cogvideox-5b --json generate.json

Variants, by comma; each is a way to run the blocks and what goes with it, joined by +:

    diffusers          the stock transformer, not compiled
    stock-compiled     the stock blocks, each compiled
    joint              one joined sequence, compiled (`joint_blocks`); +eager: not compiled
      +float8          float8 linear layers; such variants must come last, since the weights are replaced
      +first-block:T:N skips the other blocks below a change of T, at most N steps in a row
      +guidance:N      runs the half without the prompt on every N-th step
      +plain-gelu        GELU apart from the matrix product
      +cudnn, +flash, +efficient, +flash3, +flash4    the attention kernel

Step times come from --steps steps after --warmup ones and are multiplied up to --num_steps; variants that skip run all
--num_steps. Random weights change from step to step as no trained ones do: a threshold, and the deviation of what was
skipped, mean something on trained weights only. Give a folder as --model, --prompts 4 and a --prompts_file; a threshold
of 9 skips as many steps as :N allows, and times that.
"""

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from cogtune import models
from cogtune.acceleration import quantize_transformer
from cogtune.attention_backends import Backend, activate
from cogtune.benchmark.autoencoder import WAYS, describe_ways, make_random_vae, measure_ways
from cogtune.benchmark.clock import Marks, attempt, peak_memory, report, reset_peak, synchronize
from cogtune.benchmark.images import write_random_image
from cogtune.benchmark.kernels import profile_steps
from cogtune.benchmark.similarity import measure_psnr, measure_ssim
from cogtune.encoding import embed
from cogtune.errors import UserError
from cogtune.generation import Pipeline, decode_latents, generate_latents, make_pipeline
from cogtune.joint_blocks import join_blocks, part_blocks
from cogtune.machine import avoid_fragments
from cogtune.models import ModelFacts, choose_device, choose_dtype
from cogtune.random_pipeline import ARCHITECTURES, make_architecture_facts, make_random_transformer
from cogtune.step_cache import CacheSettings, StepCache
from cogtune.video_request import Request

DEFAULT_VARIANTS = (
    "diffusers,stock-compiled,joint,joint+float8,joint+float8+first-block:9:1,joint+float8+first-block:9:1+guidance:2"
)
_PROFILED_STEPS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py generate`."""
    add = parser.add_argument
    add("--model", default="cogvideox-5b", help=f"{', '.join(ARCHITECTURES)} with random weights, or a pipeline folder")
    add("--variants", default=DEFAULT_VARIANTS, help="ways to sample, by comma; the first is the reference")
    add("--steps", type=int, default=6, help="timed steps of a variant that skips none")
    add("--warmup", type=int, default=2, help="steps before them; the first one compiles")
    add("--num_steps", type=int, default=50, help="steps of a whole video")
    add("--full", action="store_true", help="run --num_steps with every variant")
    add("--profile", action="store_true", help="where a step's and a decoder's time goes, by kernel")
    add("--prompts", type=int, default=0, help="videos of --num_steps compared with the reference's, each variant")
    add("--prompts_file", type=Path, help="a prompt a line, through a folder's own T5; default: random embeddings")
    add("--decoders", default="stock,small-norms,untuned,coder,stacked", help=f"by comma: {', '.join(WAYS)}")
    for name in ("num_frames", "height", "width"):
        add(f"--{name}", type=int, help="default: the model's own")
    add("--time_limit", type=float, default=150.0, help="seconds of a variant, about")
    add("--tiny", action="store_true", help="a tiny model and few steps, to try the command on a CPU")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--json", type=Path, help="write everything that was measured to this file")


@dataclass(frozen=True)
class Variant:
    """One way to sample."""

    name: str
    blocks: str
    compiled: bool = True
    float8: bool = False
    fused_gelu: bool = True
    cache: CacheSettings | None = None
    backend: Backend = field(default="default")


def parse_variant(name: str) -> Variant:
    """The variant of a name; raises `UserError` for an unknown one."""
    blocks, *flags = name.split("+")
    if blocks not in ("diffusers", "stock-compiled", "joint") or (flags and blocks != "joint"):
        raise UserError(f"--variants {name}: expected diffusers, stock-compiled, or joint with flags; see --help")
    values: dict[str, Any] = {
        "compiled": blocks != "diffusers" and "eager" not in flags,
        "float8": "float8" in flags,
        "fused_gelu": "plain-gelu" not in flags,
    }
    cache: dict[str, Any] = {}
    for flag in flags:
        kind, *numbers = flag.split(":")
        if kind not in ("eager", "float8", "plain-gelu", "first-block", "guidance", *get_args(Backend)):
            raise UserError(f"--variants {name}: {flag} is no flag; see --help")
        try:
            if kind == "first-block":
                cache |= {"threshold": float(numbers[0]), "max_skipped": int(numbers[1])}
            elif kind == "guidance":
                cache["guidance_interval"] = int(numbers[0])
            elif kind in get_args(Backend):
                values["backend"] = kind
        except (ValueError, IndexError):
            raise UserError(f"--variants {name}: {flag} needs numbers: first-block:0.1:3, guidance:2") from None
    return Variant(name, blocks, cache=CacheSettings(**cache) if cache else None, **values)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options ask for; the file of `--json` is brought up to date after each part."""
    if arguments.tiny:
        arguments.model, arguments.num_steps, arguments.steps = "tiny", 10, 2
    variants = [parse_variant(name) for name in arguments.variants.split(",")]
    changed = [variant.float8 for variant in variants]
    if changed != sorted(changed):
        raise UserError("--variants: those with float8 must come last, since they replace the weights")
    bench = SamplingBench(arguments)
    results: dict[str, Any] = {"conditions": bench.conditions(), "variants": {}, "decoders": {}}

    def keep(part: str, row: dict[str, Any]) -> None:
        report(part, row)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

    keep("conditions", results["conditions"])
    for variant in variants:
        results["variants"][variant.name] = attempt(lambda variant=variant: bench.measure(variant))
        bench.clear()
        keep(variant.name, results["variants"][variant.name])
    bench.drop_transformer()
    ways = list(filter(None, arguments.decoders.split(",")))
    results["decoders"] = measure_ways(
        bench.vae, ways, "decode", bench.make_latents(), repeats=3, limit_seconds=arguments.time_limit,
        profiled=arguments.profile, report=keep,
    )  # fmt: skip
    keep("done", {})
    return results


class SamplingBench:
    """One model and size on a device; measures variants one after another on the same weights."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = choose_device(arguments.device)
        avoid_fragments(self.device)
        self.pipeline, self.facts = self._load(arguments.model)
        self.pipeline.set_progress_bar_config(disable=True)
        self.vae: AutoencoderKLCogVideoX = self.pipeline.vae
        self.size = (
            arguments.num_frames or self.facts.num_frames,
            arguments.height or self.facts.height,
            arguments.width or self.facts.width,
        )
        self._folder = tempfile.TemporaryDirectory()
        self._references: dict[str, np.ndarray] = {}
        self._embedded = self._embed_prompts()
        self._is_float8 = False

    def _load(self, name: str) -> tuple[Pipeline, ModelFacts]:
        if name in ARCHITECTURES:
            facts = make_architecture_facts(name)
            dtype = choose_dtype("auto", facts, self.device)
            transformer = make_random_transformer(name, seed=0, device=self.device, dtype=dtype)
            scheduler = CogVideoXDDIMScheduler.from_config(facts.scheduler_config)
            vae = make_random_vae(name, self.device, dtype)
        else:
            facts = models.read_facts(models.find_folder(name))
            dtype = choose_dtype("auto", facts, self.device)
            transformer = models.load_transformer(facts, dtype).to(self.device)  # pyright: ignore[reportArgumentType]
            scheduler = models.load_scheduler(facts)
            vae = models.load_vae(facts, dtype).to(self.device)  # pyright: ignore[reportArgumentType]
        return make_pipeline(facts, transformer=transformer, vae=vae, scheduler=scheduler), facts

    def _embed_prompts(self) -> list[torch.Tensor]:
        """Embeddings [L, D] of no text and of each prompt; none where they are to be random."""
        file = self.arguments.prompts_file
        if file is None:
            return []
        if self.arguments.model in ARCHITECTURES:
            raise UserError(
                f"--prompts_file {file}: {self.arguments.model} has random weights; give a folder as --model"
            )
        prompts = ["", *(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())]
        encoder = models.load_text_encoder(self.facts, self.transformer.dtype).to(self.device)
        embeddings = embed(prompts, models.load_tokenizer(self.facts), encoder, self.facts.max_text_length)
        return [row.clone() for row in embeddings]

    @property
    def transformer(self) -> CogVideoXTransformer3DModel:
        """The one model that all variants run."""
        return self.pipeline.transformer

    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for."""
        frames, height, width = self.size
        return {
            "model": self.arguments.model,
            "weights": "random" if self.arguments.model in ARCHITECTURES else "given",
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "precision": str(self.transformer.dtype).removeprefix("torch."),
            "video": f"{frames}x{height}x{width}",
            "tokens": self.facts.num_tokens(*self.size),
            "guidance": "batch of 2",
            "num_steps": self.arguments.num_steps,
        }

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Seconds a step and a video, memory, what was skipped, deviation from the first variant."""
        cache = self._set_up(variant)
        activate(variant.backend)
        try:
            reset_peak(self.device)
            row = self._time_steps(variant, cache)
            if self.arguments.prompts:
                row["deviations"] = self._compare(variant, cache, self.arguments.num_steps, self.arguments.prompts)
            return row
        finally:
            activate("default")
            if variant.blocks == "joint":
                part_blocks(self.transformer)
            elif variant.compiled:
                for block in self.transformer.transformer_blocks:
                    block._compiled_call_impl = None

    def _set_up(self, variant: Variant) -> StepCache | None:
        if variant.float8 and not self._is_float8:
            quantize_transformer(self.transformer, "float8", self.device)
            self._is_float8 = True
        if variant.blocks == "stock-compiled":
            for block in self.transformer.transformer_blocks:
                block.compile(dynamic=False, fullgraph=True)
        cache = StepCache(variant.cache) if variant.cache else None
        if variant.blocks == "joint":
            join_blocks(
                self.transformer,
                compiled=variant.compiled,
                cache=cache,
                backend=variant.backend,
                fused_gelu=variant.fused_gelu,
            )
        return cache

    def _time_steps(self, variant: Variant, cache: StepCache | None) -> dict[str, Any]:
        started = time.perf_counter()
        warmup = self.arguments.warmup
        whole = self.arguments.full or cache is not None
        if cache is not None:  # compiles; the 5th of 8 steps is the first that runs one half of the batch
            self._sample(0, 8 if cache.settings.guidance_interval > 1 else warmup, lambda _step: None)
        num_steps = self.arguments.num_steps if whole else warmup + self.arguments.steps
        marks = Marks(self.device)
        first: list[float] = []

        def on_step(_step: int) -> None:
            if not first:
                synchronize(self.device)
                first.append(time.perf_counter() - started)
            marks.add()

        latents = self._sample(0, num_steps, on_step)
        seconds = marks.differences()
        timed = seconds if whole else seconds[max(0, warmup - 1) :]
        row: dict[str, Any] = {
            "first_step_seconds": first[0],
            "step_seconds": statistics.median(timed),
            "step_spread": [min(timed), max(timed)],
            "steps_timed": len(timed),
        }
        if whole:
            row["video_seconds"] = sum(seconds) * num_steps / len(seconds)
        else:
            row["video_seconds"] = statistics.median(timed) * self.arguments.num_steps
        if cache is not None:
            row["skipped"] = cache.describe()
        row |= peak_memory(self.device)
        if self.arguments.profile and cache is None:
            one_step = partial(self._sample, 0, 1, lambda _step: None)
            row["profile"] = attempt(lambda: profile_steps(one_step, _PROFILED_STEPS, self.device))
        return row | self._deviation(variant, f"{num_steps} steps, prompt 0", self._decode(latents))

    def _sample(self, seed: int, num_steps: int, on_step: Callable[[int], None]) -> torch.Tensor:
        frames, height, width = self.size
        image = str(write_random_image(Path(self._folder.name), self.size)) if self.facts.takes_image else None
        request = Request("random", frames, height, width, seed=seed, num_inference_steps=num_steps, image=image)
        texts = self._find_texts(seed)
        return generate_latents(self.pipeline, request, texts[0], texts[1], on_step=on_step)

    def _find_texts(self, seed: int) -> list[torch.Tensor]:
        """With prompt, and without."""
        if self._embedded:
            nothing, *prompts = self._embedded
            return [prompts[seed % len(prompts)], nothing]
        generator = torch.Generator().manual_seed(1000 + seed)
        shape = (self.facts.max_text_length, self.facts.text_dim)
        # Of the size that T5's have.
        texts = [0.2 * torch.randn(shape, generator=generator) for _ in range(2)]
        return [text.to(self.device, self.transformer.dtype) for text in texts]

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        return decode_latents(self.vae, latents, self.facts.scaling_factor)

    def _deviation(self, variant: Variant, what: str, video: np.ndarray) -> dict[str, Any]:
        if what not in self._references:
            if variant.cache is not None or variant.float8:
                return {"compared": "nothing: no exact variant ran so many steps; see --full"}
            self._references[what] = video
            return {"reference": what}
        reference = self._references[what]
        psnr = measure_psnr(video, reference)
        return {
            "compared": what,
            "psnr": psnr if math.isfinite(psnr) else "equal",
            "ssim": measure_ssim(video, reference, self.device),
        }

    def _compare(
        self, variant: Variant, cache: StepCache | None, num_steps: int, num_prompts: int
    ) -> list[dict[str, Any]]:
        started = time.perf_counter()
        rows: list[dict[str, Any]] = []
        for prompt in range(1, num_prompts + 1):
            if rows and time.perf_counter() - started > self.arguments.time_limit:
                break
            latents = self._sample(prompt, num_steps, lambda _step: None)
            row = self._deviation(variant, f"{num_steps} steps, prompt {prompt}", self._decode(latents))
            rows.append(row | ({"skipped": cache.describe()} if cache else {}))
        return rows

    def make_latents(self) -> torch.Tensor:
        """Random latents [1, C, F, H, W] of a video, unscaled."""
        frames, channels, height, width = self.facts.latent_shape(*self.size)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, channels, frames, height, width, generator=generator)
        return latents.to(self.device, self.vae.dtype)

    def clear(self) -> None:
        """Gives back a variant's compiled code and memory."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def drop_transformer(self) -> None:
        """Makes room for the decoders."""
        self.pipeline.transformer = None  # pyright: ignore[reportAttributeAccessIssue]
        self.clear()


def describe(results: dict[str, Any]) -> str:
    """A short table."""
    conditions = results["conditions"]
    num_steps = conditions["num_steps"]
    lines = [
        f"{conditions['model']} ({conditions['weights']} weights), {conditions['video']}, {conditions['precision']}, "
        f"{conditions['device']}, torch {conditions['torch']}; {num_steps} steps with guidance",
    ]
    for name, row in results["variants"].items():
        if "error" in row:
            lines.append(f"{name:<44} {row['error'][:100]}")
            continue
        near = f"PSNR {row['psnr']:.6} SSIM {row['ssim']:.4f}" if "psnr" in row else ""
        peak = f"{row['peak_allocated_gib']:5.1f} GiB" if "peak_allocated_gib" in row else ""
        lines.append(
            f"{name:<44} {row['step_seconds']:7.3f} s a step  {row['video_seconds']:7.1f} s a video  {peak}  "
            f"first step {row['first_step_seconds']:5.1f} s  {near}  {row.get('skipped', '')}"
        )
        for deviation in row.get("deviations", ()):
            lines.append(f"    {json.dumps(deviation)}")
    return "\n".join([*lines, "", "decoding", *describe_ways(results["decoders"])])
