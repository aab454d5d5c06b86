"""Training with streamed blocks and offloaded activations: bit for bit what resident ones give, compiled or not."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_attention import KINDS, make_inputs, make_transformer, step

from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.execution import configure_blocks
from cogtune.frozen import encode_base, encode_block, quantize_base
from cogtune.streaming.blocks import find_stream, stream_blocks
from cogtune.weight_codes import WeightKind

CPU = torch.device("cpu")
LAYERS = 5


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make(
    activations: Activations = "recompute",
    *,
    kind: str = "all four",
    resident: int | None = None,
    slots: int = 2,
    offloaded: int = 0,
    lean: int = 0,
    leaving: int = 1,
    float8: bool = False,
    quantized: WeightKind | None = None,
    compiler: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A tiny transformer set up as a run does it; streamed where `resident` says how many blocks are not."""
    transformer = make_transformer("tiny", KINDS[kind], dtype, num_layers=LAYERS)
    install_attention(transformer, "default")
    if float8:
        quantize_base(transformer)
    if resident is not None:
        prepare = partial(encode_block, kind=quantized) if quantized else None
        stream_blocks(transformer, "transformer_blocks", CPU, num_resident=resident, num_slots=slots, prepare=prepare)
    elif quantized:
        encode_base(transformer, quantized, CPU)
    configure_blocks(
        transformer,
        activations,
        compiled=compiler is not None,
        has_dropout="dropout" in kind,
        compiler=compiler or "inductor",
        num_lean=lean,
        num_offloaded=offloaded,
        num_leaving=leaving,
    )
    return transformer


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0 or "lora" in name, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("activations", ["recompute", "keep_attention", "keep_products", "keep_all"])
@pytest.mark.parametrize("resident, slots", [(0, 1), (0, 2), (2, 2), (3, 1), (5, 2)])
def test_training_is_the_same_bit_for_bit(activations: Activations, resident: int, slots: int) -> None:
    """Output, loss and all gradients over two steps, with a look without gradients between them."""
    plain, streamed = make(activations), make(activations, resident=resident, slots=slots)
    for seed in (1, 2):
        assert_same(step(streamed, seed), step(plain, seed))
        with torch.no_grad():
            outputs = [model(**make_inputs(model, seed), return_dict=False)[0] for model in (streamed, plain)]
        assert torch.equal(*outputs)


def test_frozen_weights_are_away_after_a_step_and_trained_ones_are_not() -> None:
    transformer = make(resident=2, slots=1)
    step(transformer)
    stream = find_stream(transformer)
    assert stream is not None and len(stream.loaded()) == 3
    for index, block in enumerate(transformer.transformer_blocks.children()):
        sizes = {p.requires_grad: p.untyped_storage().nbytes() for p in block.parameters()}
        assert sizes[True] > 0 and (sizes[False] > 0) == (index in stream.loaded())


@pytest.mark.parametrize("kind", ["dropout", "dora", "one of three"])
def test_kinds_of_adapters_are_the_same_bit_for_bit(kind: str) -> None:
    assert_same(step(make(kind=kind, resident=1)), step(make(kind=kind)))


def test_float8_weights_are_streamed_too() -> None:
    assert_same(step(make("keep_attention", float8=True, resident=1)), step(make("keep_attention", float8=True)))


@pytest.mark.parametrize("activations", ["recompute", "keep_attention", "keep_products", "keep_all"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_in_codes_are_streamed_too(kind: WeightKind, activations: Activations) -> None:
    """With offloaded activations; what a block sends and keeps on the host is its codes."""
    plain, streamed = make(activations, quantized=kind), make(activations, quantized=kind, resident=1, offloaded=3)
    for seed in (1, 2):
        assert_same(step(streamed, seed), step(plain, seed))
    stream, exact = find_stream(streamed), find_stream(make(resident=1))
    assert stream is not None and exact is not None
    assert stream.flat[0].num_bytes < exact.flat[0].num_bytes / 2, "float32 weights, and small ones"


@pytest.mark.parametrize("activations", ["recompute", "keep_attention", "keep_products", "keep_all"])
@pytest.mark.parametrize("offloaded", [2, 5])
def test_offloaded_activations_are_the_same_bit_for_bit(activations: Activations, offloaded: int) -> None:
    plain, streamed = make(activations), make(activations, resident=1, offloaded=offloaded)
    for seed in (1, 2):
        assert_same(step(streamed, seed), step(plain, seed))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_blocks_share_one_graph_and_give_the_same(compiler: str) -> None:
    plain = make("keep_attention", compiler=compiler)
    expected = [step(plain, seed) for seed in (1, 2)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    streamed = make("keep_attention", resident=1, offloaded=3, compiler=compiler)
    assert_same(step(streamed, 1), expected[0])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and counters["graph_break"] == {}
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(step(streamed, 2), expected[1])


@pytest.mark.parametrize("activations", ["keep_attention", "keep_products", "keep_all"])
@pytest.mark.parametrize(("lean", "offloaded"), [(2, 0), (3, 2), (1, 5), (4, 3)])
def test_blocks_may_keep_more_and_less_bit_for_bit(activations: Activations, lean: int, offloaded: int) -> None:
    """Not compiled, every way gives the numbers of every other one, and so do mixed ones, streamed too."""
    plain, mixed = make(), make(activations, lean=lean, resident=1, offloaded=offloaded, leaving=2)
    for seed in (1, 2):
        assert_same(step(mixed, seed), step(plain, seed))


@pytest.mark.parametrize("kind", ["dropout", "dora"])
def test_mixed_blocks_draw_the_same_dropout(kind: str) -> None:
    assert_same(step(make("keep_products", kind=kind, lean=2, offloaded=3)), step(make(kind=kind)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_mixed_blocks_compile_to_a_graph_for_each_way(compiler: str) -> None:
    """The numbers are those of blocks that all keep alike, up to rounding; later steps compile nothing."""
    expected = [step(make("keep_products"), seed) for seed in (1, 2)]
    mixed = make("keep_products", lean=2, resident=1, offloaded=4, leaving=2, compiler=compiler)
    got = [step(mixed, 1)]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and counters["graph_break"] == {}
    with torch.compiler.set_stance("fail_on_recompile"):
        got.append(step(mixed, 2))
    for mine, reference in zip(got, expected, strict=True):
        for name, value in reference.items():
            assert float((mine[name] - value).norm()) < 1e-5 * max(1.0, float(value.norm())), name


def test_lean_blocks_keep_less() -> None:
    """Counted by what autograd saves of all blocks: nearer to keep_attention with every lean block."""

    def count_bytes(lean: int, activations: Activations = "keep_products") -> int:
        torch._dynamo.reset()
        transformer = make(activations, lean=lean, compiler="aot_eager")
        weights = {t.untyped_storage()._cdata for t in [*transformer.parameters(), *transformer.buffers()]}
        kept: dict[tuple[int, int], int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                kept[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            transformer(**make_inputs(transformer), return_dict=False)
        return sum(kept.values())

    sizes = [count_bytes(lean) for lean in (0, 2, 4)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert sizes[0] - sizes[1] == pytest.approx(sizes[1] - sizes[2], rel=0.05)
    assert count_bytes(0, "keep_attention") < sizes[2]
