"""A written folder: an ordinary data set whose mp4 files still show, to the judge, what the truth says."""

import json
from pathlib import Path

import numpy as np
import pytest

from cogtune.errors import UserError
from cogtune.manifest import read_manifest
from cogtune.shapes.captions import captioned_clip
from cogtune.shapes.judge import read_video as judge_video
from cogtune.shapes.render import render
from cogtune.shapes.writing import write_clips
from cogtune.video import read_video


@pytest.mark.parametrize("split", ["base", "concept"])
def test_round_trip(tmp_path: Path, split: str):
    write_clips(tmp_path / "set", split, count=16, seed=5, workers=2)
    truths = [json.loads(line) for line in (tmp_path / "set" / "truth.jsonl").read_text().splitlines()]
    clips = read_manifest(tmp_path / "set")
    assert len(truths) == len(clips) == 16
    for index, (truth, written) in enumerate(zip(truths, clips, strict=True)):
        clip, text = captioned_clip(split, 5, index)
        assert written.caption == text and written.video.name == Path(truth["video"]).name
        frames = read_video(written.video)
        assert frames.shape == (17, 64, 96, 3)
        error = np.mean((frames.astype(float) - render(clip)) ** 2)
        assert 10 * np.log10(255**2 / error) > 30  # what is lost is the colour's resolution, yuv420p
        reading = judge_video(frames)
        for name in ("shape", "colour", "motion", "background"):
            assert getattr(reading, name) == truth[name] == getattr(clip, name)


def test_the_manifest_tells_the_trainer_no_truth(tmp_path: Path):
    write_clips(tmp_path / "set", "concept", count=1, seed=0)
    assert set(json.loads((tmp_path / "set" / "metadata.jsonl").read_text())) == {"video", "caption"}


def test_mistakes_are_the_users(tmp_path: Path):
    with pytest.raises(UserError, match="split 'bse' does not exist"):
        write_clips(tmp_path / "a", "bse", count=1, seed=0)
    with pytest.raises(UserError, match="count is 0"):
        write_clips(tmp_path / "a", "base", count=0, seed=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        write_clips(tmp_path / "full", "base", count=1, seed=0)
