"""8-bit AdamW on a GPU: compiled as not compiled, no wait for the device, a peak near the prediction."""

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.config import OptimizerSettings
from cogtune.denoiser import make_rotary
from cogtune.eight_bit_adamw import EightBitAdamW, EightBitGuard
from cogtune.execution import configure_blocks
from cogtune.memory import GIB, predict
from cogtune.random_pipeline import ARCHITECTURES, make_architecture_facts, make_random_on_host

DEVICE = torch.device("cuda")
LAYERS, SIZE = 6, (49, 240, 368)
CHANGES: dict[str, Any] = {"num_layers": LAYERS, "num_attention_heads": 32}
SETTINGS = OptimizerSettings(learning_rate=1e-4)
pytestmark = pytest.mark.usefixtures("clean_gpu")


def make(activations: Activations, *, compiled: bool) -> Any:
    def build() -> nn.Module:
        return CogVideoXTransformer3DModel(**ARCHITECTURES["cogvideox-5b"][0] | CHANGES)

    transformer: Any = make_random_on_host(build, "transformer_blocks", device=DEVICE, dtype=torch.bfloat16)
    transformer.to(DEVICE).train().requires_grad_(True)
    install_attention(transformer, "default")
    configure_blocks(transformer, activations, compiled=compiled, has_dropout=False)
    return transformer


def make_step(transformer: Any, optimizer: EightBitAdamW, guard: EightBitGuard) -> Any:
    facts = make_architecture_facts("cogvideox-5b", **CHANGES)
    frames, channels, rows, columns = facts.latent_shape(*SIZE)
    latents = torch.randn(1, frames, channels, rows, columns, device=DEVICE, dtype=torch.bfloat16)
    text = torch.randn(1, 226, 4096, device=DEVICE, dtype=torch.bfloat16)
    rotary, timestep = make_rotary(facts, frames, SIZE[1], SIZE[2], DEVICE), torch.tensor([500], device=DEVICE)

    def step() -> torch.Tensor:
        output = transformer(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)[0]
        loss = (output.float() - latents.float()).square().mean()
        loss.backward()
        guard.apply(optimizer, [])
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("activations", ["recompute", "keep_products"])
@pytest.mark.parametrize("compiled", [True, False])
def test_steps_never_wait_and_the_peak_is_near_the_prediction(activations: Activations, compiled: bool) -> None:
    facts = make_architecture_facts("cogvideox-5b", **CHANGES)
    transformer = make(activations, compiled=compiled)
    optimizer = EightBitAdamW(list(transformer.parameters()), SETTINGS, seed=0, compiled=compiled)
    guard = EightBitGuard(optimizer)
    step = make_step(transformer, optimizer, guard)
    losses = [step(), step()]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses += [step() for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not guard.has_failed()
    assert losses[-1] < losses[0], "the same clip again and again"
    if not compiled:
        return  # blocks that are not compiled keep more than the plan says
    plan = predict(
        facts, activations, num_parameters=0, num_trainable=sum(p.numel() for p in transformer.parameters()),
        tokens=facts.num_tokens(*SIZE), batch_size=1, dtype=torch.bfloat16, eight_bit=True,
        num_block_parameters=sum(p.numel() for p in transformer.transformer_blocks[0].parameters()),
    )  # fmt: skip
    assert plan.total / GIB == pytest.approx(torch.cuda.max_memory_allocated() / GIB, rel=0.1), plan.describe()


def test_a_compiled_update_is_the_plain_one() -> None:
    """Of 5B's largest matrix and some small tensors; rounding at a limit may go either way in a few of a million."""
    found = []
    for compiled in (False, True):
        generator = torch.Generator(DEVICE).manual_seed(0)
        sizes = [(3072, 12288), (512, 512), (3072,)]
        weights = [
            nn.Parameter(torch.randn(size, device=DEVICE, generator=generator).bfloat16() * 0.02) for size in sizes
        ]
        optimizer = EightBitAdamW(weights, SETTINGS, seed=0, compiled=compiled)
        guard = EightBitGuard(optimizer)
        for _ in range(3):
            torch.stack([(w.float() * 50).sin().sum() for w in weights]).sum().backward()
            guard.apply(optimizer, [])
            optimizer.step()
        found.append([w.detach() for w in weights])
    for plain, compiled in zip(*found, strict=True):
        assert (plain != compiled).float().mean() < 1e-3


def test_an_update_is_near_the_memorys_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """16 bytes a number: the norm reads 2, the random bits take 4, the update reads 6 more and writes 4.

    Timed from the gradient's arrival on, after two steps, over four of 5B's largest matrices; prints what it found.
    """
    weights = [nn.Parameter(torch.randn(12288, 3072, device=DEVICE, dtype=torch.bfloat16)) for _ in range(4)]
    optimizer = EightBitAdamW(weights, SETTINGS, seed=0, compiled=True)
    guard = EightBitGuard(optimizer)
    seconds = []
    for _ in range(5):
        gradients = [torch.randn_like(weight) for weight in weights]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            weight.grad = gradient
            optimizer._update(index, weight)
        end.record()
        guard.apply(optimizer, [])
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    rate = sum(weight.numel() for weight in weights) / min(seconds[2:])
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target = source.clone()
    begin.record()
    target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    copied = 2 * len(source) / (begin.elapsed_time(end) / 1000)
    with capsys.disabled():
        print(
            f"\n8-bit AdamW: {rate / 1e9:.0f} G numbers a second, 16 bytes each; a copy moves {copied / 1e9:.0f} GB/s"
        )
    assert rate * 16 > 0.25 * copied
