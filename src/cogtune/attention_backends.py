"""Which attention kernel a run takes: measured on its own shape and device before the first step."""

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogtune import flash4
from cogtune.errors import UserError

Backend = Literal["default", "math", "cudnn", "flash", "efficient", "flash3", "flash4"]

SDPA_BACKENDS: dict[Backend, list[SDPBackend]] = {
    "default": [],
    "math": [SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "flash3": [SDPBackend.FLASH_ATTENTION],
    "flash4": [SDPBackend.FLASH_ATTENTION],
}


class _Package(NamedTuple):
    """What takes over PyTorch's flash backend once it is activated."""

    implementation: str
    """The name under which PyTorch knows it."""
    modules: tuple[str, ...]
    remedy: str
    """What to do where a module is missing."""


_PACKAGES: dict[Backend, _Package] = {
    "flash3": _Package("FA3", ("flash_attn_interface",), "install flash_attn_interface"),
    # FlashAttention-2 brings flash_attn.cute along, but not its compiler, cutlass.
    "flash4": _Package(flash4.IMPLEMENTATION, ("cutlass", "flash_attn.cute"), "pip install 'cogtune[flash4]'"),
}
_SMALL_SCORES = 2**26
"""Bytes of float32 scores up to which a CPU computes attention in 16 bits by plain products. Its fused kernel takes
11.4 ms there for 184 tokens and 32 heads in all, forward and backward; these take 7.9, and round less."""
CLEARLY_FASTER = 0.95
"""A backend takes the place of the one before it in the list only below this part of its time, so that noise in the
measurement does not change the kernel, and with it the last bits of a result, between a run and its continuation."""
_CANDIDATES: tuple[Backend, ...] = ("cudnn", "flash", "efficient", "flash3", "flash4")
_REPEATS = 3
_PROBE_TOKENS = 256
# What kernels and the packages around them raise for a shape, a precision or a device that they don't take.
_REFUSALS = (RuntimeError, ImportError, AssertionError, ValueError, TypeError, AttributeError, NotImplementedError)


class Layer(TypedDict):
    """What of an attention layer decides how fast a kernel is."""

    batch_size: int
    num_heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class BackendTiming:
    """Seconds of one attention layer, forward and backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def is_installed(backend: Backend) -> bool:
    """Whether the modules behind a backend are there and this PyTorch can hand attention to them."""
    if backend not in _PACKAGES:
        return True
    with contextlib.suppress(ModuleNotFoundError):  # a missing parent package
        found = all(importlib.util.find_spec(module) for module in _PACKAGES[backend].modules)
        return found and hasattr(torch_attention, "activate_flash_attention_impl")
    return False


def activate(backend: Backend) -> None:
    """Makes PyTorch's flash backend the one that `backend` means, for this process."""
    if backend == "flash4":
        flash4.register()
    if backend in _PACKAGES:
        torch_attention.activate_flash_attention_impl(_PACKAGES[backend].implementation)
    elif getattr(torch_attention, "current_flash_attention_impl", lambda: None)() is not None:
        torch_attention.restore_flash_attention_impl()


@contextlib.contextmanager
def activated(backend: Backend) -> Iterator[None]:
    """`activate` for a while."""
    activate(backend)
    try:
        yield
    finally:
        activate("default")


def check_backend(
    wanted: Literal["auto"] | Backend, *, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises `UserError` for a backend that can't run here, after a try on a few tokens; no weight is loaded for it."""
    if wanted in ("auto", "default"):
        return
    if device.type != "cuda":
        raise UserError(f"train.attention={wanted}: a kernel for GPUs, and this run is on a CPU; use auto or default")
    if not is_installed(wanted):
        package = _PACKAGES[wanted]
        raise UserError(
            f"train.attention={wanted}: needs {' and '.join(package.modules)}, and a PyTorch that hands over attention "
            f"(2.11 or later; this is {torch.__version__}): {package.remedy}, or use auto"
        )
    timings = measure_backends(
        batch_size=1,
        num_heads=num_heads,
        tokens=_PROBE_TOKENS,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        candidates=(wanted,),
    )
    if wanted not in timings:
        if torch.are_deterministic_algorithms_enabled():
            raise UserError(
                f"train.attention={wanted}: does not run on {torch.cuda.get_device_name(device)}, or sums in no fixed "
                "order there, and train.deterministic=true; use auto, or turn that off"
            )
        raise UserError(
            f"train.attention={wanted}: does not run on {torch.cuda.get_device_name(device)} in "
            f"{str(dtype).removeprefix('torch.')} with heads of {head_dim}; use auto"
        )


def measure_backends(
    *, candidates: tuple[Backend, ...] | None = None, backward: bool = True, **layer: Unpack[Layer]
) -> dict[Backend, BackendTiming]:
    """Seconds by backend for those that take this layer on its device; on a CPU the default alone.

    Where the process is deterministic, only those whose gradients come out the same, bit for bit. Not `backward`: the
    forward pass alone is tried, and compiled where that is needed; the other one counts as nothing.
    """
    device = layer["device"]
    if candidates is None:
        candidates = _CANDIDATES if device.type == "cuda" else ("default",)
    # The layout that the projections leave: heads beside one another within a token.
    shape = (layer["batch_size"], layer["tokens"], layer["num_heads"], layer["head_dim"])
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(shape, device=device, dtype=layer["dtype"], generator=generator).transpose(1, 2) for _ in range(4)
    )
    inputs = (query.requires_grad_(backward), key.requires_grad_(backward), value.requires_grad_(backward))
    found: dict[Backend, BackendTiming] = {}
    for backend in candidates:
        if not is_installed(backend):
            continue
        try:
            with activated(backend):
                found[backend] = _measure(backend, inputs, grad, device)
        except _REFUSALS:
            continue
    return found


def pick_backend(
    wanted: Literal["auto"] | Backend, *, before: Backend | None = None, **layer: Unpack[Layer]
) -> tuple[Backend, dict[Backend, BackendTiming]]:
    """Takes a kernel for the layer, makes it active for the process, and says what was measured for that: on a GPU,
    unless PyTorch's own choice is wanted. A CPU takes PyTorch's, but for small layers in 16 bits.

    `before` is what `auto` came to once; it is taken again on a GPU where it still runs.
    """
    on_gpu = layer["device"].type == "cuda"
    timings = measure_backends(**layer) if on_gpu and wanted != "default" else {}
    backend = choose_backend(wanted, timings)
    if wanted == "auto" and before is not None and before in timings:
        backend = before
    if wanted == "auto" and not on_gpu and layer["dtype"] != torch.float32:
        scores = 4 * layer["batch_size"] * layer["num_heads"] * layer["tokens"] ** 2
        backend = "math" if scores <= _SMALL_SCORES else backend
    activate(backend)
    return backend, timings


def _measure(
    backend: Backend, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], grad: torch.Tensor, device: torch.device
) -> BackendTiming:
    best = (float("inf"), float("inf"))
    first: tuple[torch.Tensor, ...] = ()
    backends = SDPA_BACKENDS[backend]
    with sdpa_kernel(backends) if backends else contextlib.nullcontext():
        for _ in range(1 + _REPEATS):
            marks = [_now(device)]
            y = torch.nn.functional.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])
            marks.append(_now(device))
            gradients = torch.autograd.grad(y, inputs, grad) if y.requires_grad else ()
            marks.append(_now(device))
            best = min(best, (marks[1] - marks[0], marks[2] - marks[1]), key=sum)
            if torch.are_deterministic_algorithms_enabled():
                found = tuple(gradient.cpu() for gradient in gradients)
                first = first or found
                if not all(torch.equal(*pair) for pair in zip(found, first, strict=True)):
                    raise RuntimeError(f"{backend} sums in no fixed order")
            del gradients
    return BackendTiming(*best)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def choose_backend(wanted: Literal["auto"] | Backend, timings: dict[Backend, BackendTiming]) -> Backend:
    """The fastest of the measured backends, or the wanted one; raises `UserError` where that one can't be had."""
    if wanted != "auto":
        if wanted not in timings and wanted != "default":
            known = ", ".join(["default", *timings])
            raise UserError(
                f"train.attention={wanted}: does not run here for this shape and precision; these do: {known}. "
                "Choose one of them, or auto"
            )
        return wanted
    best: Backend = "default"
    for backend, timing in timings.items():
        if best == "default" or timing.total < CLEARLY_FASTER * timings[best].total:
            best = backend
    return best


def hint_at_package(device: torch.device) -> str:
    """What to install for a faster kernel on this device, in brackets; empty where nothing is known to be."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9 or is_installed("flash4"):
        return ""
    return f" (FlashAttention-4 is faster on this GPU: {_PACKAGES['flash4'].remedy})"
