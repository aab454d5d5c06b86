"""Results of a comparison as a Markdown table: mean over the seeds, and the range."""

import statistics
from collections.abc import Sequence
from typing import Any

from cogtune.shapes.comparison import BASE
from cogtune.shapes.statistics import describe_points, describe_range, describe_spread

HEAD = ("run", "concept right", "base right", "base, change in points", "evaluation loss", "s/step", "seeds")


def make_table(results: Sequence[dict[str, Any]]) -> str:
    """One row a run in the order of first appearance; the base model's own row comes first."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["name"] != BASE):
        by_name.setdefault(result["name"], []).append(result)
    base = {result["seed"]: result["base"]["right"] for result in by_name.get(BASE, [])}
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for name, rows in by_name.items():
        lines.append(f"| {' | '.join(_cells(name, sorted(rows, key=lambda row: row['seed']), base))} |")
    return "\n".join(lines) + "\n"


def _cells(name: str, rows: list[dict[str, Any]], base: dict[int, float]) -> list[str]:
    changes = [row["base"]["right"] - base[row["seed"]] for row in rows if row["seed"] in base]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return [
        name,
        describe_spread([row["concept"]["right"] for row in rows], count=False),
        describe_spread([row["base"]["right"] for row in rows], count=False),
        describe_points(changes) if changes and name != BASE else "",
        describe_range(losses, 4) if losses else "",
        f"{statistics.fmean(seconds):.3f}" if seconds else "",
        str(len(rows)),
    ]
