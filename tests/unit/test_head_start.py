"""Weights read while Python imports, kernels kept from one run to the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogtune import head_start
from cogtune.head_start import CACHE_VARIABLE, keep_kernels, read_weights_ahead

PLACES = ("TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two shards of a transformer and an encoder, pieces of 1,000 bytes."""
    monkeypatch.setattr(head_start, "_PIECE_BYTES", 1000)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, size in (("transformer/a.safetensors", 2500), ("transformer/b.safetensors", 1), ("vae/c.safetensors", 9)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
    return tmp_path


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the threads read; they read nothing else."""
    found: list[tuple[str, int]] = []
    original = head_start._read

    def note(pieces: list[tuple[Path, int]]) -> None:
        found.extend((path.name, start) for path, start in pieces if (path.name, start) not in found)
        original(pieces)

    monkeypatch.setattr(head_start, "_read", note)
    return found


def read(*arguments: str, parts: tuple[str, ...] = ("transformer",), option: str = "--model.path") -> int:
    """How many threads read."""
    threads = read_weights_ahead(parts, option=option, arguments=arguments)
    for thread in threads:
        thread.join()
    return len(threads)


def test_all_of_the_named_parts_is_read(model: Path, pieces: list[tuple[str, int]]) -> None:
    assert read(f"--model.path={model}") > 0
    expected = [("a.safetensors", 0), ("a.safetensors", 1000), ("a.safetensors", 2000), ("b.safetensors", 0)]
    assert sorted(pieces) == expected


def test_the_readers_share_the_pieces(model: Path) -> None:
    left = [(path, 0) for path in sorted(model.glob("transformer/*"))]
    head_start._read(left)
    assert left == [], "read by the first of them"
    head_start._read(left)


@pytest.mark.parametrize("form", ["config", "config=", "override", "other option"])
def test_the_model_is_found_as_the_command_names_it(model: Path, form: str, pieces: list[tuple[str, int]]) -> None:
    config = model / "job.yaml"
    config.write_text(f"model: {{path: {model}}}\n" if form.startswith("config") else "model: {path: elsewhere}\n")
    arguments = {
        "config": ["--config", str(config)],
        "config=": [f"--config={config}"],
        "override": ["--config", str(config), "--model.path", str(model)],
        "other option": ["--model", str(model)],
    }[form]
    option = "--model" if form == "other option" else "--model.path"
    assert read(*arguments, parts=("vae", "transformer"), option=option) > 0
    assert {name for name, _ in pieces} == {"a.safetensors", "b.safetensors", "c.safetensors"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config"],
        ["--config", "missing.yaml"],
        ["--model.path=missing/model"],
        ["--model.path=cogvideox-5b"],
        ["--model.path={model}", "--dry-run"],
        ["--model.path={model}", "--help"],
    ],
)
def test_wrong_commands_and_plans_read_nothing_and_say_nothing(
    model: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(model / "hub"))
    assert read(*[text.format(model=model) for text in arguments]) == 0
    assert capsys.readouterr() == ("", "")


def test_one_process_of_a_node_reads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read(f"--model.path={model}") == 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert read(f"--model.path={model}") > 0


def test_weights_that_would_fill_the_memory_are_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "_available_bytes", lambda: 3000)
    assert read(f"--model.path={model}") == 0, "2,501 bytes are more than 0.6 of them"
    monkeypatch.setattr(head_start, "_available_bytes", lambda: 5000)
    assert read(f"--model.path={model}") > 0


def test_nothing_heavy_is_imported_first(model: Path) -> None:
    code = (
        "import sys; from cogtune.head_start import read_weights_ahead as r; "
        f"t = r(('transformer',), arguments=['--model.path={model}']); [x.join() for x in t]; "
        "print(len(t), sorted(n for n in ('torch', 'diffusers', 'transformers', 'numpy') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4 []\n"


@pytest.fixture
def no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACES:
        monkeypatch.setenv(name, "")  # so that the test's end takes back what is set in it
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_places")
def test_kernels_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_kernels()
    assert folder is not None
    assert folder.parent == tmp_path / "cogtune" / "kernels"
    assert os.environ[PLACES[0]] == str(folder / "inductor")
    assert os.environ[PLACES[1]] == str(folder / "flash_attention")
    assert os.environ[PLACES[2]] == "1"
    assert keep_kernels() is None, "set already"


@pytest.mark.usefixtures("no_places")
def test_places_of_the_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(PLACES[0], "/own")
    monkeypatch.setenv(PLACES[2], "0")
    folder = keep_kernels()
    assert folder is not None
    assert os.environ[PLACES[0]] == "/own"
    assert os.environ[PLACES[1]] == str(folder / "flash_attention")
    assert os.environ[PLACES[2]] == "0"


@pytest.mark.usefixtures("no_places")
def test_a_place_that_cant_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert keep_kernels() is None
    assert PLACES[0] not in os.environ


@pytest.mark.usefixtures("no_places")
def test_the_compiler_keeps_its_files_there(tmp_path: Path) -> None:
    """Run in a process of its own: what it compiles lands in the folder, and the next process reads it."""
    code = (
        "from cogtune.head_start import keep_kernels; keep_kernels(); import torch; "
        "f = torch.compile(lambda x: x.sin() + 1); f(torch.ones(8)); "
        "from torch._dynamo.utils import counters; print(counters['inductor']['fxgraph_cache_hit'])"
    )
    variables = {**os.environ, CACHE_VARIABLE: str(tmp_path)}
    hits = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables).stdout
        for _ in range(2)
    ]
    assert [line.strip() for line in hits] == ["0", "1"]
    assert any(tmp_path.glob("kernels/*/inductor/*"))
