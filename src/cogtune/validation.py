"""Validation: evaluation loss at nine timesteps on held-out clips, and videos of fixed prompts and seeds.

All noise is keyed by clip and timestep, not by the run's position, so validating changes nothing in the run, and
losses of different steps, runs and GPU counts compare. Clips and videos are spread over the ranks.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogtune import models
from cogtune.cache import Cache
from cogtune.conditions import clean_condition
from cogtune.dataset import Batch, Entry, read_image, read_sample
from cogtune.denoiser import Denoiser
from cogtune.diffusion import NUM_TIMESTEPS, pad_front
from cogtune.draws import draw_noise
from cogtune.encoding import release_memory
from cogtune.generation import decode_latents, generate_latents, make_pipeline
from cogtune.image_encoder import ImageEncoder
from cogtune.models import ModelFacts
from cogtune.placement import make_coder, release_blocks
from cogtune.video import write_video
from cogtune.video_request import Request

_REQUESTS = "requests.json"
QUANTILES = tuple(round(0.1 * k, 1) for k in range(1, 10))


def quantile_timestep(quantile: float) -> int:
    """The integer timestep at a quantile of 0..999."""
    return round(quantile * (NUM_TIMESTEPS - 1))


@contextmanager
def evaluation_mode(transformer: torch.nn.Module) -> Iterator[None]:
    """No dropout inside; the mode before is restored."""
    training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(training)


@torch.no_grad()
def evaluate(
    transformer: torch.nn.Module,
    denoiser: Denoiser,
    entries: Sequence[Entry],
    cache: Cache,
    *,
    facts: ModelFacts,
    device: torch.device,
    num_own: int | None = None,
) -> torch.Tensor:
    """Sums of the unweighted v loss at each quantile, and the number of clips, float64 [10] on the device.

    Images are as sampling has them: clean, and never dropped. Entries after the first `num_own` are gone through and
    don't count (`parallel.lockstep`).
    """
    sums = torch.zeros(len(QUANTILES) + 1, dtype=torch.float64, device=device)
    with evaluation_mode(transformer):
        for number, entry in enumerate(entries):
            counts = num_own is None or number < num_own
            mean, _, embeddings = read_sample(cache, entry)
            padded = pad_front(mean * facts.scaling_factor, facts.num_padding(mean.shape[1]))
            latents = padded.transpose(0, 1)[None]
            image = None
            if facts.takes_image:
                image = clean_condition(
                    read_image(cache, entry), (mean.shape[0], *mean.shape[2:]), key=f"evaluation:{entry.clip.id}"
                )
            for index, quantile in enumerate(QUANTILES):
                _, noise = draw_noise(0, f"evaluation:{entry.clip.id}:{quantile}", tuple(latents.shape))
                batch = Batch(
                    latents,
                    noise,
                    embeddings[None],
                    torch.tensor([quantile_timestep(quantile)]),
                    torch.ones(1),
                    torch.tensor([False]),
                    [0],
                    [entry.clip],
                    [False],
                    0,
                    image,
                ).to(device)
                sums[index] += denoiser.losses(transformer, batch, weighted=False)[0].double() * counts
            sums[-1] += counts
    return sums


@dataclass(frozen=True)
class VideoJob:
    """One validation video: its number among the prompts, what to make, and where its embeddings are."""

    number: int
    request: Request
    text_key: str
    negative_key: str

    def describe(self) -> dict[str, Any]:
        """What was asked for, as saved beside the videos."""
        return {name: value for name, value in asdict(self.request).items() if value is not None}

    def file_name(self, suffix: str = "") -> str:
        """`<nn>-<seed>.mp4`."""
        return f"{self.number:02d}-{self.request.seed}{suffix}.mp4"


def write_requests(folder: Path, jobs: Sequence[VideoJob]) -> None:
    """Notes beside a step's videos what each was asked to show."""
    text = json.dumps({job.file_name(): job.describe() for job in jobs}, indent=1)
    (folder / _REQUESTS).write_text(text, encoding="utf-8")


def read_requests(folder: Path) -> dict[str, dict[str, Any]]:
    """What `write_requests` noted, by file name; nothing where the step has no videos."""
    path = folder / _REQUESTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def generate_videos(
    transformer: torch.nn.Module,
    jobs: Sequence[VideoJob],
    folder: Path,
    cache: Cache,
    facts: ModelFacts,
    *,
    device: torch.device,
    dtype: torch.dtype,
    autocast: bool,
    quiet: bool,
    image_encoder: ImageEncoder | None = None,
    num_own: int | None = None,
    decode: bool = True,
) -> None:
    """Generates this rank's jobs into the folder; `image_encoder` for image-to-video models. Jobs after the first
    `num_own` are sampled along and dropped (`parallel.lockstep`).

    Ranks that share a video's tokens all have its job, and one of them the task to `decode`.

    The VAE comes onto the device only to decode, after all latents are sampled and streamed weights have left, frame
    by frame where memory is short (by tiles on a CPU), so the peak stays near that of sampling.
    """
    if not jobs:
        return
    pipeline = make_pipeline(
        facts,
        transformer=transformer,
        scheduler=models.load_scheduler(facts),
        vae=None if image_encoder is None else image_encoder.vae,
    )
    pipeline.set_progress_bar_config(disable=True)
    latents: list[torch.Tensor] = []
    with evaluation_mode(transformer), torch.autocast(device.type, dtype, enabled=autocast):
        for job in tqdm(jobs, "videos", unit="video", disable=quiet, leave=False):
            embeddings = [_read_embeddings(cache, key).to(device, dtype) for key in (job.text_key, job.negative_key)]
            latents.append(generate_latents(pipeline, job.request, *embeddings).cpu())
    release_blocks(transformer)
    release_memory(device)
    jobs = jobs[:num_own]
    if not jobs or not decode:
        return
    vae = models.load_vae(facts, dtype).to(device)  # pyright: ignore[reportArgumentType]
    vae.enable_tiling()
    pixels = max(job.request.height * job.request.width for job in jobs)
    coder = make_coder(vae, pixels=pixels) if device.type == "cuda" else None
    for job, sample in zip(jobs, latents, strict=True):
        frames = decode_latents(vae, sample, facts.scaling_factor, coder)
        write_video(folder / job.file_name(), frames, facts.fps)
    del vae, coder
    release_memory(device)


def _read_embeddings(cache: Cache, key: str) -> torch.Tensor:
    entry = cache.read("text", key)
    if entry is None:
        raise RuntimeError(f"embeddings {key} left the cache during the run; keep data.cache_dir while training")
    return entry["embeddings"]


def mean_losses(sums: torch.Tensor) -> dict[str, float] | None:
    """Mean loss by quantile from the sums over all ranks, or None where no clip was held out."""
    total = sums.tolist()
    if total[-1] == 0:
        return None
    return {str(quantile): value / total[-1] for quantile, value in zip(QUANTILES, total, strict=False)}
