"""Wrong input: exit code 2, one clear message with the value and the remedy, nothing lost, nothing half-written."""

import json
import math
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cogtune.cache import Cache
from cogtune.video import write_video

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
TRAIN, CHECK, PREPARE, GENERATE = "train/lora.py", "data/check.py", "data/prepare.py", "scripts/generate.py"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded once for the whole file."""
    return tmp_path_factory.mktemp("cache")


def settings(model: Path, manifest: Path, cache: Path, output: str | Path = "run", **changes: object) -> list[str]:
    values = {
        "model.path": model,
        "data.manifest": manifest,
        "data.cache_dir": cache,
        "data.num_workers": 0,
        "output_dir": output,
        "adapter.rank": 2,
        "train.max_steps": 4,
        "checkpoint.every_steps": 2,
        "validation.enabled": "false",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture
def arguments(tiny_folder: Path, clips_folder: Path, shared_cache: Path) -> Callable[..., list[str]]:
    """The options of a good run on the tiny pipeline, with changes: `arguments(adapter__rank=4)`."""

    def make(**changes: object) -> list[str]:
        return settings(tiny_folder, clips_folder, shared_cache, **changes)

    return make


@pytest.fixture(scope="module")
def finished(execute, tiny_folder: Path, clips_folder: Path, shared_cache: Path, tmp_path_factory) -> Path:
    """A finished run with checkpoints at steps 2 and 4. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert execute(TRAIN, *settings(tiny_folder, clips_folder, shared_cache, folder)) == 0
    return folder


