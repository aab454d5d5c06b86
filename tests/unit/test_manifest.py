"""Manifests: four forms, and every mistake that a row can hold."""

import csv
import json
from pathlib import Path

import pytest

from cogtune.errors import UserError
from cogtune.manifest import Clip, read_manifest, split_validation

CAPTIONS = ["a red ball, rolling", 'a "quoted" cat', "naïve café, 雨"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three (empty) videos: a manifest is read without looking into them."""
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.MOV", "c.webm"):
        (data / name).touch()
    return data


NAMES = ["a.mp4", "sub/b.MOV", "c.webm"]


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    return path


def pairs(clips: list[Clip], root: Path) -> list[tuple[str, str]]:
    return [(str(clip.video.relative_to(root)), clip.caption) for clip in clips]


EXPECTED = list(zip(NAMES, CAPTIONS, strict=True))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("columns", [("video", "caption"), ("file_name", "text"), ("video_path", "prompt")])
def test_tables(folder: Path, suffix: str, columns: tuple[str, str]) -> None:
    path = write_rows(folder / f"list{suffix}", [dict(zip(columns, row, strict=True)) for row in EXPECTED])
    assert pairs(read_manifest(path), folder) == EXPECTED


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_hugging_face_folder(folder: Path, suffix: str) -> None:
    write_rows(folder / f"metadata{suffix}", [{"file_name": name, "text": text} for name, text in EXPECTED])
    assert pairs(read_manifest(folder), folder) == EXPECTED


def test_prompts_and_videos_files(folder: Path) -> None:
    (folder / "videos.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    assert pairs(read_manifest(folder), folder) == EXPECTED


def test_videos_with_captions_beside_them(folder: Path) -> None:
    for name, caption in EXPECTED:
        (folder / name).with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    assert sorted(pairs(read_manifest(folder), folder)) == sorted(EXPECTED)


def test_byte_order_mark_is_no_part_of_the_text(folder: Path) -> None:
    (folder / "list.csv").write_text("video,caption\na.mp4,hello\n", encoding="utf-8-sig")
    assert pairs(read_manifest(folder / "list.csv"), folder) == [("a.mp4", "hello")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_optional_columns(folder: Path, suffix: str) -> None:
    rows = [
        {"video": "a.mp4", "caption": "x", "start": 1.5, "end": 8, "weight": 0.5, "id": "first"},
        {"video": "a.mp4", "caption": "x", "start": 8, "end": 15.25},
        {"video": "c.webm", "caption": "y"},
    ]
    clips = read_manifest(write_rows(folder / f"list{suffix}", rows))
    seen = [(clip.id, clip.start, clip.end, clip.weight) for clip in clips]
    assert seen[0] == ("first", 1.5, 8.0, 0.5)
    assert seen[1][1:] == (8.0, 15.25, 1.0) and seen[2] == ("c.webm", 0.0, None, 1.0)
    assert len({clip.id for clip in clips}) == 3, "segments of one video get ids of their own"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_prior_clips_are_marked(folder: Path, suffix: str) -> None:
    rows = [{"video": "a.mp4", "caption": "x", "prior": value, "id": str(value)} for value in (True, False, "true", 0)]
    clips = read_manifest(write_rows(folder / f"list{suffix}", rows))
    assert [clip.prior for clip in clips] == [True, False, True, False]
    assert not read_manifest(write_rows(folder / f"plain{suffix}", [{"video": "a.mp4", "caption": "x"}]))[0].prior


def test_trigger_word_stands_before_every_caption(folder: Path) -> None:
    path = write_rows(folder / "list.jsonl", [{"video": "a.mp4", "caption": " a toy "}])
    assert read_manifest(path, id_token=" ZIBBER ")[0].caption == "ZIBBER a toy"
    assert read_manifest(path)[0].caption == "a toy"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"video": "a.mp4", "caption": ""}, ["a.mp4", "empty caption"]),
        ({"video": "a.mp4", "caption": "  \t"}, ["a.mp4", "empty caption"]),
        ({"video": "a.mp4", "caption": None}, ["a.mp4", "empty caption"]),
        ({"video": "", "caption": "x"}, ["video is ''"]),
        ({"video": 3, "caption": "x"}, ["video is 3"]),
        ({"video": "a.mp4", "caption": "x", "start": "soon"}, ["start='soon'", "number"]),
        ({"video": "a.mp4", "caption": "x", "start": -1}, ["start=-1", "seconds"]),
        ({"video": "a.mp4", "caption": "x", "start": 5, "end": 5}, ["start=5", "end=5"]),
        ({"video": "a.mp4", "caption": "x", "weight": -2}, ["weight=-2"]),
        ({"video": "a.mp4", "caption": "x", "prior": "maybe"}, ["prior='maybe'", "true or false"]),
        ({"video": "picture.JPG", "caption": "x"}, ["picture.JPG", "an image", "remove it"]),
        ({"video": "../outside.mp4", "caption": "x"}, ["../outside.mp4", "leads out", "data.allow_outside_root"]),
        ({"video": "link.mp4", "caption": "x"}, ["link.mp4", "leads out", "data.allow_outside_root"]),
        ({"video": "linked/outside.mp4", "caption": "x"}, ["linked/outside.mp4", "leads out"]),
        ({"video": "/etc/outside.mp4", "caption": "x"}, ["/etc/outside.mp4", "leads out"]),
    ],
)
def test_a_wrong_row_is_named(folder: Path, row: dict, expected: list[str]) -> None:
    (folder.parent / "outside.mp4").touch()
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    (folder / "linked").symlink_to(folder.parent)
    good = {"video": "c.webm", "caption": "fine"}
    path = write_rows(folder / "list.jsonl", [good, row])
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    assert all(part in str(caught.value) for part in ["list.jsonl:2", *expected]), str(caught.value)


def test_not_a_number_is_no_number(folder: Path) -> None:
    for key in ("start", "end", "weight"):
        for value in ("nan", "inf"):
            path = write_rows(folder / "list.csv", [{"video": "a.mp4", "caption": "x", key: value}])
            with pytest.raises(UserError, match=f"{key}='{value}'"):
                read_manifest(path)


def test_paths_that_lead_out_can_be_allowed(folder: Path) -> None:
    outside = folder.parent / "outside.mp4"
    outside.touch()
    (folder / "link.mp4").symlink_to(outside)
    names = ["../outside.mp4", "link.mp4", str(outside)]
    path = write_rows(folder / "list.jsonl", [{"video": name, "caption": "x"} for name in names])
    clips = read_manifest(path, allow_outside_root=True)
    assert [clip.video.resolve() for clip in clips] == [outside.resolve()] * 3


def test_dots_and_links_that_stay_inside_are_fine(folder: Path) -> None:
    (folder / "alias.mp4").symlink_to(folder / "a.mp4")
    rows = [{"video": name, "caption": "x"} for name in ("sub/../a.mp4", "alias.mp4")]
    assert len(read_manifest(write_rows(folder / "list.jsonl", rows))) == 2


def test_all_wrong_rows_come_in_one_report(folder: Path) -> None:
    rows = [{"video": "a.mp4", "caption": ""}, {"video": "c.webm", "caption": "x", "weight": -1}] * 15
    with pytest.raises(UserError) as caught:
        read_manifest(write_rows(folder / "list.jsonl", rows))
    text = str(caught.value)
    assert "30 wrong row(s)" in text and "list.jsonl:1:" in text and "list.jsonl:2:" in text and "and 10 more" in text


def test_duplicate_ids_are_named(folder: Path) -> None:
    rows = [{"video": "a.mp4", "caption": "x", "id": "one"}, {"video": "c.webm", "caption": "y", "id": "one"}]
    with pytest.raises(UserError, match=r"'one' stands twice \(a\.mp4 and c\.webm\)"):
        read_manifest(write_rows(folder / "list.jsonl", rows))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("columns, missing", [({"clip": "a", "caption": "b"}, "video"), ({"video": "a"}, "caption")])
def test_missing_columns_are_named(folder: Path, suffix: str, columns: dict, missing: str) -> None:
    path = write_rows(folder / f"list{suffix}", [columns])
    with pytest.raises(UserError, match=f"no '{missing}' column.*found {', '.join(columns)}"):
        read_manifest(path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("list.jsonl", b'{"video": "a.mp4"\n', ["list.jsonl:1", "not valid JSON"]),
        ("list.jsonl", b"[1, 2]\n", ["list.jsonl:1", "list"]),
        ("list.jsonl", b'{"video": "a.mp4", "caption": "caf\xe9"}\n', ["list.jsonl", "not UTF-8", "byte 34"]),
        ("list.csv", b"video,caption\na.mp4,one, two\n", ["list.csv:2", "more fields", "quotes"]),
        ("list.csv", b"video,caption\na.mp4\n", ["list.csv:2", "fewer fields"]),
        ("list.csv", b"video,caption\n", ["no clips"]),
        ("list.txt", b"a.mp4\n", ["list.txt", ".jsonl or a .csv"]),
    ],
)
def test_an_unreadable_table_is_named(folder: Path, name: str, content: bytes, expected: list[str]) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_manifest(folder / name)
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_missing_manifest_and_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.manifest=.*nowhere: no such file or folder"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips"):
        read_manifest(tmp_path / "empty")


def test_a_video_without_caption_file_is_named(folder: Path) -> None:
    (folder / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"no caption beside it; write (b|c)\.txt"):
        read_manifest(folder)


def test_a_caption_file_that_is_not_utf8_is_named(folder: Path) -> None:
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 \(byte 3\)"):
        read_manifest(folder)


def test_prompts_and_videos_of_different_length_are_named(folder: Path) -> None:
    (folder / "videos.txt").write_text("a.mp4\nc.webm\n")
    (folder / "prompts.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"1 lines, videos\.txt 2"):
        read_manifest(folder)


def test_an_empty_line_among_the_prompts_does_not_shift_the_others(folder: Path) -> None:
    (folder / "videos.txt").write_text("a.mp4\nc.webm\n")
    (folder / "prompts.txt").write_text("\ntwo\n")
    with pytest.raises(UserError, match=r"videos\.txt:1: a\.mp4: empty caption"):
        read_manifest(folder)


def make_clips(num: int) -> list[Clip]:
    return [Clip(f"clip {i}", Path(f"{i}.mp4"), "x") for i in range(num)]


def test_validation_split_does_not_depend_on_the_order() -> None:
    clips = make_clips(40)
    train, held = split_validation(clips, 6, seed=1)
    assert len(held) == 6 and len(train) == 34 and {*train, *held} == {*clips}
    train_back, held_back = split_validation(clips[::-1], 6, seed=1)
    assert {c.id for c in held_back} == {c.id for c in held}
    assert train_back == train[::-1], "the order of the manifest is kept"
    assert {c.id for c in split_validation(clips, 6, seed=2)[1]} != {c.id for c in held}


@pytest.mark.parametrize("num_clips, num_held", [(5, 0), (19, 0), (20, 1), (100, 5)])
def test_validation_split_by_default(num_clips: int, num_held: int) -> None:
    assert len(split_validation(make_clips(num_clips), None, seed=0)[1]) == num_held


def test_segments_of_one_video_stay_on_one_side() -> None:
    clips = [Clip(f"{v}@{s}", Path(f"{v}.mp4"), "x", start=s) for v in range(6) for s in range(4)]
    train, held = split_validation(clips, 5, seed=0)
    assert len(held) == 8, "whole videos, until at least the count is held out"
    assert not {c.video for c in train} & {c.video for c in held}


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="validation_clips=3"):
        split_validation(make_clips(3), 3, seed=0)
    one_video = [Clip(str(s), Path("a.mp4"), "x", start=s) for s in range(4)]
    with pytest.raises(UserError, match="one video"):
        split_validation(one_video, 2, seed=0)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_images_stand_in_a_column_of_their_own(folder: Path, suffix: str) -> None:
    rows = [{"video": name, "caption": text, "image": ""} for name, text in EXPECTED]
    rows[1]["image"] = "sub/start.PNG"
    clips = read_manifest(write_rows(folder / f"list{suffix}", rows))
    assert [clip.image for clip in clips] == [None, folder / "sub/start.PNG", None]


@pytest.mark.parametrize(
    ("image", "expected"),
    [("../x.png", "leads out of"), ("a.mp4", "expected one of .bmp"), (3, "expected a path relative to")],
)
def test_a_wrong_image_is_named(folder: Path, image: object, expected: str) -> None:
    path = write_rows(folder / "list.jsonl", [{"video": "a.mp4", "caption": "x", "image": image}])
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    assert "list.jsonl:1" in str(caught.value) and expected in str(caught.value)
