"""The optimizer, its learning rate, and the guard that keeps a bad step out of the weights without stopping the GPU.

Clipping, loss scaling and the finite check are one multiplication by a number on the device; AdamW's fused kernel
skips its update where the guard says so. The host learns of it at the next logging step.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from cogtune.config import OptimizerSettings, ScheduleSettings
from cogtune.muon import Muon

FIRST_LOSS_SCALE = 2.0**16
SCALE_GROWTH_STEPS = 2000
MAX_OVERFLOWS_IN_A_ROW = 20


def group_parameters(
    parameters: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings
) -> list[dict[str, Any]] | list[torch.nn.Parameter]:
    """Parameters for `make_optimizer`: one group for each learning rate, with its `ratio` to the schedule's."""
    if settings.lora_plus_ratio == 1.0:
        return list(parameters.values())
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in parameters.items():
        groups[".lora_B." in name].append(parameter)
    return [{"params": groups[False], "ratio": 1.0}, {"params": groups[True], "ratio": settings.lora_plus_ratio}]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group its part of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("ratio", 1.0)


def make_optimizer(
    parameters: list[dict[str, Any]] | list[torch.nn.Parameter], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Muon, or float32 AdamW, whose fused kernel is also what can skip a step on the device."""
    if settings.name == "muon":
        return Muon(
            parameters, lr=settings.learning_rate, momentum=settings.betas[0], weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate_at(step: int, max_steps: int, peak: float, schedule: ScheduleSettings) -> float:
    """Learning rate of step `step` (counted from 0): a pure function, so resuming needs no state."""
    warmup = min(100, max_steps // 10) if schedule.warmup_steps is None else schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    progress = (step - warmup) / max(1, max_steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1.0 - progress
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * shape)


class StepGuard:
    """Scales the loss (float16 only), unscales and clips gradients, and decides on the device whether a step counts.

    Without loss scaling, the first step with non-finite gradients and all later ones are skipped, so the weights stay
    those of the last good step until the host stops the run. With it, an overflow skips that step and halves the
    scale, as usual; only a run of overflows is fatal.
    """

    def __init__(self, device: torch.device, *, use_loss_scale: bool, max_grad_norm: float | None) -> None:
        self._use_scale, self._max_norm = use_loss_scale, max_grad_norm
        scale = FIRST_LOSS_SCALE if use_loss_scale else 1.0
        self.scale = torch.tensor(scale, device=device)
        self._good_in_a_row = torch.zeros((), device=device)
        self._bad_in_a_row = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        self._failed = torch.zeros((), device=device)

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        """Prepares the gradients for the step; returns their norm before clipping, float32 on the device."""
        gradients = self.collect(parameters)
        norm = self.measure(parameters, gradients) / self.scale
        good = norm.isfinite()
        factor = 1.0 / self.scale
        if self._max_norm is not None:
            factor = factor * (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
        if gradients:  # on the host where they wait there
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        bad = (~good).float()
        self._bad_in_a_row = (self._bad_in_a_row + 1) * bad
        if self._use_scale:
            skip = bad
            self._skipped += bad
            self._good_in_a_row = (self._good_in_a_row + 1) * (1 - bad)
            grow = (self._good_in_a_row >= SCALE_GROWTH_STEPS).float()
            self.scale = self.scale * (1 - 0.5 * bad) * (1 + grow)
            self._good_in_a_row = self._good_in_a_row * (1 - grow)
            self._failed = torch.maximum(self._failed, (self._bad_in_a_row >= MAX_OVERFLOWS_IN_A_ROW).float())
        else:
            self._failed = torch.maximum(self._failed, bad)
            skip = self._failed
        # Read by the fused AdamW kernel: 1 leaves weights and state as they are.
        optimizer.found_inf = skip.reshape(())  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        return norm

    def collect(self, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        """The gradients to work on."""
        return [p.grad for p in parameters if p.grad is not None]

    def measure(self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> torch.Tensor:
        """Their norm, still scaled."""
        del parameters
        return torch.nn.utils.get_total_norm(gradients)

    def has_failed(self) -> bool:
        """Whether the run must stop; waits for the device."""
        return bool(self._failed.item())

    @property
    def num_skipped(self) -> int:
        """Steps skipped by overflows of float16; waits for the device."""
        return int(self._skipped.item())

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale.item(), "good": self._good_in_a_row.item(), "skipped": self._skipped.item()}

    def load(self, state: dict[str, float]) -> None:
        """Puts a checkpoint's values back."""
        self.scale.fill_(state["scale"])
        self._good_in_a_row.fill_(state["good"])
        self._skipped.fill_(state["skipped"])
