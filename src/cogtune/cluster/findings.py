"""What is wrong with a job's nodes, from what each process found out; pure."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Facts = dict[str, Any]

SLOW = 0.7
"""Below this part of the others' speed a node is named."""
SLOW_GPU = 0.9
_SLOW_DISK = 50.0  # MB/s: a hundredth of a second for a clip of a 5B run
_SKEW_SECONDS = 2.0
_SHM_GIB = 0.5
_HOT_CELSIUS = 85
_MOSTLY_FREE = 0.9


@dataclass(frozen=True)
class Finding:
    """Something to look at; a note needs nothing done."""

    level: Literal["error", "warning", "note"]
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def who(facts: Facts) -> str:
    """A process and its node."""
    return f"rank {facts['rank']} (node {facts['node']})"


def find_problems(ranks: Sequence[Facts]) -> list[Finding]:
    """All findings, errors first."""
    found = [
        *_disagreements(ranks),
        *_gpus(ranks),
        *_hosts(ranks),
        *_folders(ranks),
        *_models(ranks),
        *_caches(ranks),
        *_gloo(ranks),
        *_links(ranks),
    ]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _outliers(ranks: Sequence[Facts], value: Callable[[Facts], Any]) -> tuple[Any, dict[Any, list[str]]]:
    """The value of most ranks, and the others' with their nodes."""
    counts = Counter(value(facts) for facts in ranks)
    usual = counts.most_common(1)[0][0]
    others: dict[Any, list[str]] = {}
    for facts in ranks:
        if value(facts) != usual and facts["node"] not in others.setdefault(value(facts), []):
            others[value(facts)].append(facts["node"])
    return usual, others


def _disagreements(ranks: Sequence[Facts]) -> Iterable[Finding]:
    for name in sorted({name for facts in ranks for name in facts["versions"]}):
        usual, others = _outliers(ranks, lambda facts, name=name: facts["versions"].get(name, "missing"))
        for version, nodes in others.items():
            listed = ", ".join(nodes)
            yield Finding("error", f"{name} is {version} on node {listed} and {usual} elsewhere; install the same one")
    for what, key in (("GPU", "name"), ("driver", "driver")):
        usual, others = _outliers(ranks, lambda facts, key=key: (facts["gpu"] or {}).get(key))
        for name, nodes in others.items():
            listed = ", ".join(nodes)
            yield Finding(
                "warning", f"the {what} is {name} on node {listed} and {usual} elsewhere; the slowest sets the pace"
            )


def _gpus(ranks: Sequence[Facts]) -> Iterable[Finding]:
    speeds = [facts["tflops"] for facts in ranks]
    usual = statistics.median_high(speeds)
    bound = SLOW_GPU if any(facts["gpu"] for facts in ranks) else SLOW / 2  # processes share a CPU's cores
    for facts in ranks:
        if facts["tflops"] < bound * usual:
            yield Finding(
                "warning",
                f"{who(facts)} multiplies at {facts['tflops']:.3g} TFLOP/s, the others at {usual:.3g}; look at its "
                "temperature, power limit and neighbours, or leave its node out",
            )
        gpu = facts["gpu"] or {}
        if gpu.get("processes"):
            yield Finding(
                "warning",
                f"{who(facts)}: {gpu['processes']} other process(es) on its GPU, {gpu['free_gib']:.1f} of "
                f"{gpu['total_gib']:.1f} GiB free; end them (nvidia-smi lists them)",
            )
        elif gpu and gpu["free_gib"] < _MOSTLY_FREE * gpu["total_gib"]:
            free = f"{gpu['free_gib']:.1f} of {gpu['total_gib']:.1f} GiB"
            yield Finding("warning", f"{who(facts)}: only {free} of its GPU are free; look for other programs on it")
        if gpu.get("ecc_errors"):
            errors = gpu["ecc_errors"]
            yield Finding("error", f"{who(facts)}: {errors} uncorrected memory error(s) of its GPU; leave the node out")
        if gpu.get("slowed") or (gpu.get("celsius") or 0) > _HOT_CELSIUS:
            why = ", ".join(gpu.get("slowed") or [f"{gpu['celsius']} degrees"])
            yield Finding("warning", f"{who(facts)}: its GPU is slowed down or hot ({why}); look at cooling and power")


def _hosts(ranks: Sequence[Facts]) -> Iterable[Finding]:
    seen = set()
    for facts in ranks:
        if facts["node"] in seen:
            continue
        seen.add(facts["node"])
        host, processes = facts["host"], sum(other["node"] == facts["node"] for other in ranks)
        if host["shm_gib"] is not None and host["shm_gib"] < _SHM_GIB * processes:
            yield Finding(
                "warning",
                f"node {facts['node']}: {host['shm_gib']:.2f} GiB free in /dev/shm for {processes} process(es); "
                "loaders pass batches through it: start the container with --shm-size=16g, or set data.num_workers=0",
            )
        if abs(facts["clock_seconds"]) > _SKEW_SECONDS:
            yield Finding(
                "warning",
                f"node {facts['node']}: its clock is {facts['clock_seconds']:+.1f} s off rank 0's; files of shared "
                "folders get wrong times: start its time service",
            )


