"""What a run draws at random, as pure functions of the seed and the global position of a sample.

Order of the clips, noise, timestep and dropped captions depend on nothing else: not on the number of GPUs, workers or
micro-batches, nor on how often the run was interrupted. So a resumed run needs only its position, and two layouts of
the same global batch see the same samples. Everything is drawn on the CPU: every device gets the same numbers.
"""

import bisect
import hashlib
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


def draw_timestep(seed: int, position: int, num_strata: int, lowest: int = 0) -> int:
    """Uniform on lowest..999; any `num_strata` aligned neighbours cover the range evenly, one in each stratum."""
    group, member = divmod(position, num_strata)
    stratum = torch.randperm(num_strata, generator=make_generator("strata", seed, group))[member].item()
    offset = torch.rand((), generator=make_generator("timestep", seed, position), dtype=torch.float64).item()
    return min(lowest + int((stratum + offset) * (NUM_TIMESTEPS - lowest) / num_strata), NUM_TIMESTEPS - 1)


def draw_caption_dropped(seed: int, position: int, probability: float) -> bool:
    """Whether the sample's caption is replaced by the null condition."""
    generator = make_generator("caption", seed, position)
    return torch.rand((), generator=generator, dtype=torch.float64).item() < probability


def draw_noise(seed: int, position: int | str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal float32 tensors for the VAE's posterior and for the diffusion, each of `shape`."""
    generator = make_generator("noise", seed, position)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
