"""One sample's tokens spread over the ranks of a team, around a transformer that knows nothing of it.

    patch_embed   as ever, on all tokens; then each rank keeps its part of the text and of the video
    blocks        on that part; only attention talks to the other ranks (`TeamAttention`)
    proj_out      on that part; then every rank gets everybody's 64 numbers a token, and the same prediction and loss

Gradients: with n ranks, the gather's backward gives each rank n times the gradient of its own part, without a message,
and the split's is local. So the ordinary average of weight gradients over ALL ranks, which data parallel training takes
anyway, is the gradient of one GPU.

For sampling with guidance, a team may have two halves: the first has the samples without the prompt, the second those
with it, and one exchange gives everybody both predictions.
"""

import contextlib
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from cogtune.attention_backends import SDPA_BACKENDS, Backend
from cogtune.parallel.exchange import share_parts, to_heads, to_tokens
from cogtune.parallel.ranks import TokenParts, split_evenly
from cogtune.parallel.ring import ring_attention

Way = Literal["ulysses", "ring"]
LARGEST_IMBALANCE = 1.1
"""`auto` exchanges heads where the rank with the most has at most this many times its fair share. Not measured yet."""


def choose_way(wanted: Literal["auto"] | Way, num_heads: int, size: int) -> Way:
    """Heads are exchanged where they divide, or nearly do; else keys and values go around."""
    if wanted != "auto":
        return wanted
    return "ulysses" if -(-num_heads // size) * size <= LARGEST_IMBALANCE * num_heads else "ring"


def attention_shape(num_heads: int, tokens: int, size: int, way: Way) -> tuple[int, int]:
    """Heads and tokens that one rank's kernel sees, of so many in all; the most where they don't divide."""
    if way == "ulysses":
        return -(-num_heads // size), tokens
    return num_heads, -(-tokens // size)


class TeamAttention:
    """Attention over all tokens of a team, of which each rank has its part. `tokens` is set before each pass."""

    def __init__(self, group: dist.ProcessGroup, way: Way, num_heads: int) -> None:
        self.size, self.place = dist.get_world_size(group), dist.get_rank(group)
        self.name = group.group_name
        assert way == "ring" or num_heads >= self.size, f"{num_heads} heads can't be spread over {self.size} ranks"
        self.way: Way = way
        self.heads = split_evenly(num_heads, self.size)
        self.tokens: tuple[int, ...] = ()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, backend: Backend) -> Tensor:
        """q, k, v [B, own tokens, H, D] to the same; what autocast left in float32 is cast as attention would."""
        query, key = query.to(value.dtype), key.to(value.dtype)
        if self.way == "ring":
            return ring_attention(query, key, value, list(self.tokens), self.name, backend)[0]
        layout = self.tokens, self.heads, self.place, self.name
        return to_tokens(attend_plainly(*to_heads(query, key, value, *layout), backend), *layout)


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, backend: Backend) -> Tensor:
    """Attention of q, k, v [B, S, H, D] on this device alone, [B, S, H, D]."""
    backends = SDPA_BACKENDS[backend]
    with sdpa_kernel(backends) if backends else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return y.transpose(1, 2)


class _Gather(torch.autograd.Function):
    """Everybody's part on every rank; the gradient of the own part, times their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: str, place: int) -> tuple[Tensor, ...]:
        ctx.place, ctx.shape = place, x.shape
        return tuple(share_parts(x, sizes, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return len(grads) * grads[ctx.place].view(ctx.shape), None, None, None


class SplitSequence:
    """Lets a transformer work on its rank's part of every sample, until `remove`.

    `group`: the team. With `halves` of 2 its first half takes the first half of each batch, and the second the other;
    `attention` joins the ranks of one half, or is None where a half is one rank.
    """

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        group: dist.ProcessGroup,
        attention: TeamAttention | None,
        *,
        halves: Literal[1, 2] = 1,
    ) -> None:
        self._name, self._attention, self._halves = group.group_name, attention, halves
        self._size = dist.get_world_size(group)
        self._place_in_team = dist.get_rank(group)
        self._num_parts = self._size // halves
        self._half, self._place = divmod(self._place_in_team, self._num_parts)
        assert (attention is None) == (self._num_parts == 1)
        self._text = torch.empty(0)
        self._parts = TokenParts((), ())
        self._rotary: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._handles = [
            transformer.register_forward_pre_hook(self._enter, with_kwargs=True),
            transformer.patch_embed.register_forward_pre_hook(self._see_all),
            transformer.patch_embed.register_forward_hook(self._keep_part),
            transformer.proj_out.register_forward_hook(self._gather),
        ]

    def remove(self) -> None:
        """The transformer computes whole samples again."""
        for handle in self._handles:
            handle.remove()

    def _own_samples(self, x: Tensor) -> Tensor:
        return x.chunk(self._halves)[self._half] if self._halves > 1 else x

    def _enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The blocks see as many text tokens as there are here, and their positions."""
        assert not args, "called by names, as our denoiser and the pipelines do"
        text, timestep, rotary = kwargs["encoder_hidden_states"], kwargs["timestep"], kwargs.get("image_rotary_emb")
        assert self._halves == 1 or (len(text) % 2 == 0 and not torch.is_grad_enabled()), "two halves, for sampling"
        self._text = text
        first, last = TokenParts.of(text.shape[1], 0, self._num_parts).text_range(self._place)
        changes = {"encoder_hidden_states": text[:, first:last], "image_rotary_emb": self._cut_rotary(rotary, text)}
        if self._halves > 1:
            changes["timestep"] = self._own_samples(timestep.expand(len(text)))
        return args, kwargs | changes

    def _cut_rotary(self, rotary: tuple[Tensor, Tensor] | None, text: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same object for the same tables, which their users rely on."""
        if rotary is None:
            return None
        if self._rotary is None or self._rotary[0] is not rotary[0]:
            parts = TokenParts.of(text.shape[1], len(rotary[0]), self._num_parts)
            first, last = parts.video_range(self._place)
            self._rotary = rotary[0], (rotary[0][first:last], rotary[1][first:last])
        return self._rotary[1]

    def _see_all(self, _module: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._own_samples(self._text), self._own_samples(args[1])

    def _keep_part(self, _module: Any, _args: Any, joint: Tensor) -> Tensor:
        num_text = self._text.shape[1]
        parts = self._parts = TokenParts.of(num_text, joint.shape[1] - num_text, self._num_parts)
        if self._attention is not None:
            self._attention.tokens = parts.joint
        (text, text_end), (video, video_end) = parts.text_range(self._place), parts.video_range(self._place)
        return torch.cat([joint[:, text:text_end], joint[:, num_text + video : num_text + video_end]], dim=1)

    def _gather(self, _module: Any, _args: Any, x: Tensor) -> Tensor:
        """[b, own video tokens, C] to all tokens of all samples."""
        batch, _, width = x.shape
        counts = self._parts.video * self._halves
        flat: Any = _Gather.apply(x, [batch * count * width for count in counts], self._name, self._place_in_team)
        pieces = [piece.view(batch, count, width) for piece, count in zip(flat, counts, strict=True)]
        halves = [pieces[i : i + self._num_parts] for i in range(0, self._size, self._num_parts)]
        return torch.cat([torch.cat(half, dim=1) for half in halves])
