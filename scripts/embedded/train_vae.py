"""Trains the embedded model's autoencoder from random weights on clips rendered on the fly.

    python scripts/embedded/train_vae.py --out runs/vae --minutes 8

Writes `vae/` (the EMA weights in float16, what `from_pretrained` loads), `curve.jsonl`, and what `--resume` continues
from: `weights.safetensors`, `moments_1.safetensors`, `moments_2.safetensors`. Needs torch, diffusers and numpy alone.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cogtune.errors import run_command
from cogtune.shapes.frame_convolution import use_frame_convolutions
from cogtune.shapes.imagery import Imagery, sample_imagery
from cogtune.shapes.reconstruction import (
    halve_colour_resolution,
    measure_latents,
    measure_psnr,
    reconstruction_loss,
    to_pixels,
)
from cogtune.shapes.render import render
from cogtune.shapes.world import HEIGHT, WIDTH, sample_clip

UNSEEN_SEED = 1_000_003  # of the clips that PSNR is measured on
CROP_HEIGHT, CROP_WIDTH = 48, 64  # half a frame's pixels: twice as many steps while the large errors go
WHOLE_FRAMES_FROM = 0.6  # of the time
MAX_LATENT_NOISE = 0.1  # deviations; what a small denoiser leaves on the latents must not show
EMA_DECAY = 0.999
MEASURING_SECONDS = 30  # kept back at the end for saving and measuring
Tensors = list[Tensor]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="from the start of the process, measuring included")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps if that comes first")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--widths", type=int, nargs=4, default=[24, 40, 56, 56], help="channels, finest level first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--unseen", type=int, default=200, help="clips that PSNR is measured on")
    parser.add_argument("--resume", type=Path, help="--out of an earlier run; use another --seed for other clips")
    return parser.parse_args()


def make_vae(widths: list[int]) -> AutoencoderKLCogVideoX:
    """The autoencoder with random weights: 8x in space, 4x in time, 16 channels."""
    return AutoencoderKLCogVideoX(
        block_out_channels=tuple(widths),  # pyright: ignore[reportArgumentType] # annotated as a tuple of one
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        scaling_factor=1.0,
    )


def read_batches(arguments: argparse.Namespace) -> Iterator[NDArray[np.uint8]]:
    """Endless batches uint8 [B, F, H, W, 3], each clip new, rendered in worker processes."""
    loader = DataLoader(
        Imagery(arguments.seed, 10**8),  # pyright: ignore[reportArgumentType] # a data set by its methods
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        collate_fn=np.stack,  # arrays go through pipes; tensors would need a large /dev/shm
        prefetch_factor=4 if arguments.workers else None,
    )
    return iter(loader)


def prepare_batch(clips: NDArray[np.uint8], progress: float, device: torch.device, rng: torch.Generator) -> Tensor:
    """Pixels [B, 3, F, H, W]: half of the clips with a video file's colour resolution, cropped in the first phase."""
    pixels = to_pixels(torch.from_numpy(clips).to(device))
    half = len(pixels) // 2
    pixels = torch.cat([halve_colour_resolution(pixels[:half]), pixels[half:]])
    if progress >= WHOLE_FRAMES_FROM:
        return pixels
    top = int(torch.randint(0, HEIGHT - CROP_HEIGHT + 1, (), generator=rng))
    left = int(torch.randint(0, WIDTH - CROP_WIDTH + 1, (), generator=rng))
    return pixels[..., top : top + CROP_HEIGHT, left : left + CROP_WIDTH]


def backpropagate(vae: AutoencoderKLCogVideoX, pixels: Tensor) -> dict[str, Tensor]:
    """One forward and backward pass; the decoder sees sampled latents with noise of 0 to MAX_LATENT_NOISE on top."""
    (posterior,) = vae.encode(pixels.to(vae.dtype), return_dict=False)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    strength = MAX_LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, 1, device=mean.device)
    deviation = (logvar.exp() + strength.square()).sqrt()
    latents = mean + deviation * torch.randn_like(mean)
    (decoded,) = vae.decode(latents.to(vae.dtype), return_dict=False)
    loss, parts = reconstruction_loss(pixels, decoded.float(), mean, logvar)
    loss.backward()
    return parts


