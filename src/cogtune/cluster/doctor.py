"""The pre-flight check of scripts/doctor.py: asks every rank, measures between them, says what is wrong and where.

Nothing waits without a limit: ranks answer through a store, and one that doesn't is named with what it was doing.
"""

import argparse
import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from cogtune import models
from cogtune.cache import Cache
from cogtune.cli import build_config, read_yaml
from cogtune.cluster.bandwidth import measure_bandwidth, try_gloo
from cogtune.cluster.findings import Facts, Finding, find_problems, make_table
from cogtune.cluster.health import (
    ask_nvidia_smi,
    examine_gpu,
    examine_host,
    examine_model,
    find_versions,
    measure_folder,
    measure_matmul,
)
from cogtune.cluster.place import Place, RoundTable, find_place
from cogtune.config import RunConfig
from cogtune.data_plan import make_data_plan
from cogtune.encoding import CacheKeys
from cogtune.errors import UserError

NOTHING_FOUND, SOMETHING_FOUND, NO_ANSWER = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", type=Path, help="a run's config: checks its model, folders and cache too")
    parser.add_argument("--manifest", type=Path, help="clips of that run, if the config names none")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="another folder to measure (repeat)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a rank has for each answer (120)")
    parser.add_argument("--file-mebibytes", type=int, default=256, help="size of the file written and read (256)")
    parser.add_argument("--no-bandwidth", action="store_true", help="don't measure between the ranks")
    parser.add_argument("--cpu", action="store_true", help="leave the GPUs alone")
    parser.add_argument("--json", type=Path, help="write all answers there")


def examine(options: argparse.Namespace) -> int:
    """Runs the check on this rank; prints on rank 0. Returns the exit code, the same on every rank that answers."""
    config = _read_config(options)
    place = find_place(dict(os.environ))
    table = RoundTable(place, seconds=options.timeout)
    driver_says = {} if options.cpu else ask_nvidia_smi()  # before this rank is on its GPU
    device = _choose_device(place, cpu=options.cpu)
    hosts = table.ask("hello", [socket.gethostname(), place.group])
    if missing := _name_silent(hosts, hosts, table):
        return _give_up(missing, place)
    nodes = _number_nodes(hosts)
    table.note("its own facts")
    facts = _collect(options, config, place, device, driver_says)
    facts |= {"rank": place.rank, "number": nodes[place.rank], "node": _name_node(hosts, nodes[place.rank])}
    _look_for_marks(facts, table)  # its questions also bring the ranks together, so that the clocks are compared well
    facts["clock_seconds"] = 0.0 if place.rank == 0 else table.clock_seconds
    answers = table.ask("facts", facts)
    if missing := _name_silent(answers, hosts, table):
        return _give_up(missing, place)
    if place.world_size > 1 and not options.no_bandwidth:
        speeds = table.ask("speed", _measure_speed(options, place, device, nodes, table))
        if missing := _name_silent(speeds, hosts, table):
            return _give_up(missing, place)
        answers = [answer | {"speed": speed} for answer, speed in zip(answers, speeds, strict=True)]
    found = find_problems(answers)
    if place.rank == 0:
        _print_result(answers, found, options)
    table.leave()
    return SOMETHING_FOUND if any(finding.level != "note" for finding in found) else NOTHING_FOUND


def _read_config(options: argparse.Namespace) -> RunConfig | None:
    if options.config is None:
        return None
    values = read_yaml(options.config)
    values.setdefault("output_dir", f"runs/{options.config.stem}")
    if options.manifest is not None:
        values.setdefault("data", {})["manifest"] = str(options.manifest)
    return build_config(values)


def _choose_device(place: Place, *, cpu: bool) -> torch.device:
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{socket.gethostname()}: local rank {place.local_rank}, but {torch.cuda.device_count()} GPU(s); start one "
            "process for each"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _number_nodes(hosts: list[Any]) -> list[int]:
    order = list(dict.fromkeys(tuple(host) for host in hosts))
    return [order.index(tuple(host)) for host in hosts]


def _name_node(hosts: list[Any], number: int) -> str:
    order = list(dict.fromkeys(tuple(host) for host in hosts))
    name, group = order[number]
    same = sum(other == name for other, _ in order)
    return f"{name}#{group}" if same > 1 else name


def _name_silent(answers: list[Any], hosts: list[Any], table: RoundTable) -> list[str]:
    """Who didn't answer, where it is and what it was doing."""
    numbers = _number_nodes([host or ["?", -1] for host in hosts])
    named = []
    for rank, answer in enumerate(answers):
        if answer is None:
            where = f"node {_name_node([host or ['?', -1] for host in hosts], numbers[rank])}"
            where = where if hosts[rank] else "its node never answered"
            doing = f"; its last word: {table.last_note(rank)}" if hosts[rank] and table.place.rank == 0 else ""
            named.append(f"rank {rank} ({where}) gave no answer{doing}")
    return named


