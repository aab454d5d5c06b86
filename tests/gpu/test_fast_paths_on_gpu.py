"""Each fast path of a training step against eager float32: kernels, fused products, float8; and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training_on_gpu import compute_loss, loss_and_gradients, make_blocks

from cogtune.adapter import adapter_parameters
from cogtune.arrangement import Activations
from cogtune.attention import install_attention
from cogtune.attention_backends import Backend, activated, check_backend, choose_backend, is_installed, measure_backends
from cogtune.config import AdapterSettings
from cogtune.errors import UserError
from cogtune.execution import configure_blocks
from cogtune.frozen import Float8Base, quantize_base
from cogtune.low_rank import adapted_linear

GPU = torch.device("cuda")
HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_float8 = pytest.mark.skipif(not HAS_FLOAT8, reason="needs compute capability 8.9 or newer")


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch._dynamo.reset()


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).norm() / second.double().norm())


def errors(fast: Any, dtype: torch.dtype, settings: AdapterSettings | None = None) -> tuple[float, float, float]:
    """Of the fast path's loss and gradients, and of the plain low precision's gradients, from eager float32."""
    loss, gradients = loss_and_gradients(make_blocks(torch.float32, settings=settings))
    plain = distance(loss_and_gradients(make_blocks(dtype, settings=settings))[1], gradients)
    fast_loss, fast_gradients = loss_and_gradients(fast)
    return float(abs(fast_loss - loss) / loss), distance(fast_gradients, gradients), plain


@pytest.mark.parametrize("backend", ["default", "cudnn", "flash", "efficient", "flash3", "flash4"])
def test_every_attention_kernel_is_as_exact_as_the_plain_model(backend: Backend) -> None:
    if not is_installed(backend):
        pytest.skip(f"the package of {backend} is not installed")
    with activated(backend):
        fast = make_blocks(torch.bfloat16)
        install_attention(fast, backend)
        configure_blocks(fast, "keep_attention", compiled=True, has_dropout=False)
        loss_error, error, plain = errors(fast, torch.bfloat16)
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == 1 and counters["graph_break"] == {}
        with torch.compiler.set_stance("fail_on_recompile"):
            loss_and_gradients(fast)
    assert loss_error < 2e-3
    assert error < max(0.03, 1.2 * plain), (error, plain)


@pytest.mark.parametrize(
    "settings",
    [AdapterSettings(rank=16, use_dora=True), AdapterSettings(rank=10, alpha=4.0, target_modules=["to_v", "to_out.0"])],
)
def test_other_adapters_are_compiled_and_as_exact(settings: AdapterSettings) -> None:
    fast = make_blocks(torch.bfloat16, settings=settings)
    install_attention(fast, "default")
    configure_blocks(fast, "keep_attention", compiled=True, has_dropout=False)
    loss_error, error, plain = errors(fast, torch.bfloat16, settings)
    assert loss_error < 2e-3 and error < max(0.03, 1.2 * plain), (error, plain)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size_in", "size_out"), [(512, 1536), (2048, 512)])
def test_one_product_with_the_update_is_as_exact_as_two(size_in: int, size_out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(GPU).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=GPU, generator=generator) / shape[-1] ** 0.5

    values = [draw(3000, size_in), draw(size_out, size_in), draw(size_out), draw(16, size_in), draw(size_out, 16)]
    grad = draw(3000, size_out)

    def run(function: Callable[..., torch.Tensor], precision: torch.dtype) -> list[torch.Tensor]:
        low = [value.to(dtype).to(precision).requires_grad_(number in (0, 3, 4)) for number, value in enumerate(values)]
        y = function(*low)
        return [y, *torch.autograd.grad(y, [low[0], low[3], low[4]], grad.to(dtype).to(precision))]

    def apart(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> Any:
        return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)

    exact = run(apart, torch.float32)
    for compiled in (False, True):
        function = torch.compile(adapted_linear, fullgraph=True) if compiled else adapted_linear
        for got, plain, expected in zip(run(function, dtype), run(apart, dtype), exact, strict=True):
            assert distance(got, expected) < 1.1 * distance(plain, expected) + 1e-4


@needs_float8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gpus_float8_product_is_the_one_that_a_cpu_emulates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(768, 256, generator=generator), torch.randn(768, generator=generator)
    x, grad = (torch.randn(2, 333, size, generator=generator).to(dtype) for size in (256, 768))
    found = []
    for device in ("cpu", "cuda"):
        layer = Float8Base(weight.to(device), bias.to(device))
        results = []
        for part in (layer, layer.part(256, 512)):  # a part's memory for the gradient has gaps
            leaf = x.to(device).requires_grad_()
            y = part(leaf)
            results += [y, *torch.autograd.grad(y, leaf, grad[..., : y.shape[-1]].to(device))]
        found.append([result.detach().cpu() for result in results])
    for emulated, real in zip(*found, strict=True):
        assert real.dtype == dtype and real.norm() > 1
        assert distance(real, emulated) < 0.01, "bfloat16 results, sums in the tensor cores' precision"


@needs_float8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["keep_products", "keep_attention"])
def test_float8_steps_are_near_and_every_layer_gets_its_gradient(activations: Activations, dtype: torch.dtype) -> None:
    fast = make_blocks(dtype)
    install_attention(fast, "default")
    assert quantize_base(fast) == 12
    configure_blocks(fast, activations, compiled=True, has_dropout=False)
    loss_error, error, plain = errors(fast, dtype)
    assert loss_error < 0.01 and plain < error < 0.15, (loss_error, error, plain)
    for name, parameter in adapter_parameters(fast).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        loss_and_gradients(fast)


@needs_float8
def test_float8_takes_no_more_memory_for_weights() -> None:
    sizes = []
    for float8 in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        transformer = make_blocks(torch.bfloat16)
        install_attention(transformer, "default")
        if float8:
            quantize_base(transformer)
        sizes.append(torch.cuda.memory_allocated() - before)
        del transformer
    assert sizes[1] < 1.02 * sizes[0]


@needs_float8
def test_a_float8_job_is_near_the_exact_one(
    make_job: Callable[..., Path], run_command: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    losses = []
    for float8 in (False, True):
        job = make_job(tiny_folder, train={"float8_base": float8, "max_steps": 6}, validation={"enabled": False})
        folder = tmp_path / f"run-{float8}"
        outcome = run_command("train/lora.py", "--config", job, f"--output_dir={folder}")
        assert outcome.code == 0, outcome.err
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
        assert ("float8" in (folder / "config.yaml").read_text().splitlines()[0]) == float8
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_measured_kernels_run_and_the_chosen_one_is_not_slow() -> None:
    shape: dict[str, Any] = {"num_heads": 8, "head_dim": 64, "dtype": torch.bfloat16, "device": GPU}
    timings = measure_backends(batch_size=1, tokens=4096, **shape)
    assert {"flash", "efficient"} <= timings.keys()
    assert all(timing.forward > 0 and timing.backward > 0 for timing in timings.values())
    chosen = choose_backend("auto", timings)
    assert timings[chosen].total <= 1.06 * min(timing.total for timing in timings.values())
    for backend in timings:
        check_backend(backend, **shape)


def test_kernels_without_support_are_refused_before_weights_load(
    make_job: Callable[..., Path], run_command: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.attention=flash: does not run on .* in float32"):
        check_backend("flash", num_heads=8, head_dim=64, dtype=torch.float32, device=GPU)
    job = make_job(tiny_folder, model={"dtype": "float32"}, train={"attention": "flash"})
    outcome = run_command("train/lora.py", "--config", job, "--dry-run")
    assert outcome.code == 2 and "train.attention=flash: does not run on" in outcome.err
    if not is_installed("flash3"):
        outcome = run_command("train/lora.py", "--config", make_job(tiny_folder, train={"attention": "flash3"}))
        assert outcome.code == 2 and "flash_attn_interface" in outcome.err
    assert not (tmp_path / "run").exists()


def test_older_gpus_refuse_float8(
    make_job: Callable[..., Path], run_command: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    outcome = run_command("train/lora.py", "--config", make_job(tiny_folder, train={"float8_base": True}), "--dry-run")
    assert outcome.code == 2 and "compute capability 8.9" in outcome.err and "train.float8_base=false" in outcome.err


def test_a_step_after_one_without_memory_is_the_same() -> None:
    """An out-of-memory error in the middle of a step leaves nothing behind that changes the next."""
    fast = make_blocks(torch.bfloat16)
    install_attention(fast, "default")
    configure_blocks(fast, "keep_attention", compiled=True, has_dropout=False)
    loss, gradients = loss_and_gradients(fast)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            held = [compute_loss(fast) for _ in range(64)]
            del held
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    again, gradients_again = loss_and_gradients(fast)
    assert torch.equal(loss, again)
    assert distance(gradients_again, gradients) < 1e-3, "sums over tokens may be made in another order"
