"""AdamW for full fine-tuning in little memory: bfloat16 weights, state in 8 bits, a step inside the backward pass.

Each weight is updated in float32 as soon as its gradient is there, and the gradient is freed: at no time are there more
of them than one block's. There is no float32 copy of the weights; they are rounded stochastically, so that updates
smaller than bfloat16's resolution are kept in the mean. The random bits follow from seed, step and parameter alone.

A step can't be clipped by its gradients' norm, which is known when it is over. Each gradient is scaled down as if the
norm were the larger one of two numbers: the geometric mean of recent steps' norms, and the norm of all gradients that
the step has brought so far. So a single bad step can't do harm, whatever the steps before it were like.
"""

import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogtune.config import OptimizerSettings
from cogtune.draws import derive_seed
from cogtune.eight_bit import BLOCK, dequantize, make_tables, quantize, round_stochastically

SMALLEST_QUANTIZED = 4096
"""What has fewer numbers, is a vector or no multiple of a block has float32 state: under 0.1 % of a released model."""
CHUNK = 1 << 22
"""Numbers that are updated at once: some 50 bytes of float32 and other intermediate tensors for each."""
NORM_DECAY = 0.9
"""Of the mean of the logarithm of past steps' norms."""
_NAMES_8BIT = ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales")
_NAMES_FLOAT32 = ("exp_avg", "exp_avg_sq")


def is_quantized(parameter: Tensor) -> bool:
    """Whether a weight's state is kept in 8 bits."""
    return parameter.ndim > 1 and parameter.numel() >= SMALLEST_QUANTIZED and parameter.numel() % BLOCK == 0


def _decide(norm: Tensor, squares: Tensor, failed: Tensor, past: Tensor, limit: Tensor) -> list[Tensor]:
    """Takes a gradient's norm into the step's: its squares, whether it failed, whether to update, and the factor.

    `squares` are those of the step so far, `past` is a norm to expect, `limit` the largest one: scalars on the device.
    """
    squares = squares + norm.square()
    failed = torch.maximum(failed, (~squares.isfinite()).float())
    return [squares, failed, 1 - failed, (limit / (torch.maximum(squares.sqrt(), past) + 1e-6)).clamp(max=1.0)]


def _adamw(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, bits: Tensor, numbers: list[Tensor]) -> None:
    """One step of a piece [n] with float32 moments, in place; nothing changes where `numbers[0]` is zero.

    `numbers` are float32 scalars on the device, so that a compiled step needs no other graph when they change: whether
    to step, gradient factor, betas, decay factor 1 - rate x weight decay, rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t),
    eps.
    """
    wanted, factor, beta1, beta2, decay, rate, root, eps = numbers
    gradient = gradient.float() * factor
    mean_now = mean * beta1 + gradient * (1 - beta1)
    square_now = square * beta2 + gradient.square() * (1 - beta2)
    updated = weight.float() * decay - rate * mean_now / (square_now.sqrt() * root + eps)
    keep = wanted == 0
    weight.copy_(torch.where(keep, weight, round_stochastically(updated, bits)))
    mean.copy_(torch.where(keep, mean, mean_now))
    square.copy_(torch.where(keep, square, square_now))


