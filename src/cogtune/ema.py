"""An exponential moving average of the trained weights, float32, used for validation and for the final weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_NAME = "ema.safetensors"


class Ema:
    """Follows the parameters; early on with a shorter memory, so that the random start is forgotten."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._average = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (counted from 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), current, 1.0 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averaged weights are the model's inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(own)

    def save(self, folder: Path) -> None:
        """Writes the average into a checkpoint folder."""
        save_file({name: tensor.cpu().contiguous() for name, tensor in self._average.items()}, folder / _NAME)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        saved = load_file(folder / _NAME)
        for name, tensor in self._average.items():
            tensor.copy_(saved[name])
