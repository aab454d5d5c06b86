"""`bench.py generate` and `bench.py prepare` run whole on a tiny model, and a failing way loses no other's numbers."""

import argparse
import json
from pathlib import Path

import pytest

from cogtune.benchmark import generation, preparation
from cogtune.errors import UserError


def parse(subject: object, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(arguments)


def test_generate_measures_each_way_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "generate.json"
    variants = "diffusers,joint+eager,joint+eager+first-block:9:1+guidance:2,joint+eager+float8"
    options = ["--variants", variants, "--decoders", "stock,coder", "--prompts", "1", "--json", str(file)]
    arguments = parse(generation, "--tiny", "--device", "cpu", "--num_frames", "9", "--profile", *options)
    results = generation.run(arguments)
    table = generation.describe(results)
    assert json.loads(file.read_text()) == json.loads(json.dumps(results))
    rows = results["variants"]
    assert rows["diffusers"]["step_seconds"] > 0 and "reference" in rows["diffusers"]
    assert rows["joint+eager"]["psnr"] == "equal" or rows["joint+eager"]["psnr"] > 60
    assert "first block" in rows["joint+eager+first-block:9:1+guidance:2"]["skipped"]
    assert len(rows["joint+eager+first-block:9:1+guidance:2"]["deviations"]) == 1
    assert "8.9 or newer" in rows["joint+eager+float8"]["error"] and "8.9 or newer" in table
    assert results["decoders"]["coder"]["relative_error"] < 1e-5


def test_generate_takes_a_folder_and_its_prompts(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n\na blue wave\n")
    options = ["--model", str(tiny_folder), "--prompts", "2", "--prompts_file", str(prompts), "--num_steps", "8"]
    variants = "joint+eager,joint+eager+first-block:9:1"
    arguments = parse(
        generation, *options, "--num_frames", "5", "--device", "cpu", "--decoders", "", "--variants", variants
    )
    results = generation.run(arguments)
    assert results["conditions"]["weights"] == "given"
    exact, cached = (results["variants"][name]["deviations"] for name in variants.split(","))
    assert [row["reference"] for row in exact] == ["8 steps, prompt 1", "8 steps, prompt 2"]
    assert all(20 < row["psnr"] < 100 and row["skipped"] == "8 steps: 7 full, 1 first block" for row in cached)
    arguments.model = "tiny"
    with pytest.raises(UserError, match="random weights"):
        generation.run(arguments)


def test_prepare_measures_encoding_and_both_kinds_of_entries() -> None:
    arguments = parse(preparation, "--tiny", "--device", "cpu", "--profile", "--encoders", "stock,coder")
    results = preparation.run(arguments)
    assert results["clips"]["num_items"] == 4 and results["clips"]["problems"] == []
    assert results["captions"]["num_items"] == 20
    assert 0 < results["clips"]["busy_share"] <= 1
    assert "device busy" in preparation.describe(results)


@pytest.mark.parametrize(
    ("name", "message"),
    [("quick", "expected diffusers"), ("joint+fast", "no flag"), ("joint+first-block:0.1", "needs numbers"),
     ("diffusers+float8", "expected diffusers")],
)  # fmt: skip
def test_unknown_variants_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generation.parse_variant(name)
