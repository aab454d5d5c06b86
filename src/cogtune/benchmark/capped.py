"""One measurement of `bench.py memory`: takes a task as JSON, caps the device memory, runs, writes the result."""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from cogtune.acceleration import accelerate, choose_sampling_backend, decide_offload
from cogtune.adapter import TrainedAdapter, add_lora, count_adapter_parameters
from cogtune.attention import install_attention
from cogtune.benchmark.autoencoder import make_random_vae
from cogtune.benchmark.clock import Marks, peak_memory, reset_peak, synchronize
from cogtune.benchmark.training import TrainingBench
from cogtune.config import MemorySettings
from cogtune.eight_bit_adamw import EightBitAdamW, EightBitGuard, make_state
from cogtune.encoding import TEXT_BATCH, choose_coder, embed_tokens, encode_frames
from cogtune.execution import configure_blocks
from cogtune.frozen import encode_base, encode_block
from cogtune.full import TrainedModel
from cogtune.generation import Request, decode_latents, generate_latents, make_pipeline, place_pipeline
from cogtune.host_training import HostAdamW, HostStepGuard
from cogtune.ladder import choose_rung
from cogtune.machine import measure_machine
from cogtune.memory import GIB, free_device_bytes
from cogtune.models import make_meta_transformer
from cogtune.optimization import StepGuard, make_optimizer
from cogtune.placement import (
    TEXT_BLOCKS,
    TRANSFORMER_BLOCKS,
    place_text_encoder,
    release_blocks,
    sampling_workspace,
    weight_bytes,
)
from cogtune.random_pipeline import ARCHITECTURES, make_random_on_host, make_text_config
from cogtune.streaming.blocks import DEFAULT_SLOTS, find_stream, stream_blocks
from cogtune.streaming.host import free_host_bytes
from cogtune.streaming.trained import find_trained_stream, stream_trained_blocks
from cogtune.trainer import Trainer
from cogtune.training_rungs import list_training_rungs

_NUM_CLIPS = 40
"""Of the data set whose clips are encoded: it decides how."""


