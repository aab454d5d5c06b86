"""Times whole LoRA steps of the training loop on random weights, by way of running them, against this card's floor.

python scripts/bench.py train --model cogvideox-5b --variants keep_attention,keep_products --baseline diffusers
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from cogtune.adapter import TrainedAdapter
from cogtune.attention_backends import SDPA_BACKENDS, Backend, BackendTiming, choose_backend, pick_backend
from cogtune.benchmark.ceilings import StepShape, describe_ceilings, measure_ceilings, peak_flops
from cogtune.benchmark.clock import attempt, peak_memory
from cogtune.benchmark.images import make_random_image, make_random_image_encoder, time_image_encoding
from cogtune.benchmark.kernels import describe_profile, profile_steps
from cogtune.benchmark.numerics import check_variants, describe_check
from cogtune.benchmark.variants import BASELINE, Variant, parse_variant, prepare_transformer
from cogtune.cache import Cache
from cogtune.checkpoint import CheckpointFolder
from cogtune.config import RunConfig
from cogtune.dataset import Batch, Entry, PositionSampler, TrainingSet, make_loader
from cogtune.decoding import default_workers
from cogtune.denoiser import Denoiser
from cogtune.frozen import count_float8_parameters
from cogtune.machine import avoid_fragments
from cogtune.manifest import Clip
from cogtune.memory import GIB, predict
from cogtune.models import ModelFacts, choose_device, choose_dtype, count_image_encoder
from cogtune.optimization import StepGuard, make_optimizer
from cogtune.parallel.engine import Engine, Guard, make_replicated_engine
from cogtune.quantized_ways import count_coded
from cogtune.random_pipeline import ARCHITECTURES, make_architecture_facts, make_random_transformer
from cogtune.saving import DeviceStore
from cogtune.shards.ranks import Ranks
from cogtune.shards.saver import ShardedSaver, ShardedState
from cogtune.shards.writer import CheckpointWriter
from cogtune.streaming.trained import find_trained_stream
from cogtune.tracking import MetricsLog
from cogtune.trainer import Recent, Trained, Trainer

_NUM_CLIPS = 4
_PROFILED_STEPS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py train`."""
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="cogvideox-5b")
    parser.add_argument("--variants", default="keep_attention,keep_products", help="ways to run a step, by comma")
    parser.add_argument("--baseline", choices=[BASELINE], help="time the plain diffusers model and step too")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them; the first one compiles")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_frames", type=int, help="default: the model's own")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own")
    parser.add_argument("--width", type=int, help="pixels; default: the model's own")
    parser.add_argument(
        "--attention",
        choices=["auto", *SDPA_BACKENDS],
        default="auto",
        help="auto: the fastest kernel that is measured",
    )
    parser.add_argument("--time_limit", type=float, default=180.0, help="seconds of a variant, about")
    parser.add_argument("--check", action="store_true", help="compare loss and gradients with float32, two layers")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options ask for; the file of `--json` is brought up to date after each part."""
    names = [*([arguments.baseline] if arguments.baseline else []), *filter(None, arguments.variants.split(","))]
    variants = [parse_variant(name) for name in names]
    bench = TrainingBench(arguments)
    results: dict[str, Any] = {"conditions": bench.conditions(), "variants": {}}

    def keep(part: str, text: str) -> None:
        print(f"{part}\n{text}\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

    keep("conditions", json.dumps(results["conditions"]))
    results["ceilings"] = bench.ceilings = measure_ceilings(bench.shape, bench.device, bench.dtype)
    keep("ceilings", describe_ceilings(bench.ceilings))
    if bench.facts.takes_image:
        results["image_encoding"] = attempt(lambda: time_image_encoding(arguments.model, bench.size, bench.device))
        keep("image encoding, of each sample in each step", json.dumps(results["image_encoding"]))
        bench.clear()
    if arguments.check:
        results["check"] = check_variants(
            variants, arguments.model, bench.size, rank=arguments.rank, device=bench.device, dtype=bench.dtype
        )
        keep("check", describe_check(results["check"]))
        bench.clear()
    for variant in variants:
        results["variants"][variant.name] = attempt(lambda variant=variant: bench.measure(variant))
        bench.clear()
        keep(variant.name, describe_variant(results["variants"][variant.name]))
    return results


class TrainingBench:
    """One model, clip size and device; measures variants one after another."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = choose_device(arguments.device)
        avoid_fragments(self.device)
        self.facts: ModelFacts = make_architecture_facts(arguments.model)
        self.dtype = choose_dtype("auto", self.facts, self.device)
        self.size = (
            arguments.num_frames or self.facts.num_frames,
            arguments.height or self.facts.height,
            arguments.width or self.facts.width,
        )
        self.tokens = self.facts.num_tokens(*self.size)
        self.shape = StepShape.of(self.facts, self.tokens, arguments.batch_size)
        self.ceilings: dict[str, Any] = {}
        buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)  # as a run's
        self.accelerator = Accelerator(mixed_precision="no", cpu=self.device.type == "cpu", kwargs_handlers=[buckets])
        self.config = RunConfig.model_validate(
            {"adapter": {"rank": arguments.rank}, "train": {"max_steps": 1 << 20, "batch_size": arguments.batch_size}}
        )

    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for."""
        frames, height, width = self.size
        return {
            "model": self.arguments.model,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "precision": str(self.dtype).removeprefix("torch."),
            "clip": f"{frames}x{height}x{width}",
            "tokens": self.tokens,
            "batch_size": self.arguments.batch_size,
            "rank": self.arguments.rank,
        }

    def clear(self) -> None:
        """Gives back a variant's memory and compiled code."""
        self.accelerator.free_memory()  # it keeps what it has prepared
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Times, memory and profile of a variant's steps."""
        started = time.perf_counter()
        transformer = make_random_transformer(self.arguments.model, seed=0, device=self.device, dtype=self.dtype)
        num_parameters = sum(p.numel() for p in transformer.parameters())
        coded = count_coded(transformer.transformer_blocks[0], variant.quantized, self.dtype)
        num_float8 = count_float8_parameters(transformer) if "float8" in variant.flags else 0
        timings = {
            name: BackendTiming(row["forward_seconds"], row["backward_seconds"])
            for name, row in self.ceilings["attention"].items()
        }
        backend = choose_backend(self.arguments.attention, timings)
        prepare_transformer(transformer, variant, self.config.adapter, backend)
        result: dict[str, Any] = {"build_seconds": time.perf_counter() - started, "attention": backend}
        with tempfile.TemporaryDirectory() as folder:
            trained = TrainedAdapter(transformer, "")
            autocast = variant.is_baseline and self.dtype != torch.float32
            trainer = self.make_adapter_trainer(trained, Path(folder), autocast=autocast)
            batches = iter(self.make_loader(Path(folder)))
            result |= self._time_steps(trainer, batches, started)
            profiled = attempt(  # the times stand without it
                lambda: profile_steps(lambda: self._step(trainer, batches), _PROFILED_STEPS, self.device)
            )
            result["profile"] = {"parts_ms": {}, "kernels": []} | profiled
        result |= self._count_flops(variant, result["step_seconds"])
        memory = predict(
            self.facts,
            variant.activations,
            num_parameters=num_parameters,
            num_trainable=sum(p.numel() for p in transformer.parameters() if p.requires_grad),
            tokens=self.tokens,
            batch_size=self.arguments.batch_size,
            dtype=self.dtype,
            num_float8=num_float8,
            coded=coded,
            num_encoder=count_image_encoder(self.facts),
            image_pixels=self.size[1] * self.size[2],
        )
        return result | {"predicted_gib": memory.total / GIB}

    def _time_steps(self, trainer: Trainer, batches: Iterator[Batch], started: float) -> dict[str, Any]:
        arguments, device = self.arguments, self.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = self.time_each(trainer, batches, 1)[0]
        warm = self.time_each(trainer, batches, max(1, arguments.warmup - 1))[-1]
        left = arguments.time_limit - (time.perf_counter() - started)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        recent = Recent()
        seconds = self.time_each(trainer, batches, min(arguments.steps, max(2, int(left / warm))), recent)
        result: dict[str, Any] = {
            "first_step_seconds": first,
            "step_seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "num_steps": len(seconds),
            "data_seconds": recent.data_seconds / len(seconds),
            "loss": float(recent.samples[-1][1].mean()),
            "compiled_again": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        }
        return result | peak_memory(device)

    def time_each(
        self, trainer: Trainer, batches: Iterator[Batch], num_steps: int, recent: Recent | None = None
    ) -> list[float]:
        """Seconds of each step on the device, which never waits for the host between them."""
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(num_steps):
                self._step(trainer, batches, recent)
                marks.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
        torch.cuda.synchronize(self.device)
        events[0].record()
        for event in events[1:]:
            self._step(trainer, batches, recent)
            event.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]

    def _step(self, trainer: Trainer, batches: Iterator[Batch], recent: Recent | None = None) -> None:
        trainer.run_step(batches, recent or Recent())
        trainer.step += 1

    def _count_flops(self, variant: Variant, seconds: float) -> dict[str, Any]:
        """Model FLOPs leave out what is recomputed; attention's backward kernel does 2.5 forward passes of work."""
        shape = self.shape
        linear, attention = shape.num_layers * shape.linear_flops, shape.num_layers * shape.attention_flops
        model = 2 * linear + 3 * attention
        recomputed = {
            "recompute": linear * (1 if variant.is_baseline else 8 / 12) + attention,
            "keep_attention": linear * 8 / 12,  # the feed-forward's second product is read by nothing
        }.get(variant.activations, 0.0)
        hardware = 2 * linear + 3.5 * attention + recomputed
        peak = peak_flops(self.device)
        return {
            "model_tflop": model / 1e12,
            "model_tflops": model / seconds / 1e12,
            "hardware_tflops": hardware / seconds / 1e12,
            "mfu": model / seconds / peak if peak else None,
            "floor_seconds": self.ceilings["floor_seconds"]["total"],
        }

    def pick_backend(self, heads: int, tokens: int) -> tuple[Backend, dict[Backend, BackendTiming]]:
        """The attention kernel of a run of that shape, as a run takes it, and what was measured."""
        return pick_backend(
            "auto",
            batch_size=self.arguments.batch_size,
            num_heads=heads,
            tokens=tokens,
            head_dim=self.facts.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def make_adapter_trainer(self, trained: TrainedAdapter, folder: Path, *, autocast: bool = False) -> Trainer:
        """The loop around an adapter with float32 AdamW; DDP in a launch."""
        optimizer = make_optimizer(list(trained.parameters().values()), self.config.optimizer)
        guard = StepGuard(self.device, use_loss_scale=self.dtype == torch.float16, max_grad_norm=1.0)
        engine = self.make_engine(trained, optimizer, guard)
        return self.make_trainer(trained, folder, engine=engine, autocast=autocast)

    def make_engine(self, trained: Trained, optimizer: torch.optim.Optimizer, guard: Guard) -> Engine:
        """The loop's engine on this device alone; DDP in a launch."""
        stream = find_trained_stream(trained.transformer)
        store = DeviceStore(trained.parameters(), optimizer, host=trained.host, stream=stream)
        model = self.accelerator.prepare_model(trained.transformer)
        return make_replicated_engine(self.accelerator, model, optimizer, guard, store)

    def make_trainer(self, trained: Trained, folder: Path, *, engine: Engine, autocast: bool) -> Trainer:
        """The loop around what is trained, without metrics, validation and a run's folder."""
        encoder = None
        if self.facts.takes_image:
            encoder = make_random_image_encoder(self.arguments.model, self.device, self.dtype)
        trained.transformer.train()
        log = MetricsLog(
            folder, active=False, first_step=0, report_to="none", project="", wandb_mode="offline", config={}
        )
        writer = CheckpointWriter(CheckpointFolder(folder / "checkpoints", keep_last=1), Ranks(), asynchronous=False)
        return Trainer(
            self.accelerator,
            self.config,
            trained=trained,
            engine=engine,
            denoiser=Denoiser(
                self.facts,
                device=self.device,
                dtype=self.dtype,
                min_snr_gamma=None,
                autocast=autocast,
                image_encoder=encoder,
            ),
            make_loader=lambda _step: self.make_loader(folder),
            saver=ShardedSaver(ShardedState(engine.store.parts, None, Ranks()), writer),
            log=log,
            validate=lambda _step: True,
            identity={},
        )

    def make_loader(self, folder: Path) -> Any:
        """The run's own loader, over a cache of random clips."""
        cache = Cache(folder / "cache")
        frames, channels, rows, columns = self.facts.latent_shape(*self.size)
        generator = torch.Generator().manual_seed(0)
        entries = []
        for number in range(_NUM_CLIPS):
            mean = torch.randn(channels, frames, rows, columns, generator=generator)
            text = torch.randn(self.facts.max_text_length, self.facts.text_dim, generator=generator)
            cache.write("latents", f"{number:040x}", {"mean": mean.half(), "logvar": mean.half() * 0 - 10})
            cache.write("text", f"{number:040x}", {"embeddings": text.half()})
            clip = Clip(str(number), Path("random.mp4"), "random")
            image_key = f"{number:040x}" if self.facts.takes_image else None
            if image_key is not None:
                cache.write("images", image_key, {"image": make_random_image(self.size, generator)})
            entries.append(Entry(clip, f"{number:040x}", f"{number:040x}", image_key))
        dataset = TrainingSet(
            entries,
            cache,
            seed=0,
            scaling_factor=self.facts.scaling_factor,
            caption_dropout=0.1,
            timestep_strata=16,
            patch_size_t=self.facts.patch_size_t,
        )
        sampler = PositionSampler(
            first_step=0,
            last_step=self.config.train.max_steps,
            batch_size=self.arguments.batch_size,
            accumulation=1,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        on_gpu = self.device.type == "cuda"
        return make_loader(dataset, sampler, num_workers=default_workers() if on_gpu else 0, pin_memory=on_gpu)


def describe_variant(result: dict[str, Any]) -> str:
    """What was measured of a variant, for a person."""
    if "error" in result:
        return f"failed: {result['error']}"
    mfu = f", MFU {100 * result['mfu']:.1f} %" if result["mfu"] else ""
    lines = [
        f"step {result['step_seconds']:.3f} s (median of {result['num_steps']}, {result['fastest']:.3f} to "
        f"{result['slowest']:.3f}); floor {result['floor_seconds']:.3f} s; first step "
        f"{result['first_step_seconds']:.1f} s; compiled again {result['compiled_again']} times",
        f"model {result['model_tflops']:.0f} TFLOP/s{mfu}; hardware {result['hardware_tflops']:.0f} TFLOP/s; "
        f"waiting for data {1e3 * result['data_seconds']:.2f} ms; loss {result['loss']:.5f}; "
        f"attention {result['attention']}",
    ]
    if "peak_allocated_gib" in result:
        lines.append(
            f"peak {result['peak_allocated_gib']:.2f} GiB allocated, {result['peak_reserved_gib']:.2f} reserved, "
            f"{result['predicted_gib']:.2f} predicted"
        )
    return "\n".join([*lines, describe_profile(result["profile"], 25)])


def describe(results: dict[str, Any]) -> str:
    """One line a variant, with its ratio to the baseline."""
    base = results["variants"].get(BASELINE, {}).get("step_seconds")
    lines = []
    for name, row in results["variants"].items():
        if "error" in row:
            lines.append(f"{name:<40} failed")
            continue
        ratio = f"  {base / row['step_seconds']:.2f} x {BASELINE}" if base else ""
        peak = f"  {row['peak_allocated_gib']:.1f} GiB" if "peak_allocated_gib" in row else ""
        lines.append(f"{name:<40} {row['step_seconds']:.3f} s{peak}{ratio}")
    return "\n".join(lines)
