"""How a run is spread over processes: what the launcher says in the environment, read before anything is started.

`accelerate launch --config_file configs/accelerate/NAME.yaml` writes these variables; under torchrun they can be set by
hand, and without any of them several processes are DDP.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cogtune.errors import UserError
from cogtune.launch import read_launch

Kind = Literal["single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
_ZERO: dict[str, Kind] = {"1": "zero1", "2": "zero2", "3": "zero3"}


@dataclass(frozen=True)
class Strategy:
    """What is divided among processes, and what waits on the host."""

    kind: Kind = "single"
    num_processes: int = 1
    num_shards: int = 1
    """Processes that hold the parts of one copy."""
    reshard: bool = True
    """Blocks give their whole weights back after the forward pass and gather them again (FSDP2)."""
    offload_weights: bool = False
    """The parts of weights (and with FSDP2 of the optimizer's state) wait in host memory."""
    offload_optimizer: bool = False
    """The parts of the optimizer's state are in host memory and updated there (DeepSpeed)."""

    @property
    def is_fsdp(self) -> bool:
        """Sharded by `torch.distributed.fsdp.fully_shard`."""
        return self.kind in ("fsdp2", "hsdp")

    @property
    def is_deepspeed(self) -> bool:
        """Run by a DeepSpeed engine."""
        return self.kind.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """No process has the whole model, so every forward pass is one of all processes."""
        return self.is_fsdp or self.kind == "zero3"

    def describe(self) -> str:
        """One line for the plan."""
        copies = self.num_processes // self.num_shards
        parts = {
            "single": "one process",
            "ddp": f"DDP: {self.num_processes} whole copies",
            "fsdp2": f"FSDP2: weights, gradients and state in {self.num_shards} parts",
            "hsdp": f"HSDP: {copies} copies, each in {self.num_shards} parts (weights, gradients and state)",
            "zero1": f"DeepSpeed ZeRO-1: state in {self.num_shards} parts",
            "zero2": f"DeepSpeed ZeRO-2: state and gradients in {self.num_shards} parts",
            "zero3": f"DeepSpeed ZeRO-3: weights, gradients and state in {self.num_shards} parts",
        }[self.kind]
        on_host = [
            name for name, there in (("weights", self.offload_weights), ("optimizer", self.offload_optimizer)) if there
        ]
        return parts + (f"; on the host: {', '.join(on_host)}" if on_host else "")


def read_strategy(environment: Mapping[str, str]) -> Strategy:
    """The strategy that the launcher asks for; raises `UserError` for one that isn't supported."""
    num_processes = read_launch(environment).num_processes
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _read_deepspeed(environment, num_processes)
    if _is_true(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("accelerate's config: Megatron-LM is not supported; take one of configs/accelerate/")
    if _is_true(environment, "ACCELERATE_USE_FSDP"):
        return _read_fsdp(environment, num_processes)
    if _is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "accelerate's config: parallelism_config has an effect with FSDP2 only; take "
            "configs/accelerate/hsdp.yaml, or remove it"
        )
    return Strategy("single" if num_processes == 1 else "ddp", num_processes)


@contextlib.contextmanager
def settings_of_our_own() -> Iterator[None]:
    """Inside, accelerate doesn't see what is done here: the mesh of copies and parts, accumulation and clipping.

    It would refuse the first on a CPU, and do the others once more. Under ZeRO-3 it would also divide every model that
    transformers loads, such as the text encoder.
    """
    names = (
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "ACCELERATE_GRADIENT_CLIPPING",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    )
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
    try:
        yield
    finally:
        del os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"]
        os.environ.update(hidden)
        if _is_true(os.environ, "ACCELERATE_USE_DEEPSPEED"):
            # On GPUs accelerate 1.15 tells transformers of ZeRO-3 all the same.
            from transformers.integrations import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def _read_fsdp(environment: Mapping[str, str], num_processes: int) -> Strategy:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"accelerate's config: fsdp_version is {version}; only 2 is supported: set fsdp_config.fsdp_version: 2, or "
            "take configs/accelerate/fsdp2.yaml"
        )
    if _is_true(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "accelerate's config: fsdp_activation_checkpointing has no effect here; remove it: memory.mode decides "
            "which activations are kept"
        )
    if num_processes == 1:
        return Strategy()  # nobody to share with
    num_copies, num_shards = _read_mesh(environment, num_processes)
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false"):
        raise UserError(f"accelerate's config: fsdp_reshard_after_forward is {reshard}; true or false is supported")
    return Strategy(
        "hsdp" if num_copies > 1 else "fsdp2",
        num_processes,
        num_shards,
        reshard=reshard == "true",
        offload_weights=_is_true(environment, "FSDP_OFFLOAD_PARAMS"),
    )


def _read_mesh(environment: Mapping[str, str], num_processes: int) -> tuple[int, int]:
    """Copies of the model, and parts of each."""
    if not _is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1, num_processes
    sizes = {
        name: int(environment.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
        for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    }
    for name in ("TP", "CP", "SP"):
        if sizes[name] > 1:
            remedy = "tensor parallelism is not supported" if name == "TP" else "use train.context_parallel for that"
            raise UserError(f"accelerate's config: parallelism_config_{name.lower()}_size is {sizes[name]}; {remedy}")
    num_copies, num_shards = sizes["DP_REPLICATE"], sizes["DP_SHARD"]
    if num_copies * num_shards != num_processes:
        raise UserError(
            f"accelerate's config: {num_copies} copies (parallelism_config_dp_replicate_size) of {num_shards} parts "
            f"(parallelism_config_dp_shard_size) are {num_copies * num_shards} processes, and {num_processes} were "
            "started; their product must be that number"
        )
    if num_shards == 1:
        raise UserError(
            "accelerate's config: parallelism_config_dp_shard_size is 1: nothing is divided; take "
            "configs/accelerate/ddp.yaml"
        )
    return num_copies, num_shards


def _read_deepspeed(environment: Mapping[str, str], num_processes: int) -> Strategy:
    if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() not in ("none", ""):
        raise UserError(
            "accelerate's config: deepspeed_config_file would say twice what the training config says; put zero_stage "
            "and the offload devices into deepspeed_config, as configs/accelerate/zero2.yaml does"
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in _ZERO:
        raise UserError(f"accelerate's config: zero_stage is {stage}; 1, 2 or 3 is supported, or ddp.yaml instead of 0")
    places = {
        name: environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none").lower()
        for name in ("OPTIMIZER", "PARAM")
    }
    for name, place in places.items():
        if place not in ("none", "cpu"):
            raise UserError(f"accelerate's config: offload_{name.lower()}_device is {place}; none or cpu is supported")
    if places["PARAM"] == "cpu" and stage != "3":
        raise UserError(f"accelerate's config: offload_param_device=cpu needs zero_stage 3, which is {stage}")
    return Strategy(
        _ZERO[stage],
        num_processes,
        num_processes,
        offload_weights=places["PARAM"] == "cpu",
        offload_optimizer=places["OPTIMIZER"] == "cpu",
    )
