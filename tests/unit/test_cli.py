"""Settings from YAML and command line: precedence, types, and every error in one report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.cli import build_config, parse_run
from cogtune.config import RunConfig
from cogtune.errors import UserError

RELEASED = sorted((Path(__file__).parents[2] / "configs").glob("*/cogvideox-*.yaml"))


@pytest.fixture
def parse(tmp_path: Path) -> Callable[..., RunConfig]:
    def call(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "my-run.yaml"
        path.write_text(text)
        return parse_run("test", ["--config", str(path), *overrides]).config

    return call


def test_a_learning_rate_written_1e_4_is_a_number(parse) -> None:
    assert isinstance(yaml.safe_load("x: 1e-4")["x"], str), "YAML 1.1 alone reads text"
    assert parse("optimizer: {learning_rate: 1e-4}").optimizer.learning_rate == 1e-4
    assert parse("", "--optimizer.learning_rate=2e-5").optimizer.learning_rate == 2e-5


def test_command_line_wins_over_the_file_and_the_file_over_defaults(parse) -> None:
    text = "train: {max_steps: 7, batch_size: 3}\nadapter: {rank: 8}\n"
    config = parse(text, "--train.max_steps=9", "--adapter.alpha", "4")
    assert (config.train.max_steps, config.train.batch_size, config.train.seed) == (9, 3, 42)
    assert (config.adapter.rank, config.adapter.alpha) == (8, 4.0)


def test_lists_and_nulls_on_the_command_line(parse) -> None:
    config = parse(
        "validation: {seeds: [5]}",
        "--adapter.target_modules=to_q",
        "--adapter.target_modules=to_k",
        "--validation.seeds=[1,2]",
        "--optimizer.max_grad_norm=null",
        "--model.path=some/where",
    )
    assert config.adapter.target_modules == ["to_q", "to_k"]
    assert config.validation.seeds == [1, 2]
    assert config.optimizer.max_grad_norm is None
    assert config.model.path == "some/where"


@pytest.mark.parametrize("joined", [True, False])
def test_a_prompt_with_commas_stays_one_prompt(parse, joined: bool) -> None:
    prompts = ["A ship, at sea, in fog", 'He said "no", then left', "plain"]
    option = "--validation.prompts"
    arguments = [part for p in prompts for part in ([f"{option}={p}"] if joined else [option, p])]
    assert parse("", *arguments).validation.prompts == prompts


def test_a_regular_expression_with_a_comma_stays_one_target(parse) -> None:
    pattern = r"[a-z_]+\.[0-9]{1,2}\.attn1\.to_q"
    for arguments in ([f"--adapter.target_modules={pattern}"], ["--adapter.target_modules", pattern]):
        assert parse("adapter: {target_modules: [to_v]}", *arguments).adapter.target_modules == [pattern]


def test_text_lists_may_be_json(parse) -> None:
    assert parse("", '--validation.prompts=["a, b", "c"]').validation.prompts == ["a, b", "c"]


def test_output_dir_follows_the_config_file(parse) -> None:
    assert parse("").output_dir == Path("runs/my-run")
    assert parse("output_dir: elsewhere").output_dir == Path("elsewhere")
    assert parse("output_dir: elsewhere", "--output_dir=third").output_dir == Path("third")


def test_dry_run_is_an_option_of_its_own() -> None:
    assert not parse_run("test", []).dry_run
    assert parse_run("test", ["--dry-run", "--train.seed=3"]).dry_run


@pytest.mark.parametrize(
    "text, expected",
    [
        ("train: {max_stepps: 3}", ["train.max_stepps", "did you mean train.max_steps?"]),
        ("optimiser: {learning_rate: 1e-4}", ["optimiser", "did you mean optimizer?"]),
        ("train: {max_steps: many}", ["train.max_steps", "integer", "'many'"]),
        ("train: {max_steps: 0}", ["train.max_steps", "greater than or equal to 1", "0"]),
        ("train: {caption_dropout: 1.5}", ["train.caption_dropout", "1.5"]),
        ("memory: {mode: frugal}", ["memory.mode", "'recompute'", "'frugal'"]),
        ("train: 3", ["train", "3"]),
        ("validation: {prompts: ['']}", ["validation.prompts", "empty"]),
        ("data: {validation_manifest: v, validation_clips: 3}", ["exclude each other"]),
        ("- a\n- b", ["my-run.yaml", "expected sections", "list"]),
        ("train: {max_steps: [", ["my-run.yaml", "not valid YAML"]),
    ],
)
def test_a_wrong_setting_is_named(parse, text: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert all(part in str(caught.value) for part in expected), str(caught.value)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--train.max_stepps=3", ["--train.max_stepps", "did you mean --train.max_steps?"]),
        ("--dry-rum", ["--dry-rum", "did you mean --dry-run?"]),
        ("--train.max_steps=many", ["train.max_steps", "many"]),
        ("--zzzzzzzzz=1", ["unknown option --zzzzzzzzz"]),
    ],
)
def test_a_wrong_option_is_named(argument: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_run("test", [argument])
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert "zzz" not in argument or "did you mean" not in str(caught.value)


def test_all_errors_come_in_one_report(parse) -> None:
    text = """
    model: {dtype: int4}
    train: {max_steps: -1, seed: x, epochs: 3}
    adapter: {rank: 0, dropout: 2}
    """
    with pytest.raises(UserError) as caught:
        parse(text, "--schedule.name=step")
    for name in ("model.dtype", "train.max_steps", "train.seed", "train.epochs", "adapter.rank", "adapter.dropout"):
        assert name in str(caught.value)
    assert "schedule.name" in str(caught.value)


def test_missing_and_binary_config_files_are_named(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "none.yaml", "No such file"), (tmp_path, "directory")]:
        with pytest.raises(UserError, match=f"{path}.*{reason}"):
            parse_run("test", ["--config", str(path)])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"train: \xff\xfe")
    with pytest.raises(UserError, match=r"binary\.yaml: not valid YAML"):
        parse_run("test", ["--config", str(binary)])


def test_environment_variables_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_DIR", "/from/the/environment")
    monkeypatch.setenv("MODEL", '{"path": "from/environment"}')
    config = parse_run("test", []).config
    assert config.output_dir == Path("runs/run") and config.model.path == "tiny"


def test_help_lists_every_setting_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_run("the command", ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name, section in RunConfig.model_fields.items():
        for key in getattr(section.annotation, "model_fields", {}):
            assert f"--{name}.{key}" in text
    assert "Peak learning rate." in text


def test_every_setting_has_a_docstring() -> None:
    for name, section in RunConfig.model_fields.items():
        assert section.description, name
        for key, field in getattr(section.annotation, "model_fields", {}).items():
            assert field.description, f"{name}.{key}"


def test_saved_config_reads_back_as_the_same_config(parse) -> None:
    config = parse("data: {manifest: clips, fps: 8}\nadapter: {alpha: 16}\nvalidation: {prompts: ['a, b']}")
    saved = yaml.safe_load(yaml.safe_dump(config.to_plain()))
    assert build_config(saved) == config


def test_every_shipped_config_loads(root: Path) -> None:
    others = {"accelerate", "compare"}  # no run's config; tested below and in test_comparison.py
    shipped = sorted(path for path in (root / "configs").rglob("*.yaml") if not others & set(path.parts))
    for path in shipped:
        config = parse_run("test", ["--config", str(path), "--data.manifest=clips"]).config
        assert config.output_dir.name, path
    if any((root / "configs").rglob("*.yaml")):
        assert shipped, "configs/ has YAML files, but none for a run"


def test_every_shipped_accelerate_config_loads(root: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted((root / "configs" / "accelerate").glob("*.yaml")):
        assert load_config_from_file(str(path)).num_processes >= 1, path


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_of_released_models_have_a_plan(
    path: Path, skeleton_folder: Callable[[str], Path], clips_folder: Path, run_command: Any
) -> None:
    """A dry run on a folder of the right shape, without weights."""
    script = {"lora": "train/lora.py", "sft": "train/sft.py"}[path.parent.name]
    model = yaml.safe_load(path.read_text())["model"]["path"]
    done = run_command(
        script, "--config", path, f"--model.path={skeleton_folder(model)}",
        f"--data.manifest={clips_folder}", "--dry-run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"model       {model} at" in done.out
    assert ("noise on its pixels" in done.out) == model.endswith("i2v")
    assert ("45,104 a sample" if "1.5" in model else "17,776 a sample") in done.out
