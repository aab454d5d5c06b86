"""Blocks behind FSDP2's hooks compute what plain ones do, compiled and recomputed, with and without gradients."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch.distributed.tensor import DTensor

from cogtune import adapter
from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.config import AdapterSettings, OptimizerSettings
from cogtune.ema import Ema
from cogtune.execution import configure_blocks
from cogtune.formats.tensors import hold
from cogtune.optimization import StepGuard, make_optimizer
from cogtune.parallel.fully_sharded import ShardedStepGuard, ShardedStore, give_back, make_mesh, shard_transformer
from cogtune.parallel.strategy import Strategy
from cogtune.random_pipeline import make_random_transformer

DEVICE = torch.device("cpu")
ALONE = Strategy("fsdp2", 1, 1)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 5, 16, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(1, 32, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 5),
    }


def make(kind: str) -> Any:
    transformer: Any = make_random_transformer("tiny", seed=0, device=DEVICE, dtype=torch.float32)
    if kind == "lora":
        adapter.add_lora(transformer, AdapterSettings(rank=3, target_modules=["to_q", "to_v", "to_out.0"]), seed=1)
        with torch.no_grad():
            for number, parameter in enumerate(adapter.adapter_parameters(transformer).values()):
                parameter.normal_(generator=torch.Generator().manual_seed(number))
    else:
        transformer.requires_grad_(True)
    return transformer.train()


def run(transformer: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = transformer(**make_inputs(), return_dict=False)[0]
    output.square().mean().backward()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in trained]
    assert all(gradient is not None for gradient in gradients)
    return output.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("kind", ["lora", "sft"])
@pytest.mark.parametrize("activations", ["keep_all", "keep_attention", "recompute"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_plain_blocks(group: None, kind: str, activations: Activations, compiled: bool) -> None:
    plain, divided = make(kind), make(kind)
    install_attention(plain, "default", fuse=False)
    install_attention(divided, "default", fuse=False)
    shard_transformer(divided, ALONE, make_mesh(ALONE, DEVICE), DEVICE, torch.float32, full=kind == "sft")
    assert isinstance(divided.proj_out.weight, DTensor)
    torch._dynamo.reset()
    configure_blocks(divided, activations, compiled=compiled, has_dropout=False, compiler="aot_eager", hooked=True)
    torch.testing.assert_close(run(divided), run(plain), rtol=1e-4, atol=1e-6)
    if kind == "lora":
        with torch.no_grad(), adapter.without_adapter(divided), adapter.without_adapter(plain):
            expected = plain(**make_inputs(), return_dict=False)[0]
            torch.testing.assert_close(divided(**make_inputs(), return_dict=False)[0], expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected = plain(**make_inputs(), return_dict=False)[0]
        torch.testing.assert_close(divided(**make_inputs(), return_dict=False)[0], expected, rtol=1e-4, atol=1e-6)


def test_what_is_put_into_the_parts_is_computed_with(group: None) -> None:
    """Also right after a pass without gradients, after which the weights must not be held whole."""
    divided, other = make("sft"), make("sft")
    shard_transformer(divided, ALONE, make_mesh(ALONE, DEVICE), DEVICE, torch.float32, full=True)
    with torch.no_grad():
        divided(**make_inputs())
        for parameter in other.parameters():
            parameter.mul_(1.5)
        parameters = dict(divided.named_parameters())
        store = ShardedStore(divided, parameters, torch.optim.SGD(parameters.values()), is_main=True)
        store.write_weights(hold("other", dict(other.named_parameters())))
        found = divided(**make_inputs(), return_dict=False)[0]
        torch.testing.assert_close(found, other(**make_inputs(), return_dict=False)[0], rtol=1e-4, atol=1e-6)
    weights = store.read_weights()
    assert all(torch.equal(weights[name], parameter) for name, parameter in other.named_parameters())


@pytest.mark.parametrize("bad", [False, True])
def test_the_guard_clips_and_skips_parts_as_whole_ones(group: None, bad: bool) -> None:
    mesh = make_mesh(ALONE, DEVICE)
    plain, divided = make("sft"), make("sft")
    shard_transformer(divided, ALONE, mesh, DEVICE, torch.float32, full=True)
    guards = [
        StepGuard(DEVICE, use_loss_scale=False, max_grad_norm=0.01),
        ShardedStepGuard(DEVICE, mesh, use_loss_scale=False, max_grad_norm=0.01),
    ]
    norms = []
    for transformer, guard in zip((plain, divided), guards, strict=True):
        run(transformer)
        parameters = list(transformer.parameters())
        if bad:
            last = parameters[-1].grad
            (last.to_local() if isinstance(last, DTensor) else last).fill_(float("nan"))
        optimizer = make_optimizer(parameters, OptimizerSettings(learning_rate=0.01))
        norms.append(guard.apply(optimizer, parameters))
        optimizer.step()
        assert guard.has_failed() == bad
    assert bad or norms[1].item() == pytest.approx(norms[0].item(), rel=1e-5)
    fresh = dict(make("sft").named_parameters())
    for name, parameter in plain.named_parameters():
        found = divided.get_parameter(name).full_tensor()
        torch.testing.assert_close(found, parameter, rtol=0, atol=2e-5)
        assert torch.equal(found, fresh[name]) == bad


def test_blocks_that_stay_whole_see_averages_that_come_and_go(group: None) -> None:
    """Without `give_back` a block that keeps its whole weights after a pass would go on computing with them."""
    whole = Strategy("fsdp2", 1, 1, reshard=False)
    model = make("sft")
    shard_transformer(model, whole, make_mesh(whole, DEVICE), DEVICE, torch.float32, full=True)
    average = Ema(dict(model.named_parameters()), 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().mul_(1.5)

    before = run(model)[0]  # the backward pass gives all weights back
    with average.swapped_in(), torch.no_grad():
        give_back(model)
        averaged = model(**make_inputs(), return_dict=False)[0]  # the blocks stay whole
    give_back(model)
    assert not torch.allclose(averaged, before)
    assert torch.equal(run(model)[0], before)
