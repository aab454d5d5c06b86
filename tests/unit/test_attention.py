"""Our attention against diffusers' processor: outputs, gradients, what it fuses and what it leaves to the layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from cogtune import low_rank
from cogtune.adapter import WEIGHTS_NAME, LoraLinear, adapter_parameters, add_lora, save_adapter
from cogtune.attention import extend_rotary, install_attention, rotate
from cogtune.config import AdapterSettings
from cogtune.random_pipeline import make_random_transformer

CPU = torch.device("cpu")
KINDS = {
    "all four": AdapterSettings(rank=4, alpha=9.0),
    "one of three": AdapterSettings(rank=3, target_modules=["to_k"]),
    "two of three": AdapterSettings(rank=5, target_modules=["to_q", "to_v"], use_rslora=True),
    "none of them": AdapterSettings(rank=4, target_modules=["to_out.0"]),
    "dora": AdapterSettings(rank=4, use_dora=True),
    "dropout": AdapterSettings(rank=4, dropout=0.5),
    "dora with dropout": AdapterSettings(rank=4, alpha=2.0, dropout=0.5, use_dora=True),
}


def make_transformer(
    model: str, settings: AdapterSettings | None, dtype: torch.dtype = torch.float64, num_layers: int = 2
) -> CogVideoXTransformer3DModel:
    """A random transformer with an adapter that has left its start; without settings all weights are trained."""
    transformer = make_random_transformer(model, seed=0, device=CPU, dtype=torch.float32, num_layers=num_layers)
    if settings is None:
        return transformer.to(dtype).requires_grad_(True)
    add_lora(transformer, settings, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return transformer.to(dtype).train()


def make_inputs(transformer: CogVideoXTransformer3DModel, seed: int = 1) -> dict[str, Any]:
    """Two samples of 5 latent frames, and their text; the latents stand for the target too."""
    generator = torch.Generator().manual_seed(seed)
    dtype = transformer.proj_out.weight.dtype
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 5)
    return {
        "hidden_states": torch.randn(2, 5, 16, 8, 12, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 32, 32, generator=generator).to(dtype),
        "timestep": torch.tensor([500, 20]),
        "image_rotary_emb": rotary,
    }


def step(transformer: CogVideoXTransformer3DModel, seed: int = 1) -> dict[str, torch.Tensor]:
    """Output, loss and every gradient, by name; dropout draws the same each time."""
    torch.manual_seed(7)
    inputs = make_inputs(transformer, seed)
    output = transformer(**inputs, return_dict=False)[0]
    loss = (output - inputs["hidden_states"]).square().mean()
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"output": output.detach(), "loss": loss.detach(), **dict(zip(parameters, gradients, strict=True))}


def assert_equal_steps(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """By the norm of each tensor's difference, relative to the tensor's."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        # Without rotary positions, the gradient of k's shift is zero but for rounding: it moves all scores alike.
        assert (got[name] - value).norm() / max(float(value.norm()), 1e-6) < tolerance, name


def layers_of(transformer: CogVideoXTransformer3DModel) -> Iterator[Any]:
    return (block.attn1 for block in transformer.transformer_blocks)


def use_stock_lora(transformer: CogVideoXTransformer3DModel) -> None:
    """PEFT's own arithmetic in our adapter's layers."""
    for module in transformer.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = PeftLinear


# diffusers rotates in float32 whatever the precision.
@pytest.mark.parametrize(("model", "tolerance"), [("tiny", 2e-6), ("tiny-2b", 1e-12)])
@pytest.mark.parametrize("kind", [*KINDS, "all weights"])
def test_outputs_and_gradients_equal_diffusers_and_peft(model: str, tolerance: float, kind: str) -> None:
    stock = make_transformer(model, KINDS.get(kind))
    use_stock_lora(stock)
    expected = step(stock)
    transformer = make_transformer(model, KINDS.get(kind))
    install_attention(transformer, "default")
    assert all(hasattr(layer, "qkv") == (kind != "all weights") for layer in layers_of(transformer))
    assert_equal_steps(step(transformer), expected, tolerance)


