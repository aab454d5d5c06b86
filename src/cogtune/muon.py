"""Muon: a momentum whose singular values are all made nearly one, for the two matrices of each layer of an adapter.

Momentum, then five Newton-Schulz steps of Jordan et al. (kellerjordan.github.io/posts/muon), then the root-mean-square
of AdamW's updates (0.2 of the learning rate, arXiv:2502.16982), so that a learning rate means the same with both. The
steps run in float32 for all matrices of a shape at once: torch's own takes one after the other, in bfloat16, which
costs a small model hundreds of launches, and a CPU without bfloat16 products ten times the time.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_NUM_STEPS = 5
_UPDATE_RMS = 0.2
_SMALLEST_NORM = 1e-12


class Muon(torch.optim.Optimizer):
    """Decoupled weight decay, Nesterov's momentum; only matrices. State: `exp_avg`, float32 like the weight.

    A step is skipped, on the device, where `found_inf` says so (`optimization.StepGuard`).
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self, parameters: Iterable[Any], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        """Raises ValueError for a parameter that is no matrix."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"a parameter of shape {list(parameter.shape)} is no matrix")

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all weights that have a gradient."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, weights: list[Tensor], rate: float, momentum: float, decay: float) -> None:
        averages = [self._average(weight) for weight in weights]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        kept = torch.full((), rate, device=weights[0].device)
        if self.found_inf is not None:
            skip = self.found_inf.to(kept.device) > 0
            gradients = [torch.where(skip, average, own) for own, average in zip(gradients, averages, strict=True)]
            kept = torch.where(skip, 0.0, kept)
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, averages, momentum)
        if decay:
            torch._foreach_mul_(weights, 1 - kept * decay)  # pyright: ignore[reportCallIssue, reportArgumentType]
        for members in _by_shape(weights).values():
            updates = orthogonalize(torch.stack([_lie(directions[index]) for index in members]))
            updates *= kept * (_UPDATE_RMS * max(updates.shape[1:]) ** 0.5)
            for index, update in zip(members, updates, strict=True):
                weights[index].sub_(update if _lies(weights[index]) else update.t())

    def _average(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
        return state["exp_avg"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """[N, rows, columns], rows <= columns, with the same singular vectors and singular values of about 0.7 to 1.2.

    Those below a hundredth of a matrix's norm come out smaller.
    """
    first, third, fifth = _COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(_SMALLEST_NORM)
    for _ in range(_NUM_STEPS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x


def _by_shape(weights: Sequence[Tensor]) -> dict[tuple[int, int], list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault((min(weight.shape), max(weight.shape)), []).append(index)
    return groups


def _lies(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _lie(matrix: Tensor) -> Tensor:
    """As float32, its longer side across."""
    return (matrix if _lies(matrix) else matrix.t()).float()
