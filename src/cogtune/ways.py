"""What `auto` came to in a deterministic run, kept in its folder: when the run goes on it takes the same, which free
memory and timing may not give again.

Only what decides how a step is rounded: the attention kernel, and what each block keeps for its backward pass, since
what is kept is rounded where the compiler would go on in float32. Where blocks and activations wait changes no bit.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cogtune.attention_backends import Backend
from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.memory import MemoryPlan

FILE_NAME = "ways.json"
_Rounding = dict[str, Any]


@dataclass(frozen=True)
class Ways:
    """Of a run on one kind of device."""

    device: str
    attention: Backend
    memory: _Rounding

    def prefer(self, rungs: Sequence[MemoryPlan]) -> list[MemoryPlan]:
        """Those that round as the run did come first; otherwise in their order."""
        return sorted(rungs, key=lambda rung: not self.match(rung))

    def match(self, rung: MemoryPlan) -> bool:
        """Whether a rung rounds as the run did."""
        return _rounding_of(rung) == self.memory


def read_ways(config: RunConfig, device: torch.device) -> Ways | None:
    """Of the run in the output folder, if it is to go on deterministically on its kind of device.

    Raises `UserError` for a file that says nothing.
    """
    path = config.output_dir / FILE_NAME
    if not config.train.deterministic or config.checkpoint.resume == "never" or not path.is_file():
        return None
    try:
        ways = Ways(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: can't be read ({error}); delete it, and the run goes on with what is fastest now, equal up to "
            "rounding"
        ) from None
    return ways if ways.device == _name(device) else None


def write_ways(folder: Path, device: torch.device, attention: Backend, rung: MemoryPlan) -> None:
    """For the next time, by the main process; atomically, since runs are killed at any moment."""
    ways = Ways(_name(device), attention, _rounding_of(rung))
    temporary = folder / f".partial-{FILE_NAME}"
    temporary.write_text(json.dumps(asdict(ways), indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / FILE_NAME)


def _rounding_of(rung: MemoryPlan) -> _Rounding:
    return {
        "activations": rung.activations,
        "num_lean": rung.num_lean,
        "on_host": rung.on_host,
        "num_updated": rung.num_updated,
        "eight_bit": rung.eight_bit,
        "quantized": rung.quantized,
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
