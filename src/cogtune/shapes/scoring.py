"""How often a pipeline shows what its prompts ask for: videos of many prompts, read by the judge.

scores = score_prompts(pipeline, base_prompts(300, seed=0), seed=0)
print(scores.describe())
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cogtune.draws import make_generator
from cogtune.generation import Pipeline, load_adapters, load_pipeline, place_pipeline
from cogtune.models import find_folder, read_facts
from cogtune.shapes.captions import Prompt
from cogtune.shapes.judge import Reading, read_video
from cogtune.shapes.world import HEIGHT, NUM_FRAMES, WIDTH

TEXT_LENGTH = 32
NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 3.0


@dataclass
class Scores:
    """The judge's counts over a list of prompts."""

    num_videos: int = 0
    shape: int = 0
    colour: int = 0
    motion: int = 0
    background: int = 0
    right: int = 0
    """Shape, colour and motion all as asked."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why videos were unreadable, by how often."""

    def add(self, prompt: Prompt, reading: Reading) -> bool:
        """Counts one video; True where shape, colour and motion are right."""
        matches = {name: getattr(prompt, name) == getattr(reading, name) for name in ("shape", "colour", "motion")}
        for name, match in matches.items():
            setattr(self, name, getattr(self, name) + match)
        self.background += prompt.background == reading.background
        self.num_videos += 1
        self.right += all(matches.values())
        if reading.reason:
            self.reasons[reading.reason] += 1
        return all(matches.values())

    def share(self, name: str = "right") -> float:
        """A count as a part of the videos, 0..1."""
        return getattr(self, name) / max(self.num_videos, 1)

    def to_plain(self) -> dict[str, float | int]:
        """Shares and the number of videos, for JSON."""
        names = ("right", "shape", "colour", "motion", "background")
        return {"num_videos": self.num_videos} | {name: round(self.share(name), 4) for name in names}

    def describe(self) -> str:
        """One line in percent."""
        parts = ", ".join(f"{name} {100 * self.share(name):.1f} %" for name in ("shape", "colour", "motion"))
        return f"right {100 * self.share():.1f} % of {self.num_videos} ({parts})"


def load_scored_pipeline(model: str, lora: Path | None, device: torch.device) -> Pipeline:
    """A pipeline in float32 on the device, silent, with an adapter if one is given."""
    pipeline = load_pipeline(read_facts(find_folder(model)), dtype=torch.float32)
    load_adapters(pipeline, [(lora, 1.0)] if lora else [])
    place_pipeline(pipeline, device, vae_tiling=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def default_batch_size(device: torch.device) -> int:
    """Videos at once: many on a GPU, which a single small one leaves idle; a CPU gains nothing."""
    return 50 if device.type == "cuda" else 1


def sample_prompts(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    batch_size: int = 1,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
) -> Iterator[NDArray[np.uint8]]:
    """One video for each prompt, uint8 RGB [F, H, W, 3]; its noise depends on `seed` and its place in the list only."""
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        videos = pipeline(
            prompt=batch,
            num_frames=NUM_FRAMES,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=TEXT_LENGTH,
            generator=[make_generator("score", seed, start + index) for index in range(len(batch))],
            output_type="np",
        ).frames  # pyright: ignore[reportAttributeAccessIssue]
        for video in videos:
            yield (np.asarray(video) * 255).round().clip(0, 255).astype(np.uint8)


@torch.no_grad()
def score_prompts(
    pipeline: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    batch_size: int = 1,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
) -> Scores:
    """Generates a video of every prompt and counts what the judge reads."""
    scores = Scores()
    videos = sample_prompts(
        pipeline,
        [prompt.text for prompt in prompts],
        seed=seed,
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    for prompt, frames in zip(prompts, videos, strict=True):
        scores.add(prompt, read_video(frames))
    return scores
