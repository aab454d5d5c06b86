"""Previews show a clip's own frames, small, and what can't be read has none."""

from pathlib import Path

import numpy as np
import pytest

from cogtune.dataset import Entry
from cogtune.manifest import Clip
from cogtune.previews import make_previews, read_preview
from cogtune.video import read_video, write_video


def make_entry(path: Path, **options: float) -> Entry:
    return Entry(Clip(path.stem, path, "a caption", **options), f"latents-{path.stem}", "text")


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    """60 frames of 8 fps, wider than a preview, each as grey as its number."""
    frames = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None, None] * 4, (60, 128, 384, 3))
    write_video(tmp_path / "ramp.mp4", np.ascontiguousarray(frames), 8)
    return tmp_path / "ramp.mp4"


def test_a_segments_first_seconds_are_shown_at_half_the_size(ramp: Path) -> None:
    whole = read_preview(make_entry(ramp).clip)
    assert whole.shape == (24, 64, 192, 3)
    part = read_preview(make_entry(ramp, start=2.0, end=3.0).clip)
    assert len(part) == 8
    np.testing.assert_allclose(part.mean((1, 2, 3)), np.arange(16, 24) * 4, atol=3)


def test_small_odd_videos_keep_their_size_but_for_a_pixel(tmp_path: Path, clips_folder: Path) -> None:
    assert read_preview(make_entry(clips_folder / "clip0.mp4").clip).shape == (17, 64, 96, 3)


def test_previews_are_spread_made_once_and_left_out_where_the_file_is_gone(tmp_path: Path, clips_folder: Path) -> None:
    entries = [make_entry(clips_folder / f"clip{index}.mp4") for index in range(6)]
    entries[1] = make_entry(clips_folder / "clip1.mp4", weight=0.0)
    entries.insert(0, make_entry(tmp_path / "gone.mp4"))
    made = make_previews(tmp_path / "previews", entries, 3)
    assert [entry.clip.id for entry, _ in made] == ["clip2", "clip4"]
    shown = read_video(made[0][1]).astype(float)
    assert np.abs(shown - read_video(clips_folder / "clip2.mp4")).mean() < 3
    times = [path.stat().st_mtime_ns for _, path in made]
    again = make_previews(tmp_path / "previews", entries, 3)
    assert again == made and [path.stat().st_mtime_ns for _, path in again] == times
    assert make_previews(tmp_path / "none", [], 3) == []
