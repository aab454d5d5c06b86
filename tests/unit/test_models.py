"""Facts read from pipeline folders, and folders that are refused before a weight is loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogtune import models
from cogtune.errors import UserError
from cogtune.models import find_folder, make_meta_transformer, read_facts
from cogtune.video_request import check_size


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "model, layers, heads, scaling, shift, rotary, dtype, parameters",
    [
        ("cogvideox-2b", 30, 30, 1.15258426, 3.0, False, torch.float16, 1.69e9),
        ("cogvideox-5b", 42, 48, 0.7, 1.0, True, torch.bfloat16, 5.57e9),
    ],
)
def test_released_architectures(
    skeleton_folder: Callable[[str], Path],
    model: str,
    layers: int,
    heads: int,
    scaling: float,
    shift: float,
    rotary: bool,
    dtype: torch.dtype,
    parameters: float,
) -> None:
    facts = read_facts(skeleton_folder(model))
    assert (facts.variant, facts.num_layers, facts.num_heads, facts.head_dim) == (model, layers, heads, 64)
    assert (facts.scaling_factor, facts.scheduler_config["snr_shift_scale"]) == (scaling, shift)
    assert (facts.use_rotary, facts.dtype, facts.fixed_size) == (rotary, dtype, True)
    assert (facts.num_frames, facts.height, facts.width, facts.fps) == (49, 480, 720, 8.0)
    assert (facts.max_text_length, facts.text_dim, facts.in_channels, facts.latent_channels) == (226, 4096, 16, 16)
    assert facts.latent_shape(49, 480, 720) == (13, 16, 60, 90)
    assert facts.num_tokens(49, 480, 720) == 17_776
    counted = sum(p.numel() for p in make_meta_transformer(facts).parameters())
    assert counted == pytest.approx(parameters, rel=0.01)


def test_other_sizes_are_read_from_the_folder(tiny_folder: Path, tiny_2b_folder: Path) -> None:
    facts, facts_2b = read_facts(tiny_folder), read_facts(tiny_2b_folder)
    assert facts.variant == facts_2b.variant == "custom" and not facts.fixed_size
    assert (facts.num_frames, facts.height, facts.width, facts.fps) == (17, 64, 96, 8.0)
    assert (facts.max_text_length, facts.text_dim, facts.num_layers) == (32, 32, 2)
    assert (facts.use_rotary, facts.scaling_factor, facts.dtype) == (True, 0.7, torch.bfloat16)
    assert (facts_2b.use_rotary, facts_2b.scaling_factor, facts_2b.dtype) == (False, 1.15258426, torch.float16)


def test_shapes_are_those_that_the_networks_make(tiny_folder: Path) -> None:
    facts = read_facts(tiny_folder)
    vae = models.load_vae(facts, torch.float32)
    with torch.inference_mode():
        mean = vae.encode(torch.zeros(1, 3, 9, 32, 48)).latent_dist.mean  # [B, C, F, H, W]
        transformer = models.load_transformer(facts, torch.float32)
        text = torch.zeros(1, facts.max_text_length, facts.text_dim)
        tokens = transformer.patch_embed(text, mean.transpose(1, 2))
    assert facts.latent_shape(9, 32, 48) == tuple(mean.transpose(1, 2).shape[1:])
    assert facts.num_tokens(9, 32, 48) == tokens.shape[1]


def test_an_odd_number_of_latent_frames_is_padded_to_patches(tiny_folder: Path) -> None:
    facts = replace(read_facts(tiny_folder), patch_size_t=2, max_text_length=224)
    assert facts.num_tokens(81, 768, 1360) == 224 + 11 * 48 * 85  # 21 latent frames, 11 pairs


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"])
def test_a_missing_component_is_named(copy: Path, component: str) -> None:
    shutil.rmtree(copy / component)
    with pytest.raises(UserError, match=rf"missing component\(s\) {component};"):
        read_facts(copy)


def test_a_folder_without_index_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        read_facts(tmp_path)


@pytest.mark.parametrize("component", ["text_encoder", "vae", "transformer"])
def test_pickled_weights_are_refused(copy: Path, component: str) -> None:
    for path in (copy / component).glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match=rf"{component}: only pickled weights .*\.bin.*safetensors"):
        read_facts(copy)


def test_absent_weights_are_named(copy: Path) -> None:
    for path in (copy / "vae").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="vae: no weights"):
        read_facts(copy)


def test_pickled_weights_beside_safetensors_are_not_read(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    models.load_vae(read_facts(copy), torch.float32)


def test_a_text_encoder_of_another_width_is_refused(copy: Path) -> None:
    edit_json(copy / "text_encoder" / "config.json", d_model=64)
    with pytest.raises(UserError, match="64 wide, the transformer expects 32"):
        read_facts(copy)


def test_missing_and_damaged_configs_are_named(copy: Path) -> None:
    (copy / "vae" / "config.json").write_text('{"latent_channels": ')
    with pytest.raises(UserError, match=r"vae/config\.json: not valid JSON"):
        read_facts(copy)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae/config\.json: missing"):
        read_facts(copy)


def test_another_kind_of_transformer_is_refused(copy: Path) -> None:
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "num_layers"}))
    with pytest.raises(UserError, match="no 'num_layers'"):
        read_facts(copy)


def test_find_folder_takes_folders_and_refuses_nonsense(tiny_folder: Path) -> None:
    assert find_folder(str(tiny_folder)) == tiny_folder
    for name in ("cogvideox-6b", "./nowhere", "/nowhere/at", "a/b/c"):
        with pytest.raises(UserError, match=f"model.path={name}: no such folder"):
            find_folder(name)


def test_a_hub_name_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.path=zai-org/CogVideoX-5b: not in the hub's cache"):
        find_folder("cogvideox-5b")


def test_device_and_precision() -> None:
    assert models.choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert models.choose_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match=r"cuda is asked for.*choose cpu"):
            models.choose_device("cuda")


def test_precision_follows_variant_and_device(tiny_2b_folder: Path) -> None:
    facts, cpu, gpu = read_facts(tiny_2b_folder), torch.device("cpu"), torch.device("cuda")
    assert models.choose_dtype("auto", facts, gpu) == torch.float16
    assert models.choose_dtype("bfloat16", facts, gpu) == torch.bfloat16
    assert models.choose_dtype("auto", facts, cpu) == torch.float32
    with pytest.raises(UserError, match="float16 needs a GPU"):
        models.choose_dtype("float16", facts, cpu)


def test_loaded_parts_are_frozen_and_in_the_asked_precision(tiny_folder: Path) -> None:
    facts = read_facts(tiny_folder)
    for load in (models.load_transformer, models.load_vae, models.load_text_encoder):
        part = load(facts, torch.bfloat16)
        assert not part.training and not any(p.requires_grad for p in part.parameters())
        assert {p.dtype for p in part.parameters()} <= {torch.bfloat16, torch.float32}
        assert next(part.parameters()).dtype == torch.bfloat16


def test_scheduler_carries_the_checkpoints_config(tiny_2b_folder: Path, copy: Path) -> None:
    config = models.load_scheduler(read_facts(tiny_2b_folder)).config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"], config["snr_shift_scale"]) == (
        "v_prediction",
        True,
        3.0,
    )
    edit_json(copy / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    with pytest.raises(UserError, match="EulerDiscreteScheduler"):
        models.load_scheduler(read_facts(copy))


@pytest.mark.parametrize(
    "size, expected",
    [
        ((48, 480, 720), "num_frames=48: must be 4k \\+ 1, such as 45 or 49"),
        ((0, 480, 720), "num_frames=0"),
        ((49, 488, 720), "height=488: must be a multiple of 16"),
        ((49, 480, 715), "width=715: must be a multiple of 16"),
        ((49, 720, 480), "49 frames of 480x720: cogvideox-5b supports 49 frames of 720x480 only.*data.allow_unsup"),
        ((45, 480, 720), "45 frames of 720x480"),
    ],
)
def test_sizes_that_5b_was_not_trained_for_are_refused(
    skeleton_folder: Callable[[str], Path], size: tuple[int, int, int], expected: str
) -> None:
    facts = read_facts(skeleton_folder("cogvideox-5b"))
    check_size(facts, 49, 480, 720)
    with pytest.raises(UserError, match=expected):
        check_size(facts, *size)


def test_unsupported_sizes_can_be_allowed_but_impossible_ones_not(
    skeleton_folder: Callable[[str], Path], tiny_folder: Path
) -> None:
    facts = read_facts(skeleton_folder("cogvideox-5b"))
    check_size(facts, 17, 256, 384, allow_unsupported_size=True)
    with pytest.raises(UserError, match="num_frames=18"):
        check_size(facts, 18, 256, 384, allow_unsupported_size=True)
    check_size(read_facts(tiny_folder), 9, 32, 48)  # no variant that fixes a size


@pytest.mark.parametrize("damage", ["truncated", "grown", "no header", "missing shard"])
def test_damaged_or_incomplete_weights_are_found_without_loading_them(
    damage: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = next((folder / "transformer").glob("*.safetensors"))
    content = weights.read_bytes()
    changed = {"truncated": content[:-1], "grown": content + b"x", "no header": b"12345678" + content[8:]}
    message = "truncated or damaged"
    if damage == "missing shard":
        index = {"weight_map": {"a": weights.name, "b": "model-00002-of-00002.safetensors"}}
        (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
        message = "model-00002-of-00002.safetensors is missing"
    else:
        weights.write_bytes(changed[damage])
    with pytest.raises(UserError, match=message):
        models.read_facts(folder)


def test_each_process_of_a_launch_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert models.choose_device("auto") == torch.device("cuda") and not taken
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert models.choose_device("auto") == torch.device("cuda", 1) and taken == [1]
    assert models.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this node has no GPU, there are 2"):
        models.choose_device("cuda")
