"""Rungs of recomputation and compilation: equal results, one graph for all blocks, and what each keeps."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from test_attention import KINDS, Operators, assert_equal_steps, make_inputs, make_transformer, step

from cogtune.arrangement import ACTIVATIONS_FAST_TO_SLOW, Activations
from cogtune.attention import install_attention
from cogtune.config import MemorySettings
from cogtune.execution import configure_blocks
from cogtune.frozen import encode_base, quantize_base

RUNGS: tuple[Activations, ...] = get_args(Activations)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make(kind: str = "all four", dtype: torch.dtype = torch.float32, *, float8: bool = False, layers: int = 3) -> Any:
    transformer = make_transformer("tiny", KINDS.get(kind), dtype, num_layers=layers)
    install_attention(transformer, "default")
    if float8:
        quantize_base(transformer)
    return transformer


def test_settings_and_rungs_are_the_same_list() -> None:
    options = MemorySettings.model_json_schema()["properties"]["mode"]["enum"]
    assert set(options) == {"auto", *RUNGS} and set(RUNGS) == set(ACTIVATIONS_FAST_TO_SLOW)


@pytest.mark.parametrize("kind", ["all four", "dropout", "dora with dropout", "all weights"])
@pytest.mark.parametrize("activations", RUNGS)
def test_rungs_give_equal_losses_and_gradients(activations: Activations, kind: str) -> None:
    """Exactly: recomputing does the same arithmetic again, and draws the same dropout."""
    expected = step(make(kind, torch.float64))
    transformer = make(kind, torch.float64)
    configure_blocks(transformer, activations, compiled=False, has_dropout="dropout" in kind)
    assert_equal_steps(step(transformer), expected, 1e-12)


@pytest.mark.parametrize("activations", RUNGS)
def test_all_blocks_and_steps_share_one_graph(activations: Activations) -> None:
    expected = [step(make(), seed) for seed in (1, 2)]
    transformer = make()
    configure_blocks(transformer, activations, compiled=True, has_dropout=False, compiler="aot_eager")
    assert_equal_steps(step(transformer, 1), expected[0], 1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and counters["graph_break"] == {}
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal_steps(step(transformer, 2), expected[1], 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("activations", ["keep_products", "keep_attention"])
def test_the_default_compiler_gives_the_same(activations: Activations, float8: bool) -> None:
    expected = step(make(layers=2, float8=float8))
    transformer = make(layers=2, float8=float8)
    configure_blocks(transformer, activations, compiled=True, has_dropout=False)
    # Rounding to float8 makes steps of a last bit's difference.
    assert_equal_steps(step(transformer), expected, 0.05 if float8 else 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["dropout", "dora", "dora with dropout", "all weights"])
def test_what_is_not_plain_is_compiled_without_breaks_too(kind: str) -> None:
    transformer = make(kind)
    configure_blocks(transformer, "keep_attention", compiled=True, has_dropout="dropout" in kind, compiler="aot_eager")
    step(transformer)
    counters = torch._dynamo.utils.counters
    assert counters["graph_break"] == {}
    with torch.compiler.set_stance("fail_on_recompile"):
        step(transformer, 2)


def test_generating_between_steps_compiles_no_step_again() -> None:
    """Validation runs the same blocks without gradients."""
    transformer = make()
    configure_blocks(transformer, "keep_attention", compiled=True, has_dropout=False, compiler="aot_eager")
    before = step(transformer)
    with torch.no_grad():
        transformer.eval()
        output = transformer(**make_inputs(transformer), return_dict=False)[0]
        transformer.train()
    with torch.compiler.set_stance("fail_on_recompile"):
        after = step(transformer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    torch.testing.assert_close(output, before["output"], rtol=1e-5, atol=1e-5)


def test_each_rung_computes_again_what_it_says() -> None:
    counts = {}
    for activations in RUNGS:
        transformer = make(layers=3)
        configure_blocks(transformer, activations, compiled=False, has_dropout=False)
        with Operators() as seen:
            step(transformer)
        attention = sum("scaled_dot_product" in name and "backward" not in name for name, _ in seen.seen)
        counts[activations] = (attention, len(seen.products()), seen.count("gelu") - seen.count("gelu_backward"))
    attention, products, gelus = zip(*(counts[name] for name in RUNGS), strict=True)
    assert dict(zip(RUNGS, attention, strict=True)) == {
        "keep_all": 3, "keep_products": 3, "keep_attention": 3, "recompute": 6,
    }  # fmt: skip
    kept_all, kept_products, kept_attention, recomputed = products
    assert kept_all == kept_products < kept_attention == recomputed
    assert gelus[0] < gelus[1] == gelus[2] == gelus[3]


@pytest.mark.parametrize("base", ["exact", "float8", "int8", "nf4"])
def test_each_compiled_rung_keeps_what_it_says(base: Any) -> None:
    """Of each block, in tensors of its input's size. PyTorch 2.11 once kept what custom functions hold everywhere."""

    def count_kept(activations: Activations, layers: int) -> float:
        torch._dynamo.reset()
        transformer = make(layers=layers, float8=base == "float8")
        if base in ("int8", "nf4"):
            encode_base(transformer, base, torch.device("cpu"))
        configure_blocks(transformer, activations, compiled=True, has_dropout=False, compiler="aot_eager")
        held = {t.untyped_storage()._cdata for t in [*transformer.parameters(), *transformer.buffers()]}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in held:
                kept[storage._cdata] = storage
            return tensor

        inputs = make_inputs(transformer)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            transformer(**inputs, return_dict=False)
        samples, frames, _, height, width = inputs["hidden_states"].shape
        tokens = inputs["encoder_hidden_states"].shape[1] + frames * (height // 2) * (width // 2)
        unit = samples * tokens * transformer.proj_out.in_features * 4
        return sum(storage.nbytes() for storage in kept.values()) / unit

    kept = {rung: (count_kept(rung, 4) - count_kept(rung, 2)) / 2 for rung in RUNGS}
    assert kept["recompute"] == pytest.approx(1.1, abs=0.1), kept
    assert kept["keep_attention"] == pytest.approx(2.0, abs=0.1)
    assert kept["keep_attention"] + 5 < kept["keep_products"] < 11 and kept["keep_products"] + 1 < kept["keep_all"]
