"""Training that repeats itself bit for bit on a GPU: only kernels that sum in one order, and none that timing chooses.

Attention kernels are tried for it on the run's own shape (`attention_backends`); PyTorch refuses what it knows to be
without an order (https://docs.pytorch.org/docs/stable/notes/randomness.html).
"""

import os

import torch

_WORKSPACE = ":4096:8"  # one of the two in which cuBLAS promises it; 32 MiB, what a Hopper GPU takes anyway


def follow_determinism(wanted: bool) -> None:
    """Turns it on or off for this process; call it before the device computes anything."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)
        # Whatever is made empty is written before it is read. (The module takes it by a class of its own.)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if wanted or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)
        _choose_kernels_without_timing(wanted)


def _choose_kernels_without_timing(wanted: bool) -> None:
    """The compiler times several forms of a reduction otherwise, which add up in orders of their own (torch 2.9)."""
    from torch._inductor import config  # takes its time; only needed here

    if hasattr(config, "deterministic"):
        config.deterministic = wanted
