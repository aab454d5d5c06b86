"""How the transformer's blocks run: compiled or not, and which activations the backward pass finds in memory.

    keep_all         what the compiler thinks best is kept, without a limit; not compiled: everything
    keep_products    outputs of attention and of matrix products are kept; norms, gates and GELU are computed again
    keep_attention   attention outputs are kept, the rest of a block is recomputed from its input
    recompute        whole blocks are recomputed from their inputs: least memory

What comes from other ranks (`parallel`) is kept by all of them: no message is sent twice, and those of the backward
pass depend on each other, so that all ranks send them in one order.

None of them changes a result; the blocks are compiled one by one, so that all share one compiled graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogtune.parallel.exchange import exchange
from cogtune.parallel.ring import ring_attention
from cogtune.streaming.activations import ActivationOffload
from cogtune.streaming.blocks import find_stream
from cogtune.streaming.gradients import GradientStream
from cogtune.streaming.passes import pass_through

_GRAPHS_OF_A_SHAPE = 4  # past the limit, the compiler gives up without a word and the blocks run uncompiled
Activations = Literal["keep_all", "keep_products", "keep_attention", "recompute"]

_ATTENTION_OPS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
_PRODUCT_OPS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_mm.default,
    }
)
_SHARED_OPS = frozenset({exchange._opoverload, ring_attention._opoverload})
# Of these, the compiled backward pass keeps only what it reads: not the output of the feed-forward's second product.
_KEPT_OPS = {
    "keep_products": _ATTENTION_OPS | _PRODUCT_OPS | _SHARED_OPS,
    "keep_attention": _ATTENTION_OPS | _SHARED_OPS,
    "recompute": _SHARED_OPS,
}


def _policy(kept: frozenset[Any], _context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def configure_blocks(
    transformer: CogVideoXTransformer3DModel,
    activations: Activations,
    *,
    compiled: bool,
    has_dropout: bool,
    compiler: str = "inductor",
    num_offloaded: int = 0,
    gradients: GradientStream | None = None,
    hooked: bool = False,
    shared: bool = False,
) -> None:
    """Sets up checkpointing and compilation of every block, in place; streamed weights are streamed in both passes.

    What `num_offloaded` of the blocks keep for the backward pass waits in host memory. `gradients` takes each trained
    block's away when they are there. `hooked`: the blocks have hooks that gather their weights (`parallel`). `shared`:
    the ranks of a team have parts of the tokens.
    """
    if hooked:
        assert not num_offloaded and gradients is None and find_stream(transformer) is None
        run_block = _make_runner(activations, has_dropout=has_dropout, shared=shared, call=CogVideoXBlock.forward)
        _configure_hooked(transformer, run_block, compiled=compiled, compiler=compiler)
        return
    run_block = _make_runner(activations, has_dropout=has_dropout, shared=shared)
    if compiled:
        # A block is one piece: cut at DDP's buckets, as is the default, its checkpoint would fall apart, or be refused.
        torch._dynamo.config.optimize_ddp = False
        # The checkpoint lies inside the compiled region: only there can attention outputs be kept apart.
        run_block = torch.compile(run_block, dynamic=False, fullgraph=True, backend=compiler)
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False, backend=compiler)

    blocks = list(transformer.transformer_blocks.children())
    numbers = {id(block): number for number, block in enumerate(blocks)}
    stream = find_stream(transformer)
    offload = None
    if num_offloaded:
        weights = [*transformer.parameters(), *transformer.buffers()]
        offload = ActivationOffload(len(blocks), num_offloaded, weights[0].device, weights)

    def run(block: torch.nn.Module, hidden_states: torch.Tensor, text: torch.Tensor, *rest: Any) -> Any:
        inputs = _like_an_output(hidden_states), _like_an_output(text)
        if stream is None and offload is None and gradients is None:
            return run_block(block, *inputs, *rest)
        this_block = partial(run_block, block)
        number = numbers[id(block)]
        return pass_through(this_block, number, *inputs, *rest, stream=stream, offload=offload, gradients=gradients)

    transformer.enable_gradient_checkpointing(run)


def _configure_hooked(
    transformer: CogVideoXTransformer3DModel, run_block: Callable[..., Any], *, compiled: bool, compiler: str
) -> None:
    """The same for blocks whose calls have hooks: what is compiled and recomputed lies inside of them."""
    sample_block: Callable[..., Any] = CogVideoXBlock.forward
    if compiled:
        run_block = torch.compile(run_block, dynamic=False, fullgraph=True, backend=compiler)
        sample_block = torch.compile(sample_block, dynamic=False, backend=compiler)

    def forward(block: torch.nn.Module, *inputs: Any, **named: Any) -> Any:
        return (run_block if torch.is_grad_enabled() else sample_block)(block, *inputs, **named)

    for block in transformer.transformer_blocks:
        block.forward = partial(forward, block)

    def run(block: torch.nn.Module, hidden_states: torch.Tensor, text: torch.Tensor, *rest: Any) -> Any:
        return block(_like_an_output(hidden_states), _like_an_output(text), *rest)

    transformer.enable_gradient_checkpointing(run)


def allow_shapes(num_shapes: int) -> None:
    """Lets the compiler make graphs for this many clip shapes, for training, evaluation and sampling each."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS_OF_A_SHAPE * num_shapes)


def _like_an_output(x: torch.Tensor) -> torch.Tensor:
    """A block's input as the block before would have made it, so that the first block is not compiled by itself.

    It gets slices of a longer sequence, with another stride, that ask for no gradient where all before them is frozen.
    """
    x = x.flatten(0, 1).unflatten(0, x.shape[:2])
    return x if x.requires_grad else x.detach().requires_grad_()


def _call(block: torch.nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def _make_runner(
    activations: Activations, *, has_dropout: bool, shared: bool, call: Callable[..., Any] = _call
) -> Callable[..., Any]:
    if activations == "keep_all":
        return lambda block, *inputs: call(block, *inputs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if activations != "recompute" or shared:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, _KEPT_OPS[activations]))

    def run_block(block: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(lambda *own: call(block, *own), *inputs, **options)

    return run_block
