"""What a run draws: right distributions, and pure functions of seed and position."""

from collections import Counter

import pytest
import torch

from cogtune.draws import (
    ClipOrder,
    derive_seed,
    draw_caption_dropped,
    draw_noise,
    draw_timestep,
    make_generator,
)

NUM_DRAWS = 12_000


def test_seeds_depend_on_every_part_and_its_place() -> None:
    seeds = [derive_seed(*parts) for parts in [("a", 1), ("a", 2), ("b", 1), (1, "a"), ("a1",), ("a", 1, "")]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("a", 1) == derive_seed("a", 1)


def test_generators_are_the_same_in_another_process(run_process) -> None:
    code = (
        "from cogtune.draws import *; print(draw_timestep(7, 1234, 16), draw_noise(7, 5, (2,))[1].tolist(), "
        "[ClipOrder([1] * 9, 7).clip_at(p) for p in range(9)])"
    )
    done = run_process("-c", code, PYTHONHASHSEED="99")
    here = (
        draw_timestep(7, 1234, 16),
        draw_noise(7, 5, (2,))[1].tolist(),
        [ClipOrder([1] * 9, 7).clip_at(p) for p in range(9)],
    )
    assert done.out.split("\n")[-2] == " ".join(map(str, here)), done.err


@pytest.mark.parametrize("num_strata", [1, 16])
def test_timesteps_are_uniform(num_strata: int) -> None:
    draws = [draw_timestep(3, position, num_strata) for position in range(NUM_DRAWS)]
    assert min(draws) == 0 and max(draws) == 999
    counts = torch.bincount(torch.tensor(draws) // 20, minlength=50).double()
    expected = NUM_DRAWS / 50
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 85.35, "99.9 % quantile for 49 degrees of freedom"


@pytest.mark.parametrize("num_strata", [1, 7, 8, 16, 1000])
def test_aligned_neighbours_have_one_timestep_in_each_stratum(num_strata: int) -> None:
    width = 1000 / num_strata
    for group in range(3):
        first = group * num_strata
        draws = sorted(draw_timestep(5, p, num_strata) for p in range(first, first + num_strata))
        for stratum, timestep in enumerate(draws):
            # an integer may begin below a stratum that starts between two integers
            assert width * stratum - 1 < timestep < width * (stratum + 1)


def test_strata_come_in_no_fixed_order() -> None:
    orders = {tuple(draw_timestep(5, 8 * group + i, 8) // 125 for i in range(8)) for group in range(20)}
    assert len(orders) > 15


def test_draws_are_keyed_by_seed_and_position() -> None:
    shape = (3, 4)
    one, other = draw_noise(1, 10, shape), draw_noise(1, 10, shape)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for different in (draw_noise(2, 10, shape), draw_noise(1, 11, shape)):
        assert not torch.equal(one[1], different[1])
    assert not torch.equal(one[0], one[1]), "posterior and diffusion noise are independent"
    state = torch.get_rng_state()
    draw_timestep(1, 2, 16), draw_caption_dropped(1, 2, 0.5), draw_noise(1, 2, shape), make_generator("x")
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"


def test_noise_is_standard_normal_and_independent_over_positions() -> None:
    noise = torch.stack([torch.stack(draw_noise(0, p, (4000,))) for p in range(8)]).flatten(0, 1).double()
    assert noise.dtype == torch.float64 and draw_noise(0, 0, (1,))[0].dtype == torch.float32
    num = noise.shape[1]
    assert noise.mean(1).abs().max() < 5 / num**0.5
    assert (noise.var(1) - 1).abs().max() < 5 * (2 / num) ** 0.5
    correlation = torch.corrcoef(noise) - torch.eye(len(noise), dtype=torch.float64)
    assert correlation.abs().max() < 5 / num**0.5


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_caption_dropout_has_its_rate(probability: float) -> None:
    dropped = [draw_caption_dropped(11, p, probability) for p in range(6000)]
    deviation = (6000 * probability * (1 - probability)) ** 0.5
    assert abs(sum(dropped) - 6000 * probability) <= 4 * deviation


def epochs_of(order: ClipOrder, num_epochs: int) -> list[list[int]]:
    total = order.num_samples(num_epochs)
    epochs: list[list[int]] = [[] for _ in range(num_epochs)]
    for position in range(total):
        epochs[order.epoch_of(position)].append(order.clip_at(position))
    return epochs


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    epochs = epochs_of(ClipOrder([1.0] * 20, seed=4), 6)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs != epochs_of(ClipOrder([1.0] * 20, seed=5), 6)


def test_order_does_not_depend_on_how_it_is_asked() -> None:
    weights = [1.0, 2.0, 0.5, 1.0]
    straight = [ClipOrder(weights, 3).clip_at(p) for p in range(40)]
    order = ClipOrder(weights, 3)
    positions = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert {p: order.clip_at(p) for p in positions} == dict(enumerate(straight))


def test_weights_are_exact_over_epochs() -> None:
    weights = [1.0, 2.0, 0.5, 0.3, 0.1, 0.0, 1.7]
    order = ClipOrder(weights, seed=9)
    for num_epochs in (1, 3, 10, 40):
        counts = Counter(clip for epoch in epochs_of(order, num_epochs) for clip in epoch)
        for clip, weight in enumerate(weights):
            exact = weight * num_epochs
            assert int(exact + 1e-9) <= counts[clip] <= exact + 1e-9, (clip, num_epochs)
    assert counts == {0: 40, 1: 80, 2: 20, 3: 12, 4: 4, 6: 68}


def test_epochs_without_a_sample_are_passed_over() -> None:
    order = ClipOrder([0.25], seed=0)
    assert [order.epoch_of(p) for p in range(3)] == [3, 7, 11]
    assert order.num_samples(4) == 1


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0]])
def test_senseless_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight above zero"):
        ClipOrder(weights, seed=0)
