"""The penalty on what an adapter changes for prior clips: its numbers against the model's, and where it is refused."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogtune import models
from cogtune.adapter import add_lora, linear_names, without_adapter
from cogtune.config import AdapterSettings, RunConfig
from cogtune.dataset import Batch
from cogtune.denoiser import Denoiser
from cogtune.errors import UserError
from cogtune.parallel.strategy import Strategy
from cogtune.prior_penalty import PriorPenalty, adapted_layers, check_prior_penalty, collect_factors, count_factor_bytes

CPU = torch.device("cpu")
ONE = torch.ones(())
TARGETS = ["to_q", "to_k", "to_v", "ff.net.2", "norm1.linear", "proj_out"]


def make_model(folder: Path, targets: list[str], **options: Any) -> tuple[Any, Denoiser]:
    facts = models.read_facts(folder)
    transformer = models.load_transformer(facts, torch.float32)
    add_lora(transformer, AdapterSettings(rank=4, target_modules=targets, **options), seed=1)
    return transformer, Denoiser(facts, device=CPU, dtype=torch.float32, min_snr_gamma=None)


def make_batches(count: int, *, first: int = 0, size: int = 4) -> Iterator[Batch]:
    for start in range(first, first + count, size):
        random = torch.Generator().manual_seed(start)
        latents, noise = (torch.randn(size, 2, 16, 8, 12, generator=random) for _ in range(2))
        yield Batch(
            latents=latents,
            noise=noise,
            embeddings=torch.randn(size, 32, 32, generator=random),
            timesteps=torch.randint(0, 1000, (size,), generator=random),
            weights=torch.ones(size),
            held=torch.ones(size, dtype=torch.bool),
            positions=list(range(start, start + size)),
            clips=[],
            dropped=[False] * size,
            num_held=size,
        )


def make_penalty(transformer: Any, denoiser: Denoiser, strength: float = 1.0, count: int = 32) -> PriorPenalty:
    factors = collect_factors(
        transformer, make_batches(count), denoiser, base=lambda: without_adapter(transformer), seed=3
    )
    return PriorPenalty(transformer, factors, strength)


def move(transformer: Any, size: float) -> None:
    """The adapter leaves its start."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_layers(transformer).values():
            layer.lora_B["default"].weight.normal_(std=size, generator=random)


def predict(transformer: Any, batch: Batch, denoiser: Denoiser) -> torch.Tensor:
    with torch.no_grad():
        return denoiser.predict(transformer, batch.latents, batch.embeddings, batch.timesteps)


@pytest.mark.parametrize("target", ["proj_out", "transformer_blocks.1.ff.net.2", "transformer_blocks.0.norm1.linear"])
def test_it_is_about_what_a_small_update_of_a_layer_changes(target: str, tiny_folder: Path) -> None:
    """On samples that it has not seen; one layer alone, where the factors leave out the least."""
    transformer, denoiser = make_model(tiny_folder, [target], alpha=8.0)
    penalty = make_penalty(transformer, denoiser, count=64)
    assert penalty.value() == 0.0
    move(transformer, 1e-3)
    changes = []
    for batch in make_batches(32, first=1000):
        changed = predict(transformer, batch, denoiser)
        with without_adapter(transformer):
            changes.append((changed - predict(transformer, batch, denoiser)).square().mean())
    measured = torch.stack(changes).mean()
    assert 0.6 < float(penalty.value() / measured) < 1.6