def choose_convolutions(vae: AutoencoderKLCogVideoX, pixels: Tensor) -> AutoencoderKLCogVideoX:
    """The autoencoder with its convolutions run in whichever of three equal ways is fastest here."""
    timed: list[tuple[float, AutoencoderKLCogVideoX]] = []
    for way in ("frames", "volumes", "volumes, channels last"):
        candidate = copy.deepcopy(vae)
        if way == "frames":
            use_frame_convolutions(candidate)
            if pixels.device.type == "cpu":
                return candidate
        elif way != "volumes":
            for parameter in candidate.parameters():
                layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.dim())
                if layout is not None:
                    parameter.data = parameter.data.contiguous(memory_format=layout)
        for _ in range(2):  # the first steps choose kernels
            backpropagate(candidate, pixels)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(4):
            backpropagate(candidate, pixels)
        torch.cuda.synchronize()
        timed.append(((time.perf_counter() - started) / 4, candidate))
        candidate.zero_grad(set_to_none=True)
        print(f"convolutions by {way}: {timed[-1][0]:.3f} s a step of {tuple(pixels.shape)}", flush=True)
    return min(timed, key=lambda entry: entry[0])[1]


def learning_rate_at(progress: float, step: int, peak: float) -> float:
    """Warm-up over 100 steps, then a cosine over the run's progress down to 1 %."""
    return peak * min((step + 1) / 100, 1.0) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save(
    arguments: argparse.Namespace, vae: AutoencoderKLCogVideoX, optimizer: torch.optim.Optimizer, ema: Tensors
) -> AutoencoderKLCogVideoX:
    """Writes the smoothed weights as a model folder and what resuming needs; returns the model as written."""
    masters: Tensors = optimizer.param_groups[0]["params"]
    names = [name for name, _ in vae.named_parameters()]
    smooth = make_vae(arguments.widths)
    smooth.load_state_dict({name: tensor.half().float() for name, tensor in zip(names, ema, strict=True)})
    nn.Module.to(smooth, masters[0].device)
    smooth.eval()
    clips = np.stack([render(sample_clip("base", UNSEEN_SEED, index)) for index in range(100)])
    smooth.register_to_config(scaling_factor=float(1.0 / measure_latents(smooth, clips).std()))
    copy.deepcopy(smooth).half().save_pretrained(arguments.out / "vae")
    state = {
        "weights": masters,
        "moments_1": [optimizer.state[master]["exp_avg"] for master in masters],
        "moments_2": [optimizer.state[master]["exp_avg_sq"] for master in masters],
    }
    for file, tensors in state.items():
        flat = {name: tensor.cpu().contiguous() for name, tensor in zip(names, tensors, strict=True)}
        save_file(flat, arguments.out / f"{file}.safetensors")
    return smooth


def report(vae: AutoencoderKLCogVideoX, count: int) -> dict[str, float]:
    """PSNR on clips that training did not show: of the base world, of the concept, and of the varied imagery."""
    sets = {
        "base": [render(sample_clip("base", UNSEEN_SEED, 10**6 + index)) for index in range(count)],
        "concept": [render(sample_clip("concept", UNSEEN_SEED, index)) for index in range(count)],
        "imagery": [sample_imagery(UNSEEN_SEED, index) for index in range(count)],
    }
    measured = {}
    for name, clips in sets.items():
        measured[f"psnr_{name}"], measured[f"psnr_{name}_worst"] = measure_psnr(vae, np.stack(clips))
    latents = measure_latents(vae, np.stack(sets["base"]))
    measured["latent_std"] = float(latents.std())
    measured["channel_std_min"] = float(latents.std((0, 2, 3, 4)).min())
    measured["channel_std_max"] = float(latents.std((0, 2, 3, 4)).max())
    measured["channel_mean_max"] = float(latents.mean((0, 2, 3, 4)).abs().max())
    return {name: round(value, 3) for name, value in measured.items()}


def update(optimizer: torch.optim.Optimizer, parameters: Tensors, ema: Tensors, step: int) -> Tensor:
    """Steps the float32 masters with the gradients of the passes' weights, then both copies; returns the norm.

    Every convolution takes part in every pass, so no gradient is missing.
    """
    masters: Tensors = optimizer.param_groups[0]["params"]
    for master, parameter in zip(masters, parameters, strict=True):
        master.grad = cast(Tensor, parameter.grad).float()
        parameter.grad = None
    norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():  # one call for all tensors: hundreds of small ones would take as long as the pass
        torch._foreach_copy_(parameters, masters)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(ema, masters, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))  # pyright: ignore[reportPrivateImportUsage]
    return norm


