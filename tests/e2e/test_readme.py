"""Every command that the README shows runs, on the tiny pipeline in place of the released one."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What makes a run of thousands of steps short; the README's own arguments stay.
SHORT = {
    "train/lora.py": ["--train.max_steps=2", "--data.validation_clips=1", "--validation.num_inference_steps=2"],
    "scripts/generate.py": ["--steps", "2"],
}


def shown_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_commands_run_in_order(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, clips_folder: Path
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "clips").mkdir()
    for path in clips_folder.iterdir():
        (tmp_path / "clips" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    ran = []
    # Scoring and comparing need the demo's adapter and minutes; other tests run what they run.
    for line in [
        line for line in shown_commands() if not line.startswith(("python scripts/score", "python scripts/c"))
    ]:
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        assert words[0] == "python" or words[:2] == ["accelerate", "launch"], line
        script, *arguments = words[1:] if words[0] == "python" else words[2:]
        arguments = [str(tiny_folder) if word == "cogvideox-5b" else word for word in arguments]
        if "--config" in arguments:
            arguments.append(f"--model.path={tiny_folder}")
        outcome = run_command(script, *arguments, *SHORT.get(script, []))
        assert outcome.code == 0, f"{line}\n{outcome.out}\n{outcome.err}"
        ran.append(script)
    assert ran == ["data/check.py", "train/lora.py", "train/lora.py", "scripts/generate.py"]
    assert (tmp_path / "dog.mp4").is_file()
    assert (tmp_path / "runs/cogvideox-5b/final/pytorch_lora_weights.safetensors").is_file()


def test_file_map_names_every_module_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = readme.split("the library, by floor:")[1].split("```")[0]
    modules = {path.stem for path in (ROOT / "src/cogtune").glob("*.py")} - {"__init__"}
    missing = {module for module in modules if not re.search(rf"\b{module}\b", listed)}
    assert not missing
    named = {word for line in listed.splitlines() for word in re.split(r"[ ,]+", line[:60].split("   ")[0]) if word}
    assert {word for word in named if not word.endswith("/")} <= modules | {"shapes", "embedded"}


@pytest.mark.parametrize(
    "path", ["README.md", "data/README.md", "docs/design.md", "docs/benchmarks.md", "docs/formats.md"]
)
def test_links_and_paths_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / path).parent / target).exists(), f"{path}: {target}"
    for name in re.findall(r"`((?:configs|scripts|train|data|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{path}: {name}"
