"""Frozen layers in codes: product and gradient are the decoded weight's, in whole transformers too, compiled or not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_attention import KINDS, make_inputs, make_transformer, step

from cogtune.adapter import WEIGHTS_NAME, LoraLinear, add_lora, save_adapter, without_adapter
from cogtune.attention import install_attention
from cogtune.config import AdapterSettings
from cogtune.execution import configure_blocks
from cogtune.frozen import apply_updated, count_codes, encode_base, is_frozen
from cogtune.quantized_linear import QuantizedLinear
from cogtune.random_pipeline import make_random_transformer
from cogtune.weight_codes import WeightKind

CPU = torch.device("cpu")
BOTH: list[WeightKind] = ["int8", "nf4"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got.double() - expected.double()).norm() / expected.double().norm()).detach())


def make_layer(kind: WeightKind, size_in: int = 128, size_out: int = 96) -> QuantizedLinear:
    return QuantizedLinear(draw(size_out, size_in, seed=1), draw(size_out, seed=2), kind)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("size_in", "size_out"), [(128, 96), (64, 192), (100, 30)])
def test_product_and_gradient_are_the_decoded_weights(
    kind: WeightKind, dtype: torch.dtype, rounding: float, size_in: int, size_out: int
) -> None:
    """Against float64; with an update, its gradients too."""
    layer = make_layer(kind, size_in, size_out)
    weight = layer.decode(dtype).double()
    x, grad = draw(2, 7, size_in, seed=0).to(dtype), draw(2, 7, size_out, seed=3).to(dtype)
    factors = [draw(5, size_in, seed=5).to(dtype), draw(size_out, 5, seed=6).to(dtype)]
    bias = draw(size_out, seed=2)

    def run(update: bool, exact: bool) -> list[torch.Tensor]:
        leaves = [value.double() if exact else value.clone() for value in [x, *factors]]
        leaves = [leaf.requires_grad_() for leaf in leaves][: 3 if update else 1]
        if exact:
            y = F.linear(leaves[0], weight, bias.to(dtype).double())
            y = y + leaves[0] @ leaves[1].t() @ leaves[2].t() if update else y
        else:
            layer.bias = bias.to(dtype)
            y = apply_updated(layer, leaves[0], tuple(leaves[1:])) if update else layer(leaves[0])
            assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    for update in (False, True):
        for got, expected in zip(run(update, exact=False), run(update, exact=True), strict=True):
            assert distance(got, expected) < rounding


@pytest.mark.parametrize("kind", BOTH)
def test_a_part_is_the_whole_layers_part_on_the_same_memory(kind: WeightKind) -> None:
    layer, x = make_layer(kind), draw(5, 128, seed=0)
    part = layer.part(32, 64)
    assert part.weight.data_ptr() == layer.weight[32:].data_ptr()
    assert torch.equal(part.decode(torch.float32), layer.decode(torch.float32)[32:64])
    torch.testing.assert_close(part(x), layer(x)[:, 32:64])
    assert is_frozen(layer) and not layer.state_dict()


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("compiled", [False, True])
def test_between_the_passes_only_codes_are_kept(kind: WeightKind, compiled: bool) -> None:
    """The compiler would keep the decoded weight, since it is read again."""
    layer, x, grad = make_layer(kind), draw(16, 128, seed=0), draw(16, 96, seed=3)
    factors = [draw(5, 128, seed=5).requires_grad_(), draw(96, 5, seed=6).requires_grad_()]

    def apply(values: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return layer.apply_updated(values * 2, down, up).sin() + layer(values)

    run: Callable[..., torch.Tensor] = torch.compile(apply, fullgraph=True, backend="aot_eager") if compiled else apply
    own = {buffer.untyped_storage()._cdata for buffer in layer.buffers()}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept.append(tensor)
        return tensor

    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(leaf, *factors)
    assert kept and all(tensor.numel() < 96 * 128 // 2 for tensor in kept)
    got = [y, *torch.autograd.grad(y, [leaf, *factors], grad)]
    y = apply(leaf, *factors)
    expected = [y, *torch.autograd.grad(y, [leaf, *factors], grad)]
    assert all(value.norm() > 1 for value in expected)
    assert all(distance(*pair) < 1e-5 for pair in zip(got, expected, strict=True))


def layers_of(transformer: Any) -> dict[str, QuantizedLinear]:
    found = {name: module for name, module in transformer.named_modules() if isinstance(module, QuantizedLinear)}
    return {name: layer for name, layer in found.items() if not name.endswith("qkv")}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("fused", [True, False])
def test_the_frozen_layers_of_all_blocks_are_replaced_and_counted(kind: WeightKind, fused: bool) -> None:
    transformer = make_transformer("tiny", KINDS["one of three"], torch.float32)
    meta: Any = make_random_transformer("tiny", seed=0, device=torch.device("meta"), dtype=torch.float32)
    if fused:
        install_attention(transformer, "default")
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    encode_base(transformer, kind, CPU)
    layers = layers_of(transformer)
    assert len(layers) == 8 * 2 and all("transformer_blocks" in name for name in layers)
    kinds = {name.split(".", 2)[2]: layer.weight.dtype for name, layer in layers.items()}
    assert kinds["norm1.linear"] == kinds["norm2.linear"] == torch.int8
    assert kinds["ff.net.2"] == (torch.int8 if kind == "int8" else torch.uint8)
    num_parameters, num_bytes, largest = count_codes(meta.transformer_blocks[0], kind)
    weights = [linears[name].weight.numel() for name in layers]
    assert num_parameters * 2 == sum(weights) and largest == max(weights)
    assert num_bytes * 2 == sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers.values())
    block: Any = transformer.transformer_blocks[0]
    assert isinstance(block.attn1.to_k.base_layer, QuantizedLinear) and hasattr(block.attn1, "qkv") == fused
    assert not any(isinstance(m, torch.nn.Linear) for name, m in block.named_modules() if "lora" not in name)


def decode_layers(transformer: Any) -> None:
    """Puts plain layers of the decoded weights in the places of those in codes."""
    for name, layer in list(layers_of(transformer).items()):
        parent, _, own = name.rpartition(".")
        plain = torch.nn.Linear(layer.in_features, len(layer.weight), bias=layer.bias is not None)
        plain.weight.data = layer.decode(torch.float32)
        if layer.bias is not None:
            plain.bias.data = layer.bias
        setattr(transformer.get_submodule(parent), own, plain.requires_grad_(False))
    for block in transformer.transformer_blocks:
        block.attn1.__dict__["_modules"].pop("qkv", None)


ADAPTERS = {
    **{name: KINDS[name] for name in ("all four", "one of three", "dropout")},
    "everywhere": AdapterSettings(rank=4, target_modules=["to_q", "ff.net.0.proj", "ff.net.2", "norm1.linear"]),
}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_steps_gradients_are_those_of_the_decoded_model(adapter: str, kind: WeightKind) -> None:
    """And near, not equal to, those of the exact one."""
    exact = step(make_transformer("tiny", ADAPTERS[adapter], torch.float32))
    transformer = make_transformer("tiny", ADAPTERS[adapter], torch.float32)
    install_attention(transformer, "default")
    encode_base(transformer, kind, CPU)
    got = step(transformer)
    decode_layers(transformer)
    expected = step(transformer)
    for name, value in expected.items():
        assert value.norm() > 0 and (got[name] - value).norm() < 1e-5 * max(1.0, float(value.norm())), name
    joined = [torch.cat([values[name].flatten() for name in exact if "lora_" in name]) for values in (got, exact)]
    assert 1e-4 < distance(*joined) < (0.05 if kind == "int8" else 0.3)


@pytest.mark.parametrize("kind", BOTH)
def test_without_its_adapter_a_transformer_is_the_quantized_base(kind: WeightKind) -> None:
    transformer = make_transformer("tiny", KINDS["all four"], torch.float32)
    install_attention(transformer, "default")
    encode_base(transformer, kind, CPU)
    with torch.no_grad():
        with without_adapter(transformer):
            base = transformer(**make_inputs(transformer), return_dict=False)[0]
        adapted = transformer(**make_inputs(transformer), return_dict=False)[0]
        for module in transformer.modules():
            if isinstance(module, LoraLinear):
                module.scaling["default"] = 0.0
        without = transformer(**make_inputs(transformer), return_dict=False)[0]
    assert distance(base, without) < 1e-5 < distance(base, adapted)


@pytest.mark.parametrize("kind", BOTH)
def test_compiled_blocks_are_one_graph_and_give_the_same(kind: WeightKind) -> None:
    results = []
    for compiled in (False, True):
        transformer = make_transformer("tiny", KINDS["all four"], torch.float32)
        install_attention(transformer, "default")
        encode_base(transformer, kind, CPU)
        configure_blocks(transformer, "keep_attention", compiled=compiled, has_dropout=False, compiler="aot_eager")
        results.append(step(transformer))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and counters["graph_break"] == {}
    assert all(distance(results[1][name], value) < 1e-5 for name, value in results[0].items())


def test_saved_adapters_are_the_same(tmp_path: Path) -> None:
    for name in ("exact", *BOTH):
        transformer = make_random_transformer("tiny", seed=0, device=CPU, dtype=torch.bfloat16)
        add_lora(transformer, AdapterSettings(rank=4, alpha=9.0), seed=1)
        if name != "exact":
            install_attention(transformer, "default")
            encode_base(transformer, name, CPU)
        (tmp_path / name).mkdir()
        save_adapter(transformer, tmp_path / name, trained=False)
    exact = load_file(tmp_path / "exact" / WEIGHTS_NAME)
    for name in BOTH:
        own = load_file(tmp_path / name / WEIGHTS_NAME)
        assert own.keys() == exact.keys() and all(torch.equal(own[key], value) for key, value in exact.items())
