"""One measurement of `bench.py context`, run by every process of its launch: takes a task, writes the result."""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from diffusers import CogVideoXDDIMScheduler

from cogtune.acceleration import accelerate
from cogtune.adapter import TrainedAdapter
from cogtune.attention import FusedAttention
from cogtune.benchmark.clock import Marks, peak_memory, reset_peak, synchronize
from cogtune.benchmark.context import ALONE, parse_part
from cogtune.benchmark.kernels import describe_profile, profile_steps
from cogtune.benchmark.training import TrainingBench
from cogtune.benchmark.variants import parse_variant, prepare_transformer
from cogtune.cluster.stopping import end_with_parent
from cogtune.generation import generate_latents, make_pipeline
from cogtune.launch import read_launch
from cogtune.machine import avoid_fragments
from cogtune.models import choose_device, choose_dtype
from cogtune.parallel.ranks import Teams
from cogtune.parallel.sequence import Way
from cogtune.parallel.shared_samples import share_samples
from cogtune.parallel.videos import SharedVideo, VideoRanks, started_ranks
from cogtune.random_pipeline import make_architecture_facts, make_random_transformer
from cogtune.trainer import Recent
from cogtune.video_request import Request

_PROFILED_STEPS = 2


def measure_training(task: argparse.Namespace, model: str, way: str, count: int) -> dict[str, Any]:
    """Seconds of a LoRA step of the training loop, all ranks on one sample."""
    task.model, task.batch_size, task.attention = model, 1, "auto"
    bench = TrainingBench(task)
    device, facts = bench.device, bench.facts
    settings = bench.config.train.model_copy(
        update={"context_parallel": count, "context_attention": "auto" if way == ALONE else way}
    )
    bench.config = bench.config.model_copy(update={"train": settings})
    transformer = make_random_transformer(model, seed=0, device=device, dtype=bench.dtype)
    shared = share_samples(bench.config, facts.num_heads, Teams(read_launch().rank, count, count))
    heads, tokens = facts.num_heads, bench.tokens
    if shared is not None:
        heads, tokens = shared.attention_shape(heads, tokens)
    backend, timings = bench.pick_backend(heads, tokens)
    variant = parse_variant(task.activations + ("" if task.compile == "on" else "+eager"))
    prepare_transformer(transformer, variant, bench.config.adapter, backend, shared=shared is not None)
    if shared is not None:
        processor: Any = FusedAttention(backend, shared.attention)
        transformer.set_attn_processor(processor)
        shared.split(transformer)
    with tempfile.TemporaryDirectory() as folder:
        trained = TrainedAdapter(transformer, "")
        trainer = bench.make_adapter_trainer(trained, Path(folder))
        batches = iter(bench.make_loader(Path(folder)))
        reset_peak(device)
        recent = Recent()
        first = bench.time_each(trainer, batches, 1, recent)[0]
        loss = float(recent.samples[0][1].mean())
        bench.time_each(trainer, batches, max(1, task.warmup - 1))
        seconds = bench.time_each(trainer, batches, task.steps)
        row: dict[str, Any] = {"loss": loss, "attention": backend, "first_step_seconds": first, **peak_memory(device)}
        row["attention_ms"] = {name: 1e3 * timing.total for name, timing in timings.items()}
        row |= _describe_seconds(seconds, device)
        write(task, row | compare(task, f"loss-{model}", torch.tensor([loss])))  # stands if the profile fails
        if task.profile:
            row["profile"] = profile_steps(
                lambda: bench.time_each(trainer, batches, 1) and None, _PROFILED_STEPS, device
            )
            print(describe_profile(row["profile"], 30), flush=True)
    return row | compare(task, f"loss-{model}", torch.tensor([loss]))


def measure_generation(task: argparse.Namespace, model: str, way: str, count: int) -> dict[str, Any]:
    """Seconds of a sampling step with guidance, all ranks on one video."""
    avoid_fragments(choose_device(task.device))
    with started_ranks(choose_device(task.device), count) as device:
        facts = make_architecture_facts(model)
        dtype = choose_dtype("auto", facts, device)
        transformer = make_random_transformer(model, seed=0, device=device, dtype=dtype)
        pipeline = make_pipeline(
            facts, transformer=transformer, scheduler=CogVideoXDDIMScheduler.from_config(facts.scheduler_config)
        )
        pipeline.set_progress_bar_config(disable=True)
        shared = None
        if count > 1:
            halves: Literal[1, 2] = 2 if way == "halves" else 1
            wanted = cast(Way, "ulysses" if way == "halves" else way)
            ranks = VideoRanks(Teams(read_launch().rank, count, count), halves)
            shared = SharedVideo(transformer, ranks, way="auto" if way == "halves" else wanted)
        accelerate(pipeline, compiled=task.compile == "on", cache=None, coded=False, shared=shared)
        num_steps = task.warmup + task.steps
        request = Request(
            "random",
            task.num_frames or facts.num_frames,
            task.height or facts.height,
            task.width or facts.width,
            num_inference_steps=num_steps,
        )
        generator = torch.Generator().manual_seed(1000)
        texts = [0.2 * torch.randn(facts.max_text_length, facts.text_dim, generator=generator) for _ in range(2)]
        reset_peak(device)
        started, marks, first = time.perf_counter(), Marks(device), []

        def on_step(_step: int) -> None:
            if not first:
                synchronize(device)
                first.append(time.perf_counter() - started)
            marks.add()

        latents = generate_latents(pipeline, request, *(text.to(device, dtype) for text in texts), on_step=on_step)
        seconds = marks.differences()[max(0, task.warmup - 1) :]
        row = {"first_step_seconds": first[0], **peak_memory(device), **_describe_seconds(seconds, device)}
        row["video_seconds"] = task.num_steps * row["step_seconds"]
        return row | compare(task, f"latents-{model}-{num_steps}", latents.float().cpu())


def _describe_seconds(seconds: list[float], device: torch.device) -> dict[str, Any]:
    """Median, least and most over the steps, each step as slow as its slowest rank."""
    slowest = torch.tensor(seconds, device=device)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    values = slowest.tolist()
    return {"step_seconds": statistics.median(values), "spread": [min(values), max(values)], "num_steps": len(values)}


def compare(task: argparse.Namespace, name: str, result: torch.Tensor) -> dict[str, Any]:
    """How far a result is from that of the measurement on one GPU, which is kept for the others: norm of the
    difference, relative."""
    file = Path(task.folder) / f"{name}.pt"
    if parse_part(task.part)[3] == 1:
        torch.save(result, file)
    if parse_part(task.part)[3] == 1 or not file.is_file():
        return {}
    expected = torch.load(file, weights_only=True)
    return {"deviation": float((result - expected).norm() / expected.norm())}


def write(task: argparse.Namespace, row: dict[str, Any]) -> None:
    """The first rank writes the result."""
    if read_launch().rank == 0:
        partial = Path(task.output).with_suffix(".partial")
        partial.write_text(json.dumps(row), encoding="utf-8")
        partial.rename(task.output)


def main() -> None:
    """Runs the task of the command line."""
    end_with_parent(signal.SIGKILL)  # torchrun's processes are not of its session, and would keep their GPUs
    task = argparse.Namespace(**json.loads(sys.argv[1]))
    kind, model, way, count = parse_part(task.part)
    row = {"train": measure_training, "generate": measure_generation}[kind](task, model, way, count)
    write(task, row)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
