"""What a backward pass reads comes back from the host as it was."""

from types import SimpleNamespace

import pytest
import torch

from cogtune.streaming.activations import ActivationOffload, is_dense

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(offload: ActivationOffload | None, weight: torch.Tensor, depth: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = draw(6, 8).requires_grad_()
    y, kept = x, []
    for index in range(depth):
        if offload is None:
            y = torch.tanh(y @ weight).t().exp().t()
        else:
            with offload.keeping(index, y):
                y = torch.tanh(y @ weight).t().exp().t()
            kept.append(offload.host_bytes)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


def test_values_and_gradients_stay_and_host_memory_is_used_again() -> None:
    weight = draw(8, 8, seed=1)
    expected = run(None, weight)
    offload = ActivationOffload(range(3), CPU, [weight])
    sizes = []
    for _ in range(3):
        got = run(offload, weight)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        for index in range(3):
            offload.finish(index)
        sizes.append(offload.host_bytes)
    assert sizes[0] > 0 and len(set(sizes)) == 1
    assert sizes[0] % (6 * 8 * 4) == 0, "activations, and no weight"


def test_only_the_chosen_blocks_leave() -> None:
    weight = draw(8, 8, seed=1)
    few, all_of_them = ActivationOffload([1], CPU, [weight]), ActivationOffload(range(3), CPU, [weight])
    run(few, weight)
    run(all_of_them, weight)
    assert 0 < 3 * few.host_bytes == all_of_them.host_bytes


def test_fetching_ahead_changes_nothing() -> None:
    weight = draw(8, 8, seed=1)
    expected = run(None, weight)[1]
    offload = ActivationOffload(range(2), CPU, [weight])
    x = draw(6, 8).requires_grad_()
    with offload.keeping(0, x):
        y = torch.tanh(x @ weight).t().exp().t()
    with offload.keeping(1, y):
        z = torch.tanh(y @ weight).t().exp().t()
    offload.fetch(1)
    offload.fetch_before(1)
    offload.fetch_before(0)
    third = torch.tanh(z @ weight).t().exp().t()
    assert torch.equal(torch.autograd.grad(third.sum(), x)[0], expected)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(2, 3, 4), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
        (torch.zeros(2, 1, 4)[:, :, :], True),
        (torch.zeros(2, 6)[:, ::2], False),
        (torch.zeros(4, 6)[:, :3], False),
        (torch.zeros(3, 1).expand(3, 4), False),
    ],
)
def test_density(tensor: torch.Tensor, dense: bool) -> None:
    assert is_dense(tensor) is dense


class Copies:
    """Stands in for the event behind a block's copies."""

    def __init__(self, *, done: bool) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done


@pytest.mark.parametrize("num_leaving", [1, 2])
def test_a_block_never_waits_for_the_copies_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, num_leaving: int
) -> None:
    """They run beside it. Older ones must be done by then; copies that are done are let go without waiting."""
    offload = ActivationOffload(range(4), torch.device("cpu"), [], num_leaving=num_leaving)
    waited: list[Copies] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(wait_event=waited.append))
    copies = [Copies(done=False) for _ in range(3)]
    for index, left in enumerate(copies):
        with offload.keeping(index, torch.zeros(1, 2, 2)):
            pass
        offload._states[index].left = left  # type: ignore[assignment]
        assert waited == copies[: max(0, index - num_leaving)]
    for left in copies:
        left.done = True
    with offload.keeping(3, torch.zeros(1, 2, 2)):
        pass
    assert waited == copies[: 2 - num_leaving] and offload._held == [3]


def test_memory_is_not_given_up_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came back and nothing has read."""
    offload = ActivationOffload([0], torch.device("cpu"), [])
    waited: list[Copies] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(wait_event=waited.append))
    arrived = Copies(done=False)
    offload._states[0].arrived = arrived  # type: ignore[assignment]
    offload.finish(0)
    assert waited == [arrived] and offload._states[0].arrived is None
