"""One part of `bench.py scale`: steps of random weights in this process, or in each of several.

python -m cogtune.benchmark.scale_part TASK      (TASK: JSON, as `scale` writes it; also by torchrun)
"""

import argparse
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cogtune.adapter import TrainedAdapter, add_lora
from cogtune.attention import install_attention
from cogtune.benchmark.clock import peak_memory, reset_peak
from cogtune.benchmark.training import TrainingBench
from cogtune.cluster.stopping import end_with_parent
from cogtune.execution import configure_blocks
from cogtune.full import TrainedModel
from cogtune.ladder import choose_rung
from cogtune.machine import measure_machine
from cogtune.memory import GIB, MemoryPlan, free_device_bytes
from cogtune.parallel.assembly import divide_transformer, make_engine, place_transformer
from cogtune.parallel.strategy import Strategy, read_strategy, settings_of_our_own
from cogtune.random_pipeline import make_random_transformer
from cogtune.training_rungs import list_training_rungs


class Part:
    """A task's model under its strategy, ready to step."""

    def __init__(self, task: SimpleNamespace) -> None:
        self.task, self.full = task, task.part.startswith("sft")
        self.strategy: Strategy = read_strategy(os.environ)
        options = argparse.Namespace(**vars(task), attention="auto")
        with settings_of_our_own():
            self.bench = TrainingBench(options)
        self.device, self.facts, self.dtype = self.bench.device, self.bench.facts, self.bench.dtype
        # One GPU's full fine-tuning is that with 8-bit state, which computes in bfloat16 wherever it runs.
        self.eight_bit = task.part == "sft-one" and self.device.type == "cuda"
        memory: dict[str, Any] = {"mode": task.activations}
        if self.eight_bit:
            memory["optimizer"] = "8bit"
        config = self.bench.config
        self.config = self.bench.config = config.model_copy(
            update={"memory": type(config.memory).model_validate(memory)}
        )

    def measure(self) -> dict[str, Any]:
        """Times and memory of the steps, as this process sees them."""
        transformer = self._make_transformer()
        num_parameters = sum(p.numel() for p in transformer.parameters())
        if not self.full:
            add_lora(transformer, self.config.adapter, seed=1)
        num_adapter = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
        rung = self._choose_rung(0 if self.full else num_parameters, num_parameters if self.full else num_adapter)
        trained = self._make_trained(transformer)
        plan: Any = SimpleNamespace(
            memory=rung,
            strategy=self.strategy,
            dtype=self.dtype,
            config=self.config,
            compiled=self.task.compile == "on",
            num_float8=0,
            full=self.full,
        )
        place_transformer(plan, trained, self.device)
        self._install_attention(transformer)
        mesh = divide_transformer(plan, trained, self.device)
        configure_blocks(
            transformer,
            rung.activations,
            compiled=plan.compiled,
            has_dropout=False,
            num_lean=rung.num_lean,
            num_offloaded=rung.num_offloaded,
            num_leaving=rung.num_leaving,
            hooked=self.strategy.shards_weights,
        )
        engine = make_engine(self.bench.accelerator, plan, trained, mesh)
        self._clear()
        divided = self.strategy.is_fsdp or self.strategy.is_deepspeed
        autocast = self.full and not self.eight_bit and not divided and self.dtype != torch.float32
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.bench.make_trainer(trained, Path(folder), engine=engine, autocast=autocast)
            batches = iter(self.bench.make_loader(Path(folder)))
            warm = self.bench.time_each(trainer, batches, self.task.warmup)
            reset_peak(self.device)
            seconds = self.bench.time_each(trainer, batches, self.task.steps)
        step = statistics.median(seconds)
        return {
            "strategy": self.strategy.describe(),
            "way": rung.name(),
            "num_processes": self.strategy.num_processes,
            "step_seconds": step,
            "spread": [min(seconds), max(seconds)],
            "first_step_seconds": warm[0],
            "samples_per_second": self.task.batch_size * self.strategy.num_processes / step,
            "predicted_gib": rung.total / GIB,
            **peak_memory(self.device),
        }

    def _make_transformer(self) -> Any:
        """Random weights on the device; float32 ones are made for what trains them so."""
        dtype = torch.float32 if self.full and self._keeps_float32() else self.dtype
        return make_random_transformer(self.task.model, seed=0, device=self.device, dtype=dtype)

    def _keeps_float32(self) -> bool:
        """Whether the model itself is float32; DeepSpeed has float32 weights of its own beside it."""
        return not self.eight_bit and not (self.strategy.is_deepspeed and self.dtype == torch.bfloat16)

    def _make_trained(self, transformer: Any) -> Any:
        if not self.full:
            return TrainedAdapter(transformer, "")
        trained = TrainedModel(
            transformer,
            self.facts,
            "",
            export_dtype=self.dtype,
            weights_dtype=transformer.dtype,
            device=self.device,
        )
        trained.initial = lambda: None  # the weights are random: no file has more exact ones
        return trained

    def _choose_rung(self, num_frozen: int, num_trained: int) -> MemoryPlan:
        total = None
        if self.device.type == "cuda":
            # What is free before the model was made.
            total = free_device_bytes(self.device)
            assert total is not None
            total += torch.cuda.memory_allocated(self.device)
        rungs = list_training_rungs(
            self.facts,
            self.config,
            dtype=self.dtype,
            machine=measure_machine(self.device, self.dtype),
            tokens=self.bench.tokens,
            free_bytes=total,
            num_parameters=num_frozen,
            num_trainable=num_trained,
            strategy=self.strategy,
        )
        return choose_rung(rungs, self.config.memory, total, None)

    def _install_attention(self, transformer: Any) -> None:
        backend, _timings = self.bench.pick_backend(self.facts.num_heads, self.bench.tokens)
        install_attention(transformer, backend, fuse=not self.strategy.shards_weights)

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Measures a task; the main process writes its numbers."""
    end_with_parent(signal.SIGKILL)  # torchrun's processes are not of its session, and would keep their GPUs
    task = SimpleNamespace(**json.loads(sys.argv[1]))
    part = Part(task)
    result = part.measure()
    if part.bench.accelerator.is_main_process:
        Path(task.output).write_text(json.dumps(result), encoding="utf-8")
    part.bench.accelerator.wait_for_everyone()
    part.bench.accelerator.end_training()


if __name__ == "__main__":
    main()