def train(arguments: argparse.Namespace, started: float, device: torch.device) -> tuple[AutoencoderKLCogVideoX, int]:
    """Trains until the time or the steps are over; returns the smoothed model as saved, and the number of steps."""
    batches = read_batches(arguments)
    first = next(batches)  # the workers start before CUDA does
    torch.manual_seed(arguments.seed)
    rng = torch.Generator().manual_seed(arguments.seed)
    vae = make_vae(arguments.widths)
    if arguments.resume:
        vae.load_state_dict(load_file(arguments.resume / "weights.safetensors"))
    # bfloat16 weights for the passes, float32 masters for the updates: autocast would run the norms in float32, and
    # their memory traffic is most of the time.
    masters = [parameter.detach().clone().to(device) for parameter in vae.parameters()]
    ema = [master.clone() for master in masters]
    nn.Module.to(vae, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    vae = choose_convolutions(vae, prepare_batch(first, 0.0, device, rng))
    parameters: Tensors = list(vae.parameters())
    optimizer = torch.optim.AdamW(masters, betas=(0.9, 0.99), weight_decay=1e-3)
    if arguments.resume:
        restore_moments(optimizer, vae, arguments.resume)
    begun = printed = saved = time.monotonic()
    end = started + arguments.minutes * 60 - MEASURING_SECONDS
    step = 0
    while (progress := max((time.monotonic() - begun) / (end - begun), step / arguments.steps)) < 1.0:
        optimizer.param_groups[0]["lr"] = learning_rate_at(progress, step, arguments.learning_rate)
        # Cut into pieces of 9 + 8 frames as the class does by itself, or at first, in half the calls, not cut: only the
        # statistics of the norms differ.
        vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = (
            (8, 2) if progress >= WHOLE_FRAMES_FROM else (16, 4)
        )
        parts = backpropagate(vae, prepare_batch(next(batches), progress, device, rng))
        norm = update(optimizer, parameters, ema, step)
        step += 1
        now = time.monotonic()
        if now - printed > 5 or step <= 3:
            row = {"step": step, "seconds": round(now - started, 1), "progress": round(progress, 3)}
            row |= {"grad_norm": float(norm), **{name: float(part) for name, part in parts.items()}}
            log(arguments.out, row | {"psnr_with_noise": 10 * math.log10(4 / row["mse"])})
            printed = now
        if now - saved > 120:
            save(arguments, vae, optimizer, ema)
            saved = now
    return save(arguments, vae, optimizer, ema), step


def log(folder: Path, row: dict[str, float]) -> None:
    """Adds a row to the curve and prints it."""
    with (folder / "curve.jsonl").open("a", encoding="utf-8") as curve:
        curve.write(json.dumps(row) + "\n")
    print(" ".join(f"{name}={value:.4g}" for name, value in row.items()), flush=True)


def restore_moments(optimizer: torch.optim.Optimizer, vae: AutoencoderKLCogVideoX, folder: Path) -> None:
    """Puts the optimizer's moments of an earlier run back."""
    first, second = (load_file(folder / f"moments_{number}.safetensors") for number in (1, 2))
    for (name, _), master in zip(vae.named_parameters(), optimizer.param_groups[0]["params"], strict=True):
        optimizer.state[master] = {
            "step": torch.tensor(1000.0),  # the moments have settled: no bias is left to correct
            "exp_avg": first[name].to(master.device),
            "exp_avg_sq": second[name].to(master.device),
        }


def main() -> None:
    """Trains, saves and measures."""
    started = time.monotonic()
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae, steps = train(arguments, started, device)
    row = {"steps": steps, "clips": steps * arguments.batch_size, "seconds": round(time.monotonic() - started, 1)}
    row |= {"parameters": sum(parameter.numel() for parameter in vae.parameters()), **report(vae, arguments.unseen)}
    log(arguments.out, row | {"scaling_factor": vae.config["scaling_factor"]})


if __name__ == "__main__":
    run_command(main)