def _give_up(missing: list[str], place: Place) -> int:
    if place.rank == 0:
        listed = "\n       ".join(missing[:16])
        print(
            f"error: {len(missing)} of {place.world_size} ranks don't answer in time:\n       {listed}\n"
            "       look at those nodes (are they up, does the same command start there?) or raise --timeout",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(1)  # the store may be this process's, and others are still reading
    return NO_ANSWER


def _collect(
    options: argparse.Namespace,
    config: RunConfig | None,
    place: Place,
    device: torch.device,
    driver_says: dict[str, Any],
) -> Facts:
    folders = {str(folder): folder for folder in options.folder}
    if config is not None:
        folders |= {"data.cache_dir": config.data.cache_dir, "output_dir": config.output_dir.parent}
    leads = place.local_rank == 0
    facts: Facts = {
        "versions": find_versions(),
        "gpu": examine_gpu(device, driver_says),
        "host": examine_host(),
        "tflops": measure_matmul(device),
        "folders": {
            name: {"path": str(folder)} | (measure_folder(folder, mebibytes=options.file_mebibytes) if leads else {})
            for name, folder in folders.items()
        },
    }
    if config is not None:
        facts["model"] = _find_model(config)
        if leads and "digest" in facts["model"]:
            facts["cache"] = _count_missing(config, options.timeout / 2)
    return facts


def _find_model(config: RunConfig) -> dict[str, Any]:
    try:
        return examine_model(models.find_folder(config.model.path))
    except UserError as error:
        return {"problem": str(error)}


def _count_missing(config: RunConfig, seconds: float) -> dict[str, Any]:
    """How many entries of the cache a run would have to make first, of the clips that there is time to look at."""
    if config.data.manifest is None:
        return {}
    try:
        plan = make_data_plan(config)
        cache = Cache(config.data.cache_dir)
        keys = CacheKeys(cache, plan.facts, plan.clip_format, plan.dtype)
        clips = [clip for clip in [*plan.train_clips, *plan.validation_clips] if clip.video.is_file()]
        texts = {*(clip.caption for clip in clips), *plan.extra_texts()}
        wanted, deadline = {("text", keys.text(text)) for text in texts}, time.monotonic() + seconds
        for number, clip in enumerate(clips):  # files that were never digested are read whole
            if time.monotonic() > deadline:
                clips = clips[:number]
                break
            wanted |= {("latents", keys.latents(clip)), ("images", keys.image(clip))}
        wanted = {(kind, key) for kind, key in wanted if key is not None}
        missing = sum(not cache.has(kind, key) for kind, key in wanted)
        return {"clips": len(clips), "wanted": len(wanted), "missing": missing}
    except (UserError, OSError) as error:
        return {"problem": str(error)}


def _look_for_marks(facts: Facts, table: RoundTable) -> None:
    """Notes for each folder which ranks see this rank's files there."""
    rank, size = table.place.rank, table.place.world_size
    token = table.ask("token", os.urandom(8).hex())[0]
    marks = []
    for name, folder in facts["folders"].items():
        mark = Path(folder["path"]) / f".doctor-{token}-{rank}"
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            marks.append(mark)
        except OSError as error:
            facts["folders"][name]["problem"] = f"{mark.parent}: {error.strerror}"
    table.ask("marked", 0)
    for folder in facts["folders"].values():
        path = Path(folder["path"])
        folder["seen_by"] = [other for other in range(size) if (path / f".doctor-{token}-{other}").exists()]
    table.ask("looked", 0)
    for mark in marks:
        mark.unlink(missing_ok=True)


def _measure_speed(
    options: argparse.Namespace, place: Place, device: torch.device, nodes: list[int], table: RoundTable
) -> dict[str, Any]:
    table.note("starting the process group")
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore("doctor", table.store),  # pyright: ignore[reportArgumentType]
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=options.timeout),
    )
    members = [[rank for rank, node in enumerate(nodes) if node == number] for number in range(max(nodes) + 1)]
    speed = measure_bandwidth(place.rank, members, device, table.note) | try_gloo(options.timeout / 2, table.note)
    distributed.destroy_process_group()
    return speed


def _print_result(answers: list[Facts], found: list[Finding], options: argparse.Namespace) -> None:
    print(make_table(answers))
    shown = ", ".join(f"{name} {version}" for name, version in answers[0]["versions"].items())
    print(f"\nrank 0 has {shown}")
    for finding in found:
        print(finding)
    if not found:
        print("nothing found")
    if options.json is not None:
        lines = [vars(finding) for finding in found]
        options.json.write_text(json.dumps({"ranks": answers, "findings": lines}, indent=1), encoding="utf-8")
