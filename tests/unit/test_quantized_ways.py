"""Which ways to keep the frozen base are on the ladder, when one is taken unasked, and what is refused."""

from typing import Any

import pytest
import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.ladder import choose_rung, describe_rungs, fits
from cogtune.machine import NOMINAL, Machine
from cogtune.memory import GIB, MARGIN, MemoryPlan
from cogtune.models import make_meta_transformer, read_facts
from cogtune.parallel.strategy import Strategy
from cogtune.quantized_ways import check_quantized_base, count_coded, list_base_ways
from cogtune.training_rungs import list_training_rungs

HOST = 110 * GIB


def make_config(**memory: Any) -> RunConfig:
    return RunConfig.model_validate({"memory": memory})


@pytest.fixture
def make_rungs(skeleton_folder: Any) -> Any:
    """The ladder of a LoRA on 5B at its own size with so much free memory."""
    facts = read_facts(skeleton_folder("cogvideox-5b"))
    num_parameters = sum(p.numel() for p in make_meta_transformer(facts).parameters())

    def make(free_gib: float, machine: Machine = NOMINAL, **memory: Any) -> list[MemoryPlan]:
        return list_training_rungs(
            facts, make_config(**memory), dtype=torch.bfloat16, machine=machine, tokens=17_776,
            free_bytes=int(free_gib * GIB), num_parameters=num_parameters, num_trainable=66_000_000,
        )  # fmt: skip

    return make


def choose(rungs: list[MemoryPlan], free_gib: float, **memory: Any) -> MemoryPlan:
    return choose_rung(rungs, make_config(**memory).memory, int(free_gib * GIB), HOST)


def kinds(config: RunConfig) -> list[str | None]:
    with torch.device("meta"):
        block = make_block()
    return [way["coded"].kind if way else None for way in list_base_ways(config, block, torch.float32)]


def make_block() -> Any:
    from cogtune.random_pipeline import make_random_transformer

    transformer: Any = make_random_transformer("tiny", seed=0, device=torch.device("meta"), dtype=torch.float32)
    return transformer.transformer_blocks[0]


def test_unasked_the_base_is_exact_and_what_is_asked_for_is_the_only_way() -> None:
    assert kinds(make_config()) == kinds(make_config(quantized_base="none")) == [None]
    assert kinds(make_config(quantized_base="nf4")) == ["nf4"]
    assert kinds(make_config(allow_quantized_base=True)) == [None, "int8", "nf4"]


def test_a_block_of_5b_takes_half_and_a_third(skeleton_folder: Any) -> None:
    block = make_meta_transformer(read_facts(skeleton_folder("cogvideox-5b"))).transformer_blocks[0]
    total = 2 * sum(p.numel() for p in block.parameters())
    parts = {}
    for kind in ("int8", "nf4"):
        coded = count_coded(block, kind, torch.bfloat16)
        assert coded is not None and coded.num_parameters == 12 * 3072**2 + 2 * 6 * 3072 * 512
        assert coded.num_largest == 4 * 3072**2
        parts[kind] = 1 - coded.saved_bytes / total
    modulations, products = 2 * 6 * 3072 * (512 + 4), 12 * 3072**2 * 4.25 / 8
    assert coded.num_bytes == modulations + products
    assert parts == pytest.approx({"int8": 0.5, "nf4": 0.30}, abs=0.01)


def test_weights_on_device_and_host_are_counted(make_rungs: Any) -> None:
    plans = {
        kind: {
            (rung.activations, rung.num_resident): rung
            for rung in make_rungs(200, quantized_base=kind, offloaded_blocks=0, lean_blocks=0)
        }
        for kind in ("none", "int8", "nf4")
    }
    exact = plans["none"]["keep_attention", None]
    for kind, low, high in (("int8", 0.5, 0.52), ("nf4", 0.3, 0.33)):
        whole = plans[kind]["keep_attention", None]
        assert low < whole.weights / exact.weights < high and whole.quantized == kind
        assert whole.workspace - exact.workspace == 2 * 4 * 3072**2, "the largest layer's decoded weight"
        assert (whole.kept, whole.trainable, whole.host) == (exact.kept, exact.trainable, 0)
        assert whole.name() == f"keep_attention, frozen base in {kind}"
        assert 1 < whole.seconds / exact.seconds < 1.03, "decoding takes time"
    for kind, low, high in (("int8", 0.5, 0.52), ("nf4", 0.29, 0.31)):
        (exact,) = make_rungs(200, mode="recompute", resident_blocks=0, offloaded_blocks=0)
        (streamed,) = make_rungs(200, mode="recompute", resident_blocks=0, offloaded_blocks=0, quantized_base=kind)
        assert low < streamed.host / exact.host < high and streamed.weights < exact.weights


