"""`scripts/convert.py` and `scripts/export.py`: whole ways by their commands, and one clear line for what is wrong."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from safetensors.torch import load_file, save_file

from cogtune.config import AdapterSettings
from cogtune.formats.converting import parse_conversion
from cogtune.formats.exporting import parse_export
from patience import patient

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
CONVERT, EXPORT = "scripts/convert.py", "scripts/export.py"


@pytest.fixture
def bad(run_command: Callable, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must refuse, and must leave nothing behind; gives its message."""

    def call(*arguments: object) -> str:
        before = set(tmp_path.rglob("*"))
        outcome = run_command(*arguments)
        assert outcome.code == 2, outcome.err
        assert outcome.err.count("error: ") == 1 and "Traceback" not in outcome.err
        assert set(tmp_path.rglob("*")) == before
        return outcome.err

    return call


@pytest.fixture
def trained(tiny_folder: Path, make_adapter: Callable[..., Path]) -> Path:
    """A folder with a trained adapter for the 5B-like pipeline."""
    return make_adapter(tiny_folder, AdapterSettings(rank=3, alpha=6.0))


def sample(folder: Path | str, lora: Path | None = None) -> torch.Tensor:
    """The latents of a short video by the stock pipeline."""
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(1)
    options = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 32}
    return pipeline("a ship", generator=generator, output_type="latent", **options).frames


def state_of(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted((folder / component).glob("*.safetensors")) for n, t in load_file(file).items()}


def test_a_pipeline_goes_to_sat_and_comes_back(good: Callable[..., str], tiny_folder: Path, tmp_path: Path) -> None:
    good(CONVERT, "to-sat", "transformer", tiny_folder, "sat")
    assert (tmp_path / "sat" / "latest").read_text() == "1"
    good(CONVERT, "to-sat", "vae", tiny_folder, "sat-vae")
    config = tiny_folder / "transformer" / "config.json"
    out = good(
        CONVERT,
        "from-sat",
        "transformer",
        "sat",
        "back",
        "--base",
        tiny_folder,
        "--config",
        config,
        "--max-shard-gb",
        1e-4,
    )
    assert "back: pipeline" in out
    assert len(list((tmp_path / "back" / "transformer").glob("*-of-*.safetensors"))) > 2
    good(CONVERT, "from-sat", "vae", "sat-vae/3d-vae.pt", "vae", "--config", tiny_folder / "vae" / "config.json")
    for component, folder in (("transformer", tmp_path / "back"), ("vae", tmp_path)):
        before, after = state_of(tiny_folder, component), state_of(folder, component)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "back/transformer/config.json").read_text()) == json.loads(config.read_text())
    assert torch.equal(sample(tmp_path / "back"), sample(tiny_folder))
    AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae")
    assert "With" not in (tmp_path / "back" / "README.md").read_text()


def test_released_names_need_no_config_but_what_no_tensor_says(
    good: Callable[..., str], bad: Callable[..., str], tiny_folder: Path
) -> None:
    good(CONVERT, "to-sat", "transformer", tiny_folder, "sat")
    assert "--positions rotary (5B, 1.5), --positions sincos (2B)" in bad(
        CONVERT, "from-sat", "transformer", "sat", "out"
    )
    good(CONVERT, "from-sat", "transformer", "sat", "out", "--positions", "rotary", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file("out/diffusion_pytorch_model.safetensors").values()} == {
        torch.bfloat16
    }
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_layers"], config["sample_width"], config["use_rotary_positional_embeddings"]) == (2, 90, True)


def test_an_adapter_goes_through_every_format(good: Callable[..., str], tiny_folder: Path, trained: Path) -> None:
    good(CONVERT, "adapter", trained, "comfy.safetensors", "--keys", "comfyui", "--base", tiny_folder)
    assert float(load_file("comfy.safetensors")["diffusion_model.transformer_blocks.0.attn1.to_q.alpha"]) == 6
    good(CONVERT, "adapter", "comfy.safetensors", "kohya", "--keys", "kohya", "--scale", "fold")
    good(CONVERT, "adapter", "kohya", "plain", "--keys", "diffusers")
    assert "lora_alpha: 1" in good(CONVERT, "to-sat", "lora", "plain", "sat")
    good(CONVERT, "from-sat", "lora", "sat", "back", "--base", tiny_folder)
    expected = sample(tiny_folder, trained)
    torch.testing.assert_close(sample(tiny_folder, Path("back")), expected, rtol=0, atol=1e-4)
    assert (sample(tiny_folder) - expected).abs().max() > 1e-2
    assert "lora_alpha: 6" in good(CONVERT, "to-sat", "lora", trained, "as-is", "--scale", "keep")