def test_its_gradients_are_those_of_its_value(tiny_folder: Path) -> None:
    transformer, denoiser = make_model(tiny_folder, TARGETS, use_rslora=True)
    penalty = make_penalty(transformer, denoiser, strength=7.0, count=8)
    move(transformer, 0.1)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    assert all(p.grad is None for p in parameters)
    penalty.add_gradients(ONE)
    expected = torch.autograd.grad(penalty.value(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    once = [p.grad.clone() for p in parameters if p.grad is not None]
    penalty.add_gradients(2 * ONE)  # adds, times the loss scale
    for parameter, gradient in zip(parameters, once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * gradient)


def test_processes_together_find_what_one_finds_alone(tiny_folder: Path) -> None:
    transformer, denoiser = make_model(tiny_folder, TARGETS)
    batches = list(make_batches(8))
    alone = collect_factors(transformer, batches, denoiser, base=lambda: without_adapter(transformer), seed=3)
    sent: list[list[torch.Tensor]] = []
    for own in batches:  # what each process adds up
        sent.append([])
        collect_factors(
            transformer,
            [own],
            denoiser,
            base=lambda: without_adapter(transformer),
            seed=3,
            add_up=lambda tensor: sent[-1].append(tensor.clone()),
        )
    sums = iter([sum(tensors[1:], tensors[0]) for tensors in zip(*sent, strict=True)])
    together = collect_factors(
        transformer,
        batches[:1],
        denoiser,
        base=lambda: without_adapter(transformer),
        seed=3,
        add_up=lambda tensor: tensor.copy_(next(sums)),
    )
    for name, factors in alone.items():
        torch.testing.assert_close(together[name].inputs, factors.inputs)
        torch.testing.assert_close(together[name].gradients, factors.gradients)
        assert together[name].share == factors.share


def test_blocks_that_are_recomputed_give_the_same(tiny_folder: Path) -> None:
    """As they are on a GPU, where a large model's activations have no room."""
    transformer, denoiser = make_model(tiny_folder, TARGETS)
    found = []
    for recomputed in (False, True):
        if recomputed:
            transformer.enable_gradient_checkpointing()
        found.append(
            collect_factors(transformer, make_batches(8), denoiser, base=lambda: without_adapter(transformer), seed=3)
        )
    for name, factors in found[0].items():
        torch.testing.assert_close(found[1][name].inputs, factors.inputs)
        torch.testing.assert_close(found[1][name].gradients, factors.gradients)
        assert found[1][name].share == factors.share


def test_the_base_is_as_before_and_memory_is_what_the_plan_counts(tiny_folder: Path) -> None:
    transformer, denoiser = make_model(tiny_folder, TARGETS)
    batch = next(make_batches(4))
    before = predict(transformer, batch, denoiser)
    factors = collect_factors(transformer, make_batches(8), denoiser, base=lambda: without_adapter(transformer), seed=3)
    assert torch.equal(predict(transformer, batch, denoiser), before)
    assert all(p.grad is None for p in transformer.parameters())
    kept = {id(matrix): matrix.nbytes for own in factors.values() for matrix in (own.inputs, own.gradients)}
    facts = models.read_facts(tiny_folder)
    meta = models.make_meta_transformer(facts)
    config = RunConfig.model_validate(
        {"model": {"path": str(tiny_folder)}, "data": {"manifest": "x"}, "adapter": {"target_modules": TARGETS}}
    )
    assert sum(kept.values()) == count_factor_bytes(meta, config)
    assert len(factors) == sum(name.endswith(tuple(TARGETS)) for name in linear_names(meta))


CLIP = SimpleNamespace(prior=True, weight=1.0)
RUNG = SimpleNamespace(quantized=None, num_resident=None)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"full": True}, "has no adapter"),
        ({"clips": [SimpleNamespace(prior=False, weight=1.0)]}, "no clip of the manifest is marked `prior`"),
        ({"adapter": {"use_dora": True}}, "adapter.use_dora must be false"),
        ({"strategy": Strategy("fsdp2", 2, 2)}, "divided over processes"),
        ({"memory": SimpleNamespace(quantized="nf4", num_resident=None)}, "memory.quantized_base=none"),
        ({"memory": SimpleNamespace(quantized=None, num_resident=3)}, "blocks that wait on the host"),
    ],
)
def test_where_it_can_t_be_had_the_plan_says_why(change: dict[str, Any], reason: str) -> None:
    sections = {"train": {"prior_penalty": 10.0}, "adapter": change.pop("adapter", {})}
    config = RunConfig.model_validate({"model": {"path": "x"}, "data": {"manifest": "x"}} | sections)
    given: dict[str, Any] = {"strategy": Strategy(), "memory": RUNG, "clips": [CLIP], "full": False}
    check_prior_penalty(config.model_copy(update={"adapter": AdapterSettings()}), **given)
    with pytest.raises(UserError, match=r"train\.prior_penalty=10: .*" + reason):
        check_prior_penalty(config, **given | change)
