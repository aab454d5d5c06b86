"""Skips work that changes little from one sampling step to the next. Each way changes the video; none is on unasked.

first-block   The first block always runs. Where it changes the tokens nearly as at the last step that ran in full, the
              change that all other blocks would make is added instead of running them.
guidance      The half without the prompt runs on every n-th step only; in between, its distance to the half with the
              prompt is added.

What is added goes on as a line from what it was at the last two steps that ran in full (as TaylorSeer does in its first
order, arXiv:2503.06923): nearer than what it was at the last one (docs/benchmarks.md), for one tensor more.

The first and last steps of a video always run in full. `kinds` says afterwards what each step did.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CacheName = Literal["none", "first-block", "guidance", "both"]
RunBlocks = Callable[[int, int | None, Tensor, Tensor], Tensor]
"""Blocks first .. last - 1 (None: to the end) on tokens [B, N, C] with the timestep's embedding [B, E]."""
StepKind = Literal["full", "one half", "first block", "first block of one half"]


@dataclass(frozen=True)
class CacheSettings:
    """What may be skipped."""

    threshold: float | None = None
    """Largest relative change of the first block's effect with which the others are skipped; None: never."""
    max_skipped: int = 3
    """Steps in a row that may skip the other blocks."""
    guidance_interval: int = 1
    """Steps from one run of the half without the prompt to the next."""
    num_first_steps: int = 4
    """Steps at the start that run in full: the layout of the video is decided there."""
    num_last_steps: int = 2


def make_settings(
    name: CacheName, *, threshold: float, guidance_interval: int, max_skipped: int = 3
) -> CacheSettings | None:
    """The settings of a named way; None where nothing is skipped."""
    if name == "none":
        return None
    return CacheSettings(
        threshold=threshold if name in ("first-block", "both") else None,
        max_skipped=max_skipped,
        guidance_interval=guidance_interval if name in ("guidance", "both") else 1,
    )


class _Trend:
    """A tensor that changes slowly and is known at some steps; after the last two it goes on as a line."""

    def __init__(self) -> None:
        self._known: list[tuple[int, Tensor]] = []

    def add(self, step: int, value: Tensor) -> None:
        """The tensor [B, N, C] at a step."""
        self._known = [*self._known, (step, value)][-2:]

    def __bool__(self) -> bool:
        return bool(self._known)

    def at(self, step: int, size: int) -> Tensor:
        """What it may be at a later step, for the last `size` samples."""
        (second, value), *earlier = reversed(self._known)
        value = value[-size:]
        if not earlier or len(earlier[0][1]) < size:
            return value
        first, before = earlier[0]
        return torch.lerp(before[-size:], value, (step - first) / (second - first))  # a weight above 1


class StepCache:
    """What one video's steps keep for the next ones. The two halves of guidance are one batch: without, with prompt."""

    def __init__(self, settings: CacheSettings, add_up: Callable[[Tensor], Tensor] | None = None) -> None:
        """`add_up`: sums over the ranks that share a video, which must agree on what is skipped."""
        self.settings, self._add_up = settings, add_up
        self.kinds: list[StepKind] = []
        self._num_steps = 0
        self._clear()

    def start(self, num_steps: int) -> None:
        """Forgets the last video; `num_steps` are to come."""
        self._num_steps = num_steps
        self.kinds = []
        self._clear()

    def _clear(self) -> None:
        self._head: Tensor | None = None  # the first block's change at the last step that ran in full
        self._tail = _Trend()  # the other blocks' change there
        self._guidance = _Trend()  # [1, N, C], half without the prompt minus half with it

    def describe(self) -> str:
        """How many steps did what: `50 steps: 30 full, 20 first block`."""
        counts = Counter(self.kinds)
        return f"{len(self.kinds)} steps: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())

    def run(self, run: RunBlocks, joint: Tensor, temb: Tensor) -> Tensor:
        """One step's blocks."""
        step = len(self.kinds)
        if not 0 <= step < self._num_steps:
            raise RuntimeError(f"step {step} of {self._num_steps}: `start` was not called for this video")
        free = self.settings.num_first_steps <= step < self._num_steps - self.settings.num_last_steps
        halved = self._may_halve(step, joint) if free else False
        if halved:
            joint, temb = joint[1:], temb[1:]
        head = run(0, 1, joint, temb)
        change = head - joint
        skipped = free and self._may_skip(change)
        if skipped:
            output = head + self._tail.at(step, len(head))
        else:
            output = run(1, None, head, temb)
            if self.settings.threshold is not None:
                self._head = change
                self._tail.add(step, output - head)
        self.kinds.append(_name(skipped=skipped, halved=halved))
        if halved:
            return torch.cat([output + self._guidance.at(step, 1), output])
        if len(output) == 2 and self.settings.guidance_interval > 1:
            self._guidance.add(step, output[:1] - output[1:])
        return output

    def _may_halve(self, step: int, joint: Tensor) -> bool:
        interval = self.settings.guidance_interval
        phase = (step - self.settings.num_first_steps + 1) % interval
        return interval > 1 and len(joint) == 2 and bool(self._guidance) and phase != 0

    def _may_skip(self, change: Tensor) -> bool:
        if self.settings.threshold is None or self._head is None or len(self._head) < len(change):
            return False
        recent = self.kinds[-self.settings.max_skipped :]
        if len(recent) == self.settings.max_skipped and all("first block" in kind for kind in recent):
            return False
        before = self._head[-len(change) :]
        sums = torch.stack([x.abs().sum(dtype=torch.float32) for x in (change - before, before)])
        if self._add_up is not None:
            sums = self._add_up(sums)
        return bool(sums[0] < self.settings.threshold * sums[1])


def _name(*, skipped: bool, halved: bool) -> StepKind:
    if skipped:
        return "first block of one half" if halved else "first block"
    return "one half" if halved else "full"