@pytest.fixture
def used(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome.err
    starts = [match.start() for match in re.finditer("^error: ", outcome.err, re.MULTILINE)]
    assert len(starts) == 1, outcome.err
    message = outcome.err[starts[0] :]
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"
    assert "Traceback" not in outcome.err


def make_pipeline(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


SETTINGS = {
    "unknown key": ({"train__max_stepps": 3}, ["--train.max_stepps", "did you mean --train.max_steps?"]),
    "wrong type": ({"train__max_steps": "many"}, ["train.max_steps", "many", "integer"]),
    "missing manifest": ({"data__manifest": "nowhere"}, ["data.manifest=nowhere", "no such file or folder"]),
    "frames": ({"data__num_frames": 16}, ["num_frames=16", "4k + 1", "13 or 17"]),
    "height": ({"data__height": 60}, ["height=60", "multiple of 16"]),
    "float8 on a CPU": (
        {"train__float8_base": "true", "model__device": "cpu"},
        ["train.float8_base=true on a CPU", "8.9", "=false"],
    ),
    "kernel for GPUs": (
        {"train__attention": "flash", "model__device": "cpu"},
        ["train.attention=flash", "on a CPU", "auto or default"],
    ),
    "targets": (
        {"adapter__target_modules": "to_queue"},
        ["adapter.target_modules", "'to_queue' matches no linear layer", "did you mean to_q?"],
    ),
    "model": ({"model__path": "cogvideox-7b"}, ["model.path=cogvideox-7b", "no such folder", "cogvideox-5b"]),
    "half on the CPU": ({"model__dtype": "float16", "model__device": "cpu"}, ["float16 needs a GPU"]),
    "all held out": ({"data__validation_clips": 6}, ["data.validation_clips=6", "none of 6 clips"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings(run_command, arguments, tmp_path: Path, name: str) -> None:
    changes, parts = SETTINGS[name]
    assert_refused(run_command(TRAIN, *arguments(**changes)), *parts)
    assert not list(tmp_path.iterdir())


def test_cuda_asked_for_and_absent(run_command, arguments, tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(run_command(TRAIN, *arguments(model__device="cuda")), "cuda is asked for", "choose cpu")
    generate = ["--model", tiny_folder, "--prompt", "x", "--output", "out.mp4", "--device", "cuda"]
    assert_refused(run_command(GENERATE, *generate), "cuda is asked for", "choose cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [{"data__num_frames": 45}, {"data__height": 720, "data__width": 480}])
def test_another_size_than_the_released_models_were_trained_on(
    run_command, arguments, skeleton_folder, tmp_path: Path, size: dict
) -> None:
    for model in ("cogvideox-2b", "cogvideox-5b"):
        outcome = run_command(TRAIN, *arguments(model__path=skeleton_folder(model), **size), "--dry-run")
        assert_refused(outcome, f"{model} supports 49 frames of 720x480 only", "data.allow_unsupported_size=true")
        # a given mode: whether "auto" finds one that fits depends on the machine
        allow = {"data__allow_unsupported_size": "true", "memory__mode": "recompute"}
        outcome = run_command(TRAIN, *arguments(model__path=skeleton_folder(model), **allow, **size), "--dry-run")
        assert outcome.code == 0, outcome.err
    assert not list(tmp_path.iterdir())


SIZES_OF_1_5 = {
    "frames off the steps": ({"num_frames": 85}, ["85 frames of 1360x768", "16k + 1, from 17 to 161", "such as 81"]),
    "too many frames": ({"num_frames": 177}, ["177 frames of 1360x768", "16k + 1, from 17 to 161", "such as 161"]),
    "short side": ({"height": 480, "width": 720}, ["81 frames of 720x480", "shorter side must be 768", "768 and 1152"]),
    "long side": ({"width": 1376}, ["81 frames of 1376x768", "multiple of 16 up to 1360", "768 and 1360"]),
    "portrait": ({"height": 1376, "width": 768}, ["81 frames of 768x1376", "multiple of 16 up to 1360"]),
    "no multiple": ({"width": 1000}, ["width=1000", "multiple of 16"]),
}


@pytest.mark.parametrize("name", SIZES_OF_1_5)
def test_sizes_that_break_the_rules_of_version_1_5(
    run_command, arguments, skeleton_folder, tmp_path: Path, name: str
) -> None:
    size, parts = SIZES_OF_1_5[name]
    native = {"num_frames": 81, "height": 768, "width": 1360}
    bucket = "x".join(map(str, (native | size).values()))
    Image.new("RGB", (1360, 768)).save(tmp_path / "first.png")
    for model in ("cogvideox-1.5-5b", "cogvideox-1.5-5b-i2v"):
        folder = skeleton_folder(model)
        for data in ({f"data__{key}": value for key, value in size.items()}, {"data__buckets": bucket}):
            assert_refused(run_command(TRAIN, *arguments(model__path=folder, **data), "--dry-run"), *parts)
        options = [f"--{key.removeprefix('num_')}={value}" for key, value in size.items()]
        image = ["--image", "first.png"] if model.endswith("i2v") else []
        generate = ["--model", folder, "--prompt", "x", "--output", "out.mp4", *options, *image]
        assert_refused(run_command(GENERATE, *generate), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["first.png"]


def test_a_learning_rate_written_1e_4_works(run_command, arguments, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optimizer: {learning_rate: 1e-4}\n")
    outcome = run_command(TRAIN, "--config", "config.yaml", *arguments(), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "6 to train on" in outcome.out and "4 samples" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "a dry run writes nothing"


def test_all_errors_of_a_config_come_at_once(run_command, arguments, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {batch_size: 0, seed: x}\nadaptor: {}\n")
    outcome = run_command(TRAIN, "--config", "config.yaml", *arguments())
    assert_refused(outcome, "train.batch_size", "train.seed", "did you mean adapter?")


MODELS = {
    "missing component": (lambda folder: shutil.rmtree(folder / "vae"), ["missing component(s) vae"]),
    "pickled weights": (
        lambda folder: next((folder / "transformer").glob("*.safetensors")).rename(
            folder / "transformer" / "model.bin"
        ),
        ["transformer: only pickled weights (model.bin)", "convert them to safetensors"],
    ),
    "damaged config": (
        lambda folder: (folder / "transformer" / "config.json").write_text("{"),
        ["transformer/config.json: not valid JSON"],
    ),
    "no pipeline": (lambda folder: (folder / "model_index.json").unlink(), ["no model_index.json"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_model_folders(run_command, arguments, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    change, parts = MODELS[name]
    model = make_pipeline(tiny_folder, tmp_path / "model", change)
    before = tree(tmp_path)
    assert_refused(run_command(TRAIN, *arguments(model__path=model)), str(model), *parts)
    generate = ["--model", model, "--prompt", "x", "--output", "out.mp4"]
    assert_refused(run_command(GENERATE, *generate), str(model), *parts)
    assert tree(tmp_path) == before


def rows(*entries: tuple[str, str]) -> str:
    return "".join(json.dumps({"video": video, "caption": caption}) + "\n" for video, caption in entries)


MANIFESTS = {
    "missing video": ("list.jsonl", rows(("a.mp4", "x"), ("gone.mp4", "x")), ["gone.mp4", "does not exist"]),
    "empty caption": ("list.jsonl", rows(("a.mp4", " ")), ["list.jsonl:1", "a.mp4: empty caption"]),
    "encoding": ("list.csv", b"video,caption\na.mp4,caf\xe9\n", ["list.csv: not UTF-8 (byte 23)", "save it as UTF-8"]),
    "duplicate ids": ("list.jsonl", rows(("a.mp4", "x"), ("a.mp4", "y")), ["'a.mp4' stands twice", "own id"]),
    "columns": ("list.csv", "clip,words\na.mp4,x\n", ["no 'video' column", "found clip, words"]),
    "leads out": ("list.jsonl", rows(("../a.mp4", "x")), ["../a.mp4: leads out of", "data.allow_outside_root"]),
    "link leads out": ("list.jsonl", rows(("link.mp4", "x")), ["link.mp4: leads out of", "data.allow_outside_root"]),
    "image": ("list.jsonl", rows(("a.png", "x")), ["a.png: an image", "remove it"]),
    "not a table": ("list.txt", "a.mp4\n", ["list.txt", ".jsonl or a .csv file"]),
    "no clips": ("list.jsonl", "", ["no clips in it"]),
}


@pytest.fixture
def data_folder(tmp_path: Path, clips_folder: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(clips_folder / "clip0.mp4", folder / "a.mp4")
    return folder


@pytest.mark.parametrize("name", MANIFESTS)
def test_wrong_manifests(run_command, arguments, data_folder: Path, tmp_path: Path, name: str) -> None:
    file_name, content, parts = MANIFESTS[name]
    shutil.copy(data_folder / "a.mp4", tmp_path / "a.mp4")
    (data_folder / "link.mp4").symlink_to(tmp_path / "a.mp4")
    manifest = data_folder / file_name
    manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(tmp_path)
    assert_refused(run_command(TRAIN, *arguments(data__manifest=manifest)), *parts)
    assert tree(tmp_path) == before


def test_a_caption_file_that_is_not_utf8(run_command, arguments, data_folder: Path, tmp_path: Path) -> None:
    (data_folder / "a.txt").write_bytes(b"\xff\xfea")
    outcome = run_command(TRAIN, *arguments(data__manifest=data_folder))
    assert_refused(outcome, "a.txt: not UTF-8 (byte 0)", "save it as UTF-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.fixture
def bad_clips(data_folder: Path) -> Path:
    """One good clip and one of every kind that shows only in decoding."""
    content = (data_folder / "a.mp4").read_bytes()
    (data_folder / "empty.mp4").write_bytes(b"")
    (data_folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (data_folder / "text.mp4").write_text("this is no video")
    write_video(data_folder / "short.mp4", np.zeros((16, 64, 96, 3), np.uint8), 8)
    manifest = data_folder / "list.jsonl"
    manifest.write_text(rows(*((f"{name}.mp4", name) for name in ("a", "empty", "truncated", "text", "short"))))
    return manifest


def test_clips_that_cannot_be_used(run_command, arguments, bad_clips: Path, tmp_path: Path) -> None:
    """Training stops with all of them in one message, or leaves them out and says which."""
    outcome = run_command(TRAIN, *arguments(data__manifest=bad_clips, data__cache_dir="cache"))
    expected = ["empty.mp4: the file is empty", "text.mp4: not a readable video", "truncated.mp4"]
    expected += ["short.mp4: 16 frames at 8 fps, 17 are needed"]
    assert_refused(outcome, "4 clip(s) can't be used", *expected, "data.bad_clips=skip", "data/check.py")
    assert not (tmp_path / "run").exists()
    (entry,) = [name for name in tree(tmp_path / "cache") if name.startswith("latents")]
    assert Cache(tmp_path / "cache").read("latents", Path(entry).stem) is not None, "the good clip is sound"

    skipping = arguments(data__manifest=bad_clips, data__cache_dir="cache", data__bad_clips="skip")
    outcome = run_command(PREPARE, *skipping)
    assert outcome.code == 0, outcome.err
    assert "leaving out 4 clip(s)" in outcome.out and "cache: 1 clips" in outcome.out
    for part in expected:
        assert part in outcome.out


def test_checking_tells_what_is_usable_and_what_is_not(run_command, arguments, bad_clips: Path, tmp_path: Path) -> None:
    folder = bad_clips.parent
    shutil.copy(folder / "a.mp4", folder / "again.mp4")
    write_video(folder / "wide.mp4", np.zeros((17, 64, 192, 3), np.uint8), 8)
    write_video(folder / "small.mp4", np.zeros((17, 32, 48, 3), np.uint8), 8)
    with bad_clips.open("a") as file:
        file.write(rows(("again.mp4", "one caption"), ("wide.mp4", "many words " * 30), ("small.mp4", "x")))
    before = tree(tmp_path)
    outcome = run_command(CHECK, *arguments(data__manifest=bad_clips, data__cache_dir="cache"))
    assert outcome.code == 0, outcome.err
    table = dict(line.rsplit(maxsplit=1) for line in outcome.out.splitlines()[:7])
    counts = {name.strip(): int(count) for name, count in table.items()}
    assert counts.pop("too short") + counts.pop("unreadable") == 4
    assert counts == {"clips": 8, "usable": 4, "wrong size": 2, "duplicate content": 1, "caption cut": 1}
    for line in (
        "too short: short.mp4: ",
        "unreadable: empty.mp4: ",
        "wrong size: wide.mp4: 192x64: 50 % of the picture is cut off for 96x64",
        "wrong size: small.mp4: 48x32 is enlarged 2.00 times",
        "duplicate content: again.mp4: the same video as a.mp4",
        "caption cut: wide.mp4: ",
    ):
        assert line in outcome.out
    assert tree(tmp_path) == before, "checking changes nothing"

    bad_clips.write_text(rows(("empty.mp4", "x"), ("text.mp4", "x")))
    outcome = run_command(CHECK, *arguments(data__manifest=bad_clips))
    assert_refused(outcome, f"data.manifest={bad_clips}", "no clip is usable")


def test_an_unwritable_cache(run_command, arguments, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    outcome = run_command(TRAIN, *arguments(data__cache_dir="file/cache"))
    assert_refused(outcome, "data.cache_dir=file/cache", "cannot be written", "choose a folder")
    assert tree(tmp_path) == {"file": b"x"}


def test_an_output_folder_that_is_not_a_runs(run_command, arguments, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    assert_refused(
        run_command(TRAIN, *arguments()), "output_dir=run", "holds files that are no run's", "choose another"
    )
    outcome = run_command(TRAIN, *arguments(output_dir="run/thesis.tex"))
    assert_refused(outcome, "output_dir=run/thesis.tex", "is a file")
    assert tree(tmp_path) == {"run/thesis.tex": b"x"}


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"adapter__rank": 4}, ["adapter.rank: 2 -> 4"]),
        ({"train__seed": 7, "optimizer__learning_rate": 0.5}, ["train.seed: 42 -> 7", "learning_rate: 0.0001 -> 0.5"]),
        ({"train__batch_size": 2}, ["global_batch: 1 -> 2"]),
        ({"data__validation_clips": 1}, ["dataset: "]),
        ({"checkpoint__resume": "never"}, ["checkpoint.resume is 'never'", "checkpoint.resume=auto"]),
    ],
)
def test_an_output_folder_that_holds_another_run(
    run_command, arguments, used: Path, changes: dict, parts: list[str]
) -> None:
    before = tree(used)
    assert_refused(run_command(TRAIN, *arguments(**changes)), "output_dir=run", *parts, "choose another")
    assert tree(used) == before


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_resuming_from_a_damaged_checkpoint_falls_back(run_command, arguments, used: Path, finished: Path) -> None:
    damage(used / "checkpoints" / "step-000004" / "optimizer.safetensors")
    (used / "checkpoints" / ".partial-step-000006").mkdir()
    outcome = run_command(TRAIN, *arguments())
    assert outcome.code == 0, outcome.err
    assert "step-000004: optimizer.safetensors is damaged" in outcome.out and "falling back" in outcome.out
    assert "at step 2" in outcome.out
    folders = sorted(path.name for path in (used / "checkpoints").iterdir())
    assert folders == ["step-000002", "step-000004"]
    name = "pytorch_lora_weights.safetensors"
    again, before = load_file(used / "final" / name), load_file(finished / "final" / name)
    assert again.keys() == before.keys() and all(torch.equal(again[key], before[key]) for key in before)


def test_resuming_from_a_path_that_is_no_checkpoint(run_command, arguments, used: Path, tmp_path: Path) -> None:
    damage(used / "checkpoints" / "step-000002" / "pytorch_lora_weights.safetensors")
    before = tree(used)
    named = arguments(output_dir="other", checkpoint__resume=used / "checkpoints" / "step-000002")
    assert_refused(run_command(TRAIN, *named), "step-000002", "pytorch_lora_weights.safetensors is damaged")
    missing = arguments(output_dir="other", checkpoint__resume="nowhere")
    assert_refused(run_command(TRAIN, *missing), "nowhere", "not a finished checkpoint")
    assert tree(used) == before and not (tmp_path / "other").exists()


def test_a_full_disk_during_a_checkpoint_keeps_the_older_one(
    run_command, arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogtune.checkpoint import CheckpointFolder

    save = CheckpointFolder.save

    def save_with_little_space(self: CheckpointFolder, step: int, *rest: object) -> Path:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if step == 4 else soft, hard))
        try:
            return save(self, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", save_with_little_space)
        outcome = run_command(TRAIN, *arguments())
    assert_refused(outcome, "checkpoint at step 4", "free some space", "complete checkpoints: step-000002")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "run" / "final").exists()
    outcome = run_command(TRAIN, *arguments())
    assert outcome.code == 0 and "at step 2" in outcome.out, "with space again, the run goes on"


def test_out_of_memory_names_what_to_turn(run_command, arguments, used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogtune.denoiser import Denoiser

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    shutil.rmtree(used / "checkpoints" / "step-000004")
    before = tree(used / "checkpoints")
    monkeypatch.setattr(Denoiser, "losses", fail)
    outcome = run_command(TRAIN, *arguments(memory__mode="keep_all"))
    assert_refused(outcome, "out of memory", "Tried to allocate 2.00 GiB", "memory.mode=recompute", "train.batch_size")
    assert tree(used / "checkpoints") == before


def test_a_clip_that_makes_the_loss_infinite_is_named(
    run_command, arguments, shared_cache: Path, tmp_path: Path
) -> None:
    """A cache entry with a sound digest and a NaN in it, as a VAE overflow would leave."""
    cache = shutil.copytree(shared_cache, tmp_path / "cache")
    for path in (cache / "latents").rglob("*.safetensors"):
        moments = load_file(path)
        moments["mean"][0, 0, 0, 0] = math.nan
        Cache(cache).write("latents", path.stem, moments)
    outcome = run_command(TRAIN, *arguments(data__cache_dir=cache, tracking__log_every_steps=1))
    assert_refused(outcome, "non-finite loss", "step 1", "clip 'clip", "timestep", "caption", "learning_rate")
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_cache_entry_is_made_again(
    run_command, arguments, finished: Path, shared_cache: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(shared_cache, tmp_path / "cache"))
    path = next((cache / "latents").rglob("*.safetensors"))
    sound = path.read_bytes()
    damage(path)
    outcome = run_command(PREPARE, *arguments(data__cache_dir=cache))
    assert outcome.code == 0, outcome.err
    assert path.read_bytes() == sound


GENERATION = {
    "no prompt": ([], ["no prompt", "--prompt TEXT"]),
    "empty prompt": (["--prompt", " "], ["--prompt is empty"]),
    "frames": (["--prompt", "x", "--frames", "16"], ["num_frames=16", "13 or 17"]),
    "unknown option": (["--prompt", "x", "--promt", "y"], ["--promt"]),
    "not a number": (["--prompt", "x", "--seed", "many"], ["--seed", "'many'"]),
    "ending": (["--prompt", "x", "--output", "out.gif"], ["--output out.gif", ".mp4"]),
    "steps": (["--prompt", "x", "--steps", "0"], ["--steps 0"]),
    "prompts file": (["--prompts-file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
    "offload": (["--prompt", "x", "--device", "cpu", "--offload", "model"], ["--offload model", "no GPU"]),
    "missing adapter": (["--prompt", "x", "--lora", "nowhere"], ["--lora nowhere", "pytorch_lora_weights.safetensors"]),
}


@pytest.mark.parametrize("name", GENERATION)
def test_wrong_generation_options(run_command, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    options, parts = GENERATION[name]
    assert_refused(run_command(GENERATE, "--model", tiny_folder, "--output", "out.mp4", *options), *parts)
    assert not list(tmp_path.iterdir())


def rename(state: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): tensor for key, tensor in state.items()}


ADAPTERS = {
    "other layers": (
        lambda state: rename(state, "transformer_blocks.1.", "transformer_blocks.41."),
        ["transformer_blocks.41", "another model's"],
    ),
    "other width": (
        lambda state: {k: t.repeat(1, 2) if "lora_A" in k else t.repeat(2, 1) for k, t in state.items()},
        ["64 wide in the adapter and 32 in this model"],
    ),
    "no adapter": (lambda state: {"proj.weight": torch.zeros(2, 2)}, ["'proj.weight'", "lora_A|lora_B.weight"]),
    "no prefix": (
        lambda state: rename(state, "transformer.transformer", "transformer"),
        ["transformer_blocks.0.", "lora_A|lora_B.weight"],
    ),
    "ranks that differ": (
        lambda state: {k: t[:1] if "lora_A" in k else t for k, t in state.items()},
        ["rank 1 in lora_A and 2 in lora_B"],
    ),
    "half of it": (lambda state: {k: t for k, t in state.items() if "lora_A" in k}, ["rank 2 in lora_A and None in"]),
    "empty": (lambda state: {}, ["no adapter's tensors in it"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_another_model(run_command, tiny_folder: Path, finished: Path, tmp_path: Path, name: str) -> None:
    change, parts = ADAPTERS[name]
    source = load_file(finished / "final" / "pytorch_lora_weights.safetensors")
    changed = {key: tensor.contiguous() for key, tensor in change(source).items()}
    save_file(changed, tmp_path / "adapter.safetensors", metadata={"format": "pt"})
    options = ["--model", tiny_folder, "--prompt", "x", "--lora", "adapter.safetensors:0.5", "--output", "out.mp4"]
    assert_refused(run_command(GENERATE, *options), "--lora adapter.safetensors", *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_a_damaged_adapter_file(run_command, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"\x80\x02 this is no safetensors file")
    options = ["--model", tiny_folder, "--prompt", "x", "--lora", "adapter.safetensors", "--output", "out.mp4"]
    assert_refused(run_command(GENERATE, *options), "adapter.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize("script", [TRAIN, GENERATE])
def test_in_a_process_of_its_own(run_process, script: str) -> None:
    outcome = run_process(script, "--no-such-option=1")
    assert outcome.code == 2
    assert outcome.err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in outcome.err