def _folders(ranks: Sequence[Facts]) -> Iterable[Finding]:
    for facts in ranks:
        for name, folder in facts["folders"].items():
            if "problem" in folder:
                yield Finding(
                    "error", f"{who(facts)}: {name} can't be used: {folder['problem']}; choose another folder"
                )
                continue
            for way in ("write", "read"):
                if folder.get(way, _SLOW_DISK) < _SLOW_DISK:
                    yield Finding(
                        "warning",
                        f"{who(facts)}: {name} ({folder['path']}) {way}s {folder[way]:.0f} MB/s; below "
                        f"{_SLOW_DISK:.0f} encoding, loading or checkpoints will wait for it: take a faster one",
                    )
    if len(ranks) < 2:
        return
    for name in ranks[0]["folders"]:
        apart = [facts for facts in ranks if len(facts["folders"][name].get("seen_by", ranks)) < len(ranks)]
        if apart and name == "output_dir":
            nodes = ", ".join(sorted({facts["node"] for facts in apart}))
            yield Finding(
                "error", f"output_dir is not one folder for all nodes ({nodes}); put it on a shared file system"
            )
        elif apart:
            yield Finding("note", f"{name} is each node's own: every node encodes all clips, and needs room for them")


def _models(ranks: Sequence[Facts]) -> Iterable[Finding]:
    known = [facts for facts in ranks if facts.get("model")]
    for facts in known:
        if "problem" in facts["model"]:
            yield Finding("error", f"{who(facts)}: the model can't be read: {facts['model']['problem']}")
    readable = [facts for facts in known if "digest" in facts["model"]]
    if readable:
        usual, others = _outliers(readable, lambda facts: facts["model"]["digest"])
        for digest, nodes in others.items():
            listed = ", ".join(nodes)
            yield Finding(
                "error",
                f"the model's files on node {listed} differ from the others' ({digest}, {usual}); copy them anew",
            )


def _caches(ranks: Sequence[Facts]) -> Iterable[Finding]:
    for facts in ranks:
        cache = facts.get("cache") or {}
        if "problem" in cache:
            yield Finding("error", f"{who(facts)}: {cache['problem']}")
        elif cache.get("missing"):
            yield Finding(
                "note",
                f"node {facts['node']}: {cache['missing']} of {cache['wanted']} cache entries of {cache['clips']} "
                "clip(s) are missing; "
                "data/prepare.py makes them, or the run does as it starts",
            )


def _gloo(ranks: Sequence[Facts]) -> Iterable[Finding]:
    failed = [facts for facts in ranks if "gloo_problem" in facts.get("speed", {})]
    # Who could not connect at all comes first; the others have waited for it.
    for facts in sorted(failed, key=lambda facts: "time" in facts["speed"]["gloo_problem"].lower())[:4]:
        yield Finding(
            "error",
            f"{who(facts)}: no answer over gloo ({facts['speed']['gloo_problem']}); checkpoints are agreed on over it: "
            "set GLOO_SOCKET_IFNAME to the network that the nodes share, and let each host's name be its address there",
        )


def _links(ranks: Sequence[Facts]) -> Iterable[Finding]:
    leaders = {facts["number"]: facts for facts in ranks if facts.get("speed", {}).get("pairs")}
    best = {number: max(facts["speed"]["pairs"].values()) for number, facts in leaders.items()}
    if len(best) > 2:  # of two nodes, neither can be named
        for number, speed, usual in _find_slow(best):
            yield Finding(
                "error",
                f"node {leaders[number]['node']} exchanges at most {speed:.2f} GB/s with any other, the others "
                f"{usual:.2f}; look at its network cards and cables (NCCL_DEBUG=INFO), or leave it out",
            )
    inside = {facts["node"]: facts["speed"]["node"] for facts in ranks if facts.get("speed", {}).get("node")}
    if len(inside) > 1:
        for node, speed, usual in _find_slow(inside):
            yield Finding(
                "error",
                f"node {node} reduces among its own GPUs at {speed:.2f} GB/s, the others at {usual:.2f}; look at "
                "its NVLink (nvidia-smi nvlink --status), or leave it out",
            )


def _find_slow(speeds: Mapping[Any, float]) -> Iterator[tuple[Any, float, float]]:
    """Who is far slower than usual, with both speeds."""
    usual = statistics.median_high(speeds.values())
    return ((place, speed, usual) for place, speed in speeds.items() if speed < SLOW * usual)


def make_table(ranks: Sequence[Facts]) -> str:
    """One row a rank."""
    header = [
        "rank",
        "node",
        "GPU",
        "free GiB",
        "TFLOP/s",
        "host GiB",
        "shm GiB",
        "clock s",
        "all-reduce GB/s",
        "in node",
        "gloo ms",
    ]
    rows = [header]
    for facts in ranks:
        gpu, host, speed = facts["gpu"] or {}, facts["host"], facts.get("speed", {})
        numbers = [gpu.get("free_gib"), facts["tflops"], host["memory_gib"], host["shm_gib"], facts["clock_seconds"]]
        numbers += [speed.get("all"), speed.get("node"), speed.get("gloo_ms")]
        rows.append(
            [
                str(facts["rank"]),
                facts["node"],
                gpu.get("name", "-"),
                *("-" if n is None else f"{n:.3g}" for n in numbers),
            ]
        )
    for facts in ranks:
        for name, folder in facts["folders"].items():
            if "write" in folder:
                speeds = f"{name}: writes {folder['write']:.0f}, reads {folder['read']:.0f} MB/s"
                rows.append([str(facts["rank"]), facts["node"], f"{speeds}, {folder['free_gib']:.0f} GiB free"])
    widths = [max(len(row[i]) for row in rows if i < len(row) and len(row) > 3) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )
