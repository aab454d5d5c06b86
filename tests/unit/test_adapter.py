"""Adapters: what is trained, what is saved, and that a stock pipeline gives the trained strength."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from cogtune import adapter, models
from cogtune.config import AdapterSettings
from cogtune.errors import UserError
from cogtune.saving import DeviceStore

KINDS = {
    "alpha differs from rank": AdapterSettings(rank=4, alpha=9.0),
    "dora": AdapterSettings(rank=4, alpha=2.0, use_dora=True),
    "rslora": AdapterSettings(rank=4, alpha=2.0, use_rslora=True),
    "whole blocks": AdapterSettings(rank=3, target_modules=[r"transformer_blocks\.0\..*", "proj_out"]),
    "regex": AdapterSettings(rank=3, target_modules=["to_q", r"transformer_blocks\.0\.ff\..*proj"]),
}


def make_trained(folder: Path, settings: AdapterSettings) -> torch.nn.Module:
    """A transformer whose adapter has left its start."""
    transformer = models.load_transformer(models.read_facts(folder), torch.float32)
    adapter.add_lora(transformer, settings, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapter.adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return transformer


def forward(transformer: torch.nn.Module, rotary: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return transformer(
            torch.randn(1, 5, 16, 8, 12, generator=generator),
            torch.randn(1, 32, 32, generator=generator),
            torch.tensor([437]),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pipeline_fixture", ["tiny_folder", "tiny_2b_folder"])
def test_stock_pipeline_gives_the_trained_strength(
    kind: str, pipeline_fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(pipeline_fixture)
    transformer = make_trained(folder, KINDS[kind])
    adapter.save_adapter(transformer, tmp_path, trained=True)
    stock = CogVideoXPipeline.from_pretrained(folder)
    rotary = None
    if stock.transformer.config.use_rotary_positional_embeddings:
        rotary = stock._prepare_rotary_positional_embeddings(64, 96, 5, torch.device("cpu"))
    base = forward(stock.transformer, rotary)
    stock.load_lora_weights(tmp_path)
    ours, theirs = forward(transformer, rotary), forward(stock.transformer, rotary)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    # The adapter matters: without it the output is another by far more than the tolerance.
    assert (ours - base).abs().max() > 1e-2


def test_fresh_adapter_changes_nothing_and_is_all_that_trains(tiny_folder: Path) -> None:
    facts = models.read_facts(tiny_folder)
    transformer = models.load_transformer(facts, torch.bfloat16)
    names = {name for name, _ in transformer.named_parameters()}
    rotary = CogVideoXPipeline.from_pretrained(tiny_folder)._prepare_rotary_positional_embeddings(
        64, 96, 5, torch.device("cpu")
    )
    before = forward(transformer.float(), rotary)
    settings = AdapterSettings(rank=4)
    adapter.add_lora(transformer.bfloat16(), settings, seed=1)
    trained = adapter.adapter_parameters(transformer)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert len(trained) == 2 * 4 * facts.num_layers
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    frozen = {name.replace("base_layer.", "") for name, p in transformer.named_parameters() if not p.requires_grad}
    assert frozen == names
    counted = adapter.count_adapter_parameters(models.make_meta_transformer(facts), settings)
    assert counted == sum(p.numel() for p in trained.values())
    torch.testing.assert_close(forward(transformer.float(), rotary), before, rtol=0, atol=0.0)


def test_same_seed_gives_the_same_adapter_and_leaves_the_global_generator_alone(tiny_folder: Path) -> None:
    facts = models.read_facts(tiny_folder)
    states = []
    for seed in (5, 5, 6):
        transformer = models.load_transformer(facts, torch.float32)
        before = torch.get_rng_state()
        adapter.add_lora(transformer, AdapterSettings(rank=2), seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        states.append(adapter.adapter_state(transformer))
    key = next(key for key in states[0] if "lora_A" in key)
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_low_precision_forward_is_near_float64(tiny_folder: Path) -> None:
    """The layer's own forward in bfloat16 against base + scaled product in float64."""
    transformer = make_trained(tiny_folder, AdapterSettings(rank=4, alpha=8.0)).bfloat16()
    layer = transformer.transformer_blocks[0].attn1.to_q
    assert isinstance(layer, adapter.LoraLinear)
    for half in (layer.lora_A, layer.lora_B):
        half["default"].weight.data = half["default"].weight.data.float()
    x = torch.randn(3, 7, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    base, wide = layer.base_layer, x.double()
    product = wide @ layer.lora_A["default"].weight.double().T @ layer.lora_B["default"].weight.double().T
    expected = wide @ base.weight.double().T + base.bias.double() + 2.0 * product
    result = layer(x)
    assert result.dtype == torch.bfloat16
    error = (result.double() - expected).norm() / expected.norm()
    assert error < 1e-2
    result.float().sum().backward()
    gradient = layer.lora_B["default"].weight.grad
    assert gradient is not None and gradient.dtype == torch.float32 and bool(gradient.any())


def test_file_has_diffusers_keys_and_the_whole_strength(tiny_folder: Path, tmp_path: Path) -> None:
    adapter.save_adapter(make_trained(tiny_folder, KINDS["rslora"]), tmp_path, trained=True)
    with safe_open(tmp_path / adapter.WEIGHTS_NAME, framework="pt") as file:
        keys, header = list(file.keys()), file.metadata()
    assert all(key.startswith("transformer.transformer_blocks.") and "lora" in key for key in keys)
    metadata = json.loads(header["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == 2.0
    assert metadata["transformer.r"] == 4
    assert metadata["transformer.use_rslora"] is True
    assert set(metadata["transformer.target_modules"]) == {"to_q", "to_k", "to_v", "to_out.0"}


def test_equal_adapters_are_equal_files(tiny_folder: Path, tmp_path: Path) -> None:
    """Byte for byte. Left to safetensors, its two entries of metadata come in either order."""
    trained = make_trained(tiny_folder, KINDS["rslora"])
    for number in range(6):
        adapter.save_adapter(trained, tmp_path / str(number), trained=True)
    files = [(tmp_path / str(number) / adapter.WEIGHTS_NAME).read_bytes() for number in range(6)]
    assert len(set(files)) == 1
    assert files[0][8:].startswith(b'{"__metadata__":{"format":"pt","lora_adapter_metadata":"{')


def test_load_puts_back_exactly_what_was_saved(tiny_folder: Path, tmp_path: Path) -> None:
    saved = make_trained(tiny_folder, KINDS["dora"])
    adapter.save_adapter(saved, tmp_path, trained=True)
    fresh = models.load_transformer(models.read_facts(tiny_folder), torch.float32)
    adapter.add_lora(fresh, KINDS["dora"], seed=9)
    into = adapter.TrainedAdapter(fresh, "")
    DeviceStore(into.parameters(), torch.optim.SGD(into.parameters().values())).write_weights(into.read(tmp_path))
    expected, found = adapter.adapter_state(saved), adapter.adapter_state(fresh)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_adapter_of_another_rank_is_refused_on_resume(tiny_folder: Path, tmp_path: Path) -> None:
    adapter.save_adapter(make_trained(tiny_folder, AdapterSettings(rank=4)), tmp_path, trained=True)
    other = models.load_transformer(models.read_facts(tiny_folder), torch.float32)
    adapter.add_lora(other, AdapterSettings(rank=2), seed=1)
    with pytest.raises(UserError, match="differs from the config's"):
        adapter.TrainedAdapter(other, "").read(tmp_path)


def test_untrained_and_empty_adapters_are_not_written(tiny_folder: Path, tmp_path: Path) -> None:
    transformer = models.load_transformer(models.read_facts(tiny_folder), torch.float32)
    adapter.add_lora(transformer, AdapterSettings(rank=2), seed=1)
    with pytest.raises(RuntimeError, match="every B matrix"):
        adapter.save_adapter(transformer, tmp_path, trained=True)
    next(iter(adapter.adapter_parameters(transformer).values())).data = torch.empty(0)
    with pytest.raises(RuntimeError, match="empty"):
        adapter.save_adapter(transformer, tmp_path, trained=False)
    assert not any(tmp_path.iterdir())


def test_targets_are_matched_at_the_end_or_as_a_whole_regex(tiny_folder: Path) -> None:
    names = adapter.linear_names(models.make_meta_transformer(models.read_facts(tiny_folder)))
    assert len(adapter.match_targets(names, ["to_q"])) == 2
    assert adapter.match_targets(names, [r"transformer_blocks\.1\..*to_q"]) == ["transformer_blocks.1.attn1.to_q"]
    with pytest.raises(UserError, match=r"'to_qq' matches no linear layer; did you mean .*to_q"):
        adapter.match_targets(names, ["to_k", "to_qq"])


@pytest.mark.parametrize("damage", ["wider", "unknown layer", "foreign key"])
def test_adapter_of_another_model_is_refused(damage: str, tiny_folder: Path, tmp_path: Path) -> None:
    transformer = make_trained(tiny_folder, AdapterSettings(rank=2))
    adapter.save_adapter(transformer, tmp_path, trained=True)
    state, config = adapter.read_adapter_file(tmp_path)
    assert config["r"] == 2
    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    if damage == "wider":
        state[key], message = torch.zeros(2, 99), "99 wide in the adapter and 32 in this model"
    elif damage == "unknown layer":
        state[key.replace("blocks.0", "blocks.7")], message = state.pop(key), "blocks.7.attn1.to_q does not exist"
    else:
        state["unet.conv.weight"], message = torch.zeros(1), "'unet.conv.weight' is not one of a CogVideoX adapter"
    save_file(state, tmp_path / "other.safetensors")
    fresh = models.load_transformer(models.read_facts(tiny_folder), torch.float32)
    with pytest.raises(UserError, match=message):
        adapter.check_adapter_fits(adapter.read_adapter_file(tmp_path / "other.safetensors")[0], fresh, tmp_path)
