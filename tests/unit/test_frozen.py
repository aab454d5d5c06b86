"""Frozen layers in float8: the error that the format has and no more, gradients that arrive, what is replaced."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_attention import KINDS, make_inputs, make_transformer, step

from cogtune.adapter import WEIGHTS_NAME, add_lora, save_adapter
from cogtune.attention import install_attention
from cogtune.config import AdapterSettings
from cogtune.float8 import quantize_rows
from cogtune.frozen import (
    Float8Base,
    Float8FeedForward,
    FrozenLinear,
    apply_updated,
    count_float8_parameters,
    is_frozen,
    multiply_rows,
    quantize_base,
)
from cogtune.random_pipeline import make_random_transformer

EPSILON = 2.0**-4  # half a step of e4m3's three bits of mantissa, relative


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got.double() - expected.double()).norm() / expected.double().norm()).detach())


def make_layer(size_in: int = 64, size_out: int = 96) -> tuple[torch.Tensor, torch.Tensor, Float8Base]:
    weight, bias = draw(size_out, size_in, seed=1), draw(size_out, seed=2)
    return weight, bias, Float8Base(weight, bias)


def test_the_product_is_that_of_the_rounded_numbers() -> None:
    """Against float64 arithmetic on what the rows hold."""
    x, (weight, bias, layer) = draw(5, 7, 64, seed=0), make_layer()
    (rows, row_scale), (columns, scale) = quantize_rows(x), quantize_rows(weight)
    expected = (rows.double() * row_scale) @ (columns.double() * scale).t() + bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_near_and_never_better_than_the_format(dtype: torch.dtype) -> None:
    weight, bias, layer = make_layer(256, 192)
    x = draw(300, 256, seed=0).to(dtype).requires_grad_()
    grad = draw(300, 192, seed=3).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    (got_grad,) = torch.autograd.grad(got, x, grad)
    assert got_grad.dtype == dtype
    values = x.detach().double()
    errors = {
        "forward": relative_error(got, values @ weight.double().t() + bias),
        "gradient": relative_error(got_grad, grad.double() @ weight.double()),
    }
    # Both operands are rounded: some sqrt(2) times the rms of a uniform error of EPSILON at most.
    assert all(5e-3 < error < 2**0.5 * EPSILON / 3**0.5 * 1.05 for error in errors.values()), errors


def test_every_element_stays_within_the_bound_of_the_format() -> None:
    """|error| <= (2 e + e^2) sum |x| |w|, with e for each operand, plus what is too small beside its row's largest."""
    x, (weight, bias, layer) = draw(40, 64, seed=0) * torch.logspace(-2, 2, 40)[:, None], make_layer()
    exact = x.double() @ weight.double().t() + bias
    bound = (2 * EPSILON + EPSILON**2) * (x.abs().double() @ weight.abs().double().t()) * 1.01
    assert ((layer(x).double() - exact).abs() <= bound).all()


def test_outliers_in_one_token_leave_the_others_alone() -> None:
    x, (_, _, layer) = draw(8, 64, seed=0), make_layer()
    spoiled = x.clone()
    spoiled[3] *= 1e4
    others = [n for n in range(8) if n != 3]
    assert torch.equal(layer(spoiled)[others], layer(x)[others])
    assert layer(spoiled).isfinite().all()


