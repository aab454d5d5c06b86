"""Trains the embedded model's autoencoder from random weights on clips rendered meanwhile.

    python scripts/embedded/train_vae.py --out runs/vae --minutes 8

Writes `vae/` (the EMA weights in float16, what `from_pretrained` loads), `curve.jsonl`, and `weights.safetensors`,
which `--resume` continues from with new moments: after each third of the time. Needs torch, diffusers and numpy alone.

`--decoder-of FOLDER` trains the decoder of that autoencoder on, and leaves the encoder and every number of its config
as they are: latents mean the same as before, and so does a transformer that was trained on them.

On CUDA the whole step, optimizer included, is one CUDA graph; where capturing fails it says so and goes on without.
"""

import argparse
import copy
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogtune.errors import UserError, run_command
from cogtune.frame_convolution import use_frame_convolutions
from cogtune.shapes.pool import ClipPool, DevicePool
from cogtune.shapes.reconstruction import (
    UNSEEN_SEED,
    decoder_loss,
    halve_colour_resolution,
    measure_latents,
    measure_unseen,
    reconstruction_loss,
)
from cogtune.shapes.recorded_step import RecordedStep
from cogtune.shapes.render import render
from cogtune.shapes.world import HEIGHT, NUM_FRAMES, WIDTH, sample_clip
from cogtune.vae.spatial_norm import use_small_spatial_norms

MAX_LATENT_NOISE = 0.1  # deviations; what a small denoiser leaves on the latents must not show
QUIET_FROM = 0.6  # of the time; noise costs sharpness, so the end is nearly without
EMA_DECAY = 0.999
MEASURING_SECONDS = 30  # kept back at the end for saving and measuring
# Ways to run the convolutions, equal but for rounding; _last is with channels last, compiled the decoder alone.
CONVOLUTIONS = ("volumes", "volumes_last", "frames", "compiled")
Tensors = list[Tensor]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="from the start of the process, measuring included")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps if that comes first")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--widths", type=int, nargs=4, help="channels, finest level first (24 40 56 56)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=13, help="processes that render clips")
    parser.add_argument("--pool", type=int, default=16384, help="clips kept in memory, 313 kB each")
    parser.add_argument("--convolutions", choices=["fastest", *CONVOLUTIONS], default="fastest")
    parser.add_argument("--unseen", type=int, default=200, help="clips that PSNR is measured on")
    parser.add_argument("--resume", type=Path, help="--out of an earlier run; use another --seed for other clips")
    parser.add_argument("--decoder-of", type=Path, help="folder of an autoencoder whose decoder alone is trained on")
    parser.add_argument("--quiet-noise", type=float, default=0.02, help="on the latents at the end, in deviations")
    parser.add_argument("--fixed-pool", action="store_true", help="stop rendering when the pool is full")
    return parser.parse_args()


def make_start(arguments: argparse.Namespace) -> AutoencoderKLCogVideoX:
    """The autoencoder as training finds it: random, from an earlier run, or one whose decoder is trained on."""
    if arguments.decoder_of:
        if arguments.widths:
            raise UserError("--widths: has no effect beside --decoder-of, whose autoencoder has its own; remove it")
        if not (arguments.decoder_of / "config.json").is_file():
            raise UserError(f"--decoder-of {arguments.decoder_of}: no config.json there; name an autoencoder's folder")
        vae = AutoencoderKLCogVideoX.from_pretrained(arguments.decoder_of, torch_dtype=torch.float32)
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
    else:
        vae = make_vae(arguments.widths or [24, 40, 56, 56])
    if arguments.resume:
        weights = load_file(arguments.resume / "weights.safetensors")
        if weights.keys() != trained_parameters(vae).keys():
            raise UserError(f"--resume {arguments.resume}: it trained other weights; give --decoder-of as it did")
        vae.load_state_dict(weights, strict=False)
    return vae


def trained_parameters(vae: AutoencoderKLCogVideoX) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: parameter for name, parameter in vae.named_parameters() if parameter.requires_grad}


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