def test_merge_extract_combine_cast(good: Callable[..., str], tiny_folder: Path, trained: Path) -> None:
    expected = sample(tiny_folder, trained)
    good(EXPORT, "merge", tiny_folder, "merged", "--lora", trained)
    torch.testing.assert_close(sample("merged"), expected, rtol=0, atol=1e-4)
    out = good(EXPORT, "extract", tiny_folder, "merged", "extracted", "--rank", 3, "--device", "cpu")
    assert "8 layers, rank 3, 100.00 %" in out
    torch.testing.assert_close(sample(tiny_folder, Path("extracted")), expected, rtol=0, atol=1e-4)
    good(EXPORT, "combine", "sum", "--lora", f"{trained}:0.5", "--lora", f"{trained}:0.5", "--rank", 3)
    torch.testing.assert_close(sample(tiny_folder, Path("sum")), expected, rtol=0, atol=1e-4)
    good(EXPORT, "cast", "merged", "half", "--dtype", "bfloat16")
    assert {t.dtype for t in state_of(Path("half"), "transformer").values()} == {torch.bfloat16}
    sample("half")
    good(EXPORT, "cast", trained, "lora-half", "--dtype", "float16")
    torch.testing.assert_close(sample(tiny_folder, Path("lora-half")), expected, rtol=0, atol=1e-2)
    assert (
        "merged" in Path("merged/README.md").read_text() and "rank 3, attn1.to_k" in Path("sum/README.md").read_text()
    )


def test_a_base_stays_untouched_by_what_is_made_from_it(
    good: Callable[..., str], tiny_folder: Path, trained: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}
    good(EXPORT, "merge", tiny_folder, "merged", "--lora", trained)
    assert {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()} == before


def make_foreign_adapter(path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.ones(4, 3072), name.format("B"): torch.ones(3072, 4)}, path)


