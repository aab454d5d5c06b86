"""Training samples from the cache: which clip stands where, with its noise, timestep and caption, by global position.

Workers read, check and draw; the device only computes. Ranks and micro-batches take positions of one global sequence,
so 2 processes x batch 1, 1 x batch 2 and 1 x 2 accumulation steps see the same samples with the same noise.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cogtune.cache import Cache
from cogtune.conditions import ImageCondition, draw_condition, join_conditions
from cogtune.diffusion import pad_front
from cogtune.draws import BucketOrder, draw_caption_dropped, draw_noise, draw_timestep
from cogtune.errors import UserError
from cogtune.manifest import Clip

KEPT_BYTES = 256 << 20  # of read entries, in each worker
TENSORS = ("latents", "noise", "embeddings", "timesteps", "weights", "held")  # of a batch


@dataclass(frozen=True)
class Entry:
    """A clip and where the cache holds it."""

    clip: Clip
    latents_key: str
    text_key: str
    image_key: str | None = None
    """Only for image-to-video models."""


@dataclass
class Batch:
    """Samples on their way to the device; all tensors float32 but the embeddings."""

    latents: torch.Tensor  # [B, F, C, H, W], scaled, sampled from the VAE's posterior
    noise: torch.Tensor  # [B, F, C, H, W]
    embeddings: torch.Tensor  # [B, L, D], the null condition where the caption is dropped
    timesteps: torch.Tensor  # int64 [B]
    weights: torch.Tensor  # [B], of the samples' losses
    held: torch.Tensor  # bool [B], samples that are trained towards the base model's prediction
    positions: list[int]
    clips: list[Clip]
    dropped: list[bool]
    num_held: int
    image: ImageCondition | None = None

    def pin_memory(self) -> "Batch":
        """For the loader: page-locked copies, so that transfers don't wait."""
        for name in TENSORS:
            setattr(self, name, getattr(self, name).pin_memory())
        self.image = None if self.image is None else self.image.pin_memory()
        return self

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on the device."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS}
        moved["image"] = None if self.image is None else self.image.to(device)
        return replace(self, **moved)

    def release(self) -> None:
        """Gives the large tensors back; what describes the samples stays."""
        self.latents = self.noise = self.embeddings = torch.empty(0)
        self.image = None

    def describe(self) -> list[str]:
        """One line a sample for error messages: id, timestep, caption."""
        timesteps = self.timesteps.tolist()
        return [
            f"clip {clip.id!r}, timestep {t}, caption {'(dropped)' if drop else clip.caption[:120]!r}"
            for clip, t, drop in zip(self.clips, timesteps, self.dropped, strict=True)
        ]


