"""Training samples: a pure function of seed and position, the same for every layout of the global batch."""

from pathlib import Path

import pytest
import torch

from cogtune.cache import Cache
from cogtune.dataset import Batch, Entry, PositionSampler, TrainingSet, join_samples, make_loader, read_sample
from cogtune.draws import draw_caption_dropped, draw_noise, draw_timestep
from cogtune.errors import UserError
from cogtune.manifest import Clip

SHAPE = (4, 3, 2, 5)  # [C, F, H, W], as the VAE gives it
SCALING = 0.7


def make_moments(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    mean, logvar = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator) - 1
    return {"mean": mean, "logvar": logvar}


def make_embeddings(index: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(100 + index))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path)
    for index in range(5):
        cache.write("latents", f"l{index}", make_moments(index))
        cache.write("text", f"t{index}", {"embeddings": make_embeddings(index)})
    return cache


def make_set(
    cache: Cache, *, dropout: float = 0.3, seed: int = 1, weights: tuple[float, ...] = (1,) * 5
) -> TrainingSet:
    entries = [
        Entry(Clip(f"clip {i}", Path(f"{i}.mp4"), f"caption {i}", weight=w), f"l{i}", f"t{i}")
        for i, w in enumerate(weights)
    ]
    return TrainingSet(entries, cache, seed=seed, scaling_factor=SCALING, caption_dropout=dropout, timestep_strata=4)


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("latents", "noise", "embeddings", "timesteps"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.positions, one.clips, one.dropped) == (other.positions, other.clips, other.dropped)


def test_a_sample_is_what_its_draws_say(cache: Cache) -> None:
    dataset = make_set(cache)
    dropped = set()
    for position in range(30):
        sample = dataset[position]
        clip = sample.clips[0]
        index = int(clip.id.split()[1])
        moments = make_moments(index)
        posterior, noise = draw_noise(1, position, SHAPE)
        latents = (moments["mean"].double() + (moments["logvar"].double() / 2).exp() * posterior) * SCALING
        torch.testing.assert_close(sample.latents[0].double(), latents.transpose(0, 1), rtol=1e-6, atol=1e-6)
        assert torch.equal(sample.noise[0], noise.transpose(0, 1))
        assert sample.latents.shape == (1, 3, 4, 2, 5), "[B, F, C, H, W], as the transformer takes it"
        assert sample.latents.dtype == sample.noise.dtype == torch.float32
        assert sample.timesteps.tolist() == [draw_timestep(1, position, 4)]
        assert sample.dropped == [draw_caption_dropped(1, position, 0.3)]
        expected = torch.zeros(6, 8) if sample.dropped[0] else make_embeddings(index)
        assert torch.equal(sample.embeddings[0], expected)
        dropped.add(sample.dropped[0])
    assert dropped == {True, False}


def test_a_sample_depends_on_seed_and_position_only(cache: Cache) -> None:
    straight = [make_set(cache)[position] for position in range(12)]
    dataset = make_set(cache)
    for position in reversed(range(12)):
        assert_equal(dataset[position], straight[position])
    assert not torch.equal(make_set(cache, seed=2)[0].noise, straight[0].noise)


def test_each_visit_samples_the_posterior_anew(cache: Cache) -> None:
    dataset = make_set(cache)
    visits = [s for s in (dataset[p] for p in range(2000)) if s.clips[0].id == "clip 0"]
    assert len(visits) == 400, "once an epoch"
    latents = torch.cat([visit.latents for visit in visits]).double() / SCALING  # [N, F, C, H, W]
    moments = {name: tensor.double().transpose(0, 1) for name, tensor in make_moments(0).items()}
    std = (moments["logvar"] / 2).exp()
    # 5 standard errors over 120 values and 400 draws
    assert ((latents.mean(0) - moments["mean"]) / std).abs().max() < 5 / 400**0.5
    assert (latents.std(0) / std - 1).abs().max() < 5 / (2 * 400) ** 0.5


