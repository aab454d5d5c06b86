"""Decoding in workers: order, time limit, crashes, and PyAV after decord."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogtune.decoding import ClipDecoder, Decoded, default_workers
from cogtune.manifest import Clip, ClipFormat
from cogtune.video import read_video, write_video

FORM = ClipFormat(9, 64, 96, 8.0)

# Loaded by every Python process that has its folder on PYTHONPATH: decoders that hang or die on files of such names,
# as the real ones do on some damaged files.
BAD_DECODERS = """
import os, time
import av, decord

def misbehave(path, decoder):
    name = os.path.basename(str(path))
    if f"hangs-{decoder}" in name:
        time.sleep(600)
    if f"dies-{decoder}" in name:
        os.abort()
    if "slow" in name:
        time.sleep(0.4)

class Container:
    def __init__(self, container, path):
        self.container, self.path = container, path
    def __getattr__(self, name):
        return getattr(self.container, name)
    def __enter__(self):
        self.container.__enter__()
        return self
    def __exit__(self, *error):
        return self.container.__exit__(*error)
    def decode(self, *what, **which):
        if what:  # frames for a clip, unlike the one frame of the timeline
            misbehave(self.path, "pyav")
        return self.container.decode(*what, **which)

open_av = av.open
av.open = lambda path, *rest, **options: Container(open_av(path, *rest, **options), path)

class VideoReader(decord.VideoReader):
    def __init__(self, path, **options):
        misbehave(path, "decord")
        super().__init__(path, **options)

decord.VideoReader = VideoReader
"""


@pytest.fixture
def bad_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BAD_DECODERS)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def make_clip(tmp_path: Path, clips_folder: Path) -> Callable[[str, int], Clip]:
    def make(name: str, source: int) -> Clip:
        path = tmp_path / name
        path.write_bytes((clips_folder / f"clip{source}.mp4").read_bytes())
        return Clip(name, path, "x")

    return make


def decode(clips: list[Clip], *, num_workers: int = 1, timeout_seconds: float = 60) -> list[Decoded]:
    with ClipDecoder(FORM, num_workers=num_workers, timeout_seconds=timeout_seconds) as decoder:
        return list(decoder.decode(clips))


def assert_decoded(outcome: Decoded, clip: Clip) -> None:
    assert outcome.problem is None and outcome.frames is not None, outcome.problem
    assert np.array_equal(outcome.frames, read_video(clip.video)[:9])


def test_outcomes_come_in_the_order_of_the_clips_and_workers_end(make_clip, bad_decoders: None) -> None:
    """The first clip of each pair is slow, so with two workers the second one is done before it."""
    clips = [make_clip(f"{'slow' if i % 2 == 0 else 'fast'}-{i}.mp4", i) for i in range(6)]
    with ClipDecoder(FORM, num_workers=2, timeout_seconds=60) as decoder:
        outcomes = [outcome for outcome, _ in zip(decoder.decode(clips), range(5), strict=False)]
        processes = [worker.process for worker in decoder._workers]
        assert len(processes) == 2 and all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes), "also where the caller leaves early"
    assert [outcome.index for outcome in outcomes] == list(range(5))
    for outcome, clip in zip(outcomes, clips, strict=False):
        assert_decoded(outcome, clip)


def test_hanging_and_dying_decoders_cost_only_their_clip(make_clip, bad_decoders: None) -> None:
    """A worker that hangs is ended at the time limit; PyAV alone then has a try, and what follows is unharmed."""
    names = ["hangs-decord", "dies-decord-hangs-pyav", "good"]
    clips = [make_clip(f"{name}.mp4", index) for index, name in enumerate(names)]
    outcomes = decode(clips, timeout_seconds=2)
    assert [outcome.index for outcome in outcomes] == [0, 1, 2]
    for index in (0, 2):
        assert_decoded(outcomes[index], clips[index])
    problem = outcomes[1].problem
    assert problem is not None and outcomes[1].frames is None and problem.kind == "unreadable"
    assert all(part in str(problem) for part in ("dies-decord-hangs-pyav.mp4", "no frame within 2 s", "re-encode"))


def test_bad_files_are_reported_and_the_rest_is_decoded(make_clip, tmp_path: Path) -> None:
    truncated, short = make_clip("truncated.mp4", 1), tmp_path / "short.mp4"
    content = truncated.video.read_bytes()
    truncated.video.write_bytes(content[: int(0.55 * len(content))])
    write_video(short, np.zeros((5, 64, 96, 3), np.uint8), 8)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    clips = [
        make_clip("good.mp4", 0),
        truncated,
        Clip("short", short, "x"),
        Clip("text", text, "x"),
        Clip("missing", tmp_path / "missing.mp4", "x"),
        replace(make_clip("also-good.mp4", 2), start=0.5, end=1.5),
    ]
    outcomes = decode(clips)
    assert_decoded(outcomes[0], clips[0])
    assert outcomes[5].frames is not None and np.array_equal(outcomes[5].frames, read_video(clips[5].video)[4:13])
    kinds = [outcome.problem.kind if outcome.problem else None for outcome in outcomes]
    assert kinds[2:5] == ["too short", "unreadable", "unreadable"] and kinds[1] in ("too short", "unreadable")
    for outcome, clip in list(zip(outcomes, clips, strict=True))[1:5]:
        assert outcome.frames is None and clip.video.name in str(outcome.problem)


def test_no_clips_need_no_workers() -> None:
    assert decode([]) == []


def test_default_workers_leave_a_core() -> None:
    assert 1 <= default_workers() <= 4
