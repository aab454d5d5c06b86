"""Where full fine-tuning keeps weights and state: 8 bits are on the ladder only where the user lets them."""

from typing import Any

import pytest
import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.ladder import choose_rung, describe_rungs
from cogtune.machine import NOMINAL
from cogtune.memory import GIB, MemoryPlan
from cogtune.models import make_meta_transformer
from cogtune.optimizer_ways import check_optimizer, list_optimizer_ways
from cogtune.parallel.strategy import Strategy
from cogtune.random_pipeline import make_architecture_facts
from cogtune.training_rungs import list_training_rungs

FACTS = make_architecture_facts("cogvideox-5b")
DEVICE, EIGHT, HOST = {}, {"eight_bit": True}, {"on_host": True}


def make_config(memory: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> RunConfig:
    return RunConfig.model_validate({"memory": memory or {}, "train": train or {}})


def make_rungs(free_gib: float, **memory: Any) -> list[MemoryPlan]:
    """Full fine-tuning of 5B, released size, batch 1."""
    return list_training_rungs(
        FACTS,
        make_config(memory),
        dtype=torch.bfloat16,
        machine=NOMINAL,
        tokens=FACTS.num_tokens(49, 480, 720),
        free_bytes=int(free_gib * GIB),
        num_parameters=0,
        num_trainable=sum(p.numel() for p in make_meta_transformer(FACTS).parameters()),
    )


def choose(free_gib: float, **memory: Any) -> MemoryPlan:
    config = make_config(memory)
    return choose_rung(make_rungs(free_gib, **memory), config.memory, int(free_gib * GIB), 120 * GIB)


def test_ways() -> None:
    bfloat16 = torch.bfloat16
    assert list_optimizer_ways(make_config(), bfloat16, GIB) == [DEVICE, HOST]
    allowed = make_config({"allow_8bit_optimizer": True})
    assert list_optimizer_ways(allowed, bfloat16, GIB) == [DEVICE, EIGHT, HOST]
    assert list_optimizer_ways(allowed, torch.float32, GIB) == [DEVICE, HOST]
    assert list_optimizer_ways(allowed, torch.float16, GIB) == [DEVICE]
    assert list_optimizer_ways(allowed, bfloat16, None) == [DEVICE], "a CPU has one memory"
    for name, way in (("device", DEVICE), ("8bit", EIGHT), ("host", HOST)):
        assert list_optimizer_ways(make_config({"optimizer": name}), bfloat16, GIB) == [way]


def test_8_bits_are_chosen_by_themselves_only_where_the_user_lets_them() -> None:
    assert choose(38).on_host
    chosen = choose(38, allow_8bit_optimizer=True)
    assert chosen.eight_bit and not chosen.on_host and chosen.total <= 38 * GIB
    small = choose(16, allow_8bit_optimizer=True)
    assert small.eight_bit and small.streams_trained and small.num_resident is not None and small.total <= 16 * GIB
    roomy = choose(300, allow_8bit_optimizer=True)
    assert not (roomy.eight_bit or roomy.on_host), "of equally fast ones the exact one"
    assert choose(300, optimizer="8bit").eight_bit
    least = choose(5, optimizer="8bit", mode="recompute")
    assert least.streams_trained and least.total <= 0.95 * 5 * GIB


def test_8_bits_stay_on_the_device_where_they_fit() -> None:
    chosen = choose(120, optimizer="8bit")
    assert chosen.num_resident is None and chosen.host == 0
    for free_gib in (36, 22, 14, 7, 5):
        chosen = choose(free_gib, optimizer="8bit")
        assert chosen.streams_trained and chosen.total <= 0.95 * free_gib * GIB


def test_blocks_that_stay_can_be_set_by_hand_where_trained_ones_are_streamed() -> None:
    (rung,) = make_rungs(36, optimizer="8bit", resident_blocks=7, mode="recompute", offloaded_blocks=0)
    assert rung.num_resident == 7 and rung.streams_trained
    allowed = make_rungs(36, allow_8bit_optimizer=True, resident_blocks=7)
    assert all(rung.streams_trained and rung.num_resident == 7 for rung in allowed), "no other way streams them"
    with pytest.raises(UserError, match="resident_blocks=7: frozen weights are streamed, but full fine-tuning freezes"):
        make_rungs(36, resident_blocks=7)
    assert make_rungs(36, resident_blocks=42), "all"


def test_the_table_shows_each_way() -> None:
    rungs = make_rungs(38, allow_8bit_optimizer=True)
    table = describe_rungs(rungs, choose(38, allow_8bit_optimizer=True), 38 * GIB, 120 * GIB)
    (line,) = [line for line in table.splitlines() if "<- fastest that fits" in line]
    assert "8-bit optimizer state" in line
    assert "weights and optimizer on the host" in table and "keep_all  does not fit" in table


@pytest.mark.parametrize(
    ("train", "dtype", "message"),
    [
        ({}, torch.float16, "weights are kept in bfloat16, not float16"),
        ({"cuda_graph": True}, torch.bfloat16, "train.cuda_graph must be false"),
        ({"ema_decay": 0.9}, torch.bfloat16, "train.ema_decay must be null"),
        ({"gradient_accumulation_steps": 3}, torch.bfloat16, "train.gradient_accumulation_steps must be 1"),
    ],
)
def test_what_8_bits_can_not_go_with_is_named(train: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(UserError, match=f"memory.optimizer=8bit: {message}.*; or set memory.optimizer=device"):
        check_optimizer(make_config({"optimizer": "8bit"}, train), dtype, Strategy(), full=True)
    check_optimizer(make_config({"optimizer": "8bit"}), torch.bfloat16, Strategy(), full=True)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="needs one process"):
        check_optimizer(make_config({"optimizer": "8bit"}), torch.bfloat16, Strategy(), full=True)


@pytest.mark.parametrize(
    ("adapter", "strategy", "full", "message"),
    [
        ({}, Strategy(), True, "it is for a LoRA's matrices"),
        ({"use_dora": True}, Strategy(), False, "DoRA's magnitudes are no matrices"),
        ({}, Strategy("fsdp2", 2, 2), False, "it needs whole matrices, and FSDP2: .* in 2 parts; take one process"),
        ({}, Strategy("zero1", 2, 2), False, "it needs whole matrices, and DeepSpeed ZeRO-1"),
    ],
)
def test_what_muon_can_not_go_with_is_named(
    adapter: dict[str, Any], strategy: Strategy, full: bool, message: str
) -> None:
    config = RunConfig.model_validate({"optimizer": {"name": "muon"}, "adapter": adapter})
    with pytest.raises(UserError, match=f"optimizer.name=muon: {message}.*; or set optimizer.name=adamw"):
        check_optimizer(config, torch.float32, strategy, full=full)
    plain = RunConfig.model_validate({"optimizer": {"name": "muon"}})
    for kind in ("single", "ddp"):
        check_optimizer(plain, torch.float32, Strategy(kind, 2, 1), full=False)


def test_lora_plus_is_for_lora() -> None:
    config = RunConfig.model_validate({"optimizer": {"lora_plus_ratio": 4}})
    with pytest.raises(UserError, match=r"full fine-tuning .* has no LoRA; remove it"):
        check_optimizer(config, torch.bfloat16, Strategy(), full=True)
    check_optimizer(config, torch.bfloat16, Strategy(), full=False)
