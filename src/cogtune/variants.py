"""The CogVideoX variants: what no file of theirs says. A new variant is a new row of `VARIANTS`.

It imports no PyTorch: `head_start` looks a model's files up before that takes its seconds.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SizeRule:
    """Lengths and sizes that a model was trained for beside its native one; sizes in pixels."""

    short_side: int
    """The shorter side is this."""
    max_long_side: int
    """The longer side is between `short_side` and this."""
    multiple: int
    """Both sides are multiples of it."""
    frame_step: int
    """Clips have k * `frame_step` + 1 frames, k from 1 on."""
    max_frames: int

    def find_fault(self, num_frames: int, height: int, width: int) -> str | None:
        """What the rule is and a remedy, where the size breaks it; None where it doesn't."""
        short, long = sorted((height, width))
        if (num_frames - 1) % self.frame_step or not self.frame_step < num_frames <= self.max_frames:
            return (
                f"frames must be {self.frame_step}k + 1, from {self.frame_step + 1} to {self.max_frames}, such as "
                f"{_nearest(num_frames - 1, self.frame_step, self.max_frames - 1) + 1}"
            )
        if short != self.short_side or long > self.max_long_side or long % self.multiple:
            longer = _nearest(long * self.short_side / max(short, 1), self.multiple, self.max_long_side)
            return (
                f"the shorter side must be {self.short_side} and the longer one a multiple of {self.multiple} up to "
                f"{self.max_long_side}, such as {self.short_side} and {max(longer, self.short_side)}"
            )
        return None


def _nearest(value: float, step: int, most: int) -> int:
    """The multiple of `step` nearest to the value, from one step up to `most`."""
    return max(step, min(most // step, round(value / step)) * step)


@dataclass(frozen=True)
class Variant:
    """A released model: the facts that its files don't hold. A new variant is a new row of `VARIANTS`."""

    hub_name: str | None
    """Repository on the Hugging Face hub; None for a model that ships inside the package."""
    dtype: str
    """The precision it was trained in and is fine-tuned in on a GPU, by PyTorch's name."""
    num_frames: int
    height: int
    width: int
    fps: float
    fixed_size: bool
    """True: the model card supports this one length and size only."""
    signature: dict[str, Any]
    """The transformer config entries that tell this variant from the others."""
    size_rule: SizeRule | None = None
    """Other lengths and sizes that it supports."""


DTYPE_NAMES = ("float32", "bfloat16", "float16")
_VERSION_1_5 = SizeRule(short_side=768, max_long_side=1360, multiple=16, frame_step=16, max_frames=161)
_5B = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}

VARIANTS = {
    "cogvideox-2b": Variant(
        "zai-org/CogVideoX-2b",
        "float16",
        49,
        480,
        720,
        8.0,
        True,
        {"num_layers": 30, "num_attention_heads": 30, "use_rotary_positional_embeddings": False, "in_channels": 16},
    ),
    "cogvideox-5b": Variant(
        "zai-org/CogVideoX-5b",
        "bfloat16",
        49,
        480,
        720,
        8.0,
        True,
        _5B | {"in_channels": 16, "patch_size_t": None},
    ),
    "cogvideox-5b-i2v": Variant(
        "zai-org/CogVideoX-5b-I2V",
        "bfloat16",
        49,
        480,
        720,
        8.0,
        True,
        _5B | {"in_channels": 32, "patch_size_t": None},
    ),
    "cogvideox-1.5-5b": Variant(
        "zai-org/CogVideoX1.5-5B",
        "bfloat16",
        81,
        768,
        1360,
        16.0,
        False,
        _5B | {"in_channels": 16, "patch_size_t": 2},
        _VERSION_1_5,
    ),
    "cogvideox-1.5-5b-i2v": Variant(
        "zai-org/CogVideoX1.5-5B-I2V",
        "bfloat16",
        81,
        768,
        1360,
        16.0,
        False,
        _5B | {"in_channels": 32, "patch_size_t": 2},
        _VERSION_1_5,
    ),
    "tiny": Variant(
        None,
        "float32",
        17,
        64,
        96,
        8.0,
        False,
        {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 48},
    ),
}
