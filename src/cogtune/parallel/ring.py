"""Ring attention (arXiv:2310.01889): every rank keeps its queries, and keys and values travel once around the team.

Works for any number of heads. Parts are joined by their log-sum-exp in float32. In the backward pass the gradients of
keys and values travel along and come home. The next part is on its way while the present one is computed with.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from cogtune.parallel.attention_kernels import attend_part, attend_part_backward, choose_kernel
from cogtune.parallel.groups import find_group


class _Ring:
    """Sends to the next rank of a team what came from the one before."""

    def __init__(self, name: str) -> None:
        self._group = find_group(name)
        self.size, self.place = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._next = dist.get_global_rank(self._group, (self.place + 1) % self.size)
        self._before = dist.get_global_rank(self._group, (self.place - 1) % self.size)

    def pass_on(self, sent: Tensor, received: Tensor) -> list[dist.Work]:
        """Starts the transfers; `wait` on what is returned before `received` is read or `sent` is written."""
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, self._next, self._group),
                dist.P2POp(dist.irecv, received, self._before, self._group),
            ]
        )


def _wait(transfers: list[dist.Work]) -> None:
    for transfer in transfers:
        transfer.wait()  # on a GPU the stream waits, not the host


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty_part(like: Tensor, num_tokens: int) -> Tensor:
    parts, batch, _, heads, width = like.shape
    return like.new_empty(parts, batch, num_tokens, heads, width)


@torch.library.custom_op("cogtune::ring_attention", mutates_args=())
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, tokens: list[int], group: str, backend: str
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, own tokens, H, D] to the attention over all tokens, [B, own tokens, H, D], and its lse [B, H, own].

    `tokens`: how many each rank of the group has. `backend`: one of `attention_backends`.
    """
    ring, kernel = _Ring(group), choose_kernel(backend, query.device)
    part = torch.stack([key, value])  # [2, B, S, H, D]
    q = query.transpose(1, 2)
    out = lse = None
    for step in range(ring.size):
        coming, transfers = part, []
        if step + 1 < ring.size:
            coming = _empty_part(part, tokens[(ring.place - step - 1) % ring.size])
            transfers = ring.pass_on(part, coming)
        own, own_lse = attend_part(q, part[0].transpose(1, 2), part[1].transpose(1, 2), kernel)
        if out is None or lse is None:
            out, lse = own.to(_wide(own.dtype)), own_lse
        else:
            share = torch.sigmoid(own_lse - lse)[..., None]
            out = torch.lerp(out, own.to(out.dtype), share.to(out.dtype))
            lse = torch.logaddexp(lse, own_lse)
        _wait(transfers)
        part = coming
    assert out is not None and lse is not None
    # Memory of their own, as the fake one says.
    return (
        out.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format, copy=True),
        lse.clone(memory_format=torch.contiguous_format),
    )


@ring_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tokens: list[int], group: str, backend: str) -> tuple[Tensor, Tensor]:
    batch, count, heads, _ = query.shape
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, heads, count), dtype=_wide(query.dtype)),
    )


@torch.library.custom_op("cogtune::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tokens: list[int],
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v [B, own tokens, H, D]."""
    ring, kernel = _Ring(group), choose_kernel(backend, query.device)
    part = torch.stack([key, value])
    grad, q, whole = (x.transpose(1, 2) for x in (grad, query, out))
    wide = _wide(query.dtype)
    grad_query: Tensor | None = None
    grad_part: Tensor | None = None  # on its way, of the part that comes next
    homeward: list[dist.Work] = []
    sent: Tensor | None = None
    for step in range(ring.size):
        coming, transfers = part, []
        if step + 1 < ring.size:
            coming = _empty_part(part, tokens[(ring.place - step - 1) % ring.size])
            transfers = ring.pass_on(part, coming)
        own = attend_part_backward(grad, q, part[0].transpose(1, 2), part[1].transpose(1, 2), whole, lse, kernel)
        grad_query = own[0].to(wide) if grad_query is None else grad_query.add_(own[0])
        mine = torch.stack([x.transpose(1, 2).to(wide) for x in own[1:]])
        if grad_part is not None:
            _wait(homeward)
            mine += grad_part
        # The part came from here: its gradient goes on after it, and is home after the last step.
        grad_part = _empty_part(mine, tokens[(ring.place - step - 1) % ring.size])
        homeward, sent = ring.pass_on(mine, grad_part), mine  # which must live until it is away
        _wait(transfers)
        part = coming
    _wait(homeward)
    del sent
    assert grad_query is not None and grad_part is not None
    return (
        grad_query.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format, copy=True),
        grad_part[0].to(key.dtype, copy=True),
        grad_part[1].to(value.dtype, copy=True),
    )


@ring_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_more: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001  # torch.library's own signature
    query, key, value, ctx.tokens, ctx.group, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, *output)


def _differentiate(ctx, grad: Tensor, _grad_lse: Tensor):  # noqa: ANN001, ANN202
    grads = ring_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.tokens, ctx.group, ctx.backend)
    return *grads, None, None, None


ring_attention.register_autograd(_differentiate, setup_context=_keep)
