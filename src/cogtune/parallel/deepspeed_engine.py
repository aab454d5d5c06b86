"""DeepSpeed ZeRO 1 to 3: its engine drives the step, by the training config's numbers and with our AdamW.

Checkpoints and averages are not DeepSpeed's: they are made of each process's float32 weights and AdamW's state where
DeepSpeed has them (`zero_parts`).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from cogtune.config import RunConfig
from cogtune.formats.tensors import Tensors
from cogtune.optimization import FIRST_LOSS_SCALE, MAX_OVERFLOWS_IN_A_ROW, SCALE_GROWTH_STEPS, make_optimizer
from cogtune.parallel.engine import Engine
from cogtune.parallel.strategy import Strategy
from cogtune.parallel.zero_parts import ZeroParts
from cogtune.shards.parts import Parts, make_saved_state, write_parts
from cogtune.shards.pieces import Piece

_SMALLEST_LOSS_SCALE = 2.0**-MAX_OVERFLOWS_IN_A_ROW


def make_settings(config: RunConfig, strategy: Strategy, dtype: torch.dtype, *, compiled: bool) -> dict[str, Any]:
    """DeepSpeed's settings, from the training config and what the launcher said."""
    train = config.train
    # ZeRO-3 puts a function of its own in the place of PyTorch's `linear`, so that no gathered weight is kept for the
    # backward pass. Compiled blocks keep none; but torch 2.11 compiled that function for each weight's number, block by
    # block, until it gave up.
    zero: dict[str, Any] = {"stage": int(strategy.kind[-1]), "memory_efficient_linear": not compiled}
    if strategy.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if strategy.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "zero_optimization": zero,
        "steps_per_print": 1 << 62,
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train_batch_size": train.batch_size * train.gradient_accumulation_steps * strategy.num_processes,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW updates on a host too; DeepSpeed's own would be compiled first, and round in another way.
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif dtype == torch.float16:
        settings["fp16"] = {
            "enabled": True,
            "initial_scale_power": int(torch.tensor(FIRST_LOSS_SCALE).log2()),
            "loss_scale_window": SCALE_GROWTH_STEPS,
            "hysteresis": 1,
            "min_loss_scale": _SMALLEST_LOSS_SCALE,
        }
    if train.gradient_accumulation_steps > 1 and strategy.kind != "zero1":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


