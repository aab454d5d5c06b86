"""Estimates on paper: samples a second on 8 to 512 GPUs by strategy, from one measured step and assumed links.

Pure arithmetic. All it returns are estimates; docs/scaling.md has the formulas, the inputs and what they leave out.
"""

from dataclasses import dataclass, replace
from typing import Literal

Job = Literal["lora", "sft"]

GPUS_PER_NODE = 8
ADAM_BYTES = 12
"""A trained weight in float32 and two moments: what a checkpoint holds."""
TRAINED_BYTES = 16
"""And its gradient: what is on the GPU."""
_BUCKET_BYTES = 25 << 20  # the last gradients have nothing left to hide behind
_LATENT_CHANNELS, _TEXT_TOKENS, _TEXT_WIDTH = 16, 226, 4096


@dataclass(frozen=True)
class Architecture:
    """A released transformer, as far as its size matters."""

    num_parameters: int
    num_layers: int
    width: int
    num_heads: int

    def num_adapter(self, rank: int) -> int:
        """Parameters of a LoRA on to_q, to_k, to_v and to_out.0."""
        return self.num_layers * 4 * 2 * rank * self.width


ARCHITECTURES = {
    "cogvideox-2b": Architecture(1_693_783_872, 30, 1920, 30),
    "cogvideox-5b": Architecture(5_570_283_072, 42, 3072, 48),
}


