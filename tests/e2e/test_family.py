"""Image-to-video and version 1.5 from clips to a video: train, resume, validate, generate; buckets; what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from cogtune.video import read_video, write_video

VARIANT_MODELS = ["tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"]
BASIC: dict[str, Any] = {
    "data": {"validation_clips": 1, "num_workers": 0},
    "schedule": {"warmup_steps": 0},
    "train": {"max_steps": 2, "timestep_strata": 4},
    "adapter": {"rank": 4},
    "validation": {"enabled": False},
    "checkpoint": {"every_steps": 1},
    "tracking": {"log_every_steps": 1},
}


@pytest.fixture
def write_config(tmp_path: Path, clips_folder: Path) -> Callable[..., Path]:
    """Writes a run's config; sections given as keywords are merged in."""

    def write(name: str, model: Path, **sections: dict[str, Any]) -> Path:
        values = json.loads(json.dumps(BASIC))
        values["model"] = {"path": str(model)}
        values["data"] |= {"manifest": str(clips_folder), "cache_dir": str(tmp_path / "cache")}
        values["output_dir"] = str(tmp_path / name)
        for section, settings in sections.items():
            values[section] = values.get(section, {}) | settings
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def picture(tmp_path: Path, draw_clip: Callable[..., np.ndarray]) -> Path:
    """An image that is wider than the clips."""
    path = tmp_path / "start.png"
    Image.fromarray(draw_clip(9, 1, 64, 160)[0]).save(path)
    return path


def is_image_model(model: str) -> bool:
    return model.endswith("i2v")


@pytest.mark.parametrize("model", VARIANT_MODELS)
def test_lora_from_clips_to_a_video(
    model: str,
    variant_folder: Callable[[str], Path],
    write_config: Callable[..., Path],
    run_command: Any,
    tmp_path: Path,
    picture: Path,
) -> None:
    images = {"images": [str(picture)]} if is_image_model(model) else {}
    validation = {"enabled": True, "prompts": ["waves"], "num_inference_steps": 2} | images
    config = write_config("run", variant_folder(model), validation=validation)
    dry = run_command("train/lora.py", "--config", config, "--dry-run")
    assert dry.code == 0 and ("noise on its pixels" in dry.out) == is_image_model(model), dry.err
    done = run_command("train/lora.py", "--config", config)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row.get("loss", row.get("eval_loss"))) for row in rows)
    assert len([row for row in rows if "eval_loss" in row]) == 2
    assert len(read_video(tmp_path / "run" / "samples" / "step-000002" / "00-0.mp4")) == 17
    assert (tmp_path / "run" / "samples" / "step-000002" / "00-0-base.mp4").is_file()

    final, out = tmp_path / "run" / "final", tmp_path / "out.mp4"
    kind = CogVideoXImageToVideoPipeline if is_image_model(model) else CogVideoXPipeline
    assert kind.__name__ in (final / "README.md").read_text()
    stock = kind.from_pretrained(variant_folder(model))
    stock.load_lora_weights(str(final))
    assert stock.transformer.peft_config
    made = run_command(
        "scripts/generate.py", "--model", variant_folder(model), "--lora", final, "--prompt", "waves", "--steps", 2,
        "--output", out, *(("--image", picture) if is_image_model(model) else ()),
    )  # fmt: skip
    assert made.code == 0, made.err
    assert "8 layers" in made.out and len(read_video(out)) == 17
    assert ("40 % of the picture is cut off" in made.out) == is_image_model(model)

    # The run goes on from its first step, bit for bit: image noise and order are keyed too.
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    last.rename(tmp_path / "straight")
    assert run_command("train/lora.py", "--config", config, "--validation.enabled=false").code == 0
    name = "pytorch_lora_weights.safetensors"
    resumed, straight = load_file(last / name), load_file(tmp_path / "straight" / name)
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


