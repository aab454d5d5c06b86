"""Brings a data set into the cache for a run: clips through the VAE, captions through T5, over all processes."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cogtune.cache import Cache, make_key
from cogtune.cluster.sharing import find_companions
from cogtune.cluster.whereabouts import enter, move
from cogtune.data_plan import DataPlan
from cogtune.dataset import Entry
from cogtune.encoding import CacheKeys, Share, encode_captions, encode_clips, find_cut_captions
from cogtune.errors import UserError
from cogtune.manifest import Clip
from cogtune.memory import GIB
from cogtune.video import ClipError, describe_fit, read_image_size


@dataclass(frozen=True)
class EncodedData:
    """The clips that a run uses, all of them in the cache."""

    cache: Cache
    keys: CacheKeys
    train: list[Entry]
    validation: list[Entry]

    def digest(self) -> str:
        """Identity of the training clips, captions, weights, what is prior and images, in order."""
        rows = [
            [e.clip.id, e.latents_key, e.text_key, e.clip.weight]
            + ["prior"] * e.clip.prior
            + ([e.image_key] if e.image_key else [])
            for e in self.train
        ]
        return make_key(entries=rows)


def encode_data(plan: DataPlan, accelerator: Accelerator) -> EncodedData:
    """Clips and captions through VAE and T5 into the cache where they are missing, over all processes.

    Clips go first: a bad one shows before the large text encoder loads. Raises `UserError` with all bad clips, or
    leaves them out where `data.bad_clips` is `skip`.
    """
    try:
        return _encode_data(plan, accelerator)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on the device while encoding clips and captions: {str(error).splitlines()[0][:300]}\n"
            "       close other programs on the device, or fill the cache on a larger one with data/prepare.py"
        ) from error


def _encode_data(plan: DataPlan, accelerator: Accelerator) -> EncodedData:
    cache = plan.make_cache()
    quiet = not accelerator.is_main_process
    # Ranks that see one cache share the work; where nodes have caches of their own, each fills its own.
    companions = find_companions(cache.folder)
    share = Share(companions.index(accelerator.process_index), len(companions), accelerator.wait_for_everyone)
    clips = [*plan.train_clips, *plan.validation_clips]
    # Only where data.bad_clips is skip.
    absent = {clip: file for clip in clips for file in (clip.video, clip.image) if file and not file.is_file()}
    clips = [clip for clip in clips if clip not in absent]
    _digest_files(clips, cache, share)
    keys = CacheKeys(cache, plan.facts, plan.clip_format, plan.dtype)
    # Walking through a large cache is slow on a network file system: one rank does it.
    before = 0 if quiet else cache.size_bytes()
    problems = [f"{clip.id}: {file} does not exist" for clip, file in absent.items()]
    problems = problems if accelerator.is_main_process else []

    def note_problem(clip: Clip, problem: ClipError) -> None:
        problems.append(f"{clip.id}: {problem}")

    data = plan.config.data
    encode_clips(
        clips,
        keys,
        cache,
        plan.facts,
        plan.clip_format,
        device=accelerator.device,
        dtype=plan.dtype,
        share=share,
        num_workers=max(1, plan.num_workers),
        timeout_seconds=data.decode_timeout_seconds,
        on_problem=note_problem,
        quiet=quiet,
    )
    _judge_problems(sorted(set(gather_object(problems))), plan, accelerator)
    entries = {clip: Entry(clip, keys.latents(clip), keys.text(clip.caption), keys.image(clip)) for clip in clips}
    names = {clip: f"{clip.id} {entry.latents_key} {entry.image_key}" for clip, entry in entries.items()}
    unusable = [names[clip] for clip, entry in entries.items() if not _is_cached(cache, entry)]
    left_out = set(gather_object(unusable))  # the same on all ranks, or they would train on different samples
    usable = {clip for clip in clips if names[clip] not in left_out}
    captions = [clip.caption for clip in clips if clip in usable] + plan.extra_texts()
    encode_captions(
        captions, keys, cache, plan.facts, device=accelerator.device, dtype=plan.dtype, share=share, quiet=quiet
    )
    accelerator.wait_for_everyone()
    cut = find_cut_captions(captions, plan.facts) if accelerator.is_main_process else []
    if cut:
        length = plan.facts.max_text_length
        accelerator.print(f"{len(cut)} text(s) are longer than {length} tokens and lose their end (see data/check.py)")
    if accelerator.is_main_process:
        _describe_cropped_images(usable, plan)
    train = [entries[clip] for clip in plan.train_clips if clip in usable]
    if not train:
        raise UserError(f"data.manifest={data.manifest}: no usable clip; run data/check.py on it")
    if not quiet:
        where = "" if len(companions) == accelerator.num_processes else " (one of several: nodes have their own)"
        print(
            f"cache: {len(usable)} clips, {len(set(captions))} texts; {before / GIB:.2f} GiB before, "
            f"{cache.size_bytes() / GIB:.2f} GiB now in {cache.folder}{where}"
        )
    return EncodedData(cache, keys, train, [entries[clip] for clip in plan.validation_clips if clip in usable])


def _digest_files(clips: list[Clip], cache: Cache, share: Share) -> None:
    """Every file's digest into the cache, each rank a part: all of them reading all videos is too much for a disk."""
    if share.world_size > 1:
        files = {str(file): file for clip in clips for file in (clip.video, clip.image) if file is not None}
        enter("reading the clips' files")
        for name in share.of(files):
            cache.digest_file(files[name])
            move()
    share.wait()


def _is_cached(cache: Cache, entry: Entry) -> bool:
    image_key = entry.image_key
    return cache.has("latents", entry.latents_key) and (image_key is None or cache.has("images", image_key))


def _describe_cropped_images(usable: set[Clip], plan: DataPlan) -> None:
    """Says which images, of the manifest and of validation, don't have their clip's shape and size."""
    if not plan.facts.takes_image:
        return
    used = {clip.image: clip.form or plan.clip_format for clip in usable if clip.image is not None}
    used |= dict.fromkeys(plan.config.validation.images or [], plan.clip_format)
    fits = {
        image: describe_fit(read_image_size(image), form.height, form.width, most_cut=0.01)
        for image, form in sorted(used.items())
    }
    cropped = [f"{image}: {fit}" for image, fit in fits.items() if fit is not None]
    if cropped:
        rest = f" (and {len(cropped) - 1} more; data/check.py lists clips that lose a fifth)" if cropped[1:] else ""
        print(f"image of another shape or size: {cropped[0]}{rest}")


def _judge_problems(problems: list[str], plan: DataPlan, accelerator: Accelerator) -> None:
    if not problems:
        return
    listed = "\n       ".join([*problems[:20], *([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])])
    if plan.config.data.bad_clips == "error":
        raise UserError(
            f"{len(problems)} clip(s) can't be used:\n       {listed}\n       mend or remove them, or set "
            "data.bad_clips=skip to train without them (data/check.py lists every problem)"
        )
    accelerator.print(f"leaving out {len(problems)} clip(s):\n       {listed}")
