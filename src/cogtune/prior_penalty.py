"""A penalty on what an adapter changes in the base model's predictions for prior clips, beside the prior clips' loss.

What the update D = s B A of a linear layer changes in a prediction for a prior sample is, to second order and layer by
layer, the mean square tr(D X D' G) T / N: X is the mean of x x' over the layer's inputs, G that of g g' over the
gradients at its outputs of the prediction's product with a random normal tensor, T the layer's rows and N the numbers
of a sample. These are the Kronecker factors of the Gauss-Newton matrix (arXiv:1503.05671) of the distance to the base's
predictions. They are taken once, from the base alone; the gradients of the penalty are products of small matrices and
have no sampling noise, where prior clips bring a few samples to each step.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cogtune.adapter import ADAPTER_NAME, LoraLinear, linear_names, match_targets
from cogtune.config import RunConfig
from cogtune.dataset import Batch
from cogtune.denoiser import Denoiser
from cogtune.diffusion import add_noise
from cogtune.draws import make_generator
from cogtune.errors import UserError
from cogtune.manifest import Clip
from cogtune.memory import MemoryPlan
from cogtune.parallel.strategy import Strategy

_SHARED_INPUTS = ("to_q", "to_k", "to_v")


@dataclass
class Factors:
    """What a layer's inputs and gradients come to: X float32 [in, in], G float32 [out, out], and T / N."""

    inputs: Tensor
    gradients: Tensor
    share: float


class PriorPenalty:
    """`strength` times the mean square of what the adapter changes in predictions for prior samples."""

    def __init__(self, transformer: nn.Module, factors: dict[str, Factors], strength: float) -> None:
        """`factors` by the adapted layers' names."""
        layers = adapted_layers(transformer)
        self._layers = [(layers[name], own) for name, own in factors.items()]
        self._strength = strength

    def value(self) -> Tensor:
        """The penalty as it is now, float32; `add_gradients` adds its gradients without autograd."""
        total = []
        for layer, factors in self._layers:
            down, up, scaling = _matrices(layer)
            inside, outside = down @ factors.inputs @ down.t(), up.t() @ factors.gradients @ up
            total.append(scaling**2 * factors.share * (inside * outside).sum())
        return self._strength * torch.stack(total).sum()

    @torch.no_grad()
    def add_gradients(self, scale: Tensor) -> None:
        """Adds the penalty's gradients, times the loss scale, to those of the adapter's matrices; nothing waits."""
        for layer, factors in self._layers:
            down, up, scaling = _matrices(layer)
            seen, felt = down @ factors.inputs, factors.gradients @ up  # [r, in], [out, r]
            factor = scale * (2 * self._strength * scaling**2 * factors.share)
            _add(down, (up.t() @ felt) @ seen, factor)
            _add(up, felt @ (seen @ down.t()), factor)