@pytest.mark.parametrize("model", VARIANT_MODELS)
def test_full_fine_tuning_gives_a_stock_pipeline(
    model: str,
    variant_folder: Callable[[str], Path],
    write_config: Callable[..., Path],
    run_command: Any,
    tmp_path: Path,
) -> None:
    values = write_config("full", variant_folder(model))
    plain = yaml.safe_load(values.read_text())
    del plain["adapter"]
    values.write_text(yaml.safe_dump(plain))
    assert run_command("train/sft.py", "--config", values, "--model.dtype=bfloat16").code == 0
    kind = CogVideoXImageToVideoPipeline if is_image_model(model) else CogVideoXPipeline
    stock = kind.from_pretrained(tmp_path / "full" / "final")
    assert type(stock) is kind and stock.transformer.config.in_channels == (32 if is_image_model(model) else 16)
    if model == "tiny-i2v":
        base = load_file(variant_folder(model) / "transformer" / "diffusion_pytorch_model.safetensors")
        table = stock.transformer.patch_embed.pos_embedding
        torch.testing.assert_close(table.bfloat16(), base["patch_embed.pos_embedding"].bfloat16(), rtol=0, atol=0)


def test_images_of_the_manifest_take_the_first_frames_place(
    variant_folder: Callable[[str], Path],
    write_config: Callable[..., Path],
    run_command: Any,
    tmp_path: Path,
    clips_folder: Path,
    picture: Path,
) -> None:
    from cogtune.cache import Cache
    from cogtune.video import load_image

    def write_rows(image: str) -> Path:
        rows = [{"video": str(clips_folder / f"clip{i}.mp4"), "caption": "waves"} for i in range(3)]
        rows[1]["image"] = image
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    data = {"manifest": str(write_rows("start.png")), "validation_clips": 0, "allow_outside_root": True}
    config = write_config("given", variant_folder("tiny-i2v"), data=data)
    done = run_command("train/lora.py", "--config", config)
    assert done.code == 0, done.err
    assert "start.png: 160x64: 40 % of the picture is cut off for 96x64" in done.out
    found = [Cache(tmp_path / "cache").read("images", path.stem) for path in (tmp_path / "cache/images").rglob("*.s*")]
    images = [entry["image"].numpy() for entry in found if entry]
    assert len(images) == 3 and all(image.shape == (64, 96, 3) and image.dtype == np.uint8 for image in images)
    assert any(np.array_equal(image, load_image(picture, 64, 96)) for image in images)
    first = read_video(clips_folder / "clip0.mp4")[0]
    assert any(np.array_equal(image, first) for image in images)
    checked = run_command("data/check.py", "--config", config)
    assert checked.code == 0 and "image start.png: 160x64: 40 %" in checked.out

    write_rows("gone.png")
    missing = run_command("train/lora.py", "--config", config, "--output_dir", tmp_path / "other")
    assert missing.code == 2 and "gone.png does not exist" in missing.err and "1 clip(s)" in missing.err
    (tmp_path / "torn.png").write_bytes(picture.read_bytes()[:60])
    write_rows("torn.png")
    torn = run_command("train/lora.py", "--config", config, "--output_dir", tmp_path / "other")
    assert torn.code == 2 and "torn.png: not a readable image" in torn.err and "data.bad_clips=skip" in torn.err
    skipped = run_command(
        "train/lora.py", "--config", config, "--output_dir", tmp_path / "other", "--data.bad_clips=skip"
    )
    assert skipped.code == 0 and "leaving out 1 clip(s)" in skipped.out
    write_rows("start.mp4")
    wrong = run_command("train/lora.py", "--config", config, "--output_dir", tmp_path / "third")
    assert wrong.code == 2 and "image start.mp4: expected one of" in wrong.err


@pytest.fixture
def mixed_clips(tmp_path: Path, draw_clip: Callable[..., np.ndarray]) -> Path:
    """Five landscape clips of 17 frames, three long ones and two square ones."""
    folder = tmp_path / "mixed"
    for number, size in enumerate([(17, 64, 96)] * 5 + [(33, 64, 96)] * 3 + [(17, 64, 64)] * 2):
        write_video(folder / f"{number}.mp4", draw_clip(number, *size), 8)
        (folder / f"{number}.txt").write_text(f"waves {number}")
    return folder


VIDEOS = ("--validation.enabled=true", "--validation.prompts=waves")
LAYOUTS = {"one batch of two": ("2", "1"), "two of one": ("1", "2")}


