"""What can't go with a strategy is refused all at once, with what to do."""

import pytest
import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.parallel.compatibility import check_strategy
from cogtune.parallel.strategy import Strategy

FSDP2, ZERO2, DDP = Strategy("fsdp2", 4, 4), Strategy("zero2", 4, 4), Strategy("ddp", 4)


@pytest.mark.parametrize("strategy", [FSDP2, ZERO2])
def test_every_setting_is_named(strategy: Strategy) -> None:
    config = RunConfig.model_validate(
        {
            "train": {"float8_base": True, "cuda_graph": True},
            "memory": {"resident_blocks": 3, "offloaded_blocks": 5, "leaving_blocks": 2},
        }
    )
    with pytest.raises(UserError) as caught:
        check_strategy(config, strategy, torch.bfloat16, full=False)
    message = str(caught.value)
    for name in (
        "float8_base",
        "cuda_graph",
        "resident_blocks=3",
        "offloaded_blocks=5",
        "leaving_blocks=2",
        "ddp.yaml",
    ):
        assert name in message
    check_strategy(config, DDP, torch.bfloat16, full=False)


def test_an_optimizer_elsewhere_is_refused_in_full_fine_tuning() -> None:
    for optimizer in ("host", "8bit"):
        config = RunConfig.model_validate({"memory": {"optimizer": optimizer}})
        with pytest.raises(UserError, match=f"memory.optimizer={optimizer}"):
            check_strategy(config, FSDP2, torch.bfloat16, full=True)


def test_what_deepspeed_rounds() -> None:
    decomposed = RunConfig.model_validate({"adapter": {"use_dora": True}})
    two_rates = RunConfig.model_validate({"optimizer": {"lora_plus_ratio": 16}})
    for name, config in {"adapter.use_dora": decomposed, "optimizer.lora_plus_ratio=16": two_rates}.items():
        with pytest.raises(UserError, match=name):
            check_strategy(config, ZERO2, torch.bfloat16, full=False)
        check_strategy(config, FSDP2, torch.bfloat16, full=False)
    check_strategy(decomposed, ZERO2, torch.float32, full=False)


def test_averages_and_parts_go_with_all() -> None:
    train = {"ema_decay": 0.9, "trained_weights": ["attention"]}
    config = RunConfig.model_validate({"train": train, "checkpoint": {"asynchronous": "on"}})
    for strategy in (DDP, FSDP2, *(Strategy(kind, 4, 4) for kind in ("zero1", "zero2", "zero3"))):
        check_strategy(config, strategy, torch.bfloat16, full=True)
