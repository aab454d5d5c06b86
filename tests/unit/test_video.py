"""Videos: which frames a clip takes, against ffmpeg; that pixels are right; resizing; what is refused."""

import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import decord
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from cogtune.video import (
    TIME_TOLERANCE_SECONDS,
    ClipError,
    Timeline,
    choose_frames,
    decode_frames,
    describe_fit,
    load_clip,
    load_image,
    read_image_size,
    read_timeline,
    read_video,
    resize_and_crop,
    write_video,
)

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
NUM_BITS, STRIPE = 12, 8
DECODERS = ["decord", "pyav"]


def run_ffmpeg(*arguments: str | Path, stdin: bytes | None = None) -> bytes:
    command = [FFMPEG, "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    if stdin is not None:
        command.remove("-nostdin")
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


def draw_numbers(numbers: range) -> np.ndarray:
    """Frames that show their own number as binary stripes, uint8 [F, 32, 96, 3]."""
    bits = (np.array(numbers)[:, None] >> np.arange(NUM_BITS)) & 1
    row = np.repeat(bits, STRIPE, axis=1).astype(np.uint8) * 255
    return np.ascontiguousarray(np.broadcast_to(row[:, None, :, None], (len(numbers), 32, NUM_BITS * STRIPE, 3)))


def read_numbers(frames: np.ndarray) -> list[int]:
    stripes = frames.reshape(len(frames), 32, NUM_BITS, STRIPE, 3).mean(axis=(1, 3, 4))
    assert np.all((stripes < 60) | (stripes > 195)), "every stripe is clearly black or white"
    return ((stripes > 128) << np.arange(NUM_BITS)).sum(axis=1).tolist()


def write_numbers(path: Path, num_frames: int, rate: str, *options: str) -> Path:
    raw = draw_numbers(range(num_frames)).tobytes()
    size = f"{NUM_BITS * STRIPE}x32"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", rate, "-i", "-"]
    run_ffmpeg(*source, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "10", *options, path, stdin=raw)
    return path


def sample_with_ffmpeg(path: Path, fps: float = 8) -> list[int]:
    raw = run_ffmpeg("-i", path, "-vf", f"fps={fps}:round=up", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return read_numbers(np.frombuffer(raw, np.uint8).reshape(-1, 32, NUM_BITS * STRIPE, 3))


def assert_shown(chosen: list[int], expected: list[int], times: np.ndarray, fps: float = 8) -> None:
    """Equal, but for frames that come up to the tolerance late: of those either is right."""
    assert len(chosen) == len(expected)
    for k, (ours, theirs) in enumerate(zip(chosen, expected, strict=True)):
        late = times[ours] - k / fps
        assert ours == theirs or (ours == theirs + 1 and 0 < late <= TIME_TOLERANCE_SECONDS), (k, ours, theirs)


RATES = {"24": 24, "25": 25, "30000/1001": 29.97, "30": 30, "60": 60}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("rate", RATES)
def test_frames_at_constant_rates_are_those_that_ffmpeg_shows(tmp_path: Path, rate: str, decoder: str) -> None:
    num_frames = round(RATES[rate] * 6.2)
    path = write_numbers(tmp_path / "clip.mp4", num_frames, rate)
    frames = load_clip(path, num_frames=49, height=32, width=96, fps=8, decoders=[decoder])
    chosen = read_numbers(frames)
    times = np.array([float(k / Fraction(rate)) for k in range(num_frames)])
    assert_shown(chosen, sample_with_ffmpeg(path)[:49], times)
    brute_force = [max(i for i in range(num_frames) if times[i] <= k / 8 + 1e-9) for k in range(49)]
    assert_shown(chosen, brute_force, times)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_at_a_variable_rate_are_those_that_ffmpeg_shows(tmp_path: Path, suffix: str, decoder: str) -> None:
    generator = np.random.default_rng(5)
    gaps = generator.choice([8, 17, 33, 34, 40, 50, 125, 250, 400], size=120)
    ticks = np.concatenate([[0], np.cumsum(gaps)])  # milliseconds
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "10", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = NUM_BITS * STRIPE, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, tick in zip(draw_numbers(range(len(ticks))), ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = int(tick), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    times = ticks / 1000
    np.testing.assert_allclose(read_timeline(path).times, times, atol=1e-3)

    num_frames = int(times[-1] * 8) + 1
    chosen = read_numbers(load_clip(path, num_frames=num_frames, height=32, width=96, fps=8, decoders=[decoder]))
    assert_shown(chosen, sample_with_ffmpeg(path)[:num_frames], times)
    assert_shown(
        chosen, [int(np.searchsorted(times, k / 8 + 1e-9, side="right")) - 1 for k in range(num_frames)], times
    )
    assert len(set(chosen)) < num_frames, "long gaps repeat a frame"


def test_a_first_frame_later_than_zero_is_time_zero(tmp_path: Path) -> None:
    plain = write_numbers(tmp_path / "plain.mp4", 60, "30")
    late = tmp_path / "late.mkv"
    run_ffmpeg("-itsoffset", "2.5", "-i", plain, "-c", "copy", late)
    assert read_timeline(late).times[0] == 0.0
    clips = [read_numbers(load_clip(path, num_frames=9, height=32, width=96, fps=8)) for path in (plain, late)]
    assert clips[0] == clips[1]


@pytest.mark.parametrize("rate, num_frames", [("24", 144), ("25", 150), ("30", 180), ("60", 360), ("8", 49)])
def test_a_clip_of_six_seconds_is_long_enough(tmp_path: Path, rate: str, num_frames: int) -> None:
    path = write_numbers(tmp_path / "clip.mp4", num_frames, rate)
    frames = load_clip(path, num_frames=49, height=32, width=96, fps=8)
    assert read_numbers(frames)[-1] == num_frames - 1, "the last sample shows the last frame"


@pytest.mark.parametrize("rate, num_frames, have", [("8", 48, 48), ("24", 140, 47), ("30", 90, 25), ("25", 1, 1)])
def test_a_shorter_clip_is_refused(tmp_path: Path, rate: str, num_frames: int, have: int) -> None:
    path = write_numbers(tmp_path / "clip.mp4", num_frames, rate)
    with pytest.raises(ClipError) as caught:
        load_clip(path, num_frames=49, height=32, width=96, fps=8)
    assert caught.value.kind == "too short"
    for part in ("clip.mp4", f"{have} frames at 8 fps", "49 are needed", "6 s"):
        assert part in str(caught.value)


def make_timeline(times: np.ndarray, end: float) -> Timeline:
    return Timeline(times, end, 96, 32, 0, True)


@pytest.mark.parametrize("decoder", DECODERS)
def test_segments_begin_at_their_start(tmp_path: Path, decoder: str) -> None:
    path = write_numbers(tmp_path / "clip.mp4", 300, "30")
    options = {"num_frames": 17, "height": 32, "width": 96, "fps": 8, "decoders": [decoder]}
    chosen = read_numbers(load_clip(path, start=2.0, end=4.0, **options))
    assert chosen == [60 + int(k * 30 / 8) for k in range(17)]
    whole = read_numbers(load_clip(path, start=2.0, **options))
    assert whole == chosen
    with pytest.raises(ClipError, match=r"between 2 s and 3\.5 s"):
        load_clip(path, start=2.0, end=3.5, **options)
    with pytest.raises(ClipError, match="frames at 8 fps between 9 s and 10 s"):
        load_clip(path, start=9.0, **options)
    with pytest.raises(ClipError, match="0 frames at 8 fps"):
        load_clip(path, start=20.0, **options)


def test_the_last_sample_may_lie_half_a_period_past_the_end() -> None:
    times = np.arange(600) / 30
    timeline = make_timeline(times, 20.0)
    for end, fits in [(3.0, True), (2.94, True), (2.93, False)]:
        if fits:
            indices = choose_frames(timeline, 17, 8, 1.0, end)
            assert times[indices[-1]] <= end + 0.5 / 8
        else:
            with pytest.raises(ClipError, match="16 frames"):
                choose_frames(timeline, 17, 8, 1.0, end)


def test_no_frame_is_taken_before_its_time() -> None:
    """Random timelines against the definition: the last frame whose time is not later than the sample's."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        times = np.concatenate([[0.0], np.cumsum(generator.uniform(0.005, 0.2, 200))])
        fps, start = generator.uniform(4, 30), generator.uniform(0, 2)
        indices = choose_frames(make_timeline(times, times[-1] + 0.04), 25, fps, start)
        for k, index in enumerate(indices):
            wanted = start + k / fps + TIME_TOLERANCE_SECONDS
            assert times[index] <= wanted and (index == 200 or times[index + 1] > wanted)


def smooth_frames(num_frames: int, height: int, width: int, seed: int = 0, speed: float = 0.2) -> np.ndarray:
    """Coloured waves over the whole range, uint8 [F, H, W, 3]."""
    generator = np.random.default_rng(seed)
    frame, row, column, channel = np.ogrid[:num_frames, :height, :width, :3]
    wave = np.zeros((num_frames, height, width, 3))
    for _ in range(4):
        a, b, c = generator.uniform(-speed, speed, 3)
        wave = wave + np.sin(a * frame + b * row + c * column + 2 * channel + generator.uniform(0, 6))
    return np.clip(127.5 + 45 * wave, 0, 255).astype(np.uint8)


def encode(path: Path, frames: np.ndarray, *options: str) -> Path:
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", "8", "-i", "-"]
    run_ffmpeg(*source, *options, path, stdin=frames.tobytes())
    return path


def decode_with_ffmpeg(path: Path, height: int, width: int) -> np.ndarray:
    """Upright, as ffmpeg shows it."""
    raw = run_ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-sws_flags", "bicubic", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def differences(one: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    gap = np.abs(one.astype(int) - other.astype(int))
    return float(gap.mean()), int(gap.max())


@pytest.mark.parametrize(
    "options",
    [
        ("-pix_fmt", "yuv420p", "-crf", "18"),
        ("-pix_fmt", "yuv420p", "-crf", "18", "-bf", "3", "-g", "5"),
        (
            "-pix_fmt",
            "yuv420p",
            "-crf",
            "30",
            "-colorspace",
            "bt709",
            "-color_primaries",
            "bt709",
            "-color_trc",
            "bt709",
        ),
    ],
    ids=["plain", "b-frames", "bt709"],
)
@pytest.mark.parametrize("size", [(64, 96), (480, 720)])
def test_both_decoders_give_identical_pixels(tmp_path: Path, options: tuple[str, ...], size: tuple[int, int]) -> None:
    frames = smooth_frames(9, *size)
    path = encode(tmp_path / "clip.mp4", frames, "-c:v", "libx264", *options)
    timeline = read_timeline(path)
    assert timeline.exact_in_decord and (timeline.height, timeline.width) == size
    indices = np.array([0, 3, 3, 5, 8])
    one, other = (decode_frames(path, timeline, indices, decoder) for decoder in DECODERS)
    assert np.array_equal(one, other)
    assert differences(one, decode_with_ffmpeg(path, *size)[indices])[0] < 1.0


SOURCES = {
    "grey": ("clip.mp4", (64, 96), ["-c:v", "libx264", "-crf", "4", "-pix_fmt", "gray"]),
    "10-bit": ("clip.mp4", (64, 96), ["-c:v", "libx264", "-crf", "4", "-pix_fmt", "yuv420p10le"]),
    "10-bit grey": ("clip.mkv", (64, 96), ["-c:v", "ffv1", "-pix_fmt", "gray10le"]),
    "odd": ("clip.mp4", (63, 95), ["-c:v", "libx264", "-crf", "4", "-pix_fmt", "yuv444p"]),
    "odd subsampled": ("clip.mkv", (63, 95), ["-c:v", "ffv1", "-pix_fmt", "yuv420p"]),
    "full range": ("clip.mp4", (64, 96), ["-c:v", "libx264", "-crf", "4", "-pix_fmt", "yuvj420p"]),
    "rgb": ("clip.mkv", (64, 96), ["-c:v", "ffv1", "-pix_fmt", "bgr0"]),
    "transparent": ("clip.mov", (64, 96), ["-c:v", "qtrle", "-pix_fmt", "argb"]),
    "vp9": ("clip.webm", (64, 96), ["-c:v", "libvpx-vp9", "-crf", "4", "-b:v", "0", "-pix_fmt", "yuv420p"]),
    "motion jpeg": ("clip.avi", (64, 96), ["-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p"]),
    "mpeg-4": ("clip.avi", (64, 96), ["-c:v", "mpeg4", "-q:v", "2", "-pix_fmt", "yuv420p"]),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("decoders", [("decord", "pyav"), ("pyav",)], ids=["default", "pyav"])
def test_unusual_sources_look_as_in_ffmpeg(tmp_path: Path, name: str, decoders: tuple[str, ...]) -> None:
    file_name, (height, width), options = SOURCES[name]
    frames = smooth_frames(9, height, width, seed=3)
    path = encode(tmp_path / file_name, frames, *options)
    clip = load_clip(path, num_frames=9, height=height, width=width, fps=8, decoders=decoders)
    mean, worst = differences(clip, decode_with_ffmpeg(path, height, width))
    # swscale takes another way for 10 bits, depending on who calls it; neither is nearer to the original
    assert mean < (2.5 if name == "10-bit" else 1.0) and worst <= 12, (mean, worst)
    expected = frames if "grey" not in name else np.repeat(np.dot(frames, [0.299, 0.587, 0.114])[..., None], 3, axis=3)
    assert differences(clip, expected)[0] < 5, "and nearly as before encoding"


def rotate_in_header(path: Path, degrees: int) -> None:
    """Writes a rotation, clockwise on showing, into the track header of an mp4."""
    matrices = {
        90: [(0, 1), (-1, 0)],
        180: [(-1, 0), (0, -1)],
        270: [(0, -1), (1, 0)],
    }
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # version 0: the matrix follows ten fields
    assert content[at : at + 4] == (1 << 16).to_bytes(4, "big")
    (a, b), (c, d) = matrices[degrees]
    for offset, value in ((0, a), (4, b), (12, c), (16, d)):
        content[at + offset : at + offset + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(content)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("decoder", DECODERS)
def test_rotation_is_applied_as_in_ffmpeg(tmp_path: Path, degrees: int, decoder: str) -> None:
    frames = smooth_frames(9, 64, 96, seed=2)
    path = encode(tmp_path / "clip.mp4", frames, "-c:v", "libx264", "-crf", "4", "-pix_fmt", "yuv420p")
    rotate_in_header(path, degrees)
    height, width = (96, 64) if degrees != 180 else (64, 96)
    timeline = read_timeline(path)
    assert (timeline.height, timeline.width) == (height, width)
    shown = decode_frames(path, timeline, np.arange(9), decoder)
    assert differences(shown, decode_with_ffmpeg(path, height, width))[0] < 1.0
    assert differences(shown, np.rot90(frames, -degrees // 90, axes=(1, 2)))[0] < 4, "clockwise, by its own definition"
    clip = load_clip(path, num_frames=9, height=height, width=width, fps=8, decoders=[decoder])
    assert np.array_equal(clip, shown)


@pytest.mark.parametrize(
    "source, target",
    [
        ((100, 150), (64, 96)),
        ((100, 300), (64, 96)),
        ((300, 100), (64, 96)),
        ((30, 50), (64, 96)),
        ((65, 97), (64, 96)),
    ],
)
def test_resize_and_crop_is_pillows(source: tuple[int, int], target: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    # From the middle of the range: where noise is cut at 0 or 255 between the two passes, their order shows.
    frames = generator.integers(64, 192, (2, *source, 3), dtype=np.uint8)
    ours = resize_and_crop(torch.from_numpy(frames), *target).numpy()
    scale = max(target[0] / source[0], target[1] / source[1])
    rows, columns = (max(target[i], round(source[i] * scale)) for i in (0, 1))
    top, left = (rows - target[0]) // 2, (columns - target[1]) // 2
    assert ours.shape == (2, *target, 3) and ours.dtype == np.uint8
    assert rows == target[0] or columns == target[1], "the least size that covers"
    for frame, result in zip(frames, ours, strict=True):
        image = Image.fromarray(frame).resize((columns, rows), Image.Resampling.BICUBIC)
        expected = np.asarray(image)[top : top + target[0], left : left + target[1]]
        assert differences(result, expected)[1] <= 2


def test_shrinking_averages_instead_of_skipping() -> None:
    """A fine checkerboard turns grey; without antialiasing it would stay black and white."""
    board = (np.indices((256, 384)).sum(0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(board[None, :, :, None], 3, axis=3)
    small = resize_and_crop(torch.from_numpy(frames), 64, 96).numpy().astype(int)
    assert np.abs(small - 127.5).max() < 8


def test_frames_of_the_right_size_are_untouched() -> None:
    frames = torch.from_numpy(smooth_frames(2, 64, 96))
    assert torch.equal(resize_and_crop(frames, 64, 96), frames)


@pytest.mark.parametrize("size", [(64, 96), (62, 94)])
def test_written_videos_read_back(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = smooth_frames(12, *size, seed=7, speed=0.05)
    path = tmp_path / "new" / "out.mp4"
    write_video(path, frames, 8, crf=0)
    back = read_video(path)
    assert back.shape == frames.shape
    # lossless, but for the rounding to 8-bit YUV and the halved colour resolution
    assert differences(back, frames)[0] < 2.5
    timeline = read_timeline(path)
    np.testing.assert_allclose(timeline.times, np.arange(12) / 8, atol=1e-4)
    assert timeline.end == pytest.approx(1.5, abs=1e-3)
    assert [item.name for item in path.parent.iterdir()] == ["out.mp4"]
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


@pytest.mark.parametrize("shape", [(0, 64, 96, 3), (4, 63, 96, 3), (4, 64, 96), (4, 64, 96, 4)])
def test_what_h264_cannot_hold_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"uint8|even size"):
        write_video(tmp_path / "out.mp4", np.zeros(shape, np.uint8), 8)
    assert not list(tmp_path.iterdir())


def write_audio(path: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=1", path)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "empty (0 bytes)"),
        (lambda path: path.write_bytes(b"this is no video" * 50), "not a readable video"),
        (lambda path: path.mkdir(), "no such file"),
    ],
    ids=["missing", "empty", "text", "folder"],
)
def test_what_is_no_video_is_refused(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(ClipError) as caught:
        load_clip(path, num_frames=9, height=64, width=96, fps=8)
    assert caught.value.kind == "unreadable" and expected in str(caught.value) and "clip.mp4" in str(caught.value)


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    write_audio(tmp_path / "sound.m4a")
    with pytest.raises(ClipError, match="no video stream"):
        read_timeline(tmp_path / "sound.m4a")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth_frames(49, 64, 96), 8)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ClipError) as caught:
        load_clip(path, num_frames=49, height=64, width=96, fps=8)
    assert "clip.mp4" in str(caught.value)


def test_decord_is_passed_over_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbers(tmp_path / "clip.mp4", 60, "30")

    def fail(*_: object, **__: object) -> None:
        raise decord.DECORDError("no luck")

    monkeypatch.setattr(decord, "VideoReader", fail)
    with pytest.raises(ClipError, match="decord fails"):
        load_clip(path, num_frames=9, height=32, width=96, fps=8, decoders=["decord"])
    frames = load_clip(path, num_frames=9, height=32, width=96, fps=8)
    assert read_numbers(frames) == [int(k * 30 / 8) for k in range(9)]


def test_an_image_is_upright_covered_and_cut_like_a_frame(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image_size(tmp_path / "a.png") == (100, 40)
    expected = resize_and_crop(torch.from_numpy(pixels)[None], 32, 48)[0].numpy()
    assert np.array_equal(load_image(tmp_path / "a.png", 32, 48), expected)
    assert np.array_equal(load_image(tmp_path / "a.png", 40, 100), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert read_image_size(tmp_path / "turned.png") == (40, 100)
    assert np.array_equal(load_image(tmp_path / "turned.png", 100, 40), np.rot90(pixels, -1))
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png", 40, 100).shape == (40, 100, 3)


def test_what_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    for name, words in (("text.png", "not a readable image"), ("gone.png", "no such file")):
        with pytest.raises(ClipError, match=words):
            load_image(tmp_path / name, 8, 8)


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ((96, 64), (64, 96), None),
        ((192, 128), (64, 96), None),
        ((48, 32), (64, 96), "48x32 is enlarged 2.00 times to cover 96x64"),
        ((192, 64), (64, 96), "192x64: 50 % of the picture is cut off for 96x64"),
        ((100, 64), (64, 96), None),  # 4 %: only where it is asked for
    ],
)
def test_fits_are_described(source: tuple[int, int], size: tuple[int, int], expected: str | None) -> None:
    assert describe_fit(source, *size) == expected
    assert (describe_fit(source, *size, most_cut=0.01) is None) == (source in [(96, 64), (192, 128)])
