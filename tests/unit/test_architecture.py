"""The rules of the house: imports, one loop, names, importing does nothing, thin commands, short files."""

import ast
import graphlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
MODULES = sorted((SRC / "cogtune").rglob("*.py"))
COMMANDS = sorted(path for folder in ("train", "data", "scripts") for path in (ROOT / folder).rglob("*.py"))
MAX_LINES, MAX_COMMAND_LINES, MAX_RECIPE_LINES = 400, 80, 300

# Floors of docs/design: a module may import its own floor and those below. What isn't listed is a part.
GROUND = {
    "errors", "config", "cli", "models", "diffusion", "draws", "manifest", "video", "cache", "dataset", "decode_worker",
    "frame_convolution", "variants", "conditions", "launch",
}  # fmt: skip
LOOP = {"trainer"}
RUN = {"run", "benchmark"}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def imported(path: Path) -> Iterator[str]:
    """Every module named in an import statement, wherever it stands."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for name in imported(path):
        while name and name not in NAMES:
            name = name.rpartition(".")[0]
        if name and name != "cogtune":
            found.add(name)
    return found - {module_name(path) if path.is_relative_to(SRC) else ""}


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_files_under_test_are_there() -> None:
    assert len(MODULES) > 25 and len(COMMANDS) >= 6
    assert own_imports(SRC / "cogtune" / "trainer.py") >= {"cogtune.checkpoint", "cogtune.config"}


def test_imports_have_no_cycle_not_even_a_late_one() -> None:
    graph = {name: own_imports(path) for name, path in NAMES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError naming the cycle
    assert order.index("cogtune.errors") < order.index("cogtune.run")


def floor_of(name: str) -> int:
    stem = name.split(".")[1]
    return 0 if stem in GROUND else 2 if stem in LOOP else 3 if stem in RUN else 1


def test_imports_go_down() -> None:
    assert {f"cogtune.{stem}" for stem in GROUND | LOOP | RUN} <= NAMES.keys()
    for name, path in NAMES.items():
        if name == "cogtune":
            continue
        for other in own_imports(path):
            assert floor_of(other) <= floor_of(name), f"{name} imports {other}, which lies above it"


def test_nothing_in_the_package_imports_commands_or_tests() -> None:
    stems = {path.stem for path in COMMANDS} | {"train", "data", "scripts", "tests"}
    for path in MODULES + COMMANDS:
        for name in imported(path):
            assert name.split(".")[0] not in stems, f"{path}: imports {name}"


def test_late_imports_are_of_other_peoples_packages_only() -> None:
    """Optional or slow ones, each with a reason; our own modules are imported at the top."""
    for path in MODULES + COMMANDS:
        for function in ast.walk(parse(path)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(n.split(".")[0] == "cogtune" for n in names), f"{path}:{getattr(node, 'lineno', 0)}"


def calls(attribute: str, owner: str = "") -> list[str]:
    """Places in src/ that call `<something>.<attribute>(`, where the something's last name has `owner` in it."""
    found = []
    for path in MODULES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute:
                value = node.func.value
                last = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
                if owner in last.lower():
                    found.append(f"{path.relative_to(SRC)}:{node.lineno}")
    return found


def test_there_is_one_loop() -> None:
    statistics = calls("backward", "autograd")  # of the frozen base, for a penalty
    assert [place.partition(":")[0] for place in statistics] == ["cogtune/prior_penalty.py"]
    passes = sorted(set(calls("backward")) - set(statistics))
    assert len(passes) == 1 and passes[0].startswith("cogtune/trainer.py"), passes
    assert len(calls("step", "optimizer")) == 1, calls("step", "optimizer")


@pytest.mark.parametrize("path", MODULES + COMMANDS, ids=ids(MODULES + COMMANDS))
def test_names_say_what_a_file_is_about(path: Path) -> None:
    banned = {"util", "utils", "helper", "helpers", "common", "misc", "base", "manager", "managers"}
    assert not banned & set(re.split(r"[_\W]+", path.stem.lower()))
    assert path.parent.name not in banned


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_files_are_short_and_documented(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    if path.name == "__init__.py":
        assert path.read_text() == "", "importing does nothing"
    else:
        assert ast.get_docstring(parse(path)), "a module says what it is"


@pytest.mark.parametrize("path", COMMANDS, ids=ids(COMMANDS))
def test_commands_are_composition_roots(path: Path) -> None:
    tree = parse(path)
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], "a command defines no class"
    # Recipes made a shipped file once and are kept to show how; they are no part of a run.
    limit = MAX_RECIPE_LINES if path.parent.name == "embedded" else MAX_COMMAND_LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    assert path.name in (ast.get_docstring(tree) or ""), "the docstring has the command that runs it"
    assert not (path.parent / "__init__.py").exists()


def test_commands_hide_no_other_module() -> None:
    """`python train/lora.py` puts train/ first on the path: a `train/json.py` would be imported by everybody."""
    dependencies = set(importlib.metadata.packages_distributions())
    for path in COMMANDS:
        assert path.stem not in sys.stdlib_module_names, path
        assert path.stem not in dependencies | {"cogtune"}, path


IMPORT_EVERYTHING = """
import importlib, logging, os, sys, warnings

def snapshot():
    root = logging.getLogger()
    return {
        "root logger": (root.level, list(root.handlers), root.disabled, logging.root.manager.disable),
        "our loggers": [name for name in logging.root.manager.loggerDict if name.startswith("cogtune")],
        "arguments": list(sys.argv),
        "folder": os.getcwd(),
        "hook": sys.excepthook,
    }

import accelerate, av, diffusers, jinja2, peft, pydantic_settings, torch, transformers, tqdm, yaml  # theirs is not ours
import torch.nn.functional as F
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft.tuners.lora.layer import Linear
before = snapshot()
theirs = {
    "attention": F.scaled_dot_product_attention,
    "transformer": CogVideoXTransformer3DModel.forward,
    "pipeline": CogVideoXPipeline.__call__,
    "lora": Linear.forward,
    "step": torch.optim.AdamW.step,
    "checkpoint": torch.utils.checkpoint.checkpoint,
    "tf32": torch.backends.cuda.matmul.allow_tf32,
    "dtype": torch.get_default_dtype(),
    "threads": torch.get_num_threads(),
}
state = torch.get_rng_state()
for name in sys.argv[1].split(","):
    importlib.import_module(name)
now = {
    "attention": F.scaled_dot_product_attention,
    "transformer": CogVideoXTransformer3DModel.forward,
    "pipeline": CogVideoXPipeline.__call__,
    "lora": Linear.forward,
    "step": torch.optim.AdamW.step,
    "checkpoint": torch.utils.checkpoint.checkpoint,
    "tf32": torch.backends.cuda.matmul.allow_tf32,
    "dtype": torch.get_default_dtype(),
    "threads": torch.get_num_threads(),
}
after = snapshot()
for part in before:
    assert before[part] == after[part], f"importing changed the {part}: {before[part]} -> {after[part]}"
for part in theirs:
    assert theirs[part] is now[part] or theirs[part] == now[part], f"importing changed {part}"
assert torch.equal(state, torch.get_rng_state()), "importing drew random numbers"
assert not torch.cuda.is_initialized(), "importing initialised CUDA"
print("nothing happened")
"""


def test_importing_does_nothing(run_process) -> None:
    modules = ",".join(name for name in sorted(NAMES) if name != "cogtune")
    done = run_process("-c", IMPORT_EVERYTHING, modules, "--no-such-option")
    assert done.out.strip().splitlines()[-1:] == ["nothing happened"], done.err
