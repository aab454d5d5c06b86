"""Encoding into the cache: what a key depends on, the right numbers in the entries, and only missing work is done."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from cogtune import encoding
from cogtune.cache import Cache
from cogtune.encoding import (
    CacheKeys,
    Share,
    encode_captions,
    encode_clips,
    encode_frames,
    find_cut_captions,
)
from cogtune.manifest import Clip, ClipFormat, read_manifest
from cogtune.models import ModelFacts, read_facts
from cogtune.video import ClipError, load_clip, write_video

FORM = ClipFormat(9, 64, 96, 8.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def facts(tiny_folder: Path) -> ModelFacts:
    return read_facts(tiny_folder)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def make_keys(cache: Cache, facts: ModelFacts) -> Callable[..., CacheKeys]:
    def make(form: ClipFormat = FORM, dtype: torch.dtype = torch.float32, **changes: object) -> CacheKeys:
        return CacheKeys(cache, replace(facts, **changes), form, dtype)

    return make


def test_a_caption_edit_keeps_the_latents_entry(make_keys, clips_folder: Path) -> None:
    keys, clip = make_keys(), read_manifest(clips_folder)[0]
    edited = replace(clip, caption="another caption", id="another id", weight=3.0)
    assert keys.latents(edited) == keys.latents(clip)
    assert keys.text(edited.caption) != keys.text(clip.caption)


def test_changed_video_bytes_make_a_new_entry(make_keys, tmp_path: Path) -> None:
    path, keys = tmp_path / "a.mp4", make_keys()
    clip = Clip("a", path, "x")
    path.write_bytes(b"one version")
    first = keys.latents(clip)
    path.write_bytes(b"two version")
    assert keys.latents(clip) != first
    path.write_bytes(b"one version")
    assert keys.latents(clip) == first


def test_files_of_one_name_do_not_collide_and_copies_share(make_keys, tmp_path: Path) -> None:
    for folder, content in (("x", b"1"), ("y", b"2"), ("z", b"1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").write_bytes(content)
    x, y, z = (make_keys().latents(Clip("a", tmp_path / folder / "a.mp4", "c")) for folder in "xyz")
    assert x != y and x == z


def test_latents_depend_on_segment_format_precision_and_vae(make_keys, clips_folder: Path) -> None:
    clip = Clip("a", clips_folder / "clip0.mp4", "x")
    keys = {
        make_keys().latents(clip),
        make_keys().latents(replace(clip, start=0.5)),
        make_keys().latents(replace(clip, end=2.0)),
        make_keys(dtype=torch.bfloat16).latents(clip),
        *(
            make_keys(replace(FORM, **change)).latents(clip)
            for change in ({"fps": 16.0}, {"width": 80}, {"num_frames": 5})
        ),
    }
    assert len(keys) == 7


def test_other_weights_make_other_keys(make_keys, clips_folder: Path, tiny_2b_folder: Path, cache: Cache) -> None:
    clip = Clip("a", clips_folder / "clip0.mp4", "x")
    other = CacheKeys(cache, read_facts(tiny_2b_folder), FORM, torch.float32)
    # the tiny pipelines draw their autoencoders from different random states, their text encoders too
    assert other.latents(clip) != make_keys().latents(clip)
    assert other.text("x") != make_keys().text("x")


def test_text_depends_on_length_and_precision(make_keys) -> None:
    keys = {make_keys().text("x"), make_keys(max_text_length=16).text("x"), make_keys(dtype=torch.float16).text("x")}
    assert len(keys) == 3


def run_captions(captions: list[str], keys: CacheKeys, cache: Cache, facts: ModelFacts, share: Share = Share()) -> None:  # noqa: B008
    encode_captions(captions, keys, cache, facts, device=CPU, dtype=torch.float32, share=share, quiet=True)


def test_captions_are_embedded_at_all_positions_without_a_mask(make_keys, cache: Cache, facts: ModelFacts) -> None:
    captions = ["a red ball", "", "a very long caption " * 40, *(f"number {i}" for i in range(9))]
    keys = make_keys()
    run_captions(captions, keys, cache, facts)
    tokenizer = AutoTokenizer.from_pretrained(facts.folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(facts.folder / "text_encoder")
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        ids = [*ids[: facts.max_text_length - 1], tokenizer.eos_token_id] if len(ids) > facts.max_text_length else ids
        ids += [tokenizer.pad_token_id] * (facts.max_text_length - len(ids))
        with torch.inference_mode():
            expected = encoder(torch.tensor([ids]))[0][0]
        entry = cache.read("text", keys.text(caption))
        assert entry is not None and entry["embeddings"].shape == (facts.max_text_length, facts.text_dim)
        torch.testing.assert_close(entry["embeddings"], expected, rtol=1e-4, atol=1e-5)


def test_a_damaged_caption_entry_is_made_again(make_keys, cache: Cache, facts: ModelFacts) -> None:
    keys, captions = make_keys(), ["one", "two"]
    run_captions(captions, keys, cache, facts)
    path = cache.path("text", keys.text("two"))
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    run_captions(captions, keys, cache, facts)
    assert path.read_bytes() == sound


def test_nothing_is_loaded_where_nothing_is_missing(
    make_keys, cache: Cache, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = make_keys()
    run_captions(["one"], keys, cache, facts)
    monkeypatch.setattr(encoding.models, "load_text_encoder", lambda *_: pytest.fail("loaded in vain"))
    run_captions(["one", "one"], keys, cache, facts)


def test_shares_cover_the_work_once() -> None:
    keys = {f"key {i}" for i in range(11)}
    parts = [Share(rank, 3).of(keys) for rank in range(3)]
    assert sorted(key for part in parts for key in part) == sorted(keys)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_cut_captions_are_counted_in_tokens(facts: ModelFacts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(facts.folder / "tokenizer")
    captions = [" ".join(["ball"] * n + ["a"] * m) for n in range(1, 12) for m in range(4)]
    lengths = [len(tokenizer(caption).input_ids) for caption in captions]
    assert {facts.max_text_length, facts.max_text_length + 1} <= set(lengths)
    expected = [(i, length) for i, length in enumerate(lengths) if length > facts.max_text_length]
    assert find_cut_captions(captions, facts) == expected and expected
    assert find_cut_captions([], facts) == []


def test_frames_are_encoded_as_the_vae_does(facts: ModelFacts) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(facts.folder / "vae").eval()
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    mean, logvar = (moments[0] for moments in encode_frames(vae, torch.from_numpy(frames)[None]))
    pixels = torch.from_numpy(frames.astype(np.float64) * 2 / 255 - 1).float().permute(3, 0, 1, 2)
    with torch.inference_mode():
        moments = vae.encode(pixels[None], return_dict=False)[0].parameters[0]
    assert mean.shape == (16, 3, 4, 6)
    torch.testing.assert_close(mean, moments[:16], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logvar, moments[16:].clamp(-30, 20), rtol=1e-4, atol=1e-5)


def test_clips_are_encoded_once_and_bad_ones_reported(
    make_keys, cache: Cache, facts: ModelFacts, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "short.mp4"
    write_video(bad, np.zeros((4, 64, 96, 3), np.uint8), 8)
    clips = [*read_manifest(clips_folder)[:2], Clip("short", bad, "x")]
    keys, problems = make_keys(), []

    def run() -> None:
        encode_clips(
            clips,
            keys,
            cache,
            facts,
            FORM,
            device=CPU,
            dtype=torch.float32,
            share=Share(),
            num_workers=1,
            timeout_seconds=60,
            on_problem=lambda clip, problem: problems.append((clip.id, problem)),
            quiet=True,
        )

    run()
    assert [clip_id for clip_id, _ in problems] == ["short"]
    assert isinstance(problems[0][1], ClipError) and problems[0][1].kind == "too short"
    assert [cache.has("latents", keys.latents(clip)) for clip in clips] == [True, True, False]
    entry = cache.read("latents", keys.latents(clips[0]))
    assert entry is not None and entry["mean"].shape == entry["logvar"].shape == (16, 3, 8, 12)

    clips.pop()
    monkeypatch.setattr(encoding.models, "load_vae", lambda *_: pytest.fail("loaded in vain"))
    run()


def test_images_have_keys_of_their_own_content(make_keys, clips_folder: Path, tmp_path: Path) -> None:
    clip = Clip("a", clips_folder / "clip0.mp4", "x")
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"one")
    keys = make_keys(takes_image=True)
    assert make_keys().image(clip) is None, "text-to-video keeps none"
    assert keys.image(replace(clip, end=1.0, caption="y")) == keys.image(clip)
    given = replace(clip, image=tmp_path / "a.png")
    assert keys.image(given) == keys.image(replace(given, image=tmp_path / "b.png", start=0.5))
    assert len({keys.image(clip), keys.image(replace(clip, start=0.5)), keys.image(given)}) == 3
    assert make_keys(replace(FORM, width=80), takes_image=True).image(clip) != keys.image(clip)
    assert keys.latents(given) == keys.latents(clip) == make_keys().latents(clip)


def test_a_clips_own_format_decides_its_key(make_keys, clips_folder: Path) -> None:
    clip = Clip("a", clips_folder / "clip0.mp4", "x")
    other = ClipFormat(9, 64, 64, 8.0)
    assert make_keys().latents(replace(clip, form=FORM)) == make_keys().latents(clip)
    assert make_keys().latents(replace(clip, form=other)) == make_keys(other).latents(clip) != make_keys().latents(clip)


@pytest.mark.parametrize("lost", ["latents", "images"])
def test_clips_of_two_shapes_are_encoded_with_their_first_frames(
    lost: str, make_keys, cache: Cache, facts: ModelFacts, clips_folder: Path
) -> None:
    """Also where one of the two entries is gone."""
    forms = [FORM, ClipFormat(5, 64, 64, 8.0)]
    clips = [replace(clip, form=forms[n % 2]) for n, clip in enumerate(read_manifest(clips_folder)[:4])]
    keys, image_facts = make_keys(takes_image=True), replace(facts, takes_image=True)

    def run() -> None:
        encode_clips(
            clips, keys, cache, image_facts, FORM, device=CPU, dtype=torch.float32, share=Share(), num_workers=1,
            timeout_seconds=60, on_problem=lambda clip, problem: pytest.fail(f"{clip.id}: {problem}"), quiet=True,
        )  # fmt: skip

    run()
    gone = {"latents": keys.latents(clips[0]), "images": keys.image(clips[0])}[lost]
    cache.path(lost, gone).unlink()
    run()
    for clip in clips:
        moments, image = cache.read("latents", keys.latents(clip)), cache.read("images", keys.image(clip))
        assert moments is not None and image is not None and clip.form is not None
        assert moments["mean"].shape[1:] == ((clip.form.num_frames - 1) // 4 + 1, 8, clip.form.width // 8)
        frames = load_clip(clip.video, **vars(clip.form))
        assert np.array_equal(image["image"].numpy(), frames[0])


def test_clips_of_one_video_keep_images_of_their_own(
    make_keys, cache: Cache, facts: ModelFacts, clips_folder: Path, tmp_path: Path
) -> None:
    """One video, two images and its own first frame: one latents entry, three images. A bad one fails all its clips."""
    for number in range(2):
        Image.fromarray(np.full((64, 96, 3), 100 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_text("no image")
    plain = Clip("plain", clips_folder / "clip0.mp4", "x")
    given = [replace(plain, id=f"given {n}", image=tmp_path / f"{n}.png") for n in range(2)]
    bad = [replace(plain, id=f"bad {n}", image=tmp_path / "bad.png") for n in range(2)]
    keys, problems = make_keys(takes_image=True), []
    encode_clips(
        [given[0], plain, given[1], *bad], keys, cache, replace(facts, takes_image=True), FORM, device=CPU,
        dtype=torch.float32, share=Share(), num_workers=1, timeout_seconds=60, quiet=True,
        on_problem=lambda clip, problem: problems.append((clip.id, problem.kind)),
    )  # fmt: skip
    assert cache.has("latents", keys.latents(plain))
    for number, clip in enumerate(given):
        entry = cache.read("images", keys.image(clip))
        assert entry is not None and (entry["image"] == 100 * number).all()
    entry = cache.read("images", keys.image(plain))
    assert entry is not None and np.array_equal(entry["image"].numpy(), load_clip(plain.video, **vars(FORM))[0])
    assert problems == [("bad 0", "unreadable"), ("bad 1", "unreadable")]
