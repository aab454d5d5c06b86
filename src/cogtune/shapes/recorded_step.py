"""A step of work on the device as one CUDA graph: thousands of small kernels started by a single call.

It follows https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture: fixed inputs, warm-up on a side
stream, nothing inside that waits for the device. Where capturing fails the step runs operation by operation.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor


class RecordedStep:
    """Fill `inputs` in place, call `run`, read `measured` (fixed buffers, too): what `operation` returned."""

    def __init__(self, operation: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor, ...]) -> None:
        self.operation = operation
        self.inputs = inputs
        self.measured: dict[str, Tensor] = {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def run_eagerly(self) -> None:
        """The step, operation by operation."""
        for name, value in self.operation(*self.inputs).items():
            if name in self.measured:
                self.measured[name].copy_(value)
            else:
                self.measured[name] = value.clone()

    def run(self) -> None:
        """The step, from its graph if there is one."""
        if self.graph is None:
            self.run_eagerly()
        else:
            self.graph.replay()

    def capture(self, *, compared: tuple[str, ...], tolerance: float = 0.05) -> None:
        """Records the step, and keeps the record if its `compared` measures equal those of the plain step.

        Meanwhile the step must leave its own inputs alone: learning rate 0.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN chooses its kernels, the optimizer makes its state
                self.run_eagerly()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        expected = {name: float(self.measured[name]) for name in compared}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.run_eagerly()
            for value in self.measured.values():
                value.zero_()
            graph.replay()
            torch.cuda.synchronize()
            got = {name: float(self.measured[name]) for name in compared}
        except RuntimeError as error:
            print(f"no CUDA graph, every step runs eagerly: {error}", flush=True)
            return
        close = all(abs(got[name] - value) <= tolerance * abs(value) for name, value in expected.items())
        print(f"{'graphed' if close else 'NOT GRAPHED, unequal'}: eager {expected}, graph {got}", flush=True)
        if close:
            self.graph = graph

    def time(self, *, eager: bool, count: int = 5) -> float:
        """Seconds a step on CUDA."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            if eager:
                self.run_eagerly()
            else:
                self.run()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / count