@pytest.mark.parametrize("model", ["tiny", "tiny-1.5-i2v"])
def test_buckets_train_every_size_and_layouts_agree(
    model: str,
    variant_folder: Callable[[str], Path],
    write_config: Callable[..., Path],
    run_command: Any,
    tmp_path: Path,
    mixed_clips: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cogtune.trainer import Trainer

    seen: list[tuple[int, tuple[int, ...]]] = []
    run_pass = Trainer._run_pass

    def note(self: Trainer, batch: Any) -> torch.Tensor:
        seen.extend((position, tuple(batch.latents.shape[1:])) for position in batch.positions)
        return run_pass(self, batch)

    monkeypatch.setattr(Trainer, "_run_pass", note)
    weights, sequences = [], []
    for name, (batch, accumulation) in LAYOUTS.items():
        seen.clear()
        data = {
            "manifest": str(mixed_clips), "validation_clips": 0, "fps": 8,
            "buckets": ["17x64x96", "33x64x96", "17x64x64"],
        }  # fmt: skip
        train = {"max_steps": 5, "batch_size": int(batch), "gradient_accumulation_steps": int(accumulation)}
        config = write_config(name.replace(" ", "-"), variant_folder(model), data=data, train=train)
        if not weights:
            dry = run_command("train/lora.py", "--config", config, "--dry-run")
            assert "17 frames of 96x64 at 8 fps: 5 clip(s)" in dry.out and "64x64 at 8 fps: 2 clip(s)" in dry.out
            assert "at most" in dry.out and "fills a step" not in dry.out
            many = run_command("train/lora.py", "--config", config, "--dry-run", "--train.batch_size=4")
            assert "17x64x64 fills a step of 4 first in epoch 2" in many.out and "33x64x96 fills" in many.out
            short = ("--train.batch_size=4", "--train.max_steps=2")
            few = run_command("train/lora.py", "--config", config, "--dry-run", *short)
            assert "17x64x64 fills a step of 4 never in this run" in few.out
        assert run_command("train/lora.py", "--config", config).code == 0
        final = tmp_path / name.replace(" ", "-") / "final" / "pytorch_lora_weights.safetensors"
        weights.append(load_file(final))
        sequences.append(sorted(seen))
    assert sequences[0] == sequences[1] and [position for position, _ in sequences[0]] == list(range(10))
    shapes = [shape for _, shape in sequences[0]]
    assert all(shapes[k] == shapes[k + 1] for k in range(0, 10, 2)) and len(set(shapes)) > 1
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("tiny", ["--train.image_dropout=0.1"], ["train.image_dropout", "text-to-video", "remove it"]),
        ("tiny", ["--validation.images=a.png"], ["validation.images", "text-to-video"]),
        ("tiny-i2v", [*VIDEOS], ["0 for 1 prompt", "--validation.images"]),
        ("tiny-i2v", [*VIDEOS, "--validation.images=no.png"], ["no such file"]),
        ("tiny-i2v", ["--data.height=32"], ["learned table for 17 frames of 96x64"]),
        ("tiny", ["--data.buckets=17x64"], ["'17x64'", "frames x height x width"]),
        ("tiny", ["--data.bucket_tokens=99", "--data.height=64"], ["data.height", "remove it"]),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(
    model: str,
    arguments: list[str],
    words: list[str],
    variant_folder: Callable[[str], Path],
    write_config: Callable[..., Path],
    run_command: Any,
) -> None:
    outcome = run_command("train/lora.py", "--config", write_config("wrong", variant_folder(model)), *arguments)
    assert outcome.code == 2 and outcome.err.count("error:") == 1, outcome.err
    assert all(word in outcome.err for word in words), outcome.err


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("tiny-i2v", [], ["no image", "--image FILE"]),
        ("tiny-i2v", ["--image", "gone.png"], ["--image: gone.png: no such file"]),
        ("tiny-i2v", ["--image", "CONFTEST"], ["not a readable image"]),
        ("tiny", ["--video", "gone.mp4"], ["--video: gone.mp4: no such file"]),
        ("tiny", ["--video", "CLIP", "--strength", "2"], ["--strength 2", "at most 1"]),
        ("tiny", ["--video", "CLIP", "--frames", "33"], ["33 are needed", "--frames"]),
        ("tiny", ["--strength", "0.5"], ["no effect without --video"]),
        ("tiny", ["--image", "PICTURE"], ["start.png: ", "a text-to-video model and takes no image"]),
        ("tiny-1.5", ["--image", "PICTURE"], ["start.png: ", "takes no image", "cogvideox-1.5-5b-i2v"]),
        ("tiny-i2v", ["--video", "CLIP"], ["clip0.mp4: ", "is an image-to-video model, which starts from --image"]),
        ("tiny-1.5-i2v", ["--video", "CLIP", "--image", "PICTURE"], ["clip0.mp4: ", "needs a text-to-video model"]),
    ],
)
def test_wrong_generation_is_one_line(
    model: str,
    arguments: list[str],
    words: list[str],
    variant_folder: Callable[[str], Path],
    run_command: Any,
    tmp_path: Path,
    clips_folder: Path,
    root: Path,
    picture: Path,
) -> None:
    files = {"CLIP": clips_folder / "clip0.mp4", "CONFTEST": root / "tests" / "conftest.py", "PICTURE": picture}
    given = [str(files.get(argument, argument)) for argument in arguments]
    outcome = run_command(
        "scripts/generate.py", "--model", variant_folder(model), "--prompt", "a", "--steps", 2, *given,
        "--output", tmp_path / "out.mp4",
    )  # fmt: skip
    assert outcome.code == 2 and outcome.err.count("error:") == 1, outcome.err
    assert all(word in outcome.err for word in words), outcome.err
    assert not (tmp_path / "out.mp4").exists()


