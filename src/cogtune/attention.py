"""CogVideoX's attention, computed as diffusers' processor does with less memory traffic.

    projections   q, k and v of a frozen base are one matrix product, low-rank updates included
    positions     norm and rotation of q and k are one expression over all tokens (text tokens turn by nothing), which
                  the compiler makes one kernel of; diffusers' writes slices in place
    attention     by the backend that was fastest for the run's shape on its device

Whatever is not plain (trained base weights, dropout, DoRA) is projected layer by layer.
"""

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer

from cogtune.adapter import has_dropout, plain_update
from cogtune.attention_backends import Backend
from cogtune.frozen import FrozenLinear, apply_updated, is_frozen
from cogtune.low_rank import stack_updates
from cogtune.parallel.sequence import TeamAttention, attend_plainly

Rotary = tuple[torch.Tensor, torch.Tensor]


class FusedAttention:
    """An attention processor for `CogVideoXTransformer3DModel.set_attn_processor`."""

    def __init__(self, backend: Backend, team: TeamAttention | None = None) -> None:
        self.backend: Backend = backend
        self.team = team

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video tokens [B, V, D] and text tokens [B, T, D] to the same; text comes first in the joint sequence."""
        assert attention_mask is None, "CogVideoX attends to every token"
        num_text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        rotary = None if image_rotary_emb is None else extend_rotary(image_rotary_emb, num_text)
        assert attn.to_out is not None
        y = attn.to_out[1](attend(attn, x, rotary, self.backend, self.team))
        return y[:, num_text:], y[:, :num_text]


def attend(
    attn: Any, x: torch.Tensor, rotary: Rotary | None, backend: Backend, team: TeamAttention | None = None
) -> torch.Tensor:
    """Attention over the joint sequence [B, S, D], projected in and out; `rotary` has all its tokens.

    With a `team`, `x` has this rank's tokens, which attend to those of the others too.
    """
    query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in project(attn, x))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    if rotary is not None:
        query, key = rotate(query, rotary), rotate(key, rotary)
    mix = attend_plainly if team is None else team
    return attn.to_out[0](mix(query, key, value, backend).flatten(2))


def extend_rotary(rotary: Rotary, num_text: int) -> Rotary:
    """cos and sin [video tokens, head_dim] for the joint sequence, sin with the sign of `rotate`: float32 [S, D]."""
    cos, sin = rotary
    signed = torch.stack([-sin[:, 0::2], sin[:, 1::2]], dim=-1).flatten(1)
    pad = (0, 0, num_text, 0)
    return torch.nn.functional.pad(cos, pad, value=1.0), torch.nn.functional.pad(signed, pad)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """`x` [B, S, H, D] with each pair of neighbours turned, computed in float32 as diffusers does."""
    cos, signed_sin = (part[None, :, None] for part in rotary)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * signed_sin).to(x.dtype)


def project(attn: Attention, x: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v [B, S, D] of `x` [B, S, D]: in one product where `fuse_projections` has prepared the layer for it."""
    layers = [attn.to_q, attn.to_k, attn.to_v]
    fused: Any = getattr(attn, "qkv", None)
    if fused is None:
        return [layer(x) for layer in layers]
    updates: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for layer in layers:
        adapted = isinstance(layer, BaseTunerLayer) and not layer.disable_adapters
        updates.append(plain_update(layer, x.dtype) if adapted else None)
        if adapted and (updates[-1] is None or has_dropout(layer)):
            return [layer(x) for layer in layers]
    size = len(fused.weight) // 3
    if any(update is not None for update in updates):
        y = apply_updated(fused, x, stack_updates(updates, [size] * 3))
    else:
        y = fused(x)
    return list(y.split(size, dim=-1))


def install_attention(
    transformer: CogVideoXTransformer3DModel, backend: Backend, team: TeamAttention | None = None, *, fuse: bool = True
) -> None:
    """Gives every block our processor and fuses the projections of frozen blocks; call it on the final device.

    Not `fuse`: q, k and v stay three products, as weights that are divided among processes must.
    """
    transformer.set_attn_processor(FusedAttention(backend, team))  # pyright: ignore[reportArgumentType]
    for block in transformer.transformer_blocks if fuse else ():
        fuse_projections(block.attn1)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def fuse_projections(attn: Attention) -> None:
    """Puts the frozen weights of q, k and v behind one another in memory; the layers keep theirs as views of it.

    Names and values of all parameters stay. Trained weights are left alone: their optimizer holds them apart.
    """
    layers: list[Any] = [
        layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        for layer in (attn.to_q, attn.to_k, attn.to_v)
    ]
    if not all(type(layer) is torch.nn.Linear and is_frozen(layer) for layer in layers):
        return
    if len({layer.weight.shape for layer in layers}) > 1 or len({layer.bias is None for layer in layers}) > 1:
        return
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
    attn.qkv = FrozenLinear(weight, bias)
    size = len(weight) // 3
    for number, layer in enumerate(layers):
        own = slice(number * size, (number + 1) * size)
        layer.weight.data = weight[own]
        if bias is not None:
            layer.bias.data = bias[own]