@dataclass(frozen=True)
class Workload:
    """One GPU's step on one sample, measured or estimated, and what it trains."""

    architecture: Architecture
    job: Job
    step_seconds: float
    backward_share: float = 0.67
    """Part of a step that is the backward pass: a forward pass is about a third where nothing is recomputed."""
    rank: int = 64
    num_frames: int = 49
    height: int = 480
    width: int = 720

    @property
    def num_trained(self) -> int:
        """Parameters with a gradient."""
        return self.architecture.num_adapter(self.rank) if self.job == "lora" else self.architecture.num_parameters

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def num_tokens(self) -> int:
        """Of one sample, text and video."""
        frames, rows, columns = self.latent_shape
        return _TEXT_TOKENS + frames * (rows // 2) * (columns // 2)

    @property
    def sample_bytes(self) -> int:
        """Of one sample in the cache: mean and log-variance, and the caption's embeddings, in 16 bits."""
        frames, rows, columns = self.latent_shape
        return 2 * 2 * _LATENT_CHANNELS * frames * rows * columns + 2 * _TEXT_TOKENS * _TEXT_WIDTH

    @property
    def state_bytes(self) -> int:
        """On a GPU that holds everything: trained weights, gradients and moments, and frozen weights in 16 bits."""
        frozen = self.architecture.num_parameters if self.job == "lora" else 0
        return TRAINED_BYTES * self.num_trained + 2 * frozen

    @property
    def checkpoint_bytes(self) -> int:
        """Trained weights and moments in float32."""
        return ADAM_BYTES * self.num_trained


@dataclass(frozen=True)
class Links:
    """Bytes a second that collectives reach; assumed, until scripts/doctor.py has measured them."""

    inside: float = 300e9
    """Bus bandwidth of a collective among the GPUs of a node."""
    between: float = 40e9
    """Of a whole node to others: 400 Gbit/s at 80 %."""
    overlap: float = 0.9
    """Part of the computing behind which communication can hide."""
    straggling: float = 0.01
    """Part of a step that ranks wait for the slowest: what a GPU's steps differ by in docs/benchmarks.md."""
    latency_seconds: float = 30e-6
    """Of one step of a ring between nodes."""


@dataclass(frozen=True)
class Estimate:
    """One strategy on a number of GPUs."""

    num_gpus: int
    step_seconds: float
    samples_per_step: int
    efficiency: float
    """Samples a second against the GPUs' number times one GPU's."""
    hidden_seconds: float
    """Communication, whether it shows or not."""

    @property
    def samples_per_second(self) -> float:
        """Of the whole job."""
        return self.samples_per_step / self.step_seconds


def count_nodes(num_gpus: int) -> int:
    """Nodes of eight; a part of one is one."""
    return -(-num_gpus // GPUS_PER_NODE)


def reduce_seconds(num_bytes: float, num_gpus: int, links: Links) -> tuple[float, float]:
    """An all-reduce in two levels, seconds within and between nodes.

    Within, every GPU sends and gets 2 (g - 1) / g of the bytes; between, a node as a whole 2 (n - 1) / n of them.
    """
    in_node, nodes = min(num_gpus, GPUS_PER_NODE), count_nodes(num_gpus)
    inside = 2 * (in_node - 1) / in_node * num_bytes / links.inside
    between = 2 * (nodes - 1) / nodes * num_bytes / links.between + 2 * (nodes - 1) * links.latency_seconds
    return inside, between if nodes > 1 else 0.0


def _finish(work: Workload, num_gpus: int, step: float, samples: int, communication: float, links: Links) -> Estimate:
    step *= 1 + (links.straggling if num_gpus > 1 else 0.0)
    efficiency = samples / step / (num_gpus / work.step_seconds)
    return Estimate(num_gpus, step, samples, efficiency, communication)


def estimate_ddp(work: Workload, num_gpus: int, links: Links) -> Estimate:
    """Gradients in float32, reduced beside the backward pass."""
    communication = sum(reduce_seconds(4 * work.num_trained, num_gpus, links))
    last = sum(reduce_seconds(min(4 * work.num_trained, _BUCKET_BYTES), num_gpus, links))
    shown = max(last, communication - links.overlap * work.backward_share * work.step_seconds)
    return _finish(work, num_gpus, work.step_seconds + shown, num_gpus, communication, links)


def estimate_hsdp(work: Workload, num_gpus: int, links: Links) -> Estimate:
    """Weights sharded over a node, gathered in 16 bits for forward and backward; gradients reduced in float32."""
    in_node, nodes = min(num_gpus, GPUS_PER_NODE), count_nodes(num_gpus)
    share = (in_node - 1) / in_node
    gathers = 2 * share * 2 * work.architecture.num_parameters / links.inside
    scatter = share * 4 * work.num_trained / links.inside
    between = 0.0
    if nodes > 1:
        moved = 2 * (nodes - 1) / nodes * 4 * work.num_trained / links.between
        between = moved + 2 * (nodes - 1) * links.latency_seconds
    shown = max(0.0, gathers + scatter - links.overlap * work.step_seconds)
    last = sum(reduce_seconds(min(4 * work.num_trained, _BUCKET_BYTES), num_gpus, links))
    shown += max(last, between - links.overlap * work.backward_share * work.step_seconds)
    return _finish(work, num_gpus, work.step_seconds + shown, num_gpus, gathers + scatter + between, links)


def estimate_context(work: Workload, num_gpus: int, links: Links, *, ways: int, sharded: bool) -> Estimate:
    """One sample over `ways` GPUs of a node (Ulysses): q, k, v and the output change places, forward and backward.

    Nothing hides that. Gradients are then reduced over all GPUs; `sharded`: weights as in HSDP.
    """
    tokens = work.num_tokens / ways
    moved = (ways - 1) / ways * tokens * work.architecture.width * 2
    exchange = 8 * work.architecture.num_layers * moved / links.inside
    compute = work.step_seconds / ways
    plain = estimate_hsdp if sharded else estimate_ddp
    around = plain(
        replace(work, step_seconds=compute), num_gpus, replace(links, straggling=0.0)
    )  # the same bytes beside a shorter step
    step = around.step_seconds + exchange
    return _finish(work, num_gpus, step, num_gpus // ways, around.hidden_seconds + exchange, links)


def choose_strategy(work: Workload, num_gpus: int, *, gpu_bytes: float, most_samples: int) -> str:
    """DDP where everything fits, else HSDP; context parallel where a step would have more samples than wanted."""
    # Activations and workspace want a fifth at least (docs/memory.md: a block's workspace alone is 2.6 GB for 5B).
    plain = "DDP" if work.state_bytes <= 0.8 * gpu_bytes else "HSDP"
    for ways in (1, 2, 4, 8):
        if num_gpus / ways <= most_samples and work.architecture.num_heads % ways == 0:
            return plain if ways == 1 else f"{plain} x context {ways}"
    return f"{plain}; {num_gpus} GPUs are too many for {most_samples} samples a step"
