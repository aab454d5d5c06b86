"""Fills the cache: captions through T5, clips through the VAE, each model alone on the device and gone afterwards.

Several processes (or jobs) share the work: each takes every n-th missing entry and then waits until the others' are
there, so a slow neighbour can't run into a collective's time limit. A killed run goes on where it stopped.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tqdm import tqdm

from cogtune import models
from cogtune.cache import Cache, make_key
from cogtune.cluster.whereabouts import WAITING, enter, move
from cogtune.decoding import ClipDecoder, Decoded
from cogtune.manifest import Clip, ClipFormat
from cogtune.models import ModelFacts
from cogtune.overlap import Batch, EncodingTimes, encode_overlapped
from cogtune.placement import make_coder, place_text_encoder
from cogtune.vae.frame_coder import FrameCoder
from cogtune.video import ClipError, load_image

_PREPROCESSING = "time-sampled; upright; bicubic antialias cover; centre crop; [-1, 1]; v1"
_IMAGE = "upright; bicubic antialias cover; centre crop; v1"
TEXT_BATCH = 8
_CODED_FROM_CLIPS = 8
"""From this many on, a GPU encodes with `FrameCoder`, whose kernels take some seconds to compile."""
_TUNED_FROM_CLIPS = 64
"""And from this many on, it tries convolution algorithms first."""


def _no_wait() -> None:
    """One process has nobody to wait for."""


@dataclass(frozen=True)
class Share:
    """Which part of a common job this process does, and how it waits for the others."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = _no_wait

    def of(self, keys: Iterable[str]) -> list[str]:
        """This process's part of the keys: of all of them, since what is missing changes while others work."""
        return sorted(keys)[self.rank :: self.world_size]


class CacheKeys:
    """Entry names for one model, clip format and precision; digests its VAE and text encoder once.

    `clip_format` is for clips that have none of their own.
    """

    def __init__(self, cache: Cache, facts: ModelFacts, clip_format: ClipFormat, dtype: torch.dtype) -> None:
        self._cache, self._facts, self._format, self._dtype = cache, facts, clip_format, str(dtype)
        self._vae = cache.digest_folder(facts.folder / "vae")
        parts = [cache.digest_folder(facts.folder / name) for name in ("tokenizer", "text_encoder")]
        self._text = make_key(parts=parts)

    def text(self, caption: str) -> str:
        """Key of a caption's embeddings."""
        length = self._facts.max_text_length
        return make_key(caption=caption, encoder=self._text, length=length, dtype=self._dtype)

    def latents(self, clip: Clip) -> str:
        """Key of a clip's VAE moments: the video's bytes, the segment, the preprocessing, the VAE."""
        move()
        video, form = self._cache.digest_file(clip.video), clip.form or self._format
        shape = [form.num_frames, form.height, form.width, form.fps]
        return make_key(
            video=video,
            start=clip.start,
            end=clip.end,
            format=shape,
            how=_PREPROCESSING,
            vae=self._vae,
            dtype=self._dtype,
        )

    def image(self, clip: Clip) -> str | None:
        """Key of the image that a clip starts from; None where the model takes none."""
        form = clip.form or self._format
        if not self._facts.takes_image:
            return None
        if clip.image is not None:
            return make_key(image=self._cache.digest_file(clip.image), size=[form.height, form.width], how=_IMAGE)
        video, size = self._cache.digest_file(clip.video), [form.height, form.width]
        return make_key(video=video, start=clip.start, size=size, how=f"first frame; {_PREPROCESSING}")


def encode_captions(
    captions: Iterable[str],
    keys: CacheKeys,
    cache: Cache,
    facts: ModelFacts,
    *,
    device: torch.device,
    dtype: torch.dtype,
    share: Share,
    encoder: torch.nn.Module | None = None,
    quiet: bool = False,
) -> EncodingTimes | None:
    """Puts the T5 embeddings [L, D] of every distinct caption into the cache where they are missing.

    `encoder`: the text encoder, where it is on the device already; None loads it. Returns None where none are missing.
    """
    enter("encoding captions")
    by_key = {keys.text(caption): caption for caption in captions}
    mine = _find_missing("text", by_key, cache, share, quiet=quiet)
    times: EncodingTimes | None = None
    if mine:
        tokenizer = models.load_tokenizer(facts)
        encoder = place_text_encoder(models.load_text_encoder(facts, dtype), device) if encoder is None else encoder
        starts = tqdm(range(0, len(mine), TEXT_BATCH), "captions", unit="batch", disable=quiet)
        batches = (mine[start : start + TEXT_BATCH] for start in starts)
        length = facts.max_text_length
        tokens = ((batch, tokenize([by_key[key] for key in batch], tokenizer, length)) for batch in batches)

        def write(batch: list[str], results: tuple[torch.Tensor, ...]) -> None:
            move()
            for key, row in zip(batch, results[0], strict=True):
                cache.write("text", key, {"embeddings": row})

        times = encode_overlapped(tokens, lambda ids, encoder=encoder: (embed_tokens(ids, encoder),), write, device)
        del encoder
        release_memory(device)
    _wait_for(by_key, lambda key: cache.has("text", key))
    return times