class CappedRun:
    """A device with a cap, a model's size and what is to be measured."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = argparse.Namespace(**task)
        self.task.batch_size, self.task.attention = 1, "auto"
        self.bench = TrainingBench(self.task)
        self.facts, self.device, self.dtype = self.bench.facts, self.bench.device, self.bench.dtype
        if self.device.type == "cuda" and self.task.cap:
            index = torch.cuda.current_device()
            total = torch.cuda.mem_get_info(index)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.task.cap * 1e9 / total), index)
        self.free_host = free_host_bytes()  # as a plan sees it, before weights are loaded
        self.settings = MemorySettings.model_validate(dict(pair.split("=", 1) for pair in self.task.set))
        if self.task.job == "sft":  # 8-bit state and weights on the host know no loss scale, 2B's float16 needs one
            self.dtype = self.bench.dtype = torch.bfloat16
        self.config = self.bench.config = self.bench.config.model_copy(update={"memory": self.settings})

    def measure(self) -> dict[str, Any]:
        """The job's numbers."""
        started = time.perf_counter()
        jobs = {"prepare": self._prepare, "lora": self._train, "sft": self._train, "generate": self._generate}
        result = jobs[self.task.job]()
        return result | {"process_seconds": time.perf_counter() - started}

    def _make_transformer(self, dtype: torch.dtype) -> Any:
        def build() -> torch.nn.Module:
            return CogVideoXTransformer3DModel(**ARCHITECTURES[self.task.model][0])

        model = make_random_on_host(build, TRANSFORMER_BLOCKS, device=self.device, dtype=dtype)
        self._clear()
        return model

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _train(self) -> dict[str, Any]:
        """LoRA, or full fine-tuning, on the rung that a run would take."""
        full = self.task.job == "sft"
        meta = make_meta_transformer(self.facts)
        num_parameters = sum(p.numel() for p in meta.parameters())
        num_trainable = num_parameters if full else count_adapter_parameters(meta, self.config.adapter)
        free, machine = free_device_bytes(self.device), measure_machine(self.device, self.dtype)
        rungs = list_training_rungs(
            self.facts,
            self.config,
            dtype=self.dtype,
            machine=machine,
            tokens=self.bench.tokens,
            free_bytes=free,
            num_parameters=0 if full else num_parameters,
            num_trainable=num_trainable,
        )
        rung = choose_rung(rungs, self.settings, free, self.free_host)
        transformer = self._make_transformer(torch.float32 if full and not rung.eight_bit else self.dtype)
        if not full:
            add_lora(transformer, self.config.adapter, seed=1)
            trained = TrainedAdapter(transformer, "")
        else:
            trained = TrainedModel(
                transformer,
                self.facts,
                "",
                export_dtype=self.dtype,
                on_host=rung.on_host,
                num_updated=rung.num_updated,
                weights_dtype=torch.bfloat16 if rung.eight_bit else torch.float32,
                device=self.device,
            )
        if not full and rung.num_resident is None and not rung.quantized:
            transformer.to(self.device)
        self._install_attention(transformer)
        if rung.num_resident is not None and rung.streams_trained:
            stream_trained_blocks(
                transformer, TRANSFORMER_BLOCKS, self.device, num_resident=rung.num_resident, make_state=make_state
            )
        elif rung.num_resident is not None:
            prepare = partial(encode_block, kind=rung.quantized) if rung.quantized else None
            resident = rung.num_resident
            stream_blocks(transformer, TRANSFORMER_BLOCKS, self.device, num_resident=resident, prepare=prepare)
        elif rung.quantized:
            encode_base(transformer, rung.quantized, self.device)
        elif full and trained.host is None:
            transformer.to(self.device)
        configure_blocks(
            transformer,
            rung.activations,
            compiled=self.task.compile == "on",
            has_dropout=False,
            num_lean=rung.num_lean,
            num_offloaded=rung.num_offloaded,
            num_leaving=rung.num_leaving,
            gradients=None if trained.host is None else trained.host.gradients,
        )
        self._clear()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._make_trainer(trained, Path(folder), full=full, eight_bit=rung.eight_bit)
            batches = iter(self.bench.make_loader(Path(folder)))
            warm = self.bench.time_each(trainer, batches, self.task.warmup)
            reset_peak(self.device)  # compiling and measuring are over
            seconds = self.bench.time_each(trainer, batches, self.task.steps)
        return {
            "way": rung.name(),
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "first_step_seconds": warm[0],
            "predicted_seconds": rung.seconds,
            "predicted_gib": rung.total / GIB,
            "host_gib": rung.host / GIB,
            "machine": machine.describe(),
            **peak_memory(self.device),
        }

    def _make_trainer(
        self, trained: TrainedAdapter | TrainedModel, folder: Path, *, full: bool, eight_bit: bool
    ) -> Trainer:
        if eight_bit:
            parameters = list(trained.parameters().values())
            compiled = self.task.compile == "on"
            stream = find_trained_stream(trained.transformer)
            state = None if stream is None else stream.state
            optimizer = EightBitAdamW(parameters, self.config.optimizer, seed=0, state=state, compiled=compiled)
            guard = EightBitGuard(optimizer)
        elif trained.host is None:
            optimizer = make_optimizer(list(trained.parameters().values()), self.config.optimizer)
            guard = StepGuard(self.device, use_loss_scale=self.dtype == torch.float16, max_grad_norm=1.0)
        else:
            optimizer = HostAdamW(trained.host, self.config.optimizer)
            guard = HostStepGuard(trained.host, optimizer, max_grad_norm=1.0)
        autocast = full and trained.host is None and not eight_bit and self.dtype != torch.float32
        engine = self.bench.make_engine(trained, optimizer, guard)
        return self.bench.make_trainer(trained, folder, engine=engine, autocast=autocast)

    def _install_attention(self, transformer: Any) -> None:
        backend, _timings = self.bench.pick_backend(self.facts.num_heads, self.bench.tokens)
        install_attention(transformer, backend)

    def _prepare(self) -> dict[str, Any]:
        """A batch of captions through the text encoder, then clips through the autoencoder, one by one."""
        result: dict[str, Any] = {"text": self._encode_texts(TEXT_BATCH)}
        self._clear()
        num_frames, height, width = self.bench.size
        vae = make_random_vae(self.task.model, self.device, self.dtype)
        coder = choose_coder(vae, _NUM_CLIPS, height * width)
        way = "stock" if coder is None else "frame by frame" if coder.in_slabs else "in whole groups"
        frames = torch.randint(256, (1, num_frames, height, width, 3), dtype=torch.uint8)
        self._clear()
        reset_peak(self.device)
        seconds = []
        for _ in range(self.task.warmup + self.task.steps):
            started = time.perf_counter()
            encode_frames(vae, frames, coder)
            synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        timed = seconds[self.task.warmup :]
        return result | {
            "way": f"clips encoded {way}; T5 {result['text']['way']}",
            "seconds": statistics.median(timed),
            "spread": [min(timed), max(timed)],
            "host_gib": 0.0,
            **peak_memory(self.device),
        }

    def _generate(self) -> dict[str, Any]:
        """A video's parts: the text encoder, sampling steps, the decoder; the video's time is put together."""
        result: dict[str, Any] = {"text": self._encode_texts()}
        self._clear()
        transformer = self._make_transformer(self.dtype)
        weights = weight_bytes(transformer)
        tokens = self.bench.tokens
        pipeline = make_pipeline(
            self.facts,
            text_encoder=torch.nn.Module(),
            transformer=transformer,
            vae=make_random_vae(self.task.model, torch.device("cpu"), self.dtype),
            scheduler=CogVideoXDDIMScheduler.from_config(self.facts.scheduler_config),
        )
        pipeline.set_progress_bar_config(disable=True)
        offload = decide_offload("auto", pipeline, self.device, tokens)
        pipeline.text_encoder = None  # measured by itself, and gone
        resident, host = "all resident", 0
        if offload == "stream":
            place_pipeline(pipeline, self.device, offload=offload, vae_tiling=False, tokens=tokens)
            stream = find_stream(transformer)
            assert stream is not None
            resident = f"{stream.num_resident} blocks resident, others streamed"
            host = sum(flat.num_bytes for flat in stream.flat)
            streamed = len(stream.flat) - stream.num_resident
            weights -= max(0, streamed - DEFAULT_SLOTS) * stream.flat[0].num_bytes
        else:
            place_pipeline(pipeline, self.device, vae_tiling=False)
        backend = choose_sampling_backend(self.facts, tokens, self.dtype, self.device)
        result["attention"] = backend
        coder = accelerate(pipeline, compiled=self.task.compile == "on", cache=None, coded=True, backend=backend)
        workspace = sampling_workspace(tokens, self.facts.num_heads * self.facts.head_dim, self.dtype)
        self._clear()
        reset_peak(self.device)
        seconds, latents = self._time_steps(pipeline)
        result |= {
            "way": resident,
            "step_seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "predicted_gib": (weights + weight_bytes(pipeline.vae) + workspace) / GIB,
            "host_gib": host / GIB,
            **peak_memory(self.device),
        }
        release_blocks(transformer)
        reset_peak(self.device)
        started = time.perf_counter()
        decode_latents(pipeline.vae, latents, self.facts.scaling_factor, coder)
        synchronize(self.device)
        in_slabs = coder is not None and coder.in_slabs
        result["decode"] = {"seconds": time.perf_counter() - started, "in_slabs": in_slabs, **peak_memory(self.device)}
        total = result["step_seconds"] * self.task.num_steps + result["decode"]["seconds"] + result["text"]["seconds"]
        return result | {"seconds": total}

    def _time_steps(self, pipeline: Any) -> tuple[list[float], torch.Tensor]:
        frames, height, width = self.bench.size
        count = self.task.warmup + self.task.steps
        request = Request("random", frames, height, width, num_inference_steps=count)
        texts = torch.randn(2, self.facts.max_text_length, self.facts.text_dim).to(self.device, self.dtype)
        marks = Marks(self.device)
        latents = generate_latents(pipeline, request, *texts, on_step=lambda _step: marks.add())
        return marks.differences()[max(0, self.task.warmup - 1) :], latents

    def _encode_texts(self, batch_size: int = 1) -> dict[str, Any]:
        """Two batches (prompt and no prompt) through a T5 encoder, of T5-XXL's size for the released models."""
        from transformers import T5EncoderModel

        size = "small" if self.task.model.startswith("tiny") else "full"
        config = make_text_config(self.facts.text_dim, 512, size)
        encoder = make_random_on_host(lambda: T5EncoderModel(config), TEXT_BLOCKS, device=self.device, dtype=self.dtype)
        encoder.encoder.embed_tokens = encoder.shared
        self._clear()
        place_text_encoder(encoder, self.device)
        reset_peak(self.device)
        ids = torch.zeros(batch_size, self.facts.max_text_length, dtype=torch.int64, device=self.device)
        started = time.perf_counter()
        for _ in range(2):
            embed_tokens(ids, encoder)
        synchronize(self.device)
        stream = find_stream(encoder)
        way = "all resident" if stream is None else f"{stream.num_resident} blocks resident, others streamed"
        return {"seconds": time.perf_counter() - started, "way": way, **peak_memory(self.device)}


def main() -> None:
    """Runs the task of the command line."""
    task = json.loads(sys.argv[1])
    result = CappedRun(task).measure()
    Path(task["output"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
