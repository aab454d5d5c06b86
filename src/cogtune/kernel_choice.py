"""The attention kernel of a run: measured on its shape, the same on all processes where that decides the last bits."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cogtune.attention import install_attention
from cogtune.attention_backends import Backend, activate, hint_at_package, pick_backend
from cogtune.cluster.whereabouts import enter
from cogtune.parallel.shared_samples import SharedSample
from cogtune.plan import TrainingPlan


def choose_attention(
    plan: TrainingPlan, accelerator: Accelerator, transformer: Any, shared: SharedSample | None
) -> Backend:
    """Measures the kernels, takes one and installs it; says what was measured."""
    enter("measuring attention kernels")
    train, device = plan.config.train, accelerator.device
    heads, tokens = plan.facts.num_heads, plan.tokens
    if shared is not None:
        heads, tokens = shared.attention_shape(heads, tokens)
    before = None if plan.ways is None else plan.ways.attention
    backend, timings = pick_backend(
        train.attention,
        before=before,
        batch_size=train.batch_size,
        num_heads=heads,
        tokens=tokens,
        head_dim=plan.facts.head_dim,
        dtype=plan.dtype,
        device=device,
    )
    if train.deterministic and accelerator.num_processes > 1:  # each has measured for itself
        told: list[Any] = broadcast_object_list([backend])
        backend = told[0]
        activate(backend)
    team = None if shared is None else shared.attention
    install_attention(transformer, backend, team, fuse=not plan.strategy.shards_weights)
    measured = ", ".join(f"{name} {1e3 * timing.total:.1f} ms" for name, timing in timings.items())
    measured = f" (a layer's step: {measured})" if measured else ""
    hint = ""
    if before is not None and before != backend:
        hint = f" (the run began with {before}: equal up to rounding from here on)"
    elif train.attention == "auto" and not train.deterministic:
        hint = hint_at_package(device)
    accelerator.print(f"attention   {backend}{measured}{hint}")
    return backend
