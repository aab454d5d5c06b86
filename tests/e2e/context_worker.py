"""What the tests of context parallelism run in several processes, many cases to a launch.

torchrun --nproc_per_node 4 tests/e2e/context_worker.py TASKS.json OUT

`steps`: one training step of a random transformer, spread over teams, against the same step alone; `videos`: options of
`scripts/generate.py`, frames saved; `measurements`: tasks of `benchmark/shared_work.py`; `commands`: scripts with their
options. Each has its own port, since processes connect anew.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the launcher's own store can be used once only

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from cogtune.adapter import adapter_parameters, add_lora
from cogtune.attention import install_attention
from cogtune.benchmark import shared_work
from cogtune.config import AdapterSettings
from cogtune.execution import configure_blocks
from cogtune.generation_options import make_requests, parse_generation
from cogtune.launch import read_launch
from cogtune.models import choose_device, find_folder, read_facts
from cogtune.parallel.groups import make_group
from cogtune.parallel.ranks import Teams
from cogtune.parallel.sequence import SplitSequence, TeamAttention
from cogtune.parallel.videos import plan_ranks, started_ranks
from cogtune.random_pipeline import make_random_transformer
from cogtune.sampling import set_up

torch.set_num_threads(1)
RANK, NUM_RANKS = read_launch().rank, read_launch().num_processes


def make_transformer(case: dict[str, Any], device: torch.device, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """A random transformer; its adapter has left its start, or all of its weights are trained."""
    transformer = make_random_transformer(
        case["model"], seed=0, device=torch.device("cpu"), dtype=torch.float32,
        max_text_seq_length=31, num_attention_heads=case.get("heads", 2),
    )  # fmt: skip
    if case["trained"] == "adapter":
        add_lora(transformer, AdapterSettings(rank=4, alpha=9.0), seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3, generator=generator)
    else:
        transformer.requires_grad_(True)
    return transformer.to(device, dtype).train()


def run_step(transformer: CogVideoXTransformer3DModel, case: dict[str, Any], sample: int) -> dict[str, torch.Tensor]:
    """Prediction, and the gradient of each trained parameter, of two videos of 5 latent frames of 4 x 6 patches."""
    generator = torch.Generator().manual_seed(sample)
    weight = transformer.proj_out.weight
    videos = torch.randn(2, 5, transformer.config["in_channels"], 8, 12, generator=generator).to(weight)
    texts = torch.randn(2, 31, 32, generator=generator).to(weight)
    rotary = None
    if transformer.config["use_rotary_positional_embeddings"]:
        rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 5, device=weight.device)
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=case.get("autocast", False)):
        output = transformer(
            hidden_states=videos,
            encoder_hidden_states=texts,
            timestep=torch.tensor([500, 20], device=weight.device),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    loss = (output.float() - 1.0).square().mean() if case.get("autocast") else (output - 1.0).square().mean()
    names, parameters = zip(*((n, p) for n, p in transformer.named_parameters() if p.requires_grad), strict=True)
    return {"prediction": output.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def compare_step(case: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Largest error of prediction and gradients, relative in norm; the gradients are averaged over ALL ranks."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    size = case.get("size", NUM_RANKS)
    teams = Teams(RANK, NUM_RANKS, size)
    alone = make_transformer(case, device, dtype)
    install_attention(alone, "default")
    expected = [run_step(alone, case, sample) for sample in range(teams.num_teams)]
    transformer = make_transformer(case, device, dtype)
    group = make_group(teams)
    team = TeamAttention(group, case["way"], transformer.config["num_attention_heads"])
    install_attention(transformer, case.get("backend", "default"), team)
    if "activations" in case:
        options = {"compiled": "compiler" in case, "compiler": case.get("compiler", "inductor")}
        configure_blocks(transformer, case["activations"], has_dropout=False, shared=True, **options)
    SplitSequence(transformer, group, team)
    got = run_step(transformer, case, teams.team)
    errors = {}
    for name, value in got.items():
        wanted = expected[teams.team][name]
        if name != "prediction":
            dist.all_reduce(value)
            value = value / NUM_RANKS
            wanted = torch.stack([sample[name] for sample in expected]).mean(dim=0)
        # Without rotary positions, the gradient of k's shift is zero but for rounding: it moves all scores alike.
        errors[name] = float((value - wanted).norm() / max(float(wanted.norm()), 1e-6))
    torch._dynamo.reset()
    return {"prediction": errors.pop("prediction"), "gradients": max(errors.values()), "num_gradients": len(errors)}


def make_video(argv: list[str], output: Path) -> None:
    """As `scripts/generate.py` does it, but the frames are saved as they are."""
    options = parse_generation("", argv)
    facts = read_facts(find_folder(options.model))
    requests = make_requests(options, facts)
    ranks = plan_ranks(
        options.gpus_per_video, num_videos=len(requests), guided=options.may_part_guidance, launch=read_launch()
    )
    with started_ranks(choose_device(options.device), NUM_RANKS) as device:
        sampling = set_up(options, facts, requests, ranks, device)
        for number, request in list(enumerate(requests))[ranks.teams.team :: ranks.teams.num_teams]:
            frames = sampling.make(request)
            if frames is not None:
                np.save(output / f"{Path(options.output).stem}-{number}.npy", frames)
                (output / f"{Path(options.output).stem}-{number}.txt").write_text(sampling.describe_skipped())


def run_script(script: str, argv: list[str]) -> None:
    """A command as a launcher runs it."""
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")
    reset_state()


def reset_state() -> None:
    """Lets the next run connect anew."""
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main() -> None:
    """Runs the tasks of the file in turn; results are written by the first rank."""
    tasks, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ports = iter(tasks["ports"])
    if "steps" in tasks:
        os.environ["MASTER_PORT"] = str(next(ports))
        with started_ranks(choose_device(tasks.get("device", "cpu")), NUM_RANKS) as device:
            for case in tasks["steps"]:
                case["errors"] = compare_step(case, device)
        if RANK == 0:
            (output / "steps.json").write_text(json.dumps(tasks["steps"]))
    for argv in tasks.get("videos", []):
        os.environ["MASTER_PORT"] = str(next(ports))
        make_video(argv, output)
    for task in tasks.get("measurements", []):
        os.environ["MASTER_PORT"] = str(next(ports))
        sys.argv = ["shared_work", json.dumps(task)]
        shared_work.main()
        reset_state()
    for script, *argv in tasks.get("commands", []):
        os.environ["MASTER_PORT"] = str(next(ports))
        run_script(script, argv)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        raise
