"""A frozen layer and its update as one product, against the two apart."""

import pytest
import torch

from cogtune import low_rank
from cogtune.low_rank import ALIGNMENT, adapted_linear, pad_rank, stack_updates, sum_is_cheaper


def draw(*shape: int, seed: int, grad: bool = False) -> torch.Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_(grad)


@pytest.fixture(params=["apart", "summed"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "sum_is_cheaper", lambda *_sizes: request.param == "summed")


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("size_in", "size_out"), [(6, 10), (10, 6)])
@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_the_sum(size_in: int, size_out: int, rank: int, with_bias: bool) -> None:
    x, weight = draw(2, 3, size_in, seed=0, grad=True), draw(size_out, size_in, seed=1)
    bias = draw(size_out, seed=2) if with_bias else None
    down, up = draw(rank, size_in, seed=3, grad=True), draw(size_out, rank, seed=4, grad=True)
    got = adapted_linear(x, weight, bias, down, up)
    expected = torch.nn.functional.linear(x, weight, bias) + x @ down.t() @ up.t()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad = draw(2, 3, size_out, seed=5)
    for mine, reference in zip(
        torch.autograd.grad(got, (x, down, up), grad), torch.autograd.grad(expected, (x, down, up), grad), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("size_in", "size_out"), [(3, 4), (4, 3)])
def test_the_gradient_is_the_numerical_one(size_in: int, size_out: int) -> None:
    weight, bias = draw(size_out, size_in, seed=1), draw(size_out, seed=2)
    inputs = (
        draw(2, size_in, seed=0, grad=True),
        draw(2, size_in, seed=3, grad=True),
        draw(size_out, 2, seed=4, grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, down, up: adapted_linear(x, weight, bias, down, up), inputs)


@pytest.mark.parametrize(
    "num_rows, num_outputs, num_inputs, rank, expected",
    [
        (1216, 192, 192, 64, True),  # the embedded model, 8 clips: a layer of its own
        (1216, 576, 192, 192, True),  # and three behind one product
        (1216, 768, 192, 64, True),
        (1216, 192, 192, 8, False),
        (16, 192, 192, 64, False),  # too few rows for the sum's own cost
        (17776, 3072, 3072, 64, False),  # 5B
    ],
)
def test_the_sum_is_made_where_rank_is_large_and_rows_are_many(
    num_rows: int, num_outputs: int, num_inputs: int, rank: int, expected: bool
) -> None:
    assert sum_is_cheaper(num_rows, num_outputs, num_inputs, rank) == expected


def test_low_precision_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product is no further from the exact sum than the two apart."""
    monkeypatch.setattr(low_rank, "sum_is_cheaper", lambda *_sizes: False)
    x, weight, bias = draw(64, 32, seed=0), draw(48, 32, seed=1), draw(48, seed=2)
    down, up = draw(8, 32, seed=3), draw(48, 8, seed=4)
    exact = x @ weight.t() + bias + x @ down.t() @ up.t()
    low = [value.bfloat16() for value in (x, weight, bias, down, up)]
    together = adapted_linear(*low).double()
    apart = torch.nn.functional.linear(*low[:3]) + torch.nn.functional.linear(
        torch.nn.functional.linear(low[0], low[3]), low[4]
    )
    assert (together - exact).norm() <= (apart.double() - exact).norm()


@pytest.mark.parametrize("rank", [1, 7, 8, 12])
def test_rows_are_aligned_and_the_update_stays(rank: int) -> None:
    down, up = draw(rank, 4, seed=0), draw(5, rank, seed=1)
    wide_down, wide_up = pad_rank(down, up)
    assert len(wide_down) == wide_up.shape[1] and len(wide_down) % ALIGNMENT == 0 and len(wide_down) - rank < ALIGNMENT
    torch.testing.assert_close(wide_up @ wide_down, up @ down)
    assert rank % ALIGNMENT or wide_down is down


def test_stacked_updates_are_the_layers_own() -> None:
    x, sizes = draw(3, 4, seed=9), [5, 2, 6]
    updates = [(draw(2, 4, seed=1), draw(5, 2, seed=2)), None, (draw(3, 4, seed=3), draw(6, 3, seed=4))]
    down, up = stack_updates(updates, sizes)
    assert down.shape == (5, 4) and up.shape == (13, 5)
    for part, update in zip((x @ down.t() @ up.t()).split(sizes, dim=1), updates, strict=True):
        expected = torch.zeros_like(part) if update is None else x @ update[0].t() @ update[1].t()
        torch.testing.assert_close(part, expected)


def test_no_stack_of_weights_is_kept_for_the_backward_pass() -> None:
    """The compiler makes [W, B] in both passes; left alone it keeps it. The numbers stay, bit for bit."""
    torch._dynamo.reset()
    size_in, size_out, rank = 64, 96, 8
    weight, bias = draw(size_out, size_in, seed=1), draw(size_out, seed=2)

    def apply(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return adapted_linear(x * 2, weight, bias, down, up).sin()

    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata != weight.untyped_storage()._cdata:
            kept.append(tensor)
        return tensor

    leaves = [draw(16, size_in, seed=0), draw(rank, size_in, seed=3), draw(size_out, rank, seed=4)]
    results = []
    for run in (apply, torch.compile(apply, fullgraph=True, backend="aot_eager")):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = run(*own)
        assert kept and all(tensor.numel() < size_in * size_out for tensor in kept)
        results.append([y, *torch.autograd.grad(y, own, draw(16, size_out, seed=5))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    torch._dynamo.reset()
