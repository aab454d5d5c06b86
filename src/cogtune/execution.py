"""How the transformer's blocks run: compiled or not, and which activations the backward pass finds in memory.

What there is to keep, and which block keeps what, is `arrangement`'s. What comes from other ranks (`parallel`) is kept
by all of them: no message is sent twice, and those of the backward pass depend on each other, so that all ranks send
them in one order.

None of it changes a result; the blocks are compiled one by one, and those that keep the same share one graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogtune.arrangement import Activations, arrange, keep_less
from cogtune.parallel.exchange import exchange
from cogtune.parallel.ring import ring_attention
from cogtune.streaming.activations import ActivationOffload
from cogtune.streaming.blocks import find_stream
from cogtune.streaming.gradients import GradientStream
from cogtune.streaming.passes import pass_through

_GRAPHS_OF_A_SHAPE = 4  # past the limit, the compiler gives up without a word and the blocks run uncompiled

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
    num_lean: int = 0,
    num_offloaded: int = 0,
    num_leaving: int = 1,
    gradients: GradientStream | None = None,
    hooked: bool = False,
    shared: bool = False,
) -> None:
    """Sets up checkpointing and compilation of every block, in place; streamed weights are streamed in both passes.

    `num_lean` of the blocks keep less than the others. What `num_offloaded` of them keep for the backward pass waits in
    host memory; of `num_leaving` the copies may still be under way when a block begins. `gradients` takes each trained
    block's away when they are there. `hooked`: the blocks have hooks that gather their weights (`parallel`). `shared`:
    the ranks of a team have parts of the tokens.
    """
    blocks = list(transformer.transformer_blocks.children())
    arrangement = arrange(len(blocks), num_lean=num_lean, num_offloaded=num_offloaded)
    call = CogVideoXBlock.forward if hooked else _call
    if compiled:
        # A block is one piece: cut at DDP's buckets, as is the default, its checkpoint would fall apart, or be refused.
        torch._dynamo.config.optimize_ddp = False

    def make(way: Activations) -> Callable[..., Any]:
        run_block = _make_runner(way, compiled=compiled, has_dropout=has_dropout, shared=shared, call=call)
        # The checkpoint lies inside the compiled region: only there can attention outputs be kept apart.
        return torch.compile(run_block, dynamic=False, fullgraph=True, backend=compiler) if compiled else run_block

    rich, less = make(activations), keep_less(activations) if num_lean else None
    assert less is not None or not num_lean, "nothing keeps less than recompute"
    lean = rich if less is None else make(less)
    runners = [lean if number in arrangement.lean else rich for number in range(len(blocks))]
    if hooked:
        assert not num_offloaded and gradients is None and find_stream(transformer) is None
        _configure_hooked(transformer, runners, compiler=compiler if compiled else None)
        return
    for block in blocks if compiled else ():
        block.compile(dynamic=False, backend=compiler)
    numbers = {id(block): number for number, block in enumerate(blocks)}
    stream = find_stream(transformer)
    offload = None
    if num_offloaded:
        weights = [*transformer.parameters(), *transformer.buffers()]
        offload = ActivationOffload(arrangement.offloaded, weights[0].device, weights, num_leaving=num_leaving)

    def run(block: torch.nn.Module, hidden_states: torch.Tensor, text: torch.Tensor, *rest: Any) -> Any:
        inputs = _like_an_output(hidden_states), _like_an_output(text)
        number = numbers[id(block)]
        if stream is None and offload is None and gradients is None:
            return runners[number](block, *inputs, *rest)
        this_block = partial(runners[number], block)
        return pass_through(this_block, number, *inputs, *rest, stream=stream, offload=offload, gradients=gradients)

    transformer.enable_gradient_checkpointing(run)


def _configure_hooked(
    transformer: CogVideoXTransformer3DModel, runners: list[Callable[..., Any]], *, compiler: str | None
) -> None:
    """The same for blocks whose calls have hooks: what is compiled and recomputed lies inside of them."""
    sample_block: Callable[..., Any] = CogVideoXBlock.forward
    if compiler is not None:
        sample_block = torch.compile(sample_block, dynamic=False, backend=compiler)

    def forward(run_block: Callable[..., Any], block: torch.nn.Module, *inputs: Any, **named: Any) -> Any:
        return (run_block if torch.is_grad_enabled() else sample_block)(block, *inputs, **named)

    for block, run_block in zip(transformer.transformer_blocks, runners, strict=True):
        block.forward = partial(forward, run_block, block)

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
    activations: Activations, *, compiled: bool, has_dropout: bool, shared: bool, call: Callable[..., Any]
) -> Callable[..., Any]:
    if activations == "keep_all":
        return lambda block, *inputs: call(block, *inputs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    # Compiled also where nothing is kept: without a policy, PyTorch 2.11 keeps what custom functions hold.
    if compiled or shared or activations != "recompute":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, _KEPT_OPS[activations]))

    def run_block(block: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(lambda *own: call(block, *own), *inputs, **options)

    return run_block
