"""A frozen linear layer and its low-rank update as one matrix product, forward and backward.

    y = x W' + b + (x A') B'  =  [x, x A'] [W, B]' + b

Added apart, the update costs three more passes over y, which is memory traffic and no arithmetic. Stacked along the
inner dimension it costs rank / width more arithmetic instead, and its sum is rounded once. The backward pass takes the
gradients of x and of x A' out of one product in the same way, and makes no gradient for the frozen weight.

On a CPU, where a small model's rank is no small part of its width, W + B A is less arithmetic: the sum is made once for
all rows, and the gradients of A and B come from the sum's. In 16 bits the sum is rounded as a merged adapter is: of an
update below a five-hundredth of a weight the forward pass sees little (docs/LOG.md). float32 is a CPU's default.
"""

from typing import Any

import torch
import torch.nn.functional as F

ALIGNMENT = 8
"""Elements of 16 bits in the 16 bytes that tensor cores want rows to be aligned to."""


def adapted_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """`x` [..., in] times the frozen `weight` [out, in] plus `up` [out, r] `down` [r, in], all of one precision."""
    if x.device.type == "cpu" and sum_is_cheaper(x.shape[:-1].numel(), weight.shape[0], weight.shape[1], len(down)):
        return F.linear(x, torch.addmm(weight, up, down), bias)
    down, up = pad_rank(down, up)
    y = _AdaptedLinear.apply(x.flatten(0, -2), weight, bias, down, up)
    assert isinstance(y, torch.Tensor)
    return y.unflatten(0, x.shape[:-1])


def sum_is_cheaper(num_rows: int, num_outputs: int, num_inputs: int, rank: int) -> bool:
    """Whether W + B A and a layer of it take less, forward and backward, than the update apart.

    By multiplications; the copies that stacking makes of rows and weights count for a tenth more.
    """
    apart = 1.1 * num_rows * (2 * num_inputs * num_outputs + 3 * rank * (num_inputs + num_outputs))
    return 3 * (num_rows + rank) * num_inputs * num_outputs < apart


def pad_rank(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same update with zeros up to a rank that keeps rows aligned."""
    missing = -down.shape[0] % ALIGNMENT
    return (F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))) if missing else (down, up)


def stack_updates(
    updates: list[tuple[torch.Tensor, torch.Tensor] | None], out_features: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) of several layers with one input as those of one layer; `None` for a layer without an update.

    The downs are stacked; the ups stand on a diagonal of blocks.
    """
    downs = [update[0] for update in updates if update is not None]
    rank, first, rows = sum(down.shape[0] for down in downs), 0, []
    for update, size in zip(updates, out_features, strict=True):
        if update is None:
            rows.append(downs[0].new_zeros(size, rank))
        else:
            own = update[1].shape[1]
            rows.append(F.pad(update[1], (first, rank - first - own)))
            first += own
    return torch.cat(downs), torch.cat(rows)


def multiply_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [N, out] of `x` [N, in], and x A' [N, r]."""
    hidden = x @ down.t()
    if x.shape[1] <= weight.shape[0]:
        return F.linear(torch.cat([x, hidden], dim=1), torch.cat([weight, up], dim=1), bias), hidden
    # A copy of the wide input would be more traffic than the narrow output's.
    return torch.addmm(F.linear(x, weight, bias), hidden, up.t()), hidden


def multiply_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x`, `down` and `up` from that of the output [N, out]."""
    both = grad @ torch.cat([weight, up], dim=1)
    width = x.shape[1]
    grad_hidden = both[:, width:]
    grad_x = both[:, :width] + grad_hidden @ down
    return grad_x, grad_hidden.t() @ x, grad.t() @ hidden


@torch.library.custom_op("cogtune::zero_after", mutates_args=())
def zero_after(other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A zero of the type of `like` that the compiler can't have before it has `other`.

    What a zero that hangs on the incoming gradient is added to is made in the backward pass, and again there where the
    forward pass has made it too. The compiler would see that both are the same, and keep it for all layers.
    """
    return like.new_zeros(())


@zero_after.register_fake
def _(_other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(())


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        y, hidden = multiply_forward(x, weight, bias, down, up)
        ctx.save_for_backward(x, hidden, weight, down, up)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, hidden, weight, down, up = ctx.saved_tensors
        # [W, B] is stacked again: kept for all layers of 5B it would take 3.2 GB.
        grad_x, grad_down, grad_up = multiply_backward(grad, x, hidden, weight, down, up + zero_after(grad, up))
        return grad_x, None, None, grad_down, grad_up
