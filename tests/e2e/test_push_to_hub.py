"""Uploads to a local stand-in of the hub: what arrives, who may, and that the token is written nowhere."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, Hub

from cogtune import adapter, models
from cogtune.config import AdapterSettings


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def push(run_process: Callable, hub: Hub, tmp_path: Path) -> Callable:
    """Runs a command with the stand-in as the hub, in a home of its own."""

    def call(*arguments: object, token: str = TOKEN):
        environment = {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own servers, which the stand-in doesn't speak
            "HF_HOME": str(tmp_path / "home"),
            "HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return run_process(*arguments, **environment)

    return call


@pytest.fixture
def adapter_folder(tiny_2b_folder: Path, tmp_path: Path) -> Path:
    """What a training run leaves in final/, and files that belong to no adapter."""
    transformer = models.load_transformer(models.read_facts(tiny_2b_folder), torch.float32)
    adapter.add_lora(transformer, AdapterSettings(rank=2), seed=1)
    for name, parameter in adapter.adapter_parameters(transformer).items():
        if "lora_B" in name:
            parameter.data.normal_()
    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    adapter.save_adapter(transformer, folder, trained=True)
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n# Mine\n")
    (folder / "optimizer.pt").write_bytes(b"not for others")
    return folder


def assert_token_is_nowhere(*folders: Path) -> None:
    for folder in folders:
        for path in folder.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_runs_final_folder_arrives_whole(push: Callable, hub: Hub, adapter_folder: Path, tmp_path: Path) -> None:
    done = push("scripts/push.py", adapter_folder, "--push-to-hub", "me/my-lora")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"{hub.address}/me/my-lora"
    names = ("pytorch_lora_weights.safetensors", "README.md")
    assert hub.files["me/my-lora"] == {name: (adapter_folder / name).read_bytes() for name in names}
    assert hub.repositories["me/my-lora"]["visibility"] == "private"
    assert TOKEN not in done.out + done.err
    assert_token_is_nowhere(tmp_path)
    again = push("scripts/push.py", adapter_folder, "--push-to-hub", "me/my-lora")
    assert again.code == 0, again.err


def test_convert_and_export_push_what_they_wrote_with_its_card(
    push: Callable, hub: Hub, adapter_folder: Path, tiny_2b_folder: Path, tmp_path: Path
) -> None:
    hub_options = ("--push-to-hub", "club/merged", "--public")
    done = push(
        "scripts/export.py", "merge", tiny_2b_folder, tmp_path / "merged", "--lora", adapter_folder, *hub_options
    )
    assert done.code == 0, done.err
    arrived = hub.files["club/merged"]
    wrote = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    assert arrived.keys() == wrote and "model_index.json" in wrote and "README.md" in wrote
    assert hub.repositories["club/merged"]["visibility"] == "public"
    card = arrived["README.md"].decode()
    assert "With merged adapters: final at 1" in card and str(tmp_path) not in card
    done = push(
        *("scripts/convert.py", "adapter", adapter_folder, tmp_path / "comfy", "--keys", "comfyui"),
        *("--push-to-hub", "me/comfy"),
    )
    assert done.code == 0, done.err
    assert set(hub.files["me/comfy"]) == {"comfy-comfyui.safetensors", "README.md"}
    assert_token_is_nowhere(tmp_path)


@pytest.mark.parametrize("case", ["no login", "wrong token", "name", "no card", "another folder", "no server"])
def test_what_cannot_be_pushed_says_why(
    case: str,
    push: Callable,
    run_command: Callable,
    hub: Hub,
    adapter_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token, name, folder = TOKEN, "me/my-lora", adapter_folder
    in_this_process = case in ("name", "no card", "another folder")  # refused before anything is sent
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if case == "no login":
        token, message = "", "not logged in to the hub; run 'hf auth login', or set HF_TOKEN"
    elif case == "wrong token":
        token, message = "hf_wrong", "the upload failed"
    elif case == "name":
        name, message = "me/my lora", "--push-to-hub me/my lora: not a repository's name"
    elif case == "no card":
        (folder / "README.md").unlink()
        message = "no README.md, the model card"
    elif case == "another folder":
        folder, message = tmp_path / "run", "neither an adapter"
    else:
        hub.close()
        message = "the upload failed"
    arguments = ("scripts/push.py", folder, "--push-to-hub", name)
    done = run_command(*arguments) if in_this_process else push(*arguments, token=token)
    assert done.code == 2 and done.err.count("error: ") == 1 and message in done.err, done.err
    assert ("Traceback" not in done.err and token not in (done.out + done.err or "x") + "") or not token
    assert not hub.files


def test_nothing_heavy_is_imported_to_push(root: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['push.py', sys.argv[1], '--push-to-hub', 'me/mine']\n"
        f"try: runpy.run_path({str(root / 'scripts' / 'push.py')!r}, run_name='__main__')\n"
        "finally: print(sorted(n for n in ('torch', 'diffusers', 'transformers', 'numpy') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == "[]\n"
