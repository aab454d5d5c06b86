"""Formats of several lengths and sizes in one run: which there are, and which clip goes to which.

From a list (`data.buckets`), or by a budget of tokens (`data.bucket_tokens`): shapes from portrait to landscape, each
as long as the budget allows. A clip goes to the format that cuts off least of its picture, then to one that doesn't
enlarge it, then to the longest that it fills. `cogtune.draws.BucketOrder` lets every optimizer step hold one format.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from cogtune.config import DataSettings
from cogtune.errors import UserError
from cogtune.manifest import Clip, ClipFormat
from cogtune.models import ModelFacts
from cogtune.video import ClipError, Timeline, choose_frames, read_timeline
from cogtune.video_request import check_size

_SHAPES = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)  # width / height
_LENGTHS = (1, 2, 4)  # the longest clip of a shape, and these parts of it
_READERS = 4


def make_formats(data: DataSettings, facts: ModelFacts) -> list[ClipFormat]:
    """The formats that a run's settings ask for, one where they ask for no buckets; raises `UserError`."""
    fps = data.fps or facts.fps
    if data.bucket_tokens is not None:
        return _fill_budget(data.bucket_tokens, facts, fps)
    sizes = [_parse_size(text) for text in data.buckets or []]
    if len(set(sizes)) < len(sizes):
        raise UserError(f"data.buckets={data.buckets}: a format stands twice; remove one")
    if not sizes:
        sizes = [(data.num_frames or facts.num_frames, data.height or facts.height, data.width or facts.width)]
    for size in sizes:
        check_size(facts, *size, allow_unsupported_size=data.allow_unsupported_size)
    return [ClipFormat(*size, fps) for size in sizes]


def _parse_size(text: str) -> tuple[int, int, int]:
    try:
        frames, height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"data.buckets: {text!r}: expected frames x height x width, such as 81x768x1360") from None
    return frames, height, width


def _fill_budget(budget: int, facts: ModelFacts, fps: float) -> list[ClipFormat]:
    setting = f"data.bucket_tokens={budget}"
    if facts.fixed_size or facts.learned_positions:
        raise UserError(f"{setting}: {facts.variant} supports one length and size only; remove it")
    formats: dict[ClipFormat, None] = {}  # in order, each once
    step = facts.size_rule.frame_step if facts.size_rule else facts.temporal_factor * (facts.patch_size_t or 1)
    for shape in _SHAPES:
        height, width = _size_of_shape(shape, facts)
        most = (facts.size_rule.max_frames if facts.size_rule else 8 * facts.num_frames) // step
        fitting = [k for k in range(1, most + 1) if facts.num_tokens(k * step + 1, height, width) <= budget]
        for part in _LENGTHS if fitting else ():
            formats[ClipFormat(max(1, fitting[-1] // part) * step + 1, height, width, fps)] = None
    if not formats:
        height, width = _size_of_shape(1.0, facts)
        raise UserError(
            f"{setting}: too few for any clip; a short one of {width}x{height} takes "
            f"{facts.num_tokens(step + 1, height, width):,} tokens"
        )
    return list(formats)


def _size_of_shape(shape: float, facts: ModelFacts) -> tuple[int, int]:
    """Height and width: by the model's rule, or of about its native area where it has none."""
    rule, multiple = facts.size_rule, facts.spatial_factor * facts.patch_size
    if rule is not None:
        long = min(rule.max_long_side, round(rule.short_side * max(shape, 1 / shape) / rule.multiple) * rule.multiple)
        return (rule.short_side, long) if shape >= 1 else (long, rule.short_side)
    area = facts.height * facts.width
    height, width = (
        max(1, round(side / multiple)) * multiple for side in ((area / shape) ** 0.5, (area * shape) ** 0.5)
    )
    return height, width


def assign_formats(clips: Sequence[Clip], formats: Sequence[ClipFormat]) -> list[Clip]:
    """The clips, each with the format that it goes to; without change where there is one only.

    A clip that can't be read, or is too short for every format, gets the shortest: decoding will say what is wrong.
    """
    if len(formats) == 1:
        return list(clips)
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda clip: replace(clip, form=_choose_format(clip, formats)), clips))


def _choose_format(clip: Clip, formats: Sequence[ClipFormat]) -> ClipFormat:
    shortest = min(formats, key=lambda form: form.num_frames)
    try:
        timeline = read_timeline(clip.video)
    except ClipError:
        return shortest
    fitting = [form for form in formats if _fills(clip, timeline, form)]
    return max(fitting, key=lambda form: _rank(timeline, form), default=shortest)


def _fills(clip: Clip, timeline: Timeline, form: ClipFormat) -> bool:
    try:
        choose_frames(timeline, form.num_frames, form.fps, clip.start, clip.end)
    except ClipError:
        return False
    return True


def _rank(timeline: Timeline, form: ClipFormat) -> tuple[float, bool, int, int]:
    across, down = form.width / timeline.width, form.height / timeline.height
    kept = round(min(across, down) / max(across, down), 3)  # of the picture
    return kept, max(across, down) <= 1.0, form.num_frames, form.height * form.width