def read_sample(cache: Cache, entry: Entry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, float32 [C, F, H, W], and the embeddings [L, D]."""
    moments, text = cache.read("latents", entry.latents_key), cache.read("text", entry.text_key)
    if moments is None or text is None:
        what = "latents" if moments is None else "caption"
        raise UserError(
            f"cache entry of clip {entry.clip.id!r} ({what}) is missing or was damaged and is removed; "
            "start the run again: the entry is made again and training resumes"
        )
    std = torch.exp(0.5 * moments["logvar"].float().clamp(-30.0, 20.0))
    return moments["mean"].float(), std, text["embeddings"]


def read_image(cache: Cache, entry: Entry) -> torch.Tensor:
    """The image that a clip starts from, uint8 [H, W, 3]."""
    assert entry.image_key is not None
    found = cache.read("images", entry.image_key)
    if found is None:
        raise UserError(
            f"cache entry of clip {entry.clip.id!r} (image) is missing or was damaged and is removed; "
            "start the run again: the entry is made again and training resumes"
        )
    return found["image"]


class TrainingSet(Dataset[Batch]):
    """Item p is the sample at global position p: a pure function of (seed, p) and the entries.

    Where clips have different formats, the `global_batch` samples of an optimizer step share one.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        cache: Cache,
        *,
        seed: int,
        scaling_factor: float,
        caption_dropout: float,
        timestep_strata: int,
        dropped_caption_key: str | None = None,
        prior_weight: float = 1.0,
        hold_prior: bool = False,
        patch_size_t: int | None = None,
        image_dropout: float = 0.0,
        global_batch: int = 1,
    ) -> None:
        """`hold_prior`: prior clips are trained towards the base model's predictions."""
        self._entries, self._cache, self._seed = list(entries), cache, seed
        self._scaling_factor = scaling_factor
        self._caption_dropout, self._strata = caption_dropout, timestep_strata
        self._dropped_caption_key = dropped_caption_key
        self._prior_weight, self._hold_prior = prior_weight, hold_prior
        self._patch_size_t, self._image_dropout = patch_size_t or 1, image_dropout
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._kept_bytes = 0
        self._empty_embeddings: torch.Tensor | None = None
        forms = list(dict.fromkeys(entry.clip.form for entry in entries))
        self.order = BucketOrder(
            [entry.clip.weight for entry in entries],
            [forms.index(entry.clip.form) for entry in entries],
            seed,
            group_size=global_batch,
        )

    def __getitem__(self, position: int) -> Batch:
        index = self.order.clip_at(position)
        entry = self._entries[index]
        mean, std, embeddings = self._read(index)
        num_padding = -mean.shape[1] % self._patch_size_t
        posterior_noise, noise = draw_noise(self._seed, position, tuple(mean.shape), num_padding)
        latents = pad_front((mean + std * posterior_noise) * self._scaling_factor, num_padding)
        dropped = draw_caption_dropped(self._seed, position, self._caption_dropout)
        timestep = draw_timestep(self._seed, position, self._strata)
        held = self._hold_prior and entry.clip.prior
        return Batch(
            latents=latents.transpose(0, 1)[None],
            noise=noise.transpose(0, 1)[None],
            embeddings=(self._null_embeddings(embeddings) if dropped else embeddings)[None],
            timesteps=torch.tensor([timestep]),
            weights=torch.tensor([self._prior_weight if entry.clip.prior else 1.0]),
            held=torch.tensor([held]),
            positions=[position],
            clips=[entry.clip],
            dropped=[dropped],
            num_held=int(held),
            image=self._draw_image(entry, position, (mean.shape[0], *mean.shape[2:])),
        )

    def prior_positions(self, count: int) -> list[int]:
        """The first global positions at which clips marked `prior` stand; there must be such clips."""
        found: list[int] = []
        position = 0
        while len(found) < count:
            if self._entries[self.order.clip_at(position)].clip.prior:
                found.append(position)
            position += 1
        return found

    def _draw_image(self, entry: Entry, position: int, latent_shape: tuple[int, ...]) -> ImageCondition | None:
        if entry.image_key is None:
            return None
        image = read_image(self._cache, entry)
        return draw_condition(image, latent_shape, seed=self._seed, position=position, dropout=self._image_dropout)

    def _read(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A clip's tensors; small data sets stay in this worker's memory after the first time."""
        if index in self._kept:
            return self._kept[index]
        tensors = read_sample(self._cache, self._entries[index])
        size = sum(tensor.nbytes for tensor in tensors)
        if self._kept_bytes + size <= KEPT_BYTES:
            self._kept[index], self._kept_bytes = tensors, self._kept_bytes + size
        return tensors

    def _null_embeddings(self, like: torch.Tensor) -> torch.Tensor:
        if self._dropped_caption_key is None:
            return torch.zeros_like(like)
        if self._empty_embeddings is None:
            empty = self._cache.read("text", self._dropped_caption_key)
            if empty is None:
                raise UserError("cache entry of the empty caption is missing; start the run again, it is made again")
            self._empty_embeddings = empty["embeddings"]
        return self._empty_embeddings


def join_samples(samples: list[Batch]) -> Batch:
    """One batch of several samples."""
    return Batch(
        latents=torch.cat([s.latents for s in samples]).contiguous(),
        noise=torch.cat([s.noise for s in samples]).contiguous(),
        embeddings=torch.cat([s.embeddings for s in samples]),
        timesteps=torch.cat([s.timesteps for s in samples]),
        weights=torch.cat([s.weights for s in samples]),
        held=torch.cat([s.held for s in samples]),
        positions=[p for s in samples for p in s.positions],
        clips=[c for s in samples for c in s.clips],
        dropped=[d for s in samples for d in s.dropped],
        num_held=sum(s.num_held for s in samples),
        image=join_conditions([s.image for s in samples]),
    )


class PositionSampler(Sampler[list[int]]):
    """Global positions of this rank's micro-batches from one optimizer step to another.

    Step s holds positions s G .. (s + 1) G - 1 for a global batch of G; rank r of n takes those that are r modulo n.
    """

    def __init__(
        self, *, first_step: int, last_step: int, batch_size: int, accumulation: int, rank: int, world_size: int
    ) -> None:
        self._steps = range(first_step, last_step)
        self._batch_size, self._accumulation = batch_size, accumulation
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        per_rank = self._batch_size * self._accumulation
        for step in self._steps:
            start = step * per_rank * self._world_size
            mine = [start + i * self._world_size + self._rank for i in range(per_rank)]
            for first in range(0, per_rank, self._batch_size):
                yield mine[first : first + self._batch_size]


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Schedulers and terminals signal the whole process group: the parent still needs its workers to save and end.

    Workers end with the parent in any case: torch watches it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    dataset: TrainingSet, sampler: PositionSampler, *, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """The training loader; its workers stay a few batches ahead of the device."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=join_samples,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        persistent_workers=False,
    )