def test_a_part_is_the_whole_layers_part_on_the_same_memory() -> None:
    x, (_, _, layer) = draw(5, 64, seed=0).requires_grad_(), make_layer()
    part = layer.part(32, 64)
    assert part.weight.data_ptr() == layer.weight[32:].data_ptr()
    assert part.transposed.data_ptr() == layer.transposed[:, 32:].data_ptr()
    torch.testing.assert_close(part(x), layer(x)[:, 32:64])
    grad = torch.zeros(5, 96)
    grad[:, 32:64] = draw(5, 32, seed=4)
    expected = torch.autograd.grad(layer(x), x, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(part(x), x, grad[:, 32:64])[0], expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_has_the_same_gradient_and_not_zero(compiler: str, dtype: torch.dtype) -> None:
    """torch 2.11 made zeros of it, where the function ended in a cast without effect."""
    torch._dynamo.reset()
    layer = make_layer()[2]
    x, grad = draw(16, 64, seed=0).to(dtype), draw(16, 96, seed=3).to(dtype)

    def apply(values: torch.Tensor) -> torch.Tensor:
        return layer(values * 2)

    gradients = []
    for function in (apply, torch.compile(apply, backend=compiler, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(leaf), leaf, grad)[0])
    assert gradients[0].norm() > 1
    assert relative_error(gradients[1], gradients[0]) < 0.02


def test_no_cast_is_left_where_it_would_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard itself, whatever this release of torch makes of such a cast."""
    casts: list[torch.dtype] = []
    cast = torch.Tensor.to

    def watched(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        casts.extend(a for a in arguments if isinstance(a, torch.dtype) and a == self.dtype)
        return cast(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    rows, scale = quantize_rows(draw(32, 16, seed=1))
    multiply_rows(draw(4, 16, seed=0), rows, scale.t(), None)
    assert casts == []


def test_an_update_is_computed_from_the_unrounded_input() -> None:
    x, (weight, bias, layer) = draw(2, 5, 64, seed=0), make_layer()
    down, up = draw(4, 64, seed=5), draw(96, 4, seed=6)
    torch.testing.assert_close(apply_updated(layer, x, (down, up)), layer(x) + x @ down.t() @ up.t())
    exact = F.linear(x, weight, bias) + x @ down.t() @ up.t()
    torch.testing.assert_close(apply_updated(FrozenLinear(weight, bias), x, (down, up)), exact, rtol=1e-4, atol=1e-4)


def test_what_is_frozen() -> None:
    layer = torch.nn.Linear(4, 4)
    assert not is_frozen(layer)
    layer.weight.requires_grad_(False)
    assert not is_frozen(layer), "its bias is trained"
    assert is_frozen(layer.requires_grad_(False))
    assert is_frozen(FrozenLinear(torch.zeros(2, 2), None)) and is_frozen(make_layer()[2])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("model", ["tiny", "tiny-2b"])
def test_the_products_of_all_blocks_are_replaced_and_counted(model: str, fused: bool) -> None:
    transformer = make_transformer(model, KINDS["one of three"], torch.float32)
    meta = make_random_transformer(model, seed=0, device=torch.device("meta"), dtype=torch.float32)
    if fused:
        install_attention(transformer, "default")
    assert quantize_base(transformer) == 6 * 2
    layers = [m for name, m in transformer.named_modules() if isinstance(m, Float8Base) and not name.endswith("qkv")]
    assert sum(layer.weight.numel() for layer in layers) == count_float8_parameters(meta) == 2 * 12 * 32 * 32
    block = transformer.transformer_blocks[0]
    assert type(block.norm1.linear) is torch.nn.Linear
    assert isinstance(block.attn1.to_k.base_layer, Float8Base) and isinstance(block.attn1.to_q, Float8Base)
    assert hasattr(block.attn1, "qkv") == fused


def test_layers_whose_sizes_do_not_fit_stay() -> None:
    transformer = make_random_transformer(
        "tiny", seed=0, device=torch.device("cpu"), dtype=torch.float32, num_attention_heads=1, attention_head_dim=24
    )
    assert count_float8_parameters(transformer) == quantize_base(transformer) == 0


def test_trained_weights_stay() -> None:
    assert quantize_base(make_transformer("tiny", None, torch.float32)) == 0


@pytest.mark.parametrize("kind", ["all four", "one of three", "dropout"])
def test_a_steps_gradients_are_near_the_exact_ones(kind: str) -> None:
    exact = step(make_transformer("tiny", KINDS[kind], torch.float32))
    errors = []
    for fused in (True, False):
        transformer = make_transformer("tiny", KINDS[kind], torch.float32)
        if fused:
            install_attention(transformer, "default")
        quantize_base(transformer)
        got = step(transformer)
        assert abs(got["loss"] / exact["loss"] - 1) < 0.02
        names = [name for name in exact if "lora_" in name]
        assert all(got[name].norm() > 0 for name in names)
        joined = [torch.cat([values[name].flatten() for name in names]) for values in (got, exact)]
        errors.append(relative_error(*joined))
    assert all(1e-3 < error < 0.15 for error in errors), errors


def test_a_disabled_adapter_leaves_the_float8_base() -> None:
    transformer = make_transformer("tiny", KINDS["all four"], torch.float32)
    bare = copy.deepcopy(transformer)
    bare.disable_adapters()
    install_attention(transformer, "default")
    quantize_base(transformer)
    transformer.disable_adapters()
    with torch.no_grad():
        got, expected = (t(**make_inputs(t), return_dict=False)[0] for t in (transformer, bare))
    assert 1e-4 < relative_error(got, expected) < 0.1


def test_saved_adapters_are_the_same(tmp_path: Path) -> None:
    for name in ("stock", "float8"):
        transformer = make_random_transformer("tiny", seed=0, device=torch.device("cpu"), dtype=torch.bfloat16)
        add_lora(transformer, AdapterSettings(rank=4, alpha=9.0), seed=1)
        if name == "float8":
            install_attention(transformer, "default")
            quantize_base(transformer)
        (tmp_path / name).mkdir()
        save_adapter(transformer, tmp_path / name, trained=False)
    stock, float8 = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("stock", "float8"))
    assert stock.keys() == float8.keys()
    assert all(stock[key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in float8.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float8_feed_forward_is_its_layers_one_after_another(dtype: torch.dtype) -> None:
    """Up to the rounding of what lies between them; its gradient too."""
    transformer = make_random_transformer("tiny", seed=0, device=torch.device("cpu"), dtype=dtype)
    plain = copy.deepcopy(transformer.transformer_blocks[0].ff).requires_grad_(False)
    transformer.requires_grad_(False)
    quantize_base(transformer)
    fused = transformer.transformer_blocks[0].ff
    assert isinstance(fused, Float8FeedForward)
    x = draw(2, 9, plain.net[2].out_features, seed=1).to(dtype).requires_grad_()
    grad = draw(2, 9, plain.net[2].out_features, seed=2).to(dtype)
    results = {}
    for name, module in (("fused", fused), ("layers", lambda x: fused.net[2](fused.net[0](x))), ("exact", plain)):
        y = module(x)
        results[name] = (y.detach(), torch.autograd.grad(y, x, grad)[0])
        assert results[name][0].dtype == results[name][1].dtype == dtype
    rounding = 0.02 if dtype == torch.bfloat16 else 2e-6
    for index in range(2):
        assert relative_error(results["fused"][index], results["layers"][index]) < rounding
        assert 5e-3 < relative_error(results["fused"][index], results["exact"][index]) < 0.1


def test_an_adapted_feed_forward_keeps_its_layers() -> None:
    settings = AdapterSettings(rank=4, target_modules=["to_q", "ff.net.2"])
    transformer = make_transformer("tiny", settings, torch.float32)
    quantize_base(transformer)
    assert not any(isinstance(module, Float8FeedForward) for module in transformer.modules())
