"""How the transformer's blocks run: compiled or not, and which activations the backward pass finds in memory.

    keep_all         nothing is recomputed: fastest, most memory
    keep_attention   attention outputs are kept, the rest of a block is recomputed from its input
    recompute        whole blocks are recomputed from their inputs: least memory

None of them changes a result; the blocks are compiled one by one, so that all share one compiled graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Activations = Literal["keep_all", "keep_attention", "recompute"]

_ATTENTION_OPS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def configure_blocks(
    transformer: CogVideoXTransformer3DModel, activations: Activations, *, compiled: bool, has_dropout: bool
) -> None:
    """Sets up checkpointing and compilation of every block, in place."""
    if activations != "keep_all":
        runner = _make_runner(activations, has_dropout=has_dropout)
        # The checkpoint lies inside the compiled region: only there can attention outputs be kept apart.
        transformer.enable_gradient_checkpointing(torch.compile(runner, dynamic=False) if compiled else runner)
    if compiled:
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)


def _make_runner(activations: Activations, *, has_dropout: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if activations == "keep_attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run_block(block: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, **options)

    return run_block