def _adamw_8bit(
    weight: Tensor,
    gradient: Tensor,
    state: list[Tensor],
    tables: list[Tensor],
    bits: Tensor,
    numbers: list[Tensor],
) -> None:
    """The same with moments as codes [n] and scales [n / 256]: mean, root of the second moment."""
    values, limits, root_values, root_limits = tables
    mean = dequantize(state[0], state[1], values)
    square = dequantize(state[2], state[3], root_values).square()
    _adamw(weight, gradient, mean, square, bits, numbers)
    keep = numbers[0] == 0
    moments = quantize(mean, limits, signed=True), quantize(square.sqrt(), root_limits, signed=False)
    for old, new in zip(state, [*moments[0], *moments[1]], strict=True):
        old.copy_(torch.where(keep, old, new))


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW whose updates run in hooks of the backward pass; `step` only counts."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        settings: OptimizerSettings,
        *,
        seed: int,
        state: Mapping[nn.Parameter, dict[str, Tensor]] | None = None,
        compiled: bool = False,
        compiler: str = "inductor",
    ) -> None:
        """`state`: what there is of it (`make_state`), wherever it waits; what is missing is made at the first step."""
        defaults = {
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        super().__init__(parameters, defaults)
        assert all(p.dtype == torch.bfloat16 and p.is_contiguous() for p in parameters)
        for parameter, tensors in (state or {}).items():
            self.state[parameter].update(tensors)
        self.device = parameters[0].device
        self._seed = seed
        self._limit = torch.full((), settings.max_grad_norm or math.inf, device=self.device)
        self._generator = torch.Generator(self.device)
        self._tables = [table for signed in (True, False) for table in make_tables(self.device, signed=signed)]
        self.num_steps = 0
        """Steps that are over."""
        self.log_norm: Tensor | None = None
        """Mean of the logarithm of past steps' norms; None before the first one."""
        self.squares = torch.zeros((), device=self.device)
        """Sum of this step's squared gradients so far."""
        self.failed = torch.zeros((), device=self.device)
        self._numbers: list[Tensor] = []
        self._past = torch.zeros((), device=self.device)
        self._functions: list[Callable[..., Any]] = [_decide, _adamw, _adamw_8bit]
        if compiled:
            compile_it = partial(torch.compile, dynamic=True, fullgraph=True, backend=compiler)
            self._functions = [compile_it(function) for function in self._functions]
            self._warm_up()
        own: weakref.ref[EightBitAdamW] = weakref.ref(self)
        # Python doesn't find a cycle through a hook: optimizer and weights would never go
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(_update, own, index))

    def _warm_up(self) -> None:
        """Compiles before the backward pass, whose hooks run in a thread of autograd's."""
        decide, update, update_8bit = self._functions
        scalars = [torch.zeros((), device=self.device) for _ in range(8)]
        for size in (4 * BLOCK, 8 * BLOCK):
            weight, gradient = (torch.zeros(size, dtype=torch.bfloat16, device=self.device) for _ in range(2))
            bits = torch.zeros(size, dtype=torch.int16, device=self.device)
            with torch.no_grad():
                decide(*scalars[:4], self._limit)
                update(weight, gradient, weight.float(), weight.float(), bits, scalars)
                update_8bit(weight, gradient, list(_make_codes(weight).values()), self._tables, bits, scalars)

    @torch.no_grad()
    def _update(self, index: int, parameter: nn.Parameter) -> None:
        """Takes a gradient into its weight; whether to is decided on the device."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        quantized = is_quantized(parameter)
        state = self.state[parameter]
        if not state:
            state.update(make_state(parameter))
        if not self._numbers:
            self._numbers = self._make_numbers()
        weight, gradient = parameter.detach().view(-1), gradient.reshape(-1)
        decide, update, update_8bit = self._functions
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self.squares, self.failed, *now = decide(norm, self.squares, self.failed, self._past, self._limit)
        numbers = [*now, *self._numbers]
        self._generator.manual_seed(derive_seed("rounding", self._seed, self.num_steps, index))
        kept = [state[name].view(-1) for name in (_NAMES_8BIT if quantized else _NAMES_FLOAT32)]
        for start in range(0, len(weight), CHUNK):
            piece = slice(start, start + CHUNK)
            size = len(weight[piece])
            bits = torch.randint(
                -0x8000, 0x8000, (size,), dtype=torch.int16, device=self.device, generator=self._generator
            )
            if not quantized:
                update(weight[piece], gradient[piece], kept[0][piece], kept[1][piece], bits, numbers)
                continue
            blocks = slice(start // BLOCK, (start + size) // BLOCK)
            state_piece = [kept[0][piece], kept[1][blocks], kept[2][piece], kept[3][blocks]]
            update_8bit(weight[piece], gradient[piece], state_piece, self._tables, bits, numbers)

    def _make_numbers(self) -> list[Tensor]:
        """What all updates of a step share; written by kernels, so that nothing waits."""
        if self.log_norm is not None:
            self._past = self.log_norm.exp()
        group: dict[str, Any] = self.param_groups[0]
        (beta1, beta2), rate, count = group["betas"], group["lr"], self.num_steps + 1
        values = (
            beta1,
            beta2,
            1 - rate * group["weight_decay"],
            rate / (1 - beta1**count),
            (1 - beta2**count) ** -0.5,
            group["eps"],
        )
        return [torch.full((), value, dtype=torch.float32, device=self.device) for value in values]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The backward pass is over, and with it the step."""
        assert closure is None
        self.num_steps += 1
        self._numbers = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient outlives its hook."""


def _update(optimizer: "weakref.ref[EightBitAdamW]", index: int, parameter: nn.Parameter) -> None:
    own = optimizer()
    assert own is not None, "the weights are trained on, but their optimizer is gone"
    own._update(index, parameter)


def make_state(weight: Tensor) -> dict[str, Tensor]:
    """A weight's moments before its first step, on its device."""
    if is_quantized(weight):
        return _make_codes(weight)
    return {name: torch.zeros_like(weight.detach(), dtype=torch.float32) for name in _NAMES_FLOAT32}


def _make_codes(weight: Tensor) -> dict[str, Tensor]:
    """Moments of zero: codes don't matter where the scale is zero."""
    count, device = weight.numel(), weight.device
    sizes = [(count, torch.uint8), (count // BLOCK, torch.float32)] * 2
    made = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in sizes]
    return dict(zip(_NAMES_8BIT, made, strict=True))


class EightBitGuard:
    """The norm of a step and whether all was finite, as `optimization.StepGuard` tells it; never waits on its own.

    From the first gradient on that is not finite, no weight changes any more.
    """

    num_skipped = 0

    def __init__(self, optimizer: EightBitAdamW) -> None:
        self._optimizer = optimizer
        self.scale = torch.ones((), device=optimizer.device)

    def apply(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Tensor:
        """After the backward pass: the norm of its gradients before clipping, float32 on the device."""
        del parameters
        own = self._optimizer
        assert optimizer is own
        norm = own.squares.sqrt()
        log_norm = norm.clamp(min=1e-12).log()
        own.log_norm = log_norm if own.log_norm is None else own.log_norm.lerp(log_norm, 1 - NORM_DECAY)
        own.squares = torch.zeros_like(own.squares)
        return norm

    def has_failed(self) -> bool:
        """Whether the run must stop; waits for the device."""
        return bool(self._optimizer.failed.item())

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps beside the moments."""
        kept = {"scale": 1.0, "good": 0.0, "skipped": 0.0, "steps": float(self._optimizer.num_steps)}
        log_norm = self._optimizer.log_norm
        return kept if log_norm is None else kept | {"log_norm": log_norm.item()}

    def load(self, state: dict[str, float]) -> None:
        """Puts a checkpoint's values back."""
        own = self._optimizer
        own.num_steps = int(state["steps"])
        own.log_norm = torch.full_like(own.squares, state["log_norm"]) if "log_norm" in state else None
