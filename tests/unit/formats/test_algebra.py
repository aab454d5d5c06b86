"""Adapters merged, added up, compressed and extracted: each by the outputs that come of it."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from trained_adapters import KINDS, run, train

from cogtune import models
from cogtune.config import AdapterSettings
from cogtune.errors import UserError
from cogtune.formats.algebra import add_adapters, compress, extract, merge
from cogtune.formats.lora import Adapter, LoraLayer, read_adapter, write_adapter
from cogtune.formats.tensors import Tensors, hold, open_safetensors

CPU = torch.device("cpu")


def open_base(folder: Path) -> Tensors:
    return open_safetensors(folder / "transformer")


def load(folder: Path, tensors: Tensors) -> CogVideoXTransformer3DModel:
    model = models.load_transformer(models.read_facts(folder), torch.float32)
    model.load_state_dict({name: tensors.read(name) for name in tensors.specs}, strict=True)
    return model


@pytest.mark.parametrize("settings", [*KINDS.values(), AdapterSettings(rank=2, alpha=3.0, use_dora=True)])
def test_merged_weights_give_the_adapters_output(settings: AdapterSettings, tiny_2b_folder: Path, tmp_path) -> None:
    trained = train(tiny_2b_folder, tmp_path, settings)
    base = open_base(tiny_2b_folder)
    merged = merge(base, [(read_adapter(tmp_path), 1.0)], device=CPU)
    torch.testing.assert_close(run(load(tiny_2b_folder, merged)), run(trained), rtol=0, atol=1e-5)
    touched = {f"{name}.weight" for name in read_adapter(tmp_path).layers}
    for name in base.specs:
        assert torch.equal(merged.read(name), base.read(name)) == (name not in touched), name


def test_merging_rounds_once(tiny_2b_folder: Path, tmp_path: Path) -> None:
    train(tiny_2b_folder, tmp_path, KINDS["rslora"])
    adapter = read_adapter(tmp_path)
    wide = open_base(tiny_2b_folder)
    half = hold("half", {name: wide.read(name).bfloat16() for name in wide.specs})
    merged = merge(half, [(adapter, 0.5), (adapter, 0.25)], device=CPU)
    name, layer = next(iter(adapter.layers.items()))
    exact = half.read(f"{name}.weight").double() + 0.75 * layer.scale * (layer.up.double() @ layer.down.double())
    found = merged.read(f"{name}.weight")
    assert found.dtype == torch.bfloat16
    # The nearest bfloat16, up to ties that float32's own rounding moves.
    assert ((found != exact.bfloat16()).float().mean() < 1e-3) and (
        (found.double() - exact).abs() <= exact.abs() / 250
    ).all()
    cast = merge(wide, [(adapter, 1.0)], device=CPU, dtype=torch.bfloat16)
    assert {cast.read(name).dtype for name in cast.specs} == {torch.bfloat16}


def test_sum_with_scales_equals_a_stock_pipelines_two_adapters(tiny_2b_folder: Path, tmp_path: Path) -> None:
    train(tiny_2b_folder, tmp_path / "a", KINDS["every kind of layer"], seed=4)
    train(tiny_2b_folder, tmp_path / "b", KINDS["rslora"], seed=5)
    stock = CogVideoXPipeline.from_pretrained(tiny_2b_folder)
    for name in "ab":
        stock.load_lora_weights(tmp_path / name, adapter_name=name)
    stock.set_adapters(["a", "b"], [0.7, -0.4])
    both = add_adapters([(read_adapter(tmp_path / "a"), 0.7), (read_adapter(tmp_path / "b"), -0.4)])
    write_adapter(both, tmp_path / "sum.safetensors", "diffusers")
    again = CogVideoXPipeline.from_pretrained(tiny_2b_folder)
    again.load_lora_weights(tmp_path, weight_name="sum.safetensors")
    torch.testing.assert_close(run(again.transformer), run(stock.transformer), rtol=0, atol=1e-5)
    assert {layer.rank for layer in both.layers.values()} == {3, 7}
    # Compressed to the rank it has, it is the same adapter; the share that is kept says so.
    for rank, energy in ((7, None), (None, 1.0)):
        full, kept = compress(both, rank=rank, energy=energy)
        assert kept == pytest.approx(1, abs=1e-12)
        for name, layer in both.layers.items():
            torch.testing.assert_close(full.layers[name].update(), layer.update(), rtol=0, atol=2e-6)


def test_compression_is_the_nearest_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = LoraLayer(torch.randn(6, 40, generator=generator), torch.randn(30, 6, generator=generator), 0.3)
    singular = torch.linalg.svdvals(layer.update().double())
    small, kept = compress(Adapter("a", {"x": layer}), rank=2, energy=None)
    error = (small.layers["x"].update() - layer.update()).double().norm()
    assert error == pytest.approx(float(singular[2:].norm()), rel=1e-5)  # Eckart and Young: no rank 2 is nearer
    assert kept == pytest.approx(float(singular[:2].square().sum() / singular.square().sum()), rel=1e-5)
    most, kept = compress(Adapter("a", {"x": layer}), rank=None, energy=0.6)
    least = next(r for r in range(1, 7) if singular[:r].square().sum() >= 0.6 * singular.square().sum())
    assert most.layers["x"].rank == least and kept >= 0.6


def test_extracted_adapter_gives_the_tuned_models_output(tiny_2b_folder: Path, tmp_path: Path) -> None:
    trained = train(tiny_2b_folder, tmp_path / "a", KINDS["every kind of layer"])
    base = open_base(tiny_2b_folder)
    merged = merge(base, [(read_adapter(tmp_path / "a"), 1.0)], device=CPU)
    for rank, energy in ((3, None), (None, 0.99999)):
        found, lines = extract(base, merged, rank=rank, energy=energy, device=CPU)
        assert found.layers.keys() == read_adapter(tmp_path / "a").layers.keys()
        assert {layer.rank for layer in found.layers.values()} == {3}
        assert "100.00 % of the squared difference" in lines[0] and len(lines) == 1
        write_adapter(found, tmp_path / "found.safetensors", "diffusers")
        stock = CogVideoXPipeline.from_pretrained(tiny_2b_folder)
        stock.load_lora_weights(tmp_path, weight_name="found.safetensors")
        torch.testing.assert_close(run(stock.transformer), run(trained), rtol=0, atol=2e-5)
        (tmp_path / "found.safetensors").unlink()


def test_extraction_says_what_a_lora_cannot_hold(tiny_2b_folder: Path) -> None:
    base = open_base(tiny_2b_folder)
    state = {name: base.read(name) for name in base.specs}
    with pytest.raises(UserError, match="there is nothing to extract"):
        extract(base, hold("same", state), rank=2, energy=None, device=CPU)
    changed = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in state.items()}
    found, lines = extract(base, hold("sft", changed), rank=2, energy=None, device=CPU)
    matrices = {name for name, tensor in state.items() if tensor.ndim == 2 and name.endswith("weight")}
    assert {f"{name}.weight" for name in found.layers} == matrices
    assert f"left out: {len(state) - len(matrices)} changed tensor(s) that are no matrix" in lines[1]
    cut = {name: tensor for name, tensor in state.items() if "blocks.1" not in name}
    with pytest.raises(UserError, match="it is another model than"):
        extract(base, hold("other", cut), rank=2, energy=None, device=CPU)


def test_dora_can_only_be_merged_at_its_strength(tiny_2b_folder: Path, tmp_path: Path) -> None:
    train(tiny_2b_folder, tmp_path, AdapterSettings(rank=2, use_dora=True))
    adapter = read_adapter(tmp_path)
    with pytest.raises(UserError, match="can't be added up"):
        add_adapters([(adapter, 1.0)])
    with pytest.raises(UserError, match="can't be compressed"):
        compress(adapter, rank=1, energy=None)
    merged = merge(open_base(tiny_2b_folder), [(adapter, 0.5)], device=CPU)
    with pytest.raises(UserError, match="trained strength only"):
        merged.read(f"{next(iter(adapter.layers))}.weight")


def test_adapters_of_different_models_are_not_added() -> None:
    def make(width: int) -> Adapter:
        return Adapter(f"{width} wide", {"x": LoraLayer(torch.ones(2, width), torch.ones(width, 2), 1.0)})

    with pytest.raises(UserError, match=r"x is \[9, 9\] and \[8, 8\] in 8 wide"):
        add_adapters([(make(8), 1.0), (make(9), 1.0)])