def test_little_host_memory_is_a_reason(make_rungs: Any) -> None:
    little = 7 * GIB
    with pytest.raises(UserError, match=r"under LoRA set memory\.quantized_base=nf4 \(another result"):
        choose_rung(make_rungs(7.4), make_config().memory, int(7.4 * GIB), little)
    allowed = make_config(allow_quantized_base=True).memory
    assert choose_rung(make_rungs(7.4, allow_quantized_base=True), allowed, int(7.4 * GIB), little).quantized


def test_allowed_it_is_taken_where_nothing_exact_fits_and_only_then_on_a_fast_link(make_rungs: Any) -> None:
    everything = make_rungs(3.0, allow_quantized_base=True)
    exact, smallest = (
        min(rung.total for rung in everything if rung.quantized == kind or kind == "any") for kind in (None, "any")
    )
    tight, roomy = (exact + smallest) / 2 / MARGIN / GIB, 20.0
    with pytest.raises(UserError, match="the smallest plan needs"):
        choose(make_rungs(tight), tight)
    rungs = make_rungs(tight, allow_quantized_base=True)
    taken = choose(rungs, tight, allow_quantized_base=True)
    assert taken.quantized is not None and taken.total <= tight * GIB
    table = describe_rungs(rungs, taken, int(tight * GIB), HOST)
    assert "frozen base in int8" in table and "frozen base in nf4" in table
    assert any("<- fastest that fits" in line and taken.name() in line for line in table.splitlines())
    assert choose(make_rungs(roomy, allow_quantized_base=True), roomy, allow_quantized_base=True).quantized is None


def test_allowed_it_is_taken_where_it_is_clearly_faster(make_rungs: Any) -> None:
    """Over a slow link a block's copy takes longer than its work."""
    slow, free = Machine(NOMINAL.flops, 3e9), 9.0
    exact = choose(make_rungs(free, slow), free)
    taken = choose(make_rungs(free, slow, allow_quantized_base=True), free, allow_quantized_base=True)
    assert taken.quantized is not None and taken.seconds * 1.02 < exact.seconds
    for machine in (slow, NOMINAL):
        rungs = make_rungs(free, machine, allow_quantized_base=True)
        chosen = choose(rungs, free, allow_quantized_base=True)
        fastest = min(rung.seconds for rung in rungs if fits(rung, int(free * GIB), HOST))
        assert chosen.seconds <= fastest * 1.05


@pytest.mark.parametrize(
    ("changes", "full", "message"),
    [
        ({"memory": {"quantized_base": "int8"}}, True, "quantized_base=int8: is for LoRA"),
        ({"memory": {"allow_quantized_base": True}}, True, "allow_quantized_base=true: is for LoRA"),
        (
            {"memory": {"quantized_base": "none", "allow_quantized_base": True}},
            False,
            "allow_quantized_base=true: has no effect beside memory.quantized_base=none",
        ),
        (
            {"memory": {"quantized_base": "nf4"}, "adapter": {"use_dora": True}},
            False,
            "quantized_base=nf4: can't go with adapter.use_dora",
        ),
        (
            {"memory": {"allow_quantized_base": True}, "train": {"float8_base": True}},
            False,
            "allow_quantized_base=true: can't go with train.float8_base",
        ),
    ],
)
def test_what_can_not_be_is_refused(changes: dict[str, Any], full: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_quantized_base(RunConfig.model_validate(changes), Strategy(), full=full)


def test_what_can_be_is_not() -> None:
    for full, memory in ((True, {}), (True, {"quantized_base": "none"}), (False, {"quantized_base": "int8"})):
        check_quantized_base(make_config(**memory), Strategy(), full=full)
    check_quantized_base(make_config(allow_quantized_base=True), Strategy(), full=False)


def test_divided_weights_are_exact() -> None:
    for kind in ("fsdp2", "zero2"):
        with pytest.raises(UserError, match="codes are no parameters that"):
            check_quantized_base(make_config(quantized_base="int8"), Strategy(kind, 2, 2), full=False)
        check_quantized_base(make_config(), Strategy(kind, 2, 2), full=False)
