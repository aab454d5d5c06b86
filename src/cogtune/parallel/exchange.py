"""Moving tokens and heads between the ranks of a team: the all-to-all of Ulysses (arXiv:2309.14509), uneven parts too.

Every rank has some tokens of all heads; attention wants all tokens of some heads. `to_heads` goes there, q, k and v in
one message, and `to_tokens` comes back. Layouts are chosen so that what arrives is used as it lies: no copy on the way
to the attention kernel, one (out of the projections' kernels, when compiled) before each message.

The exchange is an operator of its own, so that the compiler keeps it whole and checkpoints can keep its result.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from cogtune.parallel.groups import find_group


@torch.library.custom_op("cogtune::exchange", mutates_args=())
def exchange(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """`x`: numbers for each rank of the group behind one another, `sent` of them; what they sent comes likewise."""
    y = x.new_empty(sum(received))
    # Not asynchronous to the stream, but to the host: on a GPU the call only queues.
    dist.all_to_all_single(y, x.contiguous(), received, sent, group=find_group(group))
    return y


@exchange.register_fake
def _(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return x.new_empty(sum(received))


def _keep_sizes(ctx, inputs, output) -> None:  # noqa: ANN001  # torch.library's own signature
    _, ctx.sent, ctx.received, ctx.group = inputs


def _send_back(ctx, grad: Tensor):  # noqa: ANN001, ANN202
    return exchange(grad.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


exchange.register_autograd(_send_back, setup_context=_keep_sizes)


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, tokens: tuple[int, ...], heads: tuple[int, ...], place: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, own tokens, H, D] to [B, all tokens, own heads, D]: views of one buffer.

    `tokens`, `heads`: how many each rank has before and after. Tokens come in the order of the ranks.
    """
    batch, own, _, width = value.shape
    rows = torch.stack([query, key, value], dim=2).transpose(0, 1)  # [own, B, 3, H, D]
    if len(set(heads)) == 1:
        parts = rows.unflatten(3, (len(heads), heads[0])).permute(3, 0, 1, 2, 4, 5).reshape(-1)
    else:
        parts = torch.cat([part.reshape(-1) for part in rows.split(heads, dim=3)])
    row = batch * 3 * width
    arrived = exchange(
        parts, [own * row * count for count in heads], [count * row * heads[place] for count in tokens], group
    )
    joined = arrived.view(sum(tokens), batch, 3, heads[place], width).transpose(0, 1)
    return joined[:, :, 0], joined[:, :, 1], joined[:, :, 2]


def to_tokens(x: Tensor, tokens: tuple[int, ...], heads: tuple[int, ...], place: int, group: str) -> Tensor:
    """Attention's output [B, all tokens, own heads, D] back to [B, own tokens, H, D]."""
    batch, _, own, width = x.shape
    row, count = batch * width, tokens[place]
    parts = x.transpose(0, 1).reshape(-1)  # [all tokens, B, own heads, D]
    arrived = exchange(parts, [row * own * size for size in tokens], [row * count * size for size in heads], group)
    if len(set(heads)) == 1:
        return arrived.view(len(heads), count, batch, own, width).permute(2, 1, 0, 3, 4).flatten(2, 3)
    pieces = arrived.split([row * count * size for size in heads])
    joined = [piece.view(count, batch, size, width) for piece, size in zip(pieces, heads, strict=True)]
    return torch.cat(joined, dim=2).transpose(0, 1)


def share_parts(x: Tensor, sizes: list[int], group: str) -> list[Tensor]:
    """Every rank's flat part, of `sizes`, on every rank, in their order; no gradient passes."""
    count = len(sizes)
    flat = x.reshape(1, -1).expand(count, -1).reshape(-1)
    return list(exchange(flat, [x.numel()] * count, sizes, group).split(sizes))
