"""The tables of docs/scaling.md and of scripts/scaling.py, as Markdown."""

import argparse
from collections.abc import Sequence

from cogtune.cluster.scaling import (
    ARCHITECTURES,
    GPUS_PER_NODE,
    Estimate,
    Links,
    Workload,
    choose_strategy,
    count_nodes,
    estimate_context,
    estimate_ddp,
    estimate_hsdp,
)
from cogtune.errors import UserError

_GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One's own numbers."""
    links = Links()
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="cogvideox-5b")
    parser.add_argument("--job", choices=["lora", "sft"], default="lora")
    parser.add_argument("--step-seconds", type=float, required=True, help="of one sample on one GPU, measured")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA (64)")
    parser.add_argument("--gpus", default="8,16,32,64,128,256,512", help="numbers of GPUs, separated by commas")
    parser.add_argument("--inside", type=float, default=links.inside / _GB, help="GB/s within a node (300)")
    parser.add_argument("--between", type=float, default=links.between / _GB, help="GB/s of a node to others (40)")
    parser.add_argument("--context", type=int, default=4, help="GPUs that share a sample (4)")
    parser.add_argument("--gpu-gigabytes", type=float, default=80.0, help="memory of a GPU (80)")
    parser.add_argument(
        "--most-samples", type=int, default=64, help="samples a step that training still gains from (64)"
    )
    parser.add_argument("--clips-per-second", type=float, default=2.51, help="that one GPU encodes (2.51)")
    parser.add_argument("--clip-megabytes", type=float, default=3.0, help="of a source clip's file (3)")
    parser.add_argument("--storage", type=float, default=5.0, help="GB/s of the shared file system (5)")


def make_tables(options: argparse.Namespace) -> str:
    """Speed by strategy, and what has to be fed and saved; every number is an estimate."""
    try:
        counts = [int(text) for text in options.gpus.split(",")]
    except ValueError:
        raise UserError(f"--gpus {options.gpus}: expected numbers separated by commas, such as 8,64,512") from None
    wrong = [count for count in counts if count < 1 or (count > GPUS_PER_NODE and count % GPUS_PER_NODE)]
    if wrong:
        raise UserError(f"--gpus {wrong[0]}: expected at most {GPUS_PER_NODE}, or whole nodes of {GPUS_PER_NODE}")
    architecture = ARCHITECTURES[options.model]
    if options.context < 1 or architecture.num_heads % options.context or GPUS_PER_NODE % options.context:
        raise UserError(
            f"--context {options.context}: {options.model} has {architecture.num_heads} heads and a node "
            f"{GPUS_PER_NODE} GPUs; give a divisor of both"
        )
    if options.step_seconds <= 0:
        raise UserError(f"--step-seconds {options.step_seconds}: expected more than 0")
    work = Workload(architecture, options.job, options.step_seconds, rank=options.rank)
    links = Links(inside=options.inside * _GB, between=options.between * _GB)
    return "\n\n".join([_speed(work, counts, links, options), _feeding(work, counts, links, options)])


def _speed(work: Workload, counts: Sequence[int], links: Links, options: argparse.Namespace) -> str:
    fits = work.state_bytes <= 0.8 * options.gpu_gigabytes * _GB
    context = f"context {options.context}"
    lines = [
        f"| GPUs (nodes) | DDP{'' if fits else ' (does not fit)'} | HSDP | {context}: s a step | {context} | pick |",
        "|---|---|---|---|---|---|",
    ]
    for count in counts:
        ddp, hsdp = estimate_ddp(work, count, links), estimate_hsdp(work, count, links)
        shared = "-", "-"
        if count >= options.context:
            split = estimate_context(work, count, links, ways=options.context, sharded=not fits)
            shared = f"{split.step_seconds:.2f}", _show(split)
        pick = choose_strategy(work, count, gpu_bytes=options.gpu_gigabytes * _GB, most_samples=options.most_samples)
        lines.append(
            f"| {count} ({count_nodes(count)}) | {_show(ddp) if fits else '-'} | {_show(hsdp)} | {shared[0]} | "
            f"{shared[1]} | {pick} |"
        )
    return "\n".join(lines)


def _show(estimate: Estimate) -> str:
    return f"{estimate.samples_per_second:.1f} /s, {100 * estimate.efficiency:.1f} %"


def _feeding(work: Workload, counts: Sequence[int], links: Links, options: argparse.Namespace) -> str:
    lines = [
        "| GPUs | training reads | a node reads | prepare encodes | prepare reads | a checkpoint | written in |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in counts:
        fits = work.state_bytes <= 0.8 * options.gpu_gigabytes * _GB
        speed = (estimate_ddp if fits else estimate_hsdp)(work, count, links).samples_per_second
        reads = speed * work.sample_bytes
        clips = count * options.clips_per_second
        lines.append(
            f"| {count} | {reads / 1e6:.0f} MB/s | {reads / count_nodes(count) / 1e6:.0f} MB/s | {clips:.0f} clips/s | "
            f"{clips * options.clip_megabytes / 1e3:.2f} GB/s | {work.checkpoint_bytes / _GB:.1f} GB | "
            f"{work.checkpoint_bytes / _GB / options.storage:.1f} s |"
        )
    return "\n".join(lines)
