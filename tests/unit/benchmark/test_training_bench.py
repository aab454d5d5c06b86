"""`bench.py train` and `bench.py attention` run whole on a tiny model; what fails loses no other numbers."""

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.benchmark import attention, numerics, training
from cogtune.benchmark.ceilings import StepShape, peak_flops, step_floor
from cogtune.benchmark.kernels import part_of
from cogtune.benchmark.variants import parse_variant
from cogtune.errors import UserError
from cogtune.models import read_facts


def parse(subject: Any, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    return parser.parse_args(arguments)


def bench(*options: str) -> argparse.Namespace:
    return parse(
        training, "--model", "tiny", "--device", "cpu", "--steps", "2", "--warmup", "1", "--rank", "4", *options
    )


def test_train_measures_each_way_and_its_ratio_to_the_baseline(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    variants = "keep_attention+eager,recompute+eager+stock_attention,keep_products+eager+float8,recompute+eager+nf4"
    results = training.run(bench("--variants", variants, "--baseline", "diffusers", "--check", "--json", str(file)))
    assert json.loads(file.read_text()) == json.loads(json.dumps(results))
    rows = results["variants"]
    assert list(rows) == ["diffusers", *variants.split(",")]
    for row in rows.values():
        assert 0 < row["fastest"] <= row["step_seconds"] <= row["slowest"]
        assert row["num_steps"] == 2 and row["compiled_again"] == 0 and row["data_seconds"] < row["step_seconds"]
        assert row["profile"]["parts_ms"]["linear"] > 0 and row["profile"]["kernels"]
        assert row["hardware_tflops"] >= row["model_tflops"] > 0
    exact = [rows[name]["loss"] for name in rows if "float8" not in name and "nf4" not in name]
    assert exact == pytest.approx([exact[0]] * 3, rel=1e-4), "the same batches, weights and updates"
    check = results["check"]
    assert list(check) == ["float32", "keep_all+eager+stock_attention", *variants.split(",")]
    for name, row in list(check.items())[1:]:
        low, high = (1e-4, 0.15) if "float8" in name or "nf4" in name else (0.0, 1e-5)
        assert low <= row["gradient_error"] < high, name
    table = training.describe(results)
    assert table.count(" x diffusers") == 5 and "1.00 x diffusers" in table


def test_a_variant_s_model_is_gone_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    alive: list[int] = []
    make = training.make_random_transformer

    def make_noted(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(transformer() is not None for transformer in made))
        transformer = make(*arguments, **options)
        made.append(weakref.ref(transformer))
        return transformer

    monkeypatch.setattr(training, "make_random_transformer", make_noted)
    training.run(bench("--variants", "recompute+eager,keep_all+eager", "--baseline", "diffusers"))
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("model", ["tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"])
def test_every_kind_of_model_is_measured(model: str) -> None:
    """With its image encoded in every step, and the check against float32."""
    results = training.run(
        bench("--model", model, "--variants", "recompute+eager", "--baseline", "diffusers", "--check")
    )
    ours, stock = results["variants"]["recompute+eager"], results["variants"]["diffusers"]
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-4) and ours["predicted_gib"] > 0
    assert ("image_encoding" in results) == model.endswith("i2v")
    assert not model.endswith("i2v") or results["image_encoding"]["seconds"] > 0
    assert results["check"]["recompute+eager"]["gradient_error"] < 1e-5


def test_a_compiled_way_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogtune.benchmark import variants

    configure = variants.configure_blocks
    monkeypatch.setattr(variants, "configure_blocks", lambda *a, **k: configure(*a, **k, compiler="aot_eager"))
    results = training.run(bench("--variants", "keep_attention"))
    row = results["variants"]["keep_attention"]
    assert row["compiled_again"] == 0 and row["first_step_seconds"] > 2 * row["step_seconds"]


def test_ways_that_fail_are_named_and_the_others_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = training.prepare_transformer

    def fail(transformer: Any, variant: Any, *rest: Any) -> None:
        if "stock_attention" in variant.flags:
            raise torch.OutOfMemoryError("no memory left")
        prepare(transformer, variant, *rest)

    monkeypatch.setattr(training, "prepare_transformer", fail)
    monkeypatch.setattr(training, "profile_steps", lambda *_: {}["no profiler"])
    results = training.run(bench("--variants", "recompute+eager+stock_attention,recompute+eager"))
    failed, measured = results["variants"].values()
    assert failed == {"error": "OutOfMemoryError: no memory left"}
    assert measured["step_seconds"] > 0 and "no profiler" in measured["profile"]["error"]
    table = training.describe(results)
    assert "recompute+eager+stock_attention" in table and "failed" in table


@pytest.mark.parametrize("broken", ["float32", "one way"])
def test_a_check_that_fails_ends_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = numerics._run_pass

    def fail(variant: Any, *arguments: Any) -> Any:
        computed = arguments[-1][1]
        if computed == torch.float32 if broken == "float32" else variant.name == "recompute+eager":
            raise RuntimeError("a kernel that does not compile")
        return measure(variant, *arguments)

    monkeypatch.setattr(numerics, "_run_pass", fail)
    variants = [parse_variant(name) for name in ("recompute+eager", "keep_attention+eager")]
    options = {"rank": 4, "device": torch.device("cpu"), "dtype": torch.bfloat16}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    results = numerics.check_variants(variants, "tiny", (17, 64, 96), **options)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    text = numerics.describe_check(results)
    assert "a kernel that does not compile" in text and len(text.splitlines()) == 4
    kept = results["keep_attention+eager"]
    assert kept["loss"] > 0 and ("gradient_error" in kept) == (broken == "one way")
    if broken == "one way":
        assert 1e-4 < kept["gradient_error"] < 1.5 * results["keep_all+eager+stock_attention"]["gradient_error"]


def test_attention_measures_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "attention.json"
    results = attention.run(parse(attention, "--models", "tiny,tiny-2b", "--device", "cpu", "--json", str(file)))
    assert json.loads(file.read_text()) == results
    assert [row["tokens"] for row in results.values()] == [152, 152]
    assert results["tiny"]["backends"]["default"]["forward_tflops"] > 0
    assert len(attention.describe(results).splitlines()) == 2


@pytest.mark.parametrize("name", ["quick", "recompute+quick", "diffusers+eager", "recompute+int8+nf4", ""])
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected diffusers, or one of keep_all"):
        parse_variant(name)


def test_flops_are_those_of_the_papers_formulas(skeleton_folder: Any) -> None:
    """6 N per token for linear layers trained, 2 N forward; attention 4 S^2 D."""
    facts = read_facts(skeleton_folder("cogvideox-5b"))
    shape = StepShape.of(facts, facts.num_tokens(49, 480, 720), 1)
    assert (shape.tokens, shape.width) == (17776, 3072)
    weights = 12 * 3072**2  # q, k, v, out and two of four times the width
    assert shape.linear_flops == 2 * 17776 * weights
    assert shape.attention_flops == 2 * 2 * 17776**2 * 3072
    assert 0.5e15 < 3 * 42 * (shape.linear_flops + shape.attention_flops) < 1.2e15


def test_the_floor_is_the_fastest_kernel_and_every_product_once() -> None:
    shape = StepShape(1, 10, 3, 1, 8)
    products = {name: {"forward_seconds": 1.0, "input_gradient_seconds": 2.0} for name in "ab"}
    timings = {
        "slow": {"forward_seconds": 1.0, "backward_seconds": 9.0},
        "fast": {"forward_seconds": 2.0, "backward_seconds": 3.0},
    }
    assert step_floor(shape, products, timings) == {"attention": 15.0, "linear": 18.0, "total": 33.0}
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linear"),
        ("triton_per_fused_add_native_layer_norm_backward_mm_12", "other"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_3", "other"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies to the device"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluBackward>", "other"),
    ],
)
def test_kernels_belong_to_parts(kernel: str, part: str) -> None:
    assert part_of(kernel) == part
