"""The transformer as training calls it, against the stock pipeline's own calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogtune import diffusion, models
from cogtune.adapter import add_lora, without_adapter
from cogtune.config import AdapterSettings
from cogtune.dataset import Batch
from cogtune.denoiser import Denoiser, make_rotary
from cogtune.manifest import Clip

CPU = torch.device("cpu")


def make_denoiser(folder: Path, **options: Any) -> Denoiser:
    facts = models.read_facts(folder)
    options = {"min_snr_gamma": None, "dtype": torch.float32} | options
    return Denoiser(facts, device=CPU, **options)


@pytest.mark.parametrize("pipeline_fixture", ["tiny_folder", "tiny_2b_folder"])
def test_forward_equals_the_stock_pipelines(pipeline_fixture: str, request: pytest.FixtureRequest) -> None:
    """What the pipeline gives to and gets from the transformer in a sampling step, we give and get too."""
    folder = request.getfixturevalue(pipeline_fixture)
    stock = CogVideoXPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []
    stock.transformer.register_forward_hook(
        lambda _module, _args, kwargs, output: seen.append((kwargs, output[0].clone())), with_kwargs=True
    )
    stock(
        "a red ball", num_frames=17, height=64, width=96, num_inference_steps=2, guidance_scale=5.0,
        max_sequence_length=32, generator=torch.Generator().manual_seed(1), output_type="latent",
    )  # fmt: skip
    transformer, denoiser = models.load_transformer(models.read_facts(folder), torch.float32), make_denoiser(folder)
    assert len(seen) == 2
    for kwargs, expected in seen:
        with torch.no_grad():
            found = denoiser.predict(
                transformer, kwargs["hidden_states"], kwargs["encoder_hidden_states"], kwargs["timestep"]
            )
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("height", "width", "frames"), [(480, 720, 13), (480, 480, 7), (320, 720, 3)])
def test_rotary_positions_equal_the_pipelines(height: int, width: int, frames: int, tiny_folder: Path) -> None:
    facts = models.read_facts(tiny_folder)
    stock = CogVideoXPipeline.from_pretrained(tiny_folder)
    expected = stock._prepare_rotary_positional_embeddings(height, width, frames, CPU)
    found = make_rotary(facts, frames, height, width, CPU)
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_models_with_added_positions_have_no_rotary(tiny_2b_folder: Path) -> None:
    assert make_rotary(models.read_facts(tiny_2b_folder), 5, 64, 96, CPU) is None


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("pipeline_fixture", ["tiny_folder", "tiny_2b_folder"])
def test_loss_equals_the_reference_objective_in_float64(
    gamma: float | None, pipeline_fixture: str, request: pytest.FixtureRequest
) -> None:
    """Against the vendor's form: x0 from v, weighted with 1 / (1 - abar), in float64."""
    folder = request.getfixturevalue(pipeline_fixture)
    facts = models.read_facts(folder)
    scheduler = models.load_scheduler(facts)
    generator = torch.Generator().manual_seed(4)
    shape = (3, 5, 16, 8, 12)
    batch = Batch(
        torch.randn(shape, generator=generator), torch.randn(shape, generator=generator),
        torch.randn(3, 32, 32, generator=generator), torch.tensor([12, 480, 960]),
        torch.ones(3), torch.zeros(3, dtype=torch.bool),
        [0, 1, 2], [Clip("a", Path("a"), "a")] * 3, [False] * 3, 0,
    )  # fmt: skip
    outputs: list[torch.Tensor] = []
    transformer = models.load_transformer(facts, torch.float32)
    transformer.register_forward_hook(lambda _m, _a, output: outputs.append(output[0].double()))
    with torch.no_grad():
        losses = make_denoiser(folder, min_snr_gamma=gamma).losses(transformer, batch)
    abar = scheduler.alphas_cumprod.double()[batch.timesteps].reshape(-1, 1, 1, 1, 1)
    noisy = abar.sqrt() * batch.latents.double() + (1 - abar).sqrt() * batch.noise.double()
    recovered = abar.sqrt() * noisy - (1 - abar).sqrt() * outputs[0]
    expected = ((recovered - batch.latents.double()).square() / (1 - abar)).flatten(1).mean(dim=1)
    if gamma is not None:
        snr = (abar / (1 - abar)).flatten()
        expected = expected * snr.clamp(max=gamma) / (snr + 1)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=0)


def test_low_precision_casts_only_what_enters_the_transformer(tiny_folder: Path) -> None:
    facts = models.read_facts(tiny_folder)
    transformer, seen = models.load_transformer(facts, torch.bfloat16), {}
    transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    shape = (1, 5, 16, 8, 12)
    batch = Batch(
        torch.ones(shape), torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 32, 32),
        torch.tensor([0]), torch.ones(1), torch.tensor([False]), [0], [Clip("a", Path("a"), "a")], [True], 0,
    )  # fmt: skip
    with torch.no_grad():
        loss = make_denoiser(tiny_folder, dtype=torch.bfloat16).losses(transformer, batch)
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    # At timestep 0 noise is still there: schedules cast to bfloat16 would leave x_t equal to the latents.
    assert (seen["hidden_states"].float() - 1.0).abs().max() > 0.05


@pytest.mark.parametrize("ask_base", ["samples", "batch", "always"])
def test_held_samples_go_towards_the_base_models_prediction(ask_base: Any, tiny_folder: Path) -> None:
    facts = models.read_facts(tiny_folder)
    transformer = models.load_transformer(facts, torch.float32)
    generator = torch.Generator().manual_seed(4)
    shape = (3, 5, 16, 8, 12)

    def make_batch(held: list[bool]) -> Batch:
        generator.manual_seed(5)
        return Batch(
            torch.randn(shape, generator=generator), torch.randn(shape, generator=generator),
            torch.randn(3, 32, 32, generator=generator), torch.tensor([12, 480, 960]),
            torch.tensor([2.0, 1.0, 1.0]), torch.tensor(held),
            [0, 1, 2], [Clip("a", Path("a"), "a")] * 3, [False] * 3, sum(held),
        )  # fmt: skip

    with torch.no_grad():
        base_prediction = predictions(transformer, make_batch([False] * 3), tiny_folder)
    add_lora(transformer, AdapterSettings(rank=4), seed=0)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    plain = make_denoiser(tiny_folder).losses(transformer, make_batch([False] * 3))
    holding = make_denoiser(tiny_folder, base=lambda: without_adapter(transformer), ask_base=ask_base)
    losses = holding.losses(transformer, make_batch([True, False, True]))
    assert losses.requires_grad and torch.equal(losses[1], plain[1])
    adapted = predictions(transformer, make_batch([False] * 3), tiny_folder)
    expected = (adapted - base_prediction).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(losses[[0, 2]], expected[[0, 2]] * torch.tensor([2.0, 1.0]))
    assert (losses[[0, 2]] != plain[[0, 2]]).all()
    nothing_held = holding.losses(transformer, make_batch([False] * 3))
    assert torch.equal(nothing_held, plain)


def predictions(transformer: torch.nn.Module, batch: Batch, folder: Path) -> torch.Tensor:
    """What the transformer predicts for a batch."""
    denoiser = make_denoiser(folder)
    noisy = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps, denoiser.alphas_cumprod)
    return denoiser.predict(transformer, noisy, batch.embeddings, batch.timesteps)