WRONG = {
    "no command": ([CONVERT], "the following arguments are required: COMMAND"),
    "unknown command": ([CONVERT, "to-gguf", "a", "b"], "invalid choice: 'to-gguf'"),
    "unknown option": ([EXPORT, "merge", "{tiny}", "out", "--lora", "{lora}", "--rnak=4"], "unknown option --rnak=4"),
    "no such source": ([CONVERT, "from-sat", "transformer", "nowhere", "out"], "nowhere: no such file or folder"),
    "a folder without latest": (
        [CONVERT, "from-sat", "transformer", "{tiny}", "out"],
        "no 'latest' file, which names the iteration to take",
    ),
    "output exists": (
        [EXPORT, "merge", "{tiny}", "{lora}", "--lora", "{lora}"],
        "exists already; choose another output",
    ),
    "another model's adapter": (
        [EXPORT, "merge", "{tiny}", "out", "--lora", "{foreign}"],
        "attn1.to_q is [3072, 3072] in the adapter and [32, 32] in this model; the adapter is another model's",
    ),
    "another model's adapter, converted": (
        [CONVERT, "adapter", "{foreign}", "out", "--keys", "comfyui", "--base", "{tiny}"],
        "the adapter is another model's",
    ),
    "alpha twice": (
        [CONVERT, "adapter", "{lora}", "out", "--keys", "kohya", "--alpha", "2"],
        "says its own; leave --alpha out",
    ),
    "no adapter": ([CONVERT, "adapter", "{tiny}", "out", "--keys", "kohya"], "no adapter there"),
    "weights as an adapter": (
        [CONVERT, "adapter", "{tiny}/vae", "out", "--keys", "kohya"],
        "is not one of a CogVideoX adapter",
    ),
    "rank 0": ([EXPORT, "extract", "{tiny}", "{tiny}", "out", "--rank", "0"], "--rank 0: must be at least 1"),
    "energy 2": ([EXPORT, "combine", "out", "--lora", "{lora}", "--energy", "2"], "--energy 2: must be above 0"),
    "rank and energy": (
        [EXPORT, "extract", "{tiny}", "{tiny}", "out", "--rank", "2", "--energy", "0.9"],
        "not allowed with argument",
    ),
    "nothing to extract": (
        [EXPORT, "extract", "{tiny}", "{tiny}", "out", "--rank", "2"],
        "there is nothing to extract",
    ),
    "two models": (
        [EXPORT, "extract", "{tiny}", "{other}", "out", "--rank", "2"],
        "it is another model than",
    ),
    "a part's option for another part": (
        [CONVERT, "from-sat", "lora", "x", "out", "--positions", "rotary"],
        "--positions: has no meaning for lora, only for transformer",
    ),
    "no scaling factor": ([CONVERT, "from-sat", "vae", "{vae}", "out"], "--scaling-factor: no tensor says it"),
    "wrong part": (
        [CONVERT, "from-sat", "transformer", "{vae}", "out", "--positions", "rotary"],
        "is this the weights file of a SAT CogVideoX?",
    ),
    "no lora in it": ([CONVERT, "from-sat", "lora", "{vae}", "out"], "no LoRA in it (no matrix_A, matrix_B)"),
    "config of another part": (
        [CONVERT, "to-sat", "transformer", "{tiny}/vae", "out"],
        "is a AutoencoderKLCogVideoX, and should be a CogVideoXTransformer3DModel",
    ),
    "hub for SAT": (
        [CONVERT, "to-sat", "vae", "{tiny}", "out", "--push-to-hub", "me/x"],
        "SAT's torch files are not uploaded",
    ),
    "public without hub": ([EXPORT, "merge", "{tiny}", "out", "--lora", "{lora}", "--public"], "--public: says how"),
    "hub for a file": (
        [CONVERT, "adapter", "{lora}", "x.safetensors", "--keys", "kohya", "--push-to-hub", "me/x"],
        "is a file; give a folder as output",
    ),
    "base is no pipeline": (
        [CONVERT, "adapter", "{lora}", "out", "--keys", "kohya", "--base", "{lora}"],
        "no model_index.json",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_says_what_is_wrong(
    case: str, bad, good, tiny_folder: Path, tiny_2b_folder: Path, trained: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    arguments, message = WRONG[case]
    make_foreign_adapter(tmp_path / "foreign.safetensors")
    if "{vae}" in arguments:
        good(CONVERT, "to-sat", "vae", tiny_folder, "sat-vae")
    if "{other}" in arguments:  # a model with one layer more
        shutil.copytree(tiny_folder, "other")
        state = state_of(Path("other"), "transformer")
        save_file(
            state | {"transformer_blocks.2.x": torch.zeros(1)}, "other/transformer/diffusion_pytorch_model.safetensors"
        )
    places = {
        "tiny": tiny_folder,
        "lora": trained,
        "foreign": tmp_path / "foreign.safetensors",
        "vae": tmp_path / "sat-vae" / "3d-vae.pt",
        "other": tmp_path / "other",
    }
    assert message in bad(*[argument.format(**places) for argument in arguments])


def test_commands_in_the_docs_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    root = Path(__file__).resolve().parents[2]
    shown = re.findall(
        r"^python scripts/(convert|export)\.py (.+)$", (root / "docs/formats.md").read_text(), re.MULTILINE
    )
    shown += [
        (Path(script).stem, line)
        for script in (CONVERT, EXPORT)
        for line in re.findall(r"^python scripts/\w+\.py (.+)$", (root / script).read_text(), re.MULTILINE)
    ]
    assert len(shown) >= 16
    for script, arguments in shown:
        parse = {"convert": parse_conversion, "export": parse_export}[script]
        assert callable(parse("", shlex.split(arguments)).run)


@pytest.mark.parametrize("case", ["missing", "unknown", "shape"])
def test_wrong_keys_of_a_sat_file(case: str, good, bad, tiny_folder: Path, tmp_path: Path) -> None:
    good(CONVERT, "to-sat", "transformer", tiny_folder, "sat")
    file = tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)["module"]
    key = "model.diffusion_model.transformer.layers.1.mlp.dense_h_to_4h.bias"
    if case == "missing":
        del state[key]
        message = f"1 missing key(s), first {key}"
    elif case == "unknown":
        state["model.diffusion_model.extra"], message = (
            torch.zeros(1),
            "1 unknown key(s), first model.diffusion_model.extra",
        )
    else:
        state[key], message = torch.zeros(5), f"{key} is [5] and should be [128]"
    torch.save({"module": state}, file)
    assert message in bad(CONVERT, "from-sat", "transformer", "sat", "out", "--base", tiny_folder)


def test_weights_of_another_variant(good, bad, tiny_folder: Path, tmp_path: Path) -> None:
    good(CONVERT, "to-sat", "transformer", tiny_folder, "sat")
    config = json.loads((tiny_folder / "transformer" / "config.json").read_text())
    for name, change, message in (
        ("i2v", {"in_channels": 32}, "patch_embed.proj.weight is [32, 16, 2, 2] and should be [32, 32, 2, 2]"),
        ("longer", {"num_layers": 3}, "missing key(s), first model.diffusion_model.mixins.adaln_layer"),
        ("1.5", {"patch_size_t": 2}, "patch_embed.proj.weight is [32, 16, 2, 2] and should be [32, 128]"),
        ("ofs", {"ofs_embed_dim": 32}, "4 missing key(s), first model.diffusion_model.ofs_embed.0.bias"),
        ("learned", {"use_learned_positional_embeddings": True}, "pos_embed.pos_embedding"),
        ("nothing", {"num_layers": "many"}, "the config makes no transformer"),
    ):
        Path(f"{name}.json").write_text(json.dumps(config | change))
        assert message in bad(CONVERT, "from-sat", "transformer", "sat", "out", "--config", f"{name}.json")
    Path("list.json").write_text("[1]")
    assert "no config of a component" in bad(CONVERT, "from-sat", "transformer", "sat", "out", "--config", "list.json")
    assert "cannot be read" in bad(CONVERT, "from-sat", "transformer", "sat", "out", "--config", "nowhere.json")


def test_parts_of_several_types_are_not_joined_unasked(good, bad, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "mixed")
    state = state_of(Path("mixed"), "transformer")
    state["transformer_blocks.0.attn1.to_k.weight"] = state["transformer_blocks.0.attn1.to_k.weight"].bfloat16()
    save_file(state, "mixed/transformer/diffusion_pytorch_model.safetensors")
    message = bad(CONVERT, "to-sat", "transformer", "mixed", "sat")
    assert "attn1.to_v.weight become one tensor and have several types (bfloat16, float32); give --dtype" in message
    good(CONVERT, "to-sat", "transformer", "mixed", "sat", "--dtype", "bfloat16")
    state = torch.load("sat/1/mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


GROWTH = """
import sys
from pathlib import Path
import torch
from cogtune.formats import sat_transformer as sat
from cogtune.formats.tensors import Spec, Tensors
from cogtune.formats.sat_folder import open_sat, write_sat_folder
from cogtune.formats.writing import write_component

sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "use_rotary_positional_embeddings": True}
config = sat.complete_config({"num_layers": int(sys.argv[1]), **sizes})
specs = sat.model_specs(config)
source = Tensors("zeros", specs, lambda name: torch.full(specs[name].shape, 0.5))
write_sat_folder(sat.to_sat(source, config), Path("sat"))
write_component(sat.from_sat(sat.split_off(open_sat(Path("sat")))[0], config), config, Path("out"))
status = Path("/proc/self/status").read_text()  # `getrusage` counts what ran before an exec too
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(peak, sum(spec.num_bytes for spec in specs.values()) / 2**20)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A small model and one of over 400 MiB more, there and back, each in a process of its own."""
    peaks, sizes = [], []
    for layers in (2, 36):
        folder = tmp_path / str(layers)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, str(layers)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=patient(200),
        )
        assert done.returncode == 0, done.stderr
        peak, size = map(float, done.stdout.split()[-2:])
        peaks, sizes = [*peaks, peak], [*sizes, size]
        shutil.rmtree(folder)
    assert sizes[1] - sizes[0] > 400
    assert peaks[1] - peaks[0] < 60, (peaks, sizes)


def test_a_disk_that_refuses_leaves_nothing(bad: Callable[..., str], tiny_folder: Path, trained: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        for arguments in (
            (EXPORT, "merge", tiny_folder, "out", "--lora", trained),
            (CONVERT, "to-sat", "transformer", tiny_folder, "out"),
        ):
            message = bad(*arguments)
            assert "out: cannot be written" in message
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