def update(
    vae: AutoencoderKLCogVideoX, optimizer: torch.optim.Optimizer, pixels: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """One training step: the passes, the gradients clipped, the float32 masters moved, the passes' weights after them.

    The decoder sees the latents' means with the noise. The divergence's weight is so low that the posterior's own
    deviation stays far below the noise: it is not sampled.
    """
    masters: Tensors = optimizer.param_groups[0]["params"]
    parameters = list(trained_parameters(vae).values())
    whole = any(parameter.requires_grad for parameter in vae.encoder.parameters())
    with torch.set_grad_enabled(whole):
        (posterior,) = vae.encode(pixels.to(vae.dtype), return_dict=False)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    (decoded,) = vae.decode((mean + noise).to(vae.dtype), return_dict=False)
    if whole:
        loss, parts = reconstruction_loss(pixels, decoded.float(), mean, logvar)
    else:
        loss, parts = decoder_loss(pixels, decoded.float())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for master, gradient in zip(masters, gradients, strict=True):
            assert master.grad is not None, "the gradients' buffers are fixed, too"
            master.grad.copy_(gradient)
    norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():  # one call for all tensors: hundreds of small ones would take as long as the pass
        torch._foreach_copy_(parameters, masters)  # pyright: ignore[reportArgumentType]
    return {"loss": loss.detach(), "grad_norm": norm, **parts}


def fill(step: RecordedStep, pool: DevicePool, strength: float) -> None:
    """Draws a batch, and for each clip latent noise of 0 to `strength` deviations."""
    pixels, noise = step.inputs
    drawn = pool.sample(len(pixels))
    half = len(pixels) // 2  # a video file's colours
    pixels.copy_(torch.cat([halve_colour_resolution(drawn[:half]), drawn[half:]]))
    strengths = strength * torch.rand(len(noise), 1, 1, 1, 1, device=noise.device, generator=pool.rng)
    noise.normal_(generator=pool.rng).mul_(strengths)


def prepare_step(
    arguments: argparse.Namespace, vae: AutoencoderKLCogVideoX, optimizer: torch.optim.Optimizer, pool: DevicePool
) -> RecordedStep:
    """The step with its graph, and with the convolutions run in whichever of the equal ways is fastest here."""
    device = pool.clips.device
    pixels = torch.zeros(arguments.batch_size, 3, NUM_FRAMES, HEIGHT, WIDTH, device=device)
    noise = torch.zeros(len(pixels), 16, (NUM_FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8, device=device)
    for master in optimizer.param_groups[0]["params"]:
        master.grad = torch.zeros_like(master)
    if device.type == "cpu":
        use_frame_convolutions(vae, everywhere=True)
        use_small_spatial_norms(vae)
        return RecordedStep(functools.partial(update, vae, optimizer), (pixels, noise))
    best: tuple[float, RecordedStep] | None = None
    for way in CONVOLUTIONS if arguments.convolutions == "fastest" else (arguments.convolutions,):
        candidate = copy.deepcopy(vae)
        if way == "frames":
            use_frame_convolutions(candidate, everywhere=True)
        elif way == "volumes_last":
            for parameter in candidate.parameters():
                layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.dim())
                if layout is not None:
                    parameter.data = parameter.data.contiguous(memory_format=layout)
        use_small_spatial_norms(candidate)  # after the copy: it binds the modules themselves
        if way == "compiled":
            candidate.decoder.compile(dynamic=False)
        step = RecordedStep(functools.partial(update, candidate, optimizer), (pixels, noise))
        fill(step, pool, MAX_LATENT_NOISE)
        started = time.perf_counter()
        step.capture(compared=("loss", "grad_norm"))
        took, eager, seconds = time.perf_counter() - started, step.time(eager=True), step.time(eager=False)
        print(
            f"{way}: {1000 * eager:.1f} ms a step eagerly, {1000 * seconds:.1f} ms as trained; ready in {took:.1f} s, "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
            flush=True,
        )
        if best is None or seconds < best[0]:
            best = (seconds, step)
        del step, candidate
        torch.cuda.empty_cache()
    assert best is not None
    torch.backends.cudnn.benchmark = best[1].graph is None  # measuring has other shapes: not worth the trials
    for state in optimizer.state.values():  # forget the one batch that all this was tried on
        for tensor in state.values():
            tensor.zero_()
    return best[1]


def learning_rate_at(progress: float, step: int, peak: float) -> float:
    """Warm-up over 100 steps, then a cosine over the run's progress down to 1 %."""
    return peak * min((step + 1) / 100, 1.0) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save(
    arguments: argparse.Namespace, vae: AutoencoderKLCogVideoX, masters: Tensors, ema: Tensors
) -> AutoencoderKLCogVideoX:
    """Writes the smoothed weights as a model folder and what resuming needs; returns the model as written."""
    names = list(trained_parameters(vae))
    smooth = make_start(arguments)
    smooth.load_state_dict({name: tensor.half().float() for name, tensor in zip(names, ema, strict=True)}, strict=False)
    nn.Module.to(smooth, masters[0].device)
    smooth.eval()
    if not arguments.decoder_of:
        clips = np.stack([render(sample_clip("base", UNSEEN_SEED, index)) for index in range(100)])
        smooth.register_to_config(scaling_factor=float(1.0 / measure_latents(smooth, clips).std()))
    copy.deepcopy(smooth).half().save_pretrained(arguments.out / "vae")
    flat = {name: master.detach().cpu().contiguous() for name, master in zip(names, masters, strict=True)}
    save_file(flat, arguments.out / "weights.safetensors")
    return smooth


def train(
    arguments: argparse.Namespace, started: float, device: torch.device, rendered: ClipPool
) -> tuple[AutoencoderKLCogVideoX, int]:
    """Trains until the time or the steps are over; returns the smoothed model as saved, and the number of steps."""
    while rendered.count_ready() < min(len(rendered.clips), 4 * arguments.batch_size):
        time.sleep(0.1)
    pool = DevicePool(rendered, device, arguments.seed)
    pool.refresh()
    torch.manual_seed(arguments.seed)
    vae = make_start(arguments)
    # bfloat16 weights for the passes, float32 masters for the updates: autocast would run the norms in float32, and
    # their memory traffic is most of the time.
    masters = [parameter.detach().clone().to(device) for parameter in trained_parameters(vae).values()]
    ema = [master.clone() for master in masters]
    cuda = device.type == "cuda"
    nn.Module.to(vae, device, torch.bfloat16 if cuda else torch.float32)
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=cuda, capturable=cuda)
    step = prepare_step(arguments, vae, optimizer, pool)
    begun = printed = time.monotonic()
    end = started + arguments.minutes * 60 - MEASURING_SECONDS
    done, saved, printed_at = 0, 0, 0
    while (progress := max((time.monotonic() - begun) / max(end - begun, 1.0), done / arguments.steps)) < 1.0:
        rate.fill_(learning_rate_at(progress, done, arguments.learning_rate))
        fill(step, pool, MAX_LATENT_NOISE if progress < QUIET_FROM else arguments.quiet_noise)
        step.run()
        decay = EMA_DECAY if arguments.resume else min(EMA_DECAY, (1 + done) / (10 + done))
        with torch.no_grad():
            torch._foreach_lerp_(ema, masters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        done += 1
        if time.monotonic() - printed > 5 or done <= 3:
            row = {"step": done, "progress": round(progress, 3), "pool": pool.count}
            row |= {name: float(value) for name, value in step.measured.items()}  # waits for the device
            now = time.monotonic()
            row |= {"seconds": round(now - started, 1), "step_ms": 1000 * (now - printed) / (done - printed_at)}
            log(arguments.out, row | {"psnr_with_noise": 10 * math.log10(4 / row["mse"])})
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} at step {done}: lower --learning-rate")
            pool.refresh()
            printed, printed_at = now, done
        if progress * 3 > saved + 1:  # what was learned outlives a process that is ended early
            save(arguments, vae, masters, ema)
            saved += 1
    return save(arguments, vae, masters, ema), done


def log(folder: Path, row: dict[str, float]) -> None:
    """Adds a row to the curve and prints it."""
    with (folder / "curve.jsonl").open("a", encoding="utf-8") as curve:
        curve.write(json.dumps(row) + "\n")
    print(" ".join(f"{name}={value:.4g}" for name, value in row.items()), flush=True)


def main() -> None:
    """Trains, saves and measures."""
    started = time.monotonic()
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 5  # kernels tried for each of 250 convolutions
    with ClipPool(
        arguments.seed, arguments.pool, arguments.workers, renewed=not arguments.fixed_pool
    ) as rendered:  # forks before CUDA starts
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae, steps = train(arguments, started, device, rendered)
    row = {"steps": steps, "clips": steps * arguments.batch_size, "seconds": round(time.monotonic() - started, 1)}
    row |= {
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        **measure_unseen(vae, arguments.unseen),
    }
    log(arguments.out, row | {"scaling_factor": vae.config["scaling_factor"]})


if __name__ == "__main__":
    run_command(main)