def test_extreme_variances_stay_finite(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write(
        "latents", "l", {"mean": torch.zeros(SHAPE), "logvar": torch.tensor([-1e4, 1e4]).repeat(60).view(SHAPE)}
    )
    cache.write("text", "t", {"embeddings": torch.zeros(1, 1)})
    std = read_sample(cache, Entry(Clip("c", Path("c"), "c"), "l", "t"))[1].flatten()
    # diffusers' own limits
    torch.testing.assert_close(std[:2], torch.tensor([-15.0, 10.0]).exp())


@pytest.mark.parametrize("kind, key, what", [("latents", "l2", "latents"), ("text", "t2", "caption")])
def test_a_missing_or_damaged_entry_is_named(cache: Cache, kind: str, key: str, what: str) -> None:
    cache.path(kind, key).write_bytes(b"damaged")
    dataset = make_set(cache)
    with pytest.raises(UserError, match=rf"clip 'clip 2' \({what}\).*start the run again"):
        for position in range(5):
            dataset[position]


def test_positions_of_all_ranks_and_micro_batches_make_up_the_sequence() -> None:
    for world_size, batch_size, accumulation in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 2, 2), (2, 4, 3)]:
        samplers = [
            PositionSampler(
                first_step=2,
                last_step=5,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        batches = [list(sampler) for sampler in samplers]
        assert [len(sampler) for sampler in samplers] == [len(b) for b in batches] == [3 * accumulation] * world_size
        assert {len(micro) for b in batches for micro in b} == {batch_size}
        total = world_size * batch_size * accumulation
        for step in range(3):
            seen = [p for b in batches for micro in b[step * accumulation : (step + 1) * accumulation] for p in micro]
            assert sorted(seen) == list(range((step + 2) * total, (step + 3) * total))
        for rank, b in enumerate(batches):
            assert {p % world_size for micro in b for p in micro} == {rank}


def test_layouts_of_one_global_batch_see_the_same_samples(cache: Cache) -> None:
    dataset = make_set(cache)

    def steps(world_size: int, batch_size: int, accumulation: int) -> list[dict[int, Batch]]:
        seen: list[dict[int, Batch]] = [{} for _ in range(3)]
        for rank in range(world_size):
            sampler = PositionSampler(
                first_step=0,
                last_step=3,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
            )
            for number, batch in enumerate(make_loader(dataset, sampler, num_workers=0, pin_memory=False)):
                for row, position in enumerate(batch.positions):
                    seen[number // accumulation][position] = Batch(
                        batch.latents[row : row + 1],
                        batch.noise[row : row + 1],
                        batch.embeddings[row : row + 1],
                        batch.timesteps[row : row + 1],
                        batch.weights[row : row + 1],
                        batch.held[row : row + 1],
                        [position],
                        [batch.clips[row]],
                        [batch.dropped[row]],
                        0,
                    )
        return seen

    reference = steps(1, 4, 1)
    assert [sorted(step) for step in reference] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for layout in [(4, 1, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2)]:
        for expected, step in zip(reference, steps(*layout), strict=True):
            assert expected.keys() == step.keys()
            for position, sample in step.items():
                assert_equal(sample, expected[position])


def test_loader_workers_change_nothing(cache: Cache) -> None:
    sampler = PositionSampler(first_step=1, last_step=5, batch_size=2, accumulation=1, rank=0, world_size=1)
    dataset = make_set(cache)
    plain = list(make_loader(dataset, sampler, num_workers=0, pin_memory=False))
    with_workers = list(make_loader(dataset, sampler, num_workers=2, pin_memory=False))
    assert len(plain) == 4
    for one, other in zip(plain, with_workers, strict=True):
        assert_equal(one, other)


def test_weights_repeat_clips(cache: Cache) -> None:
    dataset = make_set(cache, weights=(2, 1, 0, 0.5, 1))
    ids = [dataset[position].clips[0].id for position in range(9)]
    counts = [ids.count(f"clip {i}") for i in range(5)]
    assert counts == [4, 2, 0, 1, 2], "two epochs"


def test_error_lines_name_clip_timestep_and_caption(cache: Cache) -> None:
    dataset = make_set(cache)
    batch = join_samples([dataset[position] for position in range(12)])
    lines = batch.describe()
    for line, clip, timestep, dropped in zip(lines, batch.clips, batch.timesteps.tolist(), batch.dropped, strict=True):
        assert clip.id in line and f"timestep {timestep}" in line
        assert ("(dropped)" in line) == dropped and (clip.caption in line) != dropped


def test_dropped_captions_may_be_the_empty_captions_embeddings(cache: Cache) -> None:
    empty = torch.full_like(make_embeddings(0), 7.0)
    cache.write("text", "empty", {"embeddings": empty})
    entry = Entry(Clip("clip 0", Path("0.mp4"), "caption 0"), "l0", "t0")
    samples = TrainingSet(
        [entry],
        cache,
        seed=1,
        scaling_factor=SCALING,
        caption_dropout=0.5,
        timestep_strata=4,
        dropped_caption_key="empty",
    )
    seen = [samples[position] for position in range(20)]
    assert {sample.dropped[0] for sample in seen} == {True, False}
    for sample in seen:
        assert torch.equal(sample.embeddings[0], empty if sample.dropped[0] else make_embeddings(0))


def test_entries_kept_in_memory_give_the_same_samples(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogtune import dataset

    reads = []
    monkeypatch.setattr(dataset, "read_sample", lambda *given: reads.append(given) or read_sample(*given))
    keeping = make_set(cache)
    kept = [keeping[position] for position in range(15)]
    assert len(reads) == 5
    monkeypatch.setattr(dataset, "KEPT_BYTES", 0)
    reading = make_set(cache)
    for position, sample in enumerate(kept):
        assert_equal(sample, reading[position])
    assert len(reads) == 20
