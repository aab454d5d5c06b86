"""Runs a transformer's blocks for sampling on ONE sequence of text and video tokens, each block as one compiled graph.

The stock blocks pass text and video apart, join them for every attention and feed-forward layer and part them again,
and rotate queries and keys by writing into slices. Here the sequence stays joined through all blocks, the rotary tables
cover the text too (by the identity), and the feed-forward's GELU runs inside the matrix product where the GPU can. The
values are those of the stock blocks up to rounding (`tests/unit/test_joint_blocks.py`).

For inference only. Layers are called as modules, so adapters and float8 layers inside the blocks work.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from cogtune.step_cache import StepCache

RotaryTables = tuple[Tensor, Tensor]


def make_joint_tables(rotary: tuple[Tensor, Tensor] | None, text_length: int) -> RotaryTables | None:
    """Cosines and signed sines [N, 1, D], float32, for text and video tokens: text isn't rotated.

    `rotate` pairs neighbours (a, b) -> (a cos - b sin, b cos + a sin); the minus sits in the table.
    """
    if rotary is None:
        return None
    cos, sin = (table.float() for table in rotary)
    signs = torch.tensor([-1.0, 1.0], device=sin.device).repeat(sin.shape[-1] // 2)
    text = torch.ones(text_length, cos.shape[-1], device=cos.device)
    return torch.cat([text, cos])[:, None], torch.cat([torch.zeros_like(text), sin * signs])[:, None]


def rotate(values: Tensor, tables: RotaryTables) -> Tensor:
    """Rotary positions on [B, N, H, D]."""
    cos, sin = tables
    swapped = values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (values.float() * cos + swapped.float() * sin).to(values.dtype)


def attend(attention: Any, joint: Tensor, tables: RotaryTables | None) -> Tensor:
    """Self-attention over the joined sequence [B, N, C]."""
    query, key, value = (
        layer(joint).unflatten(-1, (attention.heads, -1)) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    if attention.norm_q is not None:
        query, key = attention.norm_q(query), attention.norm_k(key)
    if tables is not None:
        query, key = rotate(query, tables), rotate(key, tables)
    output = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
    return attention.to_out[0](output.transpose(1, 2).flatten(2))


def _feed_forward(layers: Any, joint: Tensor) -> Tensor:
    """The block's two linear layers with a tanh GELU between them."""
    activation, last = layers.net[0], layers.net[2]
    first = activation.proj
    # On a GPU the product's own epilogue applies the tanh form; on a CPU the same operator means the exact one.
    if joint.is_cuda and type(first) is nn.Linear and activation.approximate == "tanh" and first.bias is not None:
        flat = torch.ops.aten._addmm_activation(first.bias, joint.flatten(0, 1), first.weight.t(), use_gelu=True)
        return last(flat.unflatten(0, joint.shape[:2]))
    return last(activation(joint))


def run_block(block: Any, joint: Tensor, temb: Tensor, tables: RotaryTables | None, text_length: int) -> Tensor:
    """One stock block on the joined sequence [B, N, C]: text tokens first."""
    is_text = (torch.arange(joint.shape[1], device=joint.device) < text_length)[None, :, None]
    for norm, layers in ((block.norm1, None), (block.norm2, block.ff)):
        modulation = norm.linear(norm.silu(temb))[:, None]
        shift, scale, gate = (
            torch.where(is_text, text, video)
            for video, text in zip(*(half.chunk(3, -1) for half in modulation.chunk(2, -1)), strict=True)
        )
        modulated = norm.norm(joint) * (1 + scale) + shift
        change = attend(block.attn1, modulated, tables) if layers is None else _feed_forward(layers, modulated)
        joint = joint + gate * change
    return joint


class JointBlocks(nn.Module):
    """All blocks of a transformer behind the interface of one stock block."""

    def __init__(self, blocks: nn.ModuleList, *, compiled: bool, cache: StepCache | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.cache = cache
        self._run: Callable[..., Tensor] = (
            torch.compile(run_block, fullgraph=True, dynamic=False) if compiled else run_block
        )
        self._tables: tuple[Any, RotaryTables | None] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens [B, V, C] and text tokens [B, T, C] after all blocks."""
        if attention_kwargs:
            raise ValueError(f"attention_kwargs {sorted(attention_kwargs)} have no effect here; merge adapters instead")
        text_length = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        tables = self._find_tables(image_rotary_emb, text_length)

        def run(first: int, last: int, values: Tensor, embedding: Tensor) -> Tensor:
            for block in self.blocks[first:last]:
                values = self._run(block, values, embedding, tables, text_length)
            return values

        joint = run(0, len(self.blocks), joint, temb) if self.cache is None else self.cache.run(run, joint, temb)
        return joint[:, text_length:], joint[:, :text_length]

    def _find_tables(self, rotary: tuple[Tensor, Tensor] | None, text_length: int) -> RotaryTables | None:
        """The same for all steps of a video: made once."""
        if self._tables is None or self._tables[0] is not rotary:
            self._tables = (rotary, make_joint_tables(rotary, text_length))
        return self._tables[1]


def join_blocks(transformer: CogVideoXTransformer3DModel, *, compiled: bool, cache: StepCache | None = None) -> None:
    """Lets a transformer run its blocks this way, in place; adapters must be loaded or merged before."""
    transformer.transformer_blocks = nn.ModuleList(
        [JointBlocks(transformer.transformer_blocks, compiled=compiled, cache=cache)]
    )
