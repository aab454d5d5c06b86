"""Reads every clip and caption of a data set and tells what is usable and what is not; changes nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from cogtune.cache import digest_bytes
from cogtune.decoding import ClipDecoder
from cogtune.encoding import find_cut_captions
from cogtune.manifest import Clip, ClipFormat
from cogtune.models import ModelFacts
from cogtune.video import ClipError, describe_fit, load_image, read_image_size, read_timeline

KINDS = ("usable", "too short", "unreadable", "wrong size", "duplicate content", "caption cut")
_LISTED = 20


@dataclass
class Inspection:
    """Findings by kind: (clip id, what is the matter). One clip may have several."""

    num_clips: int
    usable: list[str] = field(default_factory=list)
    findings: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {kind: [] for kind in KINDS[1:]})

    def describe(self) -> str:
        """The table, and below it the first findings of each kind."""
        rows = [("usable", len(self.usable))] + [(kind, len(found)) for kind, found in self.findings.items()]
        lines = [f"{'clips':<18} {self.num_clips:>6}"] + [f"{kind:<18} {count:>6}" for kind, count in rows]
        for kind, found in self.findings.items():
            lines += [f"{kind}: {clip}: {what}" for clip, what in found[:_LISTED]]
            if len(found) > _LISTED:
                lines.append(f"{kind}: ... and {len(found) - _LISTED} more")
        return "\n".join(lines)


def inspect_clips(
    clips: Sequence[Clip], facts: ModelFacts, clip_format: ClipFormat, *, num_workers: int, timeout_seconds: float
) -> Inspection:
    """Decodes every clip as training would, under the same time limit.

    "wrong size" are clips smaller than the training size (they are enlarged) or of another shape, where more than a
    fifth of the picture is cut off; such clips, duplicates and cut captions are usable.
    """
    result = Inspection(len(clips))
    with ClipDecoder(clip_format, num_workers=num_workers, timeout_seconds=timeout_seconds) as decoder:
        for outcome in tqdm(decoder.decode(clips), "reading", total=len(clips), unit="clip"):
            clip = clips[outcome.index]
            problem = outcome.problem
            try:
                fits = [] if problem else _judge_size(clip, clip.form or clip_format, takes_image=facts.takes_image)
            except ClipError as error:
                problem, fits = error, []
            if problem is not None:
                result.findings[problem.kind].append((clip.id, str(problem)))
            else:
                result.usable.append(clip.id)
                result.findings["wrong size"] += [(clip.id, what) for what in fits]
    result.findings["duplicate content"] = _find_duplicates(clips)
    cut = find_cut_captions([clip.caption for clip in clips], facts)
    result.findings["caption cut"] = [
        (clips[index].id, f"{length} tokens, the model reads {facts.max_text_length}; the end is lost")
        for index, length in cut
    ]
    return result


def _judge_size(clip: Clip, form: ClipFormat, *, takes_image: bool) -> list[str]:
    timeline = read_timeline(clip.video)
    found = [describe_fit((timeline.width, timeline.height), form.height, form.width)]
    if clip.image is not None and takes_image:
        load_image(clip.image, form.height, form.width)
        fit = describe_fit(read_image_size(clip.image), form.height, form.width)
        found.append(fit and f"image {clip.image.name}: {fit}")
    return [what for what in found if what is not None]


def _find_duplicates(clips: Sequence[Clip]) -> list[tuple[str, str]]:
    """Clips that show the same part of the same bytes as an earlier one."""
    first: dict[tuple[str, float, float | None], str] = {}
    found = []
    digests: dict[Path, str] = {}
    sizes = Counter(clip.video.stat().st_size for clip in clips if clip.video.is_file())
    for clip in clips:
        if not clip.video.is_file() or sizes[clip.video.stat().st_size] < 2:
            continue  # a file of a size of its own has no twin
        digest = digests.setdefault(clip.video, digests.get(clip.video) or digest_bytes(clip.video))
        key = (digest, clip.start, clip.end)
        if key in first:
            found.append((clip.id, f"the same video as {first[key]}"))
        first.setdefault(key, clip.id)
    return found