def test_a_video_starts_from_a_video(
    variant_folder: Callable[[str], Path], run_command: Any, tmp_path: Path, clips_folder: Path
) -> None:
    made = run_command(
        "scripts/generate.py", "--model", variant_folder("tiny-1.5"), "--prompt", "a", "--steps", 4, "--fps", 8,
        "--video", clips_folder / "clip0.mp4", "--strength", 0.5, "--output", tmp_path / "out.mp4", "--frames", 9,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert len(read_video(tmp_path / "out.mp4")) == 9


def test_weights_of_another_variant_are_refused(
    variant_folder: Callable[[str], Path], write_config: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed-up"
    shutil.copytree(variant_folder("tiny-i2v"), mixed)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    shutil.copyfile(variant_folder("tiny") / weights, mixed / weights)
    outcome = run_command("train/lora.py", "--config", write_config("mixed", mixed))
    assert outcome.code == 2, outcome.err
    assert "patch_embed.proj.weight" in outcome.err and "another variant's" in outcome.err, outcome.err


@pytest.mark.parametrize(
    "variant, gone, extra, words",
    [
        ("tiny-i2v", "patch_embed.pos_embedding", None, "1 of 65 tensors missing, first patch_embed.pos_embedding: "),
        ("tiny-1.5", "attn1.to_q", None, "4 of 64 tensors missing, first transformer_blocks.0.attn1.to_q."),
        ("tiny", None, "transformer_blocks.9.attn1.to_q.weight", "transformer_blocks.9.attn1.to_q.weight is not in"),
    ],
)
def test_missing_and_unknown_weights_are_refused(
    variant_folder: Callable[[str], Path],
    write_config: Callable[..., Path],
    run_command: Any,
    tmp_path: Path,
    variant: str,
    gone: str | None,
    extra: str | None,
    words: str,
) -> None:
    """By the plan and by generation, as diffusers computes other positions, or leaves the layer random, or out."""
    folder = tmp_path / "model"
    shutil.copytree(variant_folder(variant), folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not gone or gone not in name}
    save_file(tensors | ({extra: torch.zeros(4, 4)} if extra else {}), file)
    image = ("--image", tmp_path / "start.png") if is_image_model(variant) else ()
    Image.new("RGB", (96, 64)).save(tmp_path / "start.png")
    config = write_config("run", folder)
    full = write_config("full", folder)
    full.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(full.read_text()).items() if k != "adapter"}))
    for command in (
        ("train/lora.py", "--config", config, "--dry-run"),
        ("train/sft.py", "--config", full, "--dry-run"),
        ("scripts/generate.py", "--model", folder, "--prompt", "a", "--output", tmp_path / "out.mp4", *image),
    ):
        outcome = run_command(*command)
        assert outcome.code == 2 and outcome.err.count("error:") == 1, outcome.err
        assert words in outcome.err, outcome.err
