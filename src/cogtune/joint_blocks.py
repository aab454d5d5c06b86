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
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from cogtune.attention import Rotary, attend, extend_rotary, fuse_projections
from cogtune.attention_backends import Backend
from cogtune.frozen import Float8FeedForward
from cogtune.parallel.sequence import TeamAttention
from cogtune.step_cache import StepCache
from cogtune.streaming.blocks import StreamedBlocks, visit


def _feed_forward(layers: Any, joint: Tensor, *, fused: bool) -> Tensor:
    """The block's two linear layers with a tanh GELU between them."""
    if isinstance(layers, Float8FeedForward):
        return layers(joint)
    activation, last = layers.net[0], layers.net[2]
    first = activation.proj
    # On a GPU the product's own epilogue applies the tanh form; on a CPU the same operator means the exact one.
    plain = type(first) is nn.Linear and first.bias is not None and activation.approximate == "tanh"
    if fused and plain and joint.is_cuda:
        flat = torch.ops.aten._addmm_activation(first.bias, joint.flatten(0, 1), first.weight.t(), use_gelu=True)
        return last(flat.unflatten(0, joint.shape[:2]))
    return last(activation(joint))


def run_block(
    block: Any,
    joint: Tensor,
    temb: Tensor,
    rotary: Rotary | None,
    text_length: int,
    backend: Backend = "default",
    fused_gelu: bool = True,
    team: TeamAttention | None = None,
) -> Tensor:
    """One stock block on the joined sequence [B, N, C]: text tokens first. With a `team`, on this rank's part of it."""
    is_text = (torch.arange(joint.shape[1], device=joint.device) < text_length)[None, :, None]
    for norm, layers in ((block.norm1, None), (block.norm2, block.ff)):
        modulation = norm.linear(norm.silu(temb))[:, None]
        shift, scale, gate = (
            torch.where(is_text, text, video)
            for video, text in zip(*(half.chunk(3, -1) for half in modulation.chunk(2, -1)), strict=True)
        )
        modulated = norm.norm(joint) * (1 + scale) + shift
        if layers is None:
            change = attend(block.attn1, modulated, rotary, backend, team)
        else:
            change = _feed_forward(layers, modulated, fused=fused_gelu)
        joint = joint + gate * change
    return joint


class JointBlocks(nn.Module):
    """All blocks of a transformer behind the interface of one stock block."""

    def __init__(
        self,
        blocks: nn.ModuleList,
        *,
        compiled: bool,
        cache: StepCache | None,
        backend: Backend,
        fused_gelu: bool,
        team: TeamAttention | None,
    ) -> None:
        super().__init__()
        self.team = team
        self.fused_gelu = fused_gelu
        self.blocks = blocks
        self.cache = cache
        self.backend: Backend = backend
        self._run: Callable[..., Tensor] = (
            torch.compile(run_block, fullgraph=True, dynamic=False) if compiled else run_block
        )
        self._rotary: tuple[Any, Rotary | None] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens [B, V, C] and text tokens [B, T, C] after all blocks."""
        if attention_kwargs:
            raise ValueError(f"attention_kwargs {sorted(attention_kwargs)} have no effect here; merge adapters instead")
        text_length = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        rotary = self._extend(image_rotary_emb, text_length)

        def run(first: int, last: int | None, values: Tensor, embedding: Tensor) -> Tensor:
            for block in visit(self.blocks, first, last):
                values = self._run(
                    block, values, embedding, rotary, text_length, self.backend, self.fused_gelu, self.team
                )
            return values

        joint = run(0, None, joint, temb) if self.cache is None else self.cache.run(run, joint, temb)
        return joint[:, text_length:], joint[:, :text_length]

    def _extend(self, rotary: Rotary | None, text_length: int) -> Rotary | None:
        """The tables are the same for all steps of a video: extended once."""
        if self._rotary is None or self._rotary[0] is not rotary:
            self._rotary = (rotary, None if rotary is None else extend_rotary(rotary, text_length))
        return self._rotary[1]


def join_blocks(
    transformer: CogVideoXTransformer3DModel,
    *,
    compiled: bool,
    cache: StepCache | None = None,
    backend: Backend = "default",
    fused_gelu: bool = True,
    team: TeamAttention | None = None,
) -> JointBlocks:
    """Lets a transformer on its final device run its blocks this way, in place; adapters come before.

    `team`: who has the other tokens (`parallel.sequence`).
    """
    # Offloading moves the weights one by one, and the views of a whole would become copies; streamed blocks were fused
    # before they left.
    if not hasattr(transformer, "_hf_hook") and not isinstance(transformer.transformer_blocks, StreamedBlocks):
        for block in transformer.transformer_blocks:
            fuse_projections(block.attn1)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    joint = JointBlocks(
        transformer.transformer_blocks,
        compiled=compiled,
        cache=cache,
        backend=backend,
        fused_gelu=fused_gelu,
        team=team,
    )
    transformer.transformer_blocks = nn.ModuleList([joint])
    return joint


def part_blocks(transformer: CogVideoXTransformer3DModel) -> None:
    """Undoes `join_blocks`."""
    (joint,) = transformer.transformer_blocks
    assert isinstance(joint, JointBlocks)
    transformer.transformer_blocks = joint.blocks


def find_step_cache(transformer: torch.nn.Module) -> StepCache | None:
    """The step cache that a transformer runs with, if any."""
    blocks: Any = getattr(transformer, "transformer_blocks", ())
    return blocks[0].cache if len(blocks) == 1 and isinstance(blocks[0], JointBlocks) else None
