"""A pool of rendered clips in memory that worker processes fill and then keep renewing, for training the autoencoder.

Each clip is drawn from several times before it is replaced, so that rendering (about 8 ms a clip on one core) never
holds up training.
"""

import mmap
import multiprocessing
import os
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogtune.shapes.imagery import sample_imagery
from cogtune.shapes.reconstruction import to_pixels
from cogtune.shapes.world import HEIGHT, NUM_FRAMES, WIDTH


class ClipPool:
    """`clips` uint8 [size, F, H, W, 3]; the first `count_ready()` of them are rendered. Start it before CUDA.

    Where they are not `renewed`, the workers end when each clip was rendered once.
    """

    def __init__(self, seed: int, size: int, workers: int, *, renewed: bool = True) -> None:
        if not 1 <= workers <= size:
            raise ValueError(f"{workers} workers for {size} clips: there must be 1 worker or more, and as many clips")
        shape = (size, NUM_FRAMES, HEIGHT, WIDTH, 3)
        # Anonymous shared memory, which forked processes write into: /dev/shm can be small.
        self.clips: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self._rendered: NDArray[np.int64] = np.frombuffer(mmap.mmap(-1, 8 * workers), np.int64)
        self._renewed = renewed
        context = multiprocessing.get_context("fork")
        self._processes = [
            context.Process(target=self._fill, args=(seed, worker), daemon=True) for worker in range(workers)
        ]

    def _fill(self, seed: int, worker: int) -> None:
        os.nice(5)  # the training loop comes first
        slots = range(worker, len(self.clips), len(self._rendered))
        generation = 0
        while self._renewed or generation == 0:
            for slot in slots:
                self.clips[slot] = sample_imagery(seed, generation * len(self.clips) + slot)
                self._rendered[worker] += 1
            generation += 1

    def count_ready(self) -> int:
        """How many clips from the beginning have been rendered at least once."""
        return min(int(self._rendered.min()) * len(self._rendered), len(self.clips))

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


class DevicePool:
    """The rendered clips on the device, and batches drawn from them."""

    def __init__(self, pool: ClipPool, device: torch.device, seed: int) -> None:
        self.pool = pool
        self.host = torch.from_numpy(pool.clips)
        self.clips = torch.empty_like(self.host, device=device) if device.type == "cuda" else self.host
        # Not CUDA's default generator: a capture that failed could leave that one unusable.
        self.rng = torch.Generator(device).manual_seed(seed)
        self.count = self.next = 0

    def refresh(self, most: int = 2048) -> None:
        """Copies what was rendered since to the device: new clips first, then renewed ones, round and round."""
        ready = self.pool.count_ready()
        if self.count < len(self.host):
            start, stop = self.count, ready
            self.count = ready
        else:
            start, stop = self.next, min(self.next + most, len(self.host))
            self.next = stop % len(self.host)
        if self.clips is not self.host:  # a clip may be caught half renewed: harmless, a cut between two clips
            self.clips[start:stop].copy_(self.host[start:stop])

    def sample(self, batch_size: int) -> Tensor:
        """Pixels [B, 3, F, H, W] in [-1, 1]: each mirrored and reversed in time at random."""
        device = self.clips.device
        picked = torch.randint(self.count, (batch_size,), device=device, generator=self.rng)
        pixels = to_pixels(self.clips[picked])
        for dimension in (2, 4):
            chosen = torch.rand(batch_size, 1, 1, 1, 1, device=device, generator=self.rng) < 0.5
            pixels = torch.where(chosen, pixels.flip(dimension), pixels)
        return pixels
