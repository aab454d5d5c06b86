"""What a run draws at random, as pure functions of the seed and the global position of a sample.

Order of the clips, noise, timestep and dropped captions depend on nothing else: not on the number of GPUs, workers or
micro-batches, nor on how often the run was interrupted. So a resumed run needs only its position, and two layouts of
the same global batch see the same samples. Everything is drawn on the CPU: every device gets the same numbers.
"""

import bisect
import hashlib
import math
from fractions import Fraction

import torch

from cogtune.diffusion import NUM_TIMESTEPS


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts; different parts give unrelated generators."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator keyed by the parts."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))


class ClipOrder:
    """Which clip stands at which global position: one permutation per epoch, keyed by (seed, epoch).

    A clip of weight w appears w times an epoch; for a fraction, floor(w (e + 1)) - floor(w e) times in epoch e, so the
    count over any number of epochs is right to within one, and no sample is dropped or doubled by chance.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        self._weights = [Fraction(str(weight)) for weight in weights]
        if not weights or min(self._weights) < 0 or not any(self._weights):
            raise ValueError("at least one clip with a weight above zero is needed, and none below zero")
        self._seed = seed
        self._starts = [0]  # global position at which each epoch begins, grown on demand
        self._epoch: tuple[int, list[int]] | None = None

    def num_samples(self, num_epochs: int) -> int:
        """Samples in the first `num_epochs` epochs."""
        return sum(weight * num_epochs // 1 for weight in self._weights)

    def epoch_of(self, position: int) -> int:
        """The epoch that a global position belongs to."""
        while self._starts[-1] <= position:
            self._starts.append(self.num_samples(len(self._starts)))
        return bisect.bisect_right(self._starts, position) - 1

    def clip_at(self, position: int) -> int:
        """Index of the clip at a global position."""
        epoch = self.epoch_of(position)
        if self._epoch is None or self._epoch[0] != epoch:
            counts = [w * (epoch + 1) // 1 - w * epoch // 1 for w in self._weights]
            clips = [index for index, count in enumerate(counts) for _ in range(count)]
            order = torch.randperm(len(clips), generator=make_generator("order", self._seed, epoch))
            self._epoch = (epoch, [clips[i] for i in order.tolist()])
        return self._epoch[1][position - self._starts[epoch]]


class BucketOrder:
    """Which clip stands at which global position, where clips of different shapes can't share a batch.

    Positions come in groups of `group_size` aligned neighbours (an optimizer step's samples), and a group holds one
    bucket. Each bucket is a `ClipOrder` of its own, and its groups read on from where its last one ended. With n
    samples in its first e epochs, it has had floor(n / group_size) groups by then, and the groups of an epoch come in
    an order keyed by (seed, epoch). So no sample is dropped or doubled: after any number of epochs a bucket is less
    than one group behind. With one bucket this is `ClipOrder`.
    """

    def __init__(self, weights: list[float], buckets: list[int], seed: int, *, group_size: int) -> None:
        self._seed, self._group_size = seed, group_size
        self._clips = [[i for i, own in enumerate(buckets) if own == bucket] for bucket in range(max(buckets) + 1)]
        self._clips = [clips for clips in self._clips if any(weights[i] for i in clips)]
        if not self._clips:
            raise ValueError("at least one clip with a weight above zero is needed")
        # One bucket keeps the seed: the order of a run without buckets.
        seeds = [seed] if len(self._clips) == 1 else [derive_seed("bucket", seed, n) for n in range(len(self._clips))]
        self._orders = [
            ClipOrder([weights[i] for i in clips], own) for clips, own in zip(self._clips, seeds, strict=True)
        ]
        self._starts = [0]  # group at which each epoch begins, grown on demand
        self._epoch: tuple[int, list[tuple[int, int]]] | None = None

    def _count_groups(self, num_epochs: int) -> list[int]:
        """Of each bucket in the first epochs."""
        return [order.num_samples(num_epochs) // self._group_size for order in self._orders]

    def clip_at(self, position: int) -> int:
        """Index of the clip at a global position."""
        group, place = divmod(position, self._group_size)
        while self._starts[-1] <= group:
            self._starts.append(sum(self._count_groups(len(self._starts))))
        epoch = bisect.bisect_right(self._starts, group) - 1
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._arrange(epoch))
        bucket, number = self._epoch[1][group - self._starts[epoch]]
        return self._clips[bucket][self._orders[bucket].clip_at(number * self._group_size + place)]

    def _arrange(self, epoch: int) -> list[tuple[int, int]]:
        """The epoch's groups as (bucket, number of that bucket's group in the run)."""
        before, after = self._count_groups(epoch), self._count_groups(epoch + 1)
        waiting = [bucket for bucket, count in enumerate(before) for _ in range(after[bucket] - count)]
        order = torch.randperm(len(waiting), generator=make_generator("groups", self._seed, epoch)).tolist()
        groups = []
        for index in order:
            groups.append((waiting[index], before[waiting[index]]))
            before[waiting[index]] += 1
        return groups


def draw_timestep(seed: int, position: int, num_strata: int) -> int:
    """Uniform on 0..999; any `num_strata` aligned neighbours cover the range evenly, one in each stratum."""
    group, member = divmod(position, num_strata)
    stratum = torch.randperm(num_strata, generator=make_generator("strata", seed, group))[member].item()
    offset = torch.rand((), generator=make_generator("timestep", seed, position), dtype=torch.float64).item()
    return min(int((stratum + offset) * NUM_TIMESTEPS / num_strata), NUM_TIMESTEPS - 1)


def draw_caption_dropped(seed: int, position: int, probability: float) -> bool:
    """Whether the sample's caption is replaced by the null condition."""
    generator = make_generator("caption", seed, position)
    return torch.rand((), generator=generator, dtype=torch.float64).item() < probability


def draw_noise(
    seed: int, position: int | str, shape: tuple[int, ...], num_padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal float32 noise for the VAE's posterior, of `shape` [C, F, ...], and for the diffusion.

    That one has `num_padding` frames more, for latents that are padded at the front.
    """
    generator = make_generator("noise", seed, position)
    posterior_noise = torch.randn(shape, generator=generator)
    padded = shape if num_padding == 0 else (shape[0], shape[1] + num_padding, *shape[2:])
    return posterior_noise, torch.randn(padded, generator=generator)


def draw_image_dropped(seed: int, position: int, probability: float) -> bool:
    """Whether the sample's image is replaced by zero latents."""
    generator = make_generator("image dropped", seed, position)
    return torch.rand((), generator=generator, dtype=torch.float64).item() < probability


def draw_image_noise(
    seed: int, position: int | str, pixels: tuple[int, ...], latents: tuple[int, ...]
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Scale exp(N(-3, 0.5)) of an image's noise, and standard normal float32 noise for its pixels and its posterior."""
    generator = make_generator("image", seed, position)
    exponent = torch.randn((), generator=generator, dtype=torch.float64).item()
    posterior_noise = torch.randn(latents, generator=generator)
    return math.exp(-3.0 + 0.5 * exponent), torch.randn(pixels, generator=generator), posterior_noise