def _add(parameter: nn.Parameter, gradient: Tensor, factor: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.mul_(factor)
    else:
        parameter.grad.addcmul_(gradient, factor)


def adapted_layers(transformer: nn.Module) -> dict[str, Any]:
    """The layers with the adapter by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLinear)}


def _name_inputs(layer: str) -> str:
    """What a layer's inputs are called: the same for layers that see the same."""
    parent, _, own = layer.rpartition(".")
    return f"{parent}.qkv" if own in _SHARED_INPUTS else layer


def _matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight, layer.scaling[ADAPTER_NAME]


class _Collector:
    """Sums over a layer's inputs and gradients, while it is called."""

    def __init__(self, layer: Any, shared: "_Collector | None") -> None:
        self._shared = shared
        self.inputs: Tensor | None = None
        self.gradients: Tensor | None = None
        self.num_inputs = self.num_gradients = 0
        self._handle = layer.register_forward_hook(self._hook)

    def remove(self) -> None:
        self._handle.remove()

    def source(self) -> "_Collector":
        """Whose sum of inputs is this layer's too."""
        return self._shared or self

    def _hook(self, _layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._shared is None:
            rows = arguments[0].detach().flatten(0, -2).float()
            self.inputs = _add_square(self.inputs, rows)
            self.num_inputs += len(rows)
        if not output.requires_grad:  # nothing before it has a gradient: the base is frozen
            output = output.detach().requires_grad_()
        output.register_hook(self._take_gradient)
        return output

    def _take_gradient(self, gradient: Tensor) -> None:
        rows = gradient.detach().flatten(0, -2).float()
        self.gradients = _add_square(self.gradients, rows)
        self.num_gradients += len(rows)


def _add_square(total: Tensor | None, rows: Tensor) -> Tensor:
    return rows.t() @ rows if total is None else total.addmm_(rows.t(), rows)


def collect_factors(
    transformer: Any,
    batches: Iterable[Batch],
    denoiser: Denoiser,
    *,
    base: Callable[[], AbstractContextManager[None]],
    seed: int,
    add_up: Callable[[Tensor], object] | None = None,
) -> dict[str, Factors]:
    """Takes every adapted layer's factors from the base model's forward and backward passes over prior samples.

    Before layers are fused or compiled. `add_up` sums a tensor over the processes, in place; each has a batch at least.
    """
    collectors: dict[str, _Collector] = {}
    first: dict[str, _Collector] = {}
    for name, layer in adapted_layers(transformer).items():
        collectors[name] = _Collector(layer, first.get(_name_inputs(name)))
        first.setdefault(_name_inputs(name), collectors[name])
    on_gpu = next(transformer.parameters()).device.type == "cuda"
    if on_gpu:  # else a large model's activations would not fit
        transformer.enable_gradient_checkpointing()
    num_numbers = 0
    try:
        for batch in batches:
            with base(), torch.enable_grad():
                predicted = _predict(transformer, batch, denoiser)
                shape = predicted.shape[1:]
                directions = [torch.randn(shape, generator=make_generator("penalty", seed, p)) for p in batch.positions]
                torch.autograd.backward(predicted, torch.stack(directions).to(predicted))
            num_numbers += predicted.numel()
    finally:
        for collector in collectors.values():
            collector.remove()
        if on_gpu:
            transformer.disable_gradient_checkpointing()
    return _join(collectors, num_numbers, add_up)


def _predict(transformer: Any, batch: Batch, denoiser: Denoiser) -> Tensor:
    noisy = add_noise(batch.latents, batch.noise, batch.timesteps, denoiser.alphas_cumprod)
    return denoiser.predict(transformer, noisy, batch.embeddings, batch.timesteps, batch.image)


def _join(
    collectors: dict[str, _Collector], num_numbers: int, add_up: Callable[[Tensor], object] | None
) -> dict[str, Factors]:
    """Means over all processes' rows; layers with the same inputs share a matrix."""

    def add(values: Tensor) -> Tensor:
        if add_up is not None:
            add_up(values)
        return values

    means: dict[int, Tensor] = {}
    found = {}
    for name, collector in collectors.items():
        assert collector.gradients is not None, f"no gradient reached {name}"
        source = collector.source()
        counts = torch.tensor([source.num_inputs, collector.num_gradients, num_numbers], dtype=torch.float64)
        num_inputs, num_gradients, numbers = add(counts.to(collector.gradients.device)).tolist()
        if source.inputs is not None:
            means[id(source)] = add(source.inputs).div_(num_inputs)
            source.inputs = None
        found[name] = Factors(means[id(source)], add(collector.gradients).div_(num_gradients), num_gradients / numbers)
    return found


def count_factor_bytes(transformer: nn.Module, config: RunConfig) -> int:
    """Memory of the factors, from a transformer's shapes."""
    linears: dict[str, Any] = dict(transformer.named_modules())
    names = match_targets(linear_names(transformer), config.adapter.target_modules)
    inputs = {_name_inputs(name): linears[name].in_features for name in names}
    outputs = [linears[name].out_features for name in names]
    return 4 * sum(width**2 for width in [*inputs.values(), *outputs])


def check_prior_penalty(
    config: RunConfig, strategy: Strategy, memory: MemoryPlan, clips: list[Clip], *, full: bool
) -> None:
    """Raises `UserError` for `train.prior_penalty` where it can't be had."""
    strength = config.train.prior_penalty
    if strength is None:
        return
    divided = strategy.is_fsdp or strategy.is_deepspeed or config.train.context_parallel > 1
    reasons = {
        "full fine-tuning (train/sft.py) has no adapter": full,
        'no clip of the manifest is marked `prior`; mark some ("prior": true, data/README.md)': not any(
            clip.prior and clip.weight for clip in clips
        ),
        "adapter.use_dora must be false": config.adapter.use_dora,
        f"a base that is divided over processes ({strategy.describe()}) can't be asked yet; take one process or DDP": (
            divided
        ),
        f"a base in {memory.quantized} can't be asked; set memory.quantized_base=none": memory.quantized is not None,
        "blocks that wait on the host can't be asked yet; leave out memory.resident_blocks, or, where the GPU has no "
        "room for all of them, take fewer adapter.target_modules, a smaller rank or a larger card": memory.num_resident
        is not None,
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if wrong:
        raise UserError(
            f"train.prior_penalty={strength:g}: {'; '.join(wrong)}; change that, or remove train.prior_penalty"
        )