def embed(captions: list[str], tokenizer: Callable[..., Any], encoder: torch.nn.Module, length: int) -> torch.Tensor:
    """T5 embeddings [B, L, D] padded to `length`; no mask, as the released models were trained."""
    return embed_tokens(tokenize(captions, tokenizer, length).to(next(encoder.parameters()).device), encoder)


def tokenize(captions: list[str], tokenizer: Callable[..., Any], length: int) -> torch.Tensor:
    """Token numbers [B, L], padded or cut to `length`."""
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids


@torch.inference_mode()
def embed_tokens(tokens: torch.Tensor, encoder: torch.nn.Module) -> torch.Tensor:
    """T5 embeddings [B, L, D] of token numbers on the encoder's device."""
    return encoder(tokens)[0]


def find_cut_captions(captions: Sequence[str], facts: ModelFacts) -> list[tuple[int, int]]:
    """(index, number of tokens) of the captions longer than the model's text length, which lose their end."""
    tokenizer = models.load_tokenizer(facts)
    lengths = [len(ids) for ids in tokenizer(list(captions))["input_ids"]] if captions else []
    return [(index, length) for index, length in enumerate(lengths) if length > facts.max_text_length]


def encode_clips(
    clips: Sequence[Clip],
    keys: CacheKeys,
    cache: Cache,
    facts: ModelFacts,
    clip_format: ClipFormat,
    *,
    device: torch.device,
    dtype: torch.dtype,
    share: Share,
    num_workers: int,
    timeout_seconds: float,
    on_problem: Callable[[Clip, ClipError], None],
    quiet: bool = False,
) -> EncodingTimes | None:
    """Puts every clip's VAE moments, and its image where the model takes one, into the cache where they are missing.

    Returns None where nothing was missing.

    `on_problem` is called for a clip that can't be decoded; what it doesn't raise leaves the clip out. It may be called
    from another thread, one call at a time.
    """
    enter("encoding clips")
    by_key = {keys.latents(clip): clip for clip in clips}
    first_frames = {}  # keys of images by keys of latents
    if facts.takes_image:
        _cache_given_images(clips, keys, cache, clip_format, share=share, on_problem=on_problem, quiet=quiet)
        first_frames = {keys.latents(clip): keys.image(clip) or "" for clip in clips if clip.image is None}
    mine = _find_missing("latents", by_key, cache, share, quiet=quiet)
    if first_frames:
        without = set(_find_missing("images", first_frames.values(), cache, share, quiet=quiet))
        mine = sorted({*mine, *(key for key, image in first_frames.items() if image in without)})
    mine.sort(key=lambda key: (by_key[key].form or clip_format).describe())  # clips of one shape are encoded together
    times: EncodingTimes | None = None
    if mine:
        vae = models.load_vae(facts, dtype).to(device)  # pyright: ignore[reportArgumentType]
        pixels = _largest_frame(mine, by_key, clip_format)
        coder = choose_coder(vae, len(mine), pixels)
        with ClipDecoder(clip_format, num_workers=num_workers, timeout_seconds=timeout_seconds) as decoder:
            outcomes = decoder.decode([by_key[key] for key in mine])
            shown = tqdm(outcomes, "clips", total=len(mine), unit="clip", disable=quiet)

            def note(key: str, problem: ClipError) -> None:
                _mark_failed(cache, key, str(problem))
                on_problem(by_key[key], problem)

            def encode(frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
                moments = encode_frames(vae, frames, coder)
                return (*moments, frames[:, 0]) if facts.takes_image else moments

            def write(keys: list[str], results: tuple[torch.Tensor, ...]) -> None:
                move()
                for key, mean, logvar, *first_frame in zip(keys, *results, strict=True):
                    if key in first_frames:
                        cache.write("images", first_frames[key], {"image": first_frame[0]})
                    cache.write("latents", key, {"mean": mean, "logvar": logvar})

            times = encode_overlapped(_gather_batches(shown, mine, device, note), encode, write, device)
        del vae, coder
        release_memory(device)

    def is_done(key: str) -> bool:
        there = cache.has("latents", key) and (key not in first_frames or cache.has("images", first_frames[key]))
        return there or _failed_path(cache, key).exists()

    _wait_for(by_key, is_done)
    return times


def _cache_given_images(
    clips: Sequence[Clip],
    keys: CacheKeys,
    cache: Cache,
    clip_format: ClipFormat,
    *,
    share: Share,
    on_problem: Callable[[Clip, ClipError], None],
    quiet: bool,
) -> None:
    """Puts the images that the manifest gives into the cache; `on_problem` hears of each clip whose image is no use."""
    users: dict[str, list[Clip]] = {}
    for clip in clips:
        if clip.image is not None:
            users.setdefault(keys.image(clip) or "", []).append(clip)
    if not users:
        return
    for key in _find_missing("images", users, cache, share, quiet=quiet):
        clip = users[key][0]
        form = clip.form or clip_format
        assert clip.image is not None
        try:
            image = load_image(clip.image, form.height, form.width)
        except ClipError as problem:
            _mark_failed(cache, key, str(problem))
            for user in users[key]:
                on_problem(user, problem)
        else:
            cache.write("images", key, {"image": torch.from_numpy(image)})
    _wait_for(users, lambda key: cache.has("images", key) or _failed_path(cache, key).exists())


def _largest_frame(wanted: Sequence[str], by_key: dict[str, Clip], clip_format: ClipFormat) -> int:
    """Pixels of the largest frame among the clips to encode."""
    forms = [by_key[key].form or clip_format for key in wanted]
    return max(form.height * form.width for form in forms)


def choose_coder(vae: AutoencoderKLCogVideoX, num_clips: int, pixels: int) -> FrameCoder | None:
    """How so many clips, of at most `pixels` a frame, are encoded; None: the stock way (a CPU; few, in much memory)."""
    if vae.device.type != "cuda":
        return None
    coder = make_coder(vae, tune_convolutions=num_clips >= _TUNED_FROM_CLIPS, pixels=pixels)
    return coder if coder.in_slabs or num_clips >= _CODED_FROM_CLIPS else None


def _gather_batches(
    outcomes: Iterable[Decoded], keys: Sequence[str], device: torch.device, note: Callable[[str, ClipError], None]
) -> Iterator[Batch]:
    """Keys and uint8 frames [B, F, H, W, 3] of decoded clips of one shape; `note` hears of those without frames."""
    waiting: list[tuple[str, torch.Tensor]] = []

    def take() -> Batch:
        batch = [key for key, _ in waiting], torch.stack([frames for _, frames in waiting])
        waiting.clear()
        return batch

    for outcome in outcomes:
        if outcome.problem is not None:
            note(keys[outcome.index], outcome.problem)
            continue
        assert outcome.frames is not None
        frames = torch.from_numpy(outcome.frames)
        if waiting and waiting[0][1].shape != frames.shape:
            yield take()
        waiting.append((keys[outcome.index], frames))
        if len(waiting) >= _clips_at_once(frames, device):
            yield take()
    if waiting:
        yield take()


def _find_missing(kind: str, keys: Iterable[str], cache: Cache, share: Share, *, quiet: bool) -> list[str]:
    """This process's keys without a sound entry; every entry is read once and damaged ones are removed."""
    mine = share.of(keys)
    move()
    present = [key for key in mine if cache.has(kind, key)]

    def check(key: str) -> None:
        move()
        cache.read(kind, key)

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(
            tqdm(
                pool.map(check, present),
                f"checking {kind}",
                total=len(present),
                unit="entry",
                disable=quiet or len(present) < 1000,
            )
        )
    for key in mine:
        _failed_path(cache, key).unlink(missing_ok=True)
    share.wait()
    return [key for key in mine if not cache.has(kind, key)]


def _failed_path(cache: Cache, key: str) -> Path:
    return cache.folder / "failed" / key


def _mark_failed(cache: Cache, key: str, reason: str) -> None:
    """Tells the other processes not to wait for this entry."""
    path = _failed_path(cache, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reason)


def _clips_at_once(frames: torch.Tensor, device: torch.device) -> int:
    """How many clips fill the memory that one released clip takes (49 x 480 x 720): one of those, or many small.

    On a CPU always one: batching gains nothing there, and an entry's last bits don't depend on its neighbours.
    """
    if device.type == "cpu":
        return 1
    return max(1, min(32, 49 * 480 * 720 * 3 // frames.numel()))


@torch.inference_mode()
def encode_frames(
    vae: AutoencoderKLCogVideoX, frames: torch.Tensor, coder: FrameCoder | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [B, F, H, W, 3] to the posterior's mean and log-variance, each [B, C, F', H', W'], unscaled."""
    pixels = frames.to(vae.device).permute(0, 4, 1, 2, 3)
    pixels = (pixels.float() / 127.5 - 1.0).to(vae.dtype)
    if coder is None:
        distribution = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    else:
        distribution = DiagonalGaussianDistribution(coder.encode(pixels))
    return distribution.mean, distribution.logvar


def _wait_for(keys: Iterable[str], there: Callable[[str], bool]) -> None:
    enter(WAITING)
    remaining = [key for key in keys if not there(key)]
    while remaining:
        time.sleep(0.5)
        remaining = [key for key in remaining if not there(key)]


def release_memory(device: torch.device) -> None:
    """Gives freed memory back to the device, so that the next model finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
