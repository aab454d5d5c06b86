"""Runs training commands one after another in each of several processes, each under the strategy that it asks for.

torchrun --nproc_per_node 2 tests/e2e/strategies_worker.py CASES.json

CASES.json is a list of {"script", "environment", "arguments"}; the environment is what a launcher would have set.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from cogtune.errors import run_command

ROOT = Path(__file__).resolve().parents[2]


def run_case(case: dict) -> None:
    before = dict(os.environ)
    if "ACCELERATE_USE_DEEPSPEED" in case["environment"]:
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # compiled for speed on a CPU; gloo does without
    os.environ.update(case["environment"])
    sys.argv = [case["script"], *case["arguments"]]
    spec = importlib.util.spec_from_file_location("command_under_test", ROOT / case["script"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run_command(module.main)
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def main() -> None:
    torch.set_num_threads(1)
    # One process group for all cases: a command ends its own, and a second one can't be made at the same address.
    torch.distributed.destroy_process_group = lambda *_args, **_named: None
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case)


if __name__ == "__main__":
    main()