class DeepSpeedSteps(torch.optim.Optimizer):
    """DeepSpeed's step as the loop's optimizer and its guard: clipping, loss scale and finite check are DeepSpeed's.

    A bad step is skipped by DeepSpeed; without a loss scale, all later ones are then skipped here.
    """

    def __init__(self, engine: Any, device: torch.device, *, use_loss_scale: bool) -> None:
        self._engine, self._use_scale = engine, use_loss_scale
        self._norm = torch.zeros((), device=device)
        self.scale = torch.ones((), device=device)
        """DeepSpeed scales the loss itself."""
        self.num_skipped = 0
        self._bad_in_a_row, self._failed = 0, False
        super().__init__(engine.optimizer.optimizer.param_groups, {})
        self.param_groups = engine.optimizer.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """DeepSpeed's step; the norm that `apply` gave is filled in by it."""
        assert closure is None
        if self._failed:
            return
        self._engine.step()
        overflow = bool(self._engine.optimizer.overflow)
        norm = self._engine.get_global_grad_norm()
        self._norm.fill_(float("inf") if overflow or norm is None else float(norm))
        self._bad_in_a_row = self._bad_in_a_row + 1 if overflow else 0
        self.num_skipped += int(overflow and self._use_scale)
        self._failed = self._bad_in_a_row >= (MAX_OVERFLOWS_IN_A_ROW if self._use_scale else 1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed does it with the step."""

    def apply(self, optimizer: Any, parameters: list[nn.Parameter]) -> Tensor:
        """The norm, on the device, which the step fills in."""
        del parameters
        assert optimizer is self
        return self._norm

    def has_failed(self) -> bool:
        """Whether the run must stop."""
        return self._failed

    def state_of_guard(self) -> dict[str, float]:
        """What a checkpoint keeps, as `StepGuard` reads it."""
        scaler = self._engine.optimizer.loss_scaler
        good = scaler.cur_iter - scaler.last_overflow_iter - 1 if self._use_scale else 0
        return {"scale": float(scaler.cur_scale), "good": float(good), "skipped": float(self.num_skipped)}

    def load_guard(self, state: dict[str, float]) -> None:
        """Puts a checkpoint's values back."""
        self.num_skipped = int(state["skipped"])
        if self._use_scale:
            scaler = self._engine.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_iter = state["scale"], int(state["good"])
            scaler.last_overflow_iter = -1


class DeepSpeedGuard:
    """`DeepSpeedSteps` under a guard's names."""

    def __init__(self, steps: DeepSpeedSteps) -> None:
        self._steps = steps
        self.scale, self.apply, self.has_failed = steps.scale, steps.apply, steps.has_failed
        self.state, self.load = steps.state_of_guard, steps.load_guard

    @property
    def num_skipped(self) -> int:
        """Steps skipped by overflows of float16."""
        return self._steps.num_skipped


class DeepSpeedStore:
    """A `saving.Store` of what DeepSpeed has divided: its float32 weights, not the copies that compute."""

    def __init__(
        self, engine: Any, parameters: dict[str, nn.Parameter], device: torch.device, *, is_main: bool
    ) -> None:
        self._device, self._is_main = device, is_main
        self._zero_parts = ZeroParts(engine, parameters)
        self.parts: Parts = self._zero_parts

    def read_weights(self) -> dict[str, Tensor]:
        """`Store.read_weights`."""
        return self._gather(self._zero_parts.pieces())

    def read_optimizer(self) -> dict[str, Tensor]:
        """`Store.read_optimizer`; the number of steps is one for all."""
        found = self._gather(self._zero_parts.moments())
        if not found:
            return {}
        step = self._zero_parts.step().detach().float().cpu()
        return found | {f"{name}.step": step.clone() for name in self._zero_parts.pieces()}

    def _gather(self, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
        found = {}
        for name, piece in pieces.items():
            whole = torch.zeros(math.prod(piece.shape), device=self._device)
            whole[piece.start : piece.stop] = piece.data.to(self._device)
            dist.reduce(whole, dst=0)
            if self._is_main:
                found[name] = whole.view(piece.shape).cpu()
        return found

    def largest_moments(self) -> dict[str, Tensor]:
        """`Store.largest_moments`."""
        firsts = {name: piece for name, piece in self._zero_parts.moments().items() if name.endswith(".exp_avg")}
        if not firsts:
            return {}
        parts = [piece.data.to(self._device) for piece in firsts.values()]
        largest = torch.stack([part.abs().max() if part.numel() else part.new_zeros(()) for part in parts])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return {name.removesuffix(".exp_avg"): value for name, value in zip(firsts, largest.unbind(), strict=True)}

    def write_weights(self, weights: Tensors) -> None:
        """`Store.write_weights`: the float32 ones, and the copies that compute."""
        write_parts(self.parts.weights(), weights)
        self.parts.publish()

    def write_optimizer(self, state: Tensors) -> None:
        """`Store.write_optimizer`."""
        write_parts(make_saved_state(self.parts, state), state)


def make_deepspeed_engine(
    accelerator: Accelerator,
    transformer: Any,
    parameters: dict[str, nn.Parameter],
    *,
    config: RunConfig,
    strategy: Strategy,
    dtype: torch.dtype,
    compiled: bool,
    initial: Tensors | None,
) -> Engine:
    """The loop's engine around DeepSpeed's; `initial` are the trained weights, which are in `dtype` in the model."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    settings = make_settings(config, strategy, dtype, compiled=compiled)
    if strategy.kind == "zero3":
        set_z3_leaf_modules(transformer, [CogVideoXBlock])  # a block is gathered as one, by hooks around its call
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        # One weight after the other: `initialize` would put the whole model on each device first.
        deepspeed.init_distributed()
        deepspeed.zero.Init(module=transformer, config_dict_or_path=settings, dtype=dtype)
        for module in transformer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(accelerator.device))
    optimizer = make_optimizer(list(parameters.values()), config.optimizer)
    # Not `accelerator.prepare`, which does this on GPUs only.
    engine, *_ = deepspeed.initialize(model=transformer, optimizer=optimizer, config=settings)
    store = DeepSpeedStore(engine, parameters, accelerator.device, is_main=accelerator.is_main_process)
    if initial is not None:
        store.write_weights(initial)
    steps = DeepSpeedSteps(engine, accelerator.device, use_loss_scale=dtype == torch.float16)

    @contextlib.contextmanager
    def accumulating(is_last: bool) -> Iterator[None]:
        engine.set_gradient_accumulation_boundary(is_last)
        yield

    backward = partial(engine.backward, scale_wrt_gas=False)  # the loop has divided the loss already
    return Engine(engine, steps, DeepSpeedGuard(steps), store, backward, accumulating)
