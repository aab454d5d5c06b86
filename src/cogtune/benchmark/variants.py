"""Ways to run a LoRA step, by name, and a random transformer set up for one of them.

A name is a rung of `cogtune.execution` and what differs from the default, joined by +: `keep_attention`,
`keep_products+float8`, `keep_attention+nf4`, `recompute+stock_attention+eager`. `diffusers` is what its own training
example does: stock LoRA layers under autocast, stock attention, no compiler, whole blocks recomputed.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig

from cogtune.adapter import add_lora
from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.attention_backends import Backend, activate
from cogtune.config import AdapterSettings
from cogtune.errors import UserError
from cogtune.execution import configure_blocks
from cogtune.frozen import encode_base, quantize_base
from cogtune.weight_codes import WeightKind

BASELINE = "diffusers"
_FLAGS = ("float8", "int8", "nf4", "stock_attention", "eager")
_ROUNDED = frozenset({"float8", "int8", "nf4"})


@dataclass(frozen=True)
class Variant:
    """One way to run a step."""

    name: str
    activations: Activations
    flags: frozenset[str] = frozenset()

    @property
    def is_baseline(self) -> bool:
        """Whether nothing of ours is in it but the optimizer and the loss."""
        return self.name == BASELINE

    @property
    def quantized(self) -> WeightKind | None:
        """How the frozen base is kept in codes."""
        return "int8" if "int8" in self.flags else "nf4" if "nf4" in self.flags else None

    @property
    def compiled(self) -> bool:
        return not self.is_baseline and "eager" not in self.flags


def parse_variant(name: str) -> Variant:
    """The variant of a name; raises `UserError` for an unknown one."""
    if name == BASELINE:
        return Variant(name, "recompute")
    rung, *flags = name.split("+")
    unknown = sorted(set(flags) - set(_FLAGS)) or len(_ROUNDED & set(flags)) > 1
    if rung not in get_args(Activations) or unknown:
        raise UserError(
            f"--variants {name}: expected {BASELINE}, or one of {', '.join(get_args(Activations))} "
            f"with any of {', '.join('+' + flag for flag in _FLAGS)} (one of {', '.join(sorted(_ROUNDED))})"
        )
    return Variant(name, rung, frozenset(flags))  # pyright: ignore[reportArgumentType]  # checked above


def prepare_transformer(
    transformer: CogVideoXTransformer3DModel,
    variant: Variant,
    settings: AdapterSettings,
    backend: Backend,
    *,
    shared: bool = False,
) -> None:
    """Adds an adapter that has left its start, and everything that the variant means; `shared` as in `execution`."""
    device = transformer.device
    if variant.is_baseline:
        _add_stock_lora(transformer, settings)
    else:
        add_lora(transformer, settings, seed=1)
    transformer.to(device)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator(device).manual_seed(2)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)
    if variant.is_baseline:
        transformer.enable_gradient_checkpointing()
        return
    if "stock_attention" not in variant.flags:
        activate(backend)
        install_attention(transformer, backend)
    if "float8" in variant.flags:
        quantize_base(transformer)
    if variant.quantized:
        encode_base(transformer, variant.quantized, device)
    configure_blocks(transformer, variant.activations, compiled=variant.compiled, has_dropout=False, shared=shared)


def _add_stock_lora(transformer: Any, settings: AdapterSettings) -> None:
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        init_lora_weights=True,
        target_modules=list(settings.target_modules),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer.add_adapter(config)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
