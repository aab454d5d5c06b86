"""What launchers say is read as they write it, and what isn't supported is refused with a remedy."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from cogtune.errors import UserError
from cogtune.parallel.strategy import Strategy, read_strategy, settings_of_our_own

ROOT = Path(__file__).resolve().parents[3]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "4"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "4"}
HSDP = FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


def launched(name: str) -> dict[str, str]:
    """The environment that accelerate's own launcher makes of one of our configs."""
    path = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, *_ = launch._validate_launch_command(arguments)
    before = dict(os.environ)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # set where it launches
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    os.environ.clear()
    os.environ.update(before)
    return environment | {"WORLD_SIZE": str(yaml.safe_load(path.read_text())["num_processes"])}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", Strategy("ddp", 2)),
        ("fsdp2", Strategy("fsdp2", 2, 2)),
        ("hsdp", Strategy("hsdp", 16, 8)),
        ("zero1", Strategy("zero1", 2, 2)),
        ("zero2", Strategy("zero2", 2, 2)),
        ("zero3", Strategy("zero3", 2, 2)),
        ("zero3-offload", Strategy("zero3", 2, 2, offload_weights=True, offload_optimizer=True)),
    ],
)
def test_each_config_is_read_through_accelerates_launcher(name: str, expected: Strategy) -> None:
    assert read_strategy(launched(name)) == expected
    text = (ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text()
    assert "Pick it" in text and f"--config_file configs/accelerate/{name}.yaml" in text


def test_processes_without_a_word_are_ddp_and_one_is_alone() -> None:
    assert read_strategy({}).kind == "single" and read_strategy({"WORLD_SIZE": "3"}) == Strategy("ddp", 3)
    assert read_strategy(FSDP2 | {"WORLD_SIZE": "1"}).kind == "single"
    assert read_strategy(ZERO | {"WORLD_SIZE": "1"}).kind == "zero2"


def test_parts_on_the_host_and_blocks_kept_whole() -> None:
    found = read_strategy(FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "False"})
    assert found.offload_weights and not found.reshard and found.shards_weights and not found.is_deepspeed
    assert "on the host: weights" in found.describe()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, "fsdp_version is 1; only 2 is supported"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "memory.mode decides"),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "4"}, "true or false is supported"),
        (HSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "3"}, "and 4 were started"),
        (HSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4"}, "nothing is divided"),
        (HSDP | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, "train.context_parallel"),
        (HSDP | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "has an effect with FSDP2 only"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "not supported"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage is 0"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "says twice|would say twice"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "none or cpu is supported"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "needs zero_stage 3"),
    ],
)
def test_what_is_not_supported_is_refused(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read_strategy(environment)


def test_accelerate_sees_nothing_that_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    before: Any = dict(os.environ)
    with settings_of_our_own():
        assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ
        assert os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    assert dict(os.environ) == before


def test_transformers_never_hears_of_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it divides the text encoder, which then can't encode: seen with accelerate 1.15 on GPUs."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with settings_of_our_own():
        known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # what accelerate makes and keeps
        assert is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()
    assert known.is_zero3()
