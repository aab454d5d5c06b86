"""Times filling the cache: the autoencoder on one clip, and mp4 files to cache entries with all that belongs to it.

    python scripts/bench.py prepare --model cogvideox-5b --json prepare.json

Weights are random: the released autoencoder, and a T5 encoder of T5-XXL's size (24 layers, width 4096) made on the
device. Without --clips, two 30 fps files are drawn, and clips start at different times of them. The share of time in
which the device is busy counts the encoding alone, from the first clip's arrival to the last one's writing.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import T5EncoderModel

from cogtune.benchmark.autoencoder import WAYS, describe_ways, make_random_vae, measure_ways
from cogtune.benchmark.clock import attempt, peak_memory, report, reset_peak
from cogtune.cache import Cache
from cogtune.decoding import default_workers
from cogtune.encoding import CacheKeys, EncodingTimes, Share, encode_captions, encode_clips
from cogtune.machine import avoid_fragments
from cogtune.manifest import Clip, ClipFormat, read_manifest
from cogtune.models import choose_device, choose_dtype
from cogtune.random_pipeline import ARCHITECTURES, make_architecture_facts, make_text_config, make_tokenizer
from cogtune.video import ClipError, write_video

_SOURCE_FPS = 30
_VOCABULARY = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py prepare`."""
    add = parser.add_argument
    add("--model", choices=list(ARCHITECTURES), default="cogvideox-5b")
    add("--clips", type=Path, help="a folder of captioned clips; default: drawn ones")
    add("--num_clips", type=int, default=32, help="clips from mp4 to cache; 0: none")
    add("--num_captions", type=int, default=128, help="captions through T5; 0: none")
    add("--text_layers", type=int, default=24, help="layers of the text encoder")
    add("--encoders", default="stock,channels-last,untuned,coder,stacked", help=f"by comma: {', '.join(WAYS)}")
    add("--workers", type=int, default=default_workers(), help="decoding processes")
    add("--time_limit", type=float, default=120.0, help="seconds of one way to encode, about")
    add("--profile", action="store_true", help="where an encoder's time goes, by kernel")
    add("--tiny", action="store_true", help="a tiny model and small clips, to try the command on a CPU")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--json", type=Path, help="write everything that was measured to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options ask for; the file of `--json` is brought up to date after each part."""
    if arguments.tiny:
        arguments.model, arguments.num_clips, arguments.num_captions, arguments.text_layers = "tiny", 4, 20, 1
    with tempfile.TemporaryDirectory() as folder:
        bench = PreparationBench(arguments, Path(folder))
        results: dict[str, Any] = {"conditions": bench.conditions(), "encoders": {}}

        def keep(part: str, row: dict[str, Any]) -> None:
            report(part, row)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

        keep("conditions", results["conditions"])
        ways = list(filter(None, arguments.encoders.split(",")))
        results["encoders"] = measure_ways(
            bench.vae, ways, "encode", bench.make_pixels(), repeats=3, limit_seconds=arguments.time_limit,
            profiled=arguments.profile, report=keep,
        )  # fmt: skip
        for part, count, measure in (
            ("clips", arguments.num_clips, bench.measure_clips),
            ("captions", arguments.num_captions, bench.measure_captions),
        ):
            if count:
                results[part] = attempt(measure)
                keep(part, results[part])
    return results


class PreparationBench:
    """A model's autoencoder and text encoder with random weights, clips, and an empty cache."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.device = choose_device(arguments.device)
        avoid_fragments(self.device)
        self.facts = replace(make_architecture_facts(arguments.model), folder=folder / "model")
        self.dtype = choose_dtype("auto", self.facts, self.device)
        self.vae = make_random_vae(arguments.model, self.device, self.dtype)
        self.format = ClipFormat(self.facts.num_frames, self.facts.height, self.facts.width, self.facts.fps)
        self._write_model()
        self.cache = Cache(folder / "cache")
        self.keys = CacheKeys(self.cache, self.facts, self.format, self.dtype)

    def conditions(self) -> dict[str, Any]:
        """What the numbers hold for."""
        form = self.format
        return {
            "model": self.arguments.model,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "precision": str(self.dtype).removeprefix("torch."),
            "clip": f"{form.num_frames}x{form.height}x{form.width}",
            "source": str(self.arguments.clips or f"drawn, {_SOURCE_FPS} fps"),
            "workers": self.arguments.workers,
            "text_layers": self.arguments.text_layers,
        }

    def _write_model(self) -> None:
        """What encoding reads from a pipeline folder; the text encoder stays in memory."""
        model = self.facts.folder
        self.vae.save_pretrained(model / "vae")
        make_tokenizer(_VOCABULARY).save_pretrained(model / "tokenizer")
        index = {"tokenizer": ["transformers", "T5Tokenizer"]}
        (model / "model_index.json").write_text(json.dumps(index))
        (model / "text_encoder").mkdir()

    def make_pixels(self) -> torch.Tensor:
        """One clip [1, 3, F, H, W] in [-1, 1] on the device."""
        frames = torch.from_numpy(_draw(self.format.num_frames, self.format.height, self.format.width, seed=0))
        pixels = frames.to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        return pixels.to(self.dtype)

    def measure_clips(self) -> dict[str, Any]:
        """mp4 files to cache entries, all of it: reading, decoding, resizing, copying, encoding, writing."""
        clips = self._find_clips()
        problems: list[str] = []

        def note(clip: Clip, problem: ClipError) -> None:
            problems.append(f"{clip.id}: {problem}")

        reset_peak(self.device)
        started = time.perf_counter()
        times = encode_clips(
            clips,
            self.keys,
            self.cache,
            self.facts,
            self.format,
            device=self.device,
            dtype=self.dtype,
            share=Share(),
            num_workers=self.arguments.workers,
            timeout_seconds=60,
            on_problem=note,
            quiet=True,
        )
        return _describe_times(times, time.perf_counter() - started) | peak_memory(self.device) | {"problems": problems}

    def measure_captions(self) -> dict[str, Any]:
        """Captions to cache entries."""
        config = make_text_config(self.facts.text_dim, _VOCABULARY, "full")
        if self.arguments.tiny:
            config = make_text_config(self.facts.text_dim, _VOCABULARY, "small")
        config.num_layers = self.arguments.text_layers
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                encoder = T5EncoderModel(config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(default)
        captions = [f"caption {number}: coloured waves run over a wide grey sea" for number in range(self._num_texts)]
        reset_peak(self.device)
        started = time.perf_counter()
        times = encode_captions(
            captions,
            self.keys,
            self.cache,
            self.facts,
            device=self.device,
            dtype=self.dtype,
            share=Share(),
            encoder=encoder,
            quiet=True,
        )
        return _describe_times(times, time.perf_counter() - started) | peak_memory(self.device)

    @property
    def _num_texts(self) -> int:
        return self.arguments.num_captions

    def _find_clips(self) -> list[Clip]:
        wanted = self.arguments.num_clips
        if self.arguments.clips:
            found = read_manifest(self.arguments.clips)
            files = [clip.video for clip in found]
        else:
            files = [self.folder / f"drawn{number}.mp4" for number in range(2)]
            seconds = self.format.num_frames / self.format.fps + 1.5
            for number, path in enumerate(files):
                frames = _draw(round(seconds * _SOURCE_FPS), self.format.height, self.format.width, seed=number)
                write_video(path, frames, _SOURCE_FPS)
        # Copies, so that no clip's entry serves another.
        clips = []
        for number in range(wanted):
            path = self.folder / f"clip{number}{files[0].suffix}"
            shutil.copyfile(files[number % len(files)], path)
            with path.open("ab") as file:
                file.write(number.to_bytes(8, "big"))
            clips.append(Clip(f"clip{number}", path, f"clip {number}"))
        return clips


def _describe_times(times: EncodingTimes | None, total_seconds: float) -> dict[str, Any]:
    if times is None:
        raise RuntimeError("nothing was encoded: the cache held everything")
    row = asdict(times) | {"busy_share": times.busy_share, "total_seconds": total_seconds}
    return row | {"items_per_second": times.num_items / times.wall_seconds}


def _draw(num_frames: int, height: int, width: int, *, seed: int) -> np.ndarray:
    """A textured picture that moves, with a little noise, uint8 [F, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    picture = F.interpolate(coarse, size=(height + num_frames, width + num_frames), mode="bicubic").clamp(0, 1)
    picture = (picture[0] * 240).to(torch.uint8).permute(1, 2, 0)
    noise = torch.randint(0, 12, (height, width, 3), generator=generator, dtype=torch.uint8)
    frames = [picture[n : n + height, n : n + width] + noise.roll(17 * n, 1) for n in range(num_frames)]
    return torch.stack(frames).numpy()


def describe(results: dict[str, Any]) -> str:
    """A short table."""
    conditions = results["conditions"]
    lines = [
        f"{conditions['model']}, {conditions['clip']}, {conditions['precision']}, {conditions['device']}, "
        f"torch {conditions['torch']}",
        "encoding one clip",
        *describe_ways(results["encoders"]),
    ]
    for part in ("clips", "captions"):
        row = results.get(part)
        if row is None:
            continue
        if "error" in row:
            lines.append(f"{part}: {row['error'][:200]}")
            continue
        lines.append(
            f"{part}: {row['num_items']} in {row['wall_seconds']:.1f} s ({row['items_per_second']:.2f}/s), "
            f"{row['total_seconds']:.1f} s with start-up; device busy {100 * row['busy_share']:.1f} %"
        )
    return "\n".join(lines)
