"""`report.html`: one self-contained file with curves, videos side by side, training clips, data table and config."""

import base64
import html
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from cogtune.config import RunConfig
from cogtune.dataset import Entry
from cogtune.previews import make_previews
from cogtune.tracking import read_metrics
from cogtune.validation import read_requests

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 220, 62, 28
_COLOURS = ("#2a6fdb", "#d1495b", "#3c9d5d", "#b07d2b", "#7a5cc9", "#3aa6a6", "#8c564b", "#555555", "#c2569d")
_MAX_ROWS = 200
_MAX_PREVIEWS = 8


def write_report(
    folder: Path,
    config: RunConfig,
    train: Sequence[Entry],
    validation: Sequence[Entry],
    *,
    eight_bit: bool = False,
    quantized: str | None = None,
) -> Path:
    """Writes (or rewrites) the report of the run in `folder` from its metrics, samples and clips.

    `eight_bit`: AdamW's state is kept so; `quantized`: how the frozen base is. The config alone may leave both open.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    template = jinja2.Environment(autoescape=True).from_string(_template())
    page = template.render(
        title=folder.name,
        version=_version(),
        summary=_summarise(config, steps, evaluations, eight_bit=eight_bit, quantized=quantized),
        charts=[
            draw_chart("training loss", {"loss": [(r["step"], r["loss"]) for r in steps], "smoothed": _smooth(steps)}),
            draw_chart("evaluation loss", {"held-out clips": [(r["step"], r["eval_loss"]) for r in evaluations]}),
            draw_chart("evaluation loss by timestep quantile", _by_quantile(evaluations)),
            draw_chart("learning rate", {"learning rate": [(r["step"], r["learning_rate"]) for r in steps]}),
            draw_chart("gradient norm", {"gradient norm": [(r["step"], r["grad_norm"]) for r in steps]}),
            draw_chart(
                "seconds a step",
                {
                    "step": [(r["step"], r["step_seconds"]) for r in steps[1:]],
                    "waiting for data": [(r["step"], r["data_seconds"]) for r in steps[1:]],
                },
            ),
        ],
        samples=_collect_samples(folder, config),
        previews=[
            {"caption": entry.clip.caption, "source": embed_video(path)}
            for entry, path in make_previews(folder / "previews", train, _MAX_PREVIEWS)
        ],
        num_clips=len(train),
        clips=[
            _describe_clip(entry, part)
            for part, entries in (("train", train), ("held out", validation))
            for entry in entries[:_MAX_ROWS]
        ],
        num_hidden=max(0, len(train) - _MAX_ROWS) + max(0, len(validation) - _MAX_ROWS),
        config=_read_config(folder, config),
    )
    path = folder / "report.html"
    temporary = folder / ".report.partial"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _read_config(folder: Path, config: RunConfig) -> str:
    """The run's own file, which says what `auto` came to."""
    path = folder / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else yaml.safe_dump(config.to_plain(), sort_keys=False)


def _version() -> str:
    try:
        return importlib.metadata.version("cogtune")
    except importlib.metadata.PackageNotFoundError:
        return "(run from its source folder, not installed)"


def _template() -> str:
    return Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")


def _summarise(
    config: RunConfig,
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    *,
    eight_bit: bool,
    quantized: str | None,
) -> list[tuple[str, str]]:
    rows = [("model", config.model.path)]
    if config.train.float8_base:
        rows.append(("frozen base", "multiplied by in float8 (train.float8_base)"))
    if quantized:
        rows.append(("frozen base", f"its blocks' linear weights in {quantized} (memory.quantized_base)"))
    if eight_bit:
        rows.append(("optimizer", "AdamW with 8-bit state, bfloat16 weights (memory.optimizer=8bit)"))
    if steps:
        last, seconds = steps[-1], sorted(row["step_seconds"] for row in steps[1:] or steps)
        rows += [
            ("steps", f"{last['step']} of {config.train.max_steps}, {last['samples_seen']} samples"),
            ("loss", f"{steps[0]['loss']:.4f} at step {steps[0]['step']}, {last['loss']:.4f} at step {last['step']}"),
            ("seconds a step", f"{seconds[len(seconds) // 2]:.3f} (median)"),
        ]
        launches = [row["start_seconds"] for row in steps if "start_seconds" in row]
        if launches:
            rows.append(("first step", _describe_start(launches[-1])))
        if last.get("peak_memory_gib") is not None:
            rows.append(("peak memory", f"{last['peak_memory_gib']:.1f} GiB"))
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        rows.append(
            (
                "evaluation loss",
                f"{first['eval_loss']:.4f} at step {first['step']}, {last['eval_loss']:.4f} at step {last['step']}",
            )
        )
    return rows


