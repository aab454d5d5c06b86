"""How far each way to run a step is from the plain float32 model: loss, output and adapter gradients on one batch.

Two layers at full width; the float32 reference has the very weights of the low precision.
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch

from cogtune import diffusion
from cogtune.adapter import adapter_parameters
from cogtune.attention_backends import choose_backend, measure_backends
from cogtune.benchmark.clock import attempt
from cogtune.benchmark.images import make_random_condition, make_random_image_encoder
from cogtune.benchmark.variants import Variant, parse_variant, prepare_transformer
from cogtune.config import AdapterSettings
from cogtune.dataset import Batch
from cogtune.denoiser import Denoiser
from cogtune.models import ModelFacts
from cogtune.random_pipeline import make_architecture_facts, make_random_transformer


@dataclass(frozen=True)
class _Pass:
    """One batch through the model, in float64 on the host."""

    loss: float
    output: torch.Tensor
    """What the transformer predicted."""
    gradients: torch.Tensor
    """All of the adapter's, one after another."""


_LAYERS = {"num_layers": 2}
_REFERENCE = "float32"


def check_variants(
    variants: list[Variant],
    model: str,
    size: tuple[int, int, int],
    *,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Relative errors by variant; the plain model in the low precision, which has its own, comes first.

    What fails has an `error` instead; the times that follow do not depend on it.
    """
    plain = parse_variant("keep_all+eager+stock_attention")
    measured: dict[str, _Pass] = {}

    def measure(name: str, variant: Variant, computed: torch.dtype) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            measured[name] = _run_pass(variant, model, size, rank, device, (dtype, computed))
            return {"loss": measured[name].loss}

        row = attempt(work)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    results = {_REFERENCE: measure(_REFERENCE, plain, torch.float32)}
    torch.backends.cuda.matmul.allow_tf32 = allowed
    for variant in [plain, *(v for v in variants if not v.is_baseline)]:
        row = results[variant.name] = measure(variant.name, variant, dtype)
        if variant.name in measured and _REFERENCE in measured:
            row |= _compare(measured.pop(variant.name), measured[_REFERENCE])
    return results


def _compare(found: _Pass, reference: _Pass) -> dict[str, float]:
    return {
        "loss_error": abs(found.loss - reference.loss) / abs(reference.loss),
        "output_error": float((found.output - reference.output).norm() / reference.output.norm()),
        "gradient_error": float((found.gradients - reference.gradients).norm() / reference.gradients.norm()),
    }


def _run_pass(
    variant: Variant,
    model: str,
    size: tuple[int, int, int],
    rank: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> _Pass:
    """Of weights made in the first type and computed with in the second."""
    dtype, computed = dtypes
    facts = make_architecture_facts(model, **_LAYERS)
    transformer = make_random_transformer(model, seed=0, device=device, dtype=dtype, **_LAYERS)
    transformer.to(computed).train()  # pyright: ignore[reportArgumentType]
    timings = measure_backends(
        batch_size=1,
        num_heads=facts.num_heads,
        tokens=facts.num_tokens(*size),
        head_dim=facts.head_dim,
        dtype=computed,
        device=device,
    )
    prepare_transformer(transformer, variant, AdapterSettings(rank=rank), choose_backend("auto", timings))
    encoder = make_random_image_encoder(model, device, computed) if facts.takes_image else None
    denoiser = Denoiser(facts, device=device, dtype=computed, min_snr_gamma=None, image_encoder=encoder)
    outputs: list[torch.Tensor] = []
    transformer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0].detach()))
    loss = denoiser.losses(transformer, _make_batch(facts, size, device)).mean()
    scale = 2.0**10 if computed == torch.float16 else 1.0
    parameters = list(adapter_parameters(transformer).values())
    gradients = torch.autograd.grad(loss * scale, parameters)
    flat = torch.cat([g.flatten().double() for g in gradients]).cpu() / scale
    return _Pass(loss.item(), outputs[0].double().cpu(), flat)


def _make_batch(facts: ModelFacts, size: tuple[int, int, int], device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(3)
    frames, channels, rows, columns = facts.latent_shape(*size)
    shape = (1, frames + facts.num_padding(frames), channels, rows, columns)
    text = torch.randn(1, facts.max_text_length, facts.text_dim, generator=generator)
    return Batch(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        embeddings=text,
        timesteps=torch.tensor([diffusion.NUM_TIMESTEPS // 2]),
        weights=torch.ones(1),
        held=torch.tensor([False]),
        positions=[0],
        clips=[],
        dropped=[],
        num_held=0,
        image=make_random_condition(facts, size) if facts.takes_image else None,
    ).to(device)


def describe_check(results: dict[str, Any]) -> str:
    """A line a variant."""
    lines = []
    for name, row in results.items():
        text = row["error"] if "error" in row else f"loss {row['loss']:.6f}"
        if "gradient_error" in row:
            text += f", off by {row['loss_error']:.1e}; output by {row['output_error']:.1e}"
            text += f"; gradients by {row['gradient_error']:.1e}"
        lines.append(f"{name:<40} {text}")
    return "\n".join(lines)
