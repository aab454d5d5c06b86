"""Forward and backward pass of one batch shape as one CUDA graph: for models so small that starting their kernels
takes longer than running them.

It follows https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture: fixed inputs, warm-up on a side
stream, nothing inside that waits for the device. The gradients are buffers of the graph, written anew by every replay.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cogtune.data_plan import DataPlan
from cogtune.dataset import TENSORS, Batch
from cogtune.errors import UserError
from cogtune.launch import read_launch

_WARM_UP = 3


def check_cuda_graph(data: DataPlan) -> None:
    """Raises `UserError` for `train.cuda_graph` where a step can't be recorded."""
    config = data.config
    reasons = {
        "it needs a GPU": data.device.type != "cuda",
        "it needs one process": read_launch().num_processes > 1,
        "train.gradient_accumulation_steps must be 1": config.train.gradient_accumulation_steps > 1,
        "adapter.dropout must be 0": config.adapter.dropout > 0,
        "a graph holds one shape; remove data.buckets": len(data.formats) > 1,
        "image-to-video encodes an image in every step": data.facts.takes_image,
        "float16's loss scale changes between steps; use bfloat16 or float32": data.dtype == torch.float16,
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if config.train.cuda_graph and wrong:
        raise UserError(f"train.cuda_graph: {'; '.join(wrong)}; or set train.cuda_graph=false")


class RecordedPass:
    """`compute` of a batch's losses and their gradients, recorded at the first batch and replayed from then on."""

    def __init__(self, compute: Callable[[Batch], torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> None:
        self._compute, self._parameters = compute, list(parameters)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._losses = torch.empty(0)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The losses [B] of a batch on the device; the parameters' gradients are this batch's afterwards."""
        if self._graph is None or self._batch is None:
            self._record(batch)
        assert self._graph is not None and self._batch is not None
        for name in TENSORS:
            getattr(self._batch, name).copy_(getattr(batch, name))
        self._graph.replay()
        return self._losses.clone()

    def _record(self, batch: Batch) -> None:
        self._batch = replace(batch, **{name: getattr(batch, name).clone() for name in TENSORS})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # compilation, and the libraries' choice of kernels
                self._compute(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self._parameters:
            parameter.grad = None  # so that the recorded pass assigns gradients instead of adding to them
        graph = torch.cuda.CUDAGraph()
        # The loader's pinning thread goes on calling CUDA meanwhile: only this thread's calls are checked.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._losses = self._compute(self._batch)
        self._graph = graph