def _describe_start(seconds: dict[str, float]) -> str:
    """Of the newest launch: until its first row, by what took longest; parts below a twentieth are left out."""
    total = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {spent:.1f}" for name, spent in parts if spent >= total / 20)
    return f"{total:.1f} s after the launch: {listed}"


def _smooth(steps: list[dict[str, Any]]) -> list[tuple[float, float]]:
    points, mean = [], None
    for row in steps:
        mean = row["loss"] if mean is None else 0.9 * mean + 0.1 * row["loss"]
        points.append((row["step"], mean))
    return points


def _by_quantile(evaluations: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    names = list(evaluations[0]["eval_loss_by_quantile"]) if evaluations else []
    return {f"t = {name}": [(r["step"], r["eval_loss_by_quantile"][name]) for r in evaluations] for name in names}


def draw_chart(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG line chart of (x, y) points by series name; empty series are left out."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return f'<figure><figcaption>{html.escape(title)}</figcaption><p class="none">nothing recorded</p></figure>'
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points if y == y]
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    low, high = (min(low, 0.0) if low < 0.3 * high else low), (high if high > low else low + 1.0)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> str:
        px = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - 10)
        py = 8 + (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 8)
        return f"{px:.1f},{py:.1f}"

    parts = []
    for fraction in (0.0, 0.5, 1.0):
        y = low + fraction * (high - low)
        px, py = place(x_low, y).split(",")
        parts.append(f'<line x1="{px}" y1="{py}" x2="{_WIDTH - 10}" y2="{py}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(py) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in (x_low, x_high):
        px = place(x, low).split(",")[0]
        parts.append(f'<text x="{px}" y="{_HEIGHT - 8}" text-anchor="middle">{x:g}</text>')
    legend = []
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = " ".join(place(x, y) for x, y in points if y == y)
        parts.append(f'<polyline points="{line}" stroke="{colour}"/>')
        if len(points) == 1:
            px, py = place(*points[0]).split(",")
            parts.append(f'<circle cx="{px}" cy="{py}" r="3" fill="{colour}"/>')
        legend.append(f'<span style="color:{colour}">{html.escape(name)}</span>')
    names = " ".join(legend) if len(series) > 1 else ""
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{html.escape(title)} <small>{names}</small></figcaption>{svg}</figure>"


def _collect_samples(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Base, middle and newest video of each prompt and seed, as data addresses."""
    steps = sorted(path for path in (folder / "samples").glob("step-*") if path.is_dir())
    rows = []
    for number, prompt in enumerate(config.validation.prompts):
        for seed in config.validation.seeds:
            name = f"{number:02d}-{seed}.mp4"
            made = [(path / name, read_requests(path).get(name, {})) for path in steps]
            # After a change of prompts, older steps hold other prompts' videos under the same name.
            found = [path for path, asked in made if path.is_file() and asked.get("prompt") == prompt]
            shown = (
                [found[0], *([found[len(found) // 2]] if len(found) > 3 else []), found[-1]]
                if len(found) > 1
                else found
            )
            videos = [
                {
                    "label": "base model" if path.parent.name == "step-000000" else f"step {int(path.parent.name[5:])}",
                    "source": embed_video(path),
                }
                for path in shown
            ]
            rows.append({"prompt": prompt, "seed": seed, "videos": videos})
    return rows


def embed_video(path: Path) -> str:
    """A video file as a `data:` address."""
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def _describe_clip(entry: Entry, part: str) -> dict[str, str]:
    clip = entry.clip
    segment = (
        ""
        if clip.start == 0 and clip.end is None
        else f"{clip.start:g} s - {'end' if clip.end is None else f'{clip.end:g} s'}"
    )
    return {
        "id": clip.id,
        "caption": clip.caption,
        "segment": segment,
        "weight": f"{clip.weight:g}",
        "part": "prior" if clip.prior else part,
    }
