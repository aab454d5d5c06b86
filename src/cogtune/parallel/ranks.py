"""Which ranks work on one sample or video together, and which of its tokens each one has. No process group is needed.

Neighbouring ranks form a team. Each team takes samples of its own, and its members parts of their tokens.
"""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Teams:
    """All ranks, `size` of them to a team."""

    rank: int
    num_ranks: int
    size: int

    def __post_init__(self) -> None:
        assert self.size >= 1 and self.num_ranks % self.size == 0 and 0 <= self.rank < self.num_ranks

    @property
    def team(self) -> int:
        """This rank's team."""
        return self.rank // self.size

    @property
    def num_teams(self) -> int:
        """Teams in all."""
        return self.num_ranks // self.size

    @property
    def place(self) -> int:
        """This rank's place in its team; 0 leads it."""
        return self.rank % self.size


def split_evenly(total: int, num_parts: int, first: int = 0) -> tuple[int, ...]:
    """Sizes of the parts, which differ by one at most; the larger ones are part `first` and those after it, in turn."""
    whole, more = divmod(total, num_parts)
    return tuple(whole + ((part - first) % num_parts < more) for part in range(num_parts))


@dataclass(frozen=True)
class TokenParts:
    """Every member's number of text and of video tokens; the sums differ by one at most."""

    text: tuple[int, ...]
    video: tuple[int, ...]

    @classmethod
    def of(cls, num_text: int, num_video: int, num_parts: int) -> "TokenParts":
        """Contiguous parts; who has one text token more has no video token more, where that is possible."""
        return cls(split_evenly(num_text, num_parts), split_evenly(num_video, num_parts, num_text % num_parts))

    @property
    def joint(self) -> tuple[int, ...]:
        """Tokens of each member."""
        return tuple(map(sum, zip(self.text, self.video, strict=True)))

    def text_range(self, place: int) -> tuple[int, int]:
        """Where a member's text begins and ends."""
        return _range(self.text, place)

    def video_range(self, place: int) -> tuple[int, int]:
        """Where a member's video tokens begin and end."""
        return _range(self.video, place)


def _range(sizes: tuple[int, ...], place: int) -> tuple[int, int]:
    ends = list(accumulate(sizes, initial=0))
    return ends[place], ends[place + 1]