def test_dropout_is_drawn() -> None:
    """Without it the test above would say nothing about dropout."""
    without = step(make_transformer("tiny-2b", KINDS["dropout"].model_copy(update={"dropout": 0.0})))
    assert not torch.allclose(step(make_transformer("tiny-2b", KINDS["dropout"]))["output"], without["output"])


def test_a_disabled_adapter_leaves_the_base_model() -> None:
    """What validation's base videos are made with."""
    plain = make_transformer("tiny", KINDS["all four"])
    plain.disable_adapters()
    transformer = make_transformer("tiny", KINDS["all four"])
    install_attention(transformer, "default")
    with torch.no_grad():
        adapted = transformer(**make_inputs(transformer), return_dict=False)[0]
        transformer.disable_adapters()
        base = transformer(**make_inputs(transformer), return_dict=False)[0]
        expected = plain(**make_inputs(plain), return_dict=False)[0]
    torch.testing.assert_close(base, expected, rtol=1e-6, atol=1e-6)
    assert (adapted - base).norm() / base.norm() > 1e-2


class Operators(TorchDispatchMode):
    """Writes down every operator that runs, with the sizes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(argument.shape) for argument in args if isinstance(argument, torch.Tensor)]
        self.seen.append((func.overloadpacket.__name__, shapes))
        return func(*args, **(kwargs or {}))

    def count(self, *names: str) -> int:
        """How often operators whose name has one of these in it ran."""
        return sum(any(name in operator for name in names) for operator, _ in self.seen)

    def products(self) -> list[tuple[int, ...]]:
        """The size of each matrix product's second operand."""
        return [shapes[-1] for operator, shapes in self.seen if operator in ("mm", "addmm")]


def test_three_projections_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "sum_is_cheaper", lambda *_sizes: False)  # as on a GPU
    transformer = make_transformer("tiny", KINDS["all four"], num_layers=1)
    with Operators() as stock:
        transformer(**make_inputs(transformer))
    install_attention(transformer, "default")
    with Operators() as ours:
        transformer(**make_inputs(transformer))
    rank = 3 * 4 + 4  # zeros up to a multiple of 8
    assert ours.products().count((32 + rank, 3 * 32)) == 1, "q, k, v and their updates"
    assert len(ours.products()) < len(stock.products())


def test_names_values_and_memory_of_the_weights_stay() -> None:
    transformer = make_transformer("tiny", KINDS["all four"], torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    install_attention(transformer, "default")
    after = transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for layer in layers_of(transformer):
        start, size = layer.qkv.weight.data_ptr(), layer.to_q.base_layer.weight.nbytes
        for number, part in enumerate((layer.to_q, layer.to_k, layer.to_v)):
            assert part.base_layer.weight.data_ptr() == start + number * size, "a view, not a copy"


def test_saved_adapters_are_the_same(tmp_path: Path) -> None:
    saved = []
    for name in ("stock", "ours"):
        transformer = make_transformer("tiny", KINDS["all four"], torch.float32)
        if name == "ours":
            install_attention(transformer, "default")
        (tmp_path / name).mkdir()
        save_adapter(transformer, tmp_path / name, trained=True)
        saved.append(load_file(tmp_path / name / WEIGHTS_NAME))
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) == 16
    assert all(saved[0][key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in saved[1].items())


def test_rotation_turns_pairs_as_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    num_text, num_video, width = 3, 7, 8
    angles = torch.rand(num_video, width // 2, generator=generator, dtype=torch.float64) * 6
    x = torch.randn(2, num_text + num_video, 5, width, generator=generator, dtype=torch.float64)
    tables = (angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1))
    turned = (
        torch.view_as_complex(x[:, num_text:].unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)[:, None]
    )
    expected = torch.cat([x[:, :num_text], torch.view_as_real(turned).flatten(-2)], dim=1)
    torch.testing.assert_close(rotate(x, extend_rotary(tables, num_text)), expected, rtol=1e-12, atol=1e-12)


def test_rotation_is_computed_in_float32_for_low_precisions() -> None:
    cos, sin = (torch.randn(4, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    tables = extend_rotary((cos, sin), 0)
    assert torch.equal(rotate(x, tables), rotate(x.float(), tables).bfloat16())
