import math

import pytest
import torch
from torch import Tensor

from cogtune.muon import Muon, orthogonalize
from cogtune.optimization import StepGuard

SHAPES = [(8, 40), (40, 8), (8, 40), (16, 16)]


def make_weights(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(weights: list[torch.nn.Parameter], seed: int) -> None:
    for own, other in zip(weights, make_weights(100 + seed), strict=True):
        own.grad = other.detach().clone()


def values(weights: list[torch.nn.Parameter]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(2, 12, 12, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(2, 50, 12, generator=generator))[0].transpose(1, 2)
    sizes = torch.logspace(0, -1.5, 12)
    found = left.transpose(1, 2) @ orthogonalize(left * sizes @ right) @ right.transpose(1, 2)
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.25)).all(), diagonal
    torch.testing.assert_close(found, torch.diag_embed(diagonal), atol=2e-5, rtol=0)


def test_scale_of_the_gradients_does_not_count() -> None:
    matrices = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonalize(matrices * 1e-6), orthogonalize(matrices), rtol=1e-4, atol=1e-5)
    assert orthogonalize(torch.zeros(1, 6, 20)).abs().max() == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason=f"torch {torch.__version__} has no Muon to compare with")
def test_steps_are_those_of_torch_s_own() -> None:
    """Which rounds to bfloat16 inside: a few thousandths of an update."""
    ours, theirs = make_weights(), make_weights()
    start = values(ours)
    mine = Muon(ours, lr=0.1, momentum=0.9, weight_decay=0.01)
    other = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        other.step()
    for before, own, reference in zip(start, ours, theirs, strict=True):
        moved, expected = own.detach() - before, reference.detach() - before
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_an_update_has_the_size_of_adamw_s() -> None:
    weights = make_weights()
    start = values(weights)
    give_gradients(weights, 0)
    Muon(weights, lr=0.1).step()
    for before, weight in zip(start, weights, strict=True):
        assert math.isclose(float((weight.detach() - before).square().mean().sqrt()), 0.02, rel_tol=0.25)


def test_a_bad_step_leaves_weights_and_state() -> None:
    weights = make_weights()
    optimizer = Muon(weights, lr=0.1, weight_decay=0.1)
    guard = StepGuard(torch.device("cpu"), use_loss_scale=True, max_grad_norm=1.0)
    give_gradients(weights, 0)
    guard.apply(optimizer, list(weights))
    optimizer.step()
    before = values(weights), [optimizer.state[weight]["exp_avg"].clone() for weight in weights]
    give_gradients(weights, 1)
    assert weights[0].grad is not None
    weights[0].grad[0, 0] = torch.nan
    guard.apply(optimizer, list(weights))
    optimizer.step()
    assert guard.num_skipped == 1
    after = values(weights), [optimizer.state[weight]["exp_avg"] for weight in weights]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(old, new, strict=True))


def test_groups_have_rates_of_their_own_and_weights_without_gradient_stay() -> None:
    weights = make_weights()
    start = values(weights)
    optimizer = Muon([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.2}], lr=0.1)
    give_gradients(weights, 0)
    weights[3].grad = None
    optimizer.step()
    first, third = ((weights[index].detach() - start[index]).norm() for index in (0, 2))
    assert math.isclose(float(third / first), 2.0, rel_tol=0.2)
    assert torch.equal(weights[3].detach(), start[3])


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"\[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
