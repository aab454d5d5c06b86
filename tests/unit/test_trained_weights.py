"""Which weights a pattern takes."""

import re

import pytest

from cogtune.errors import UserError
from cogtune.trained_weights import choose_trained, count_frozen_in_blocks

INSIDE = ("norm1.linear.weight", "attn1.to_q.weight", "attn1.to_q.bias", "attn1.norm_q.weight", "ff.net.2.weight")
NAMES = [
    "patch_embed.proj.weight",
    *[f"transformer_blocks.{b}.{n}" for b in range(12) for n in INSIDE],
    "proj_out.bias",
]


def count(*patterns: str) -> int:
    return len(choose_trained(NAMES, list(patterns), 12))


def test_all_without_patterns() -> None:
    assert choose_trained(NAMES, None, 12) == NAMES


def test_shorthands() -> None:
    taken = choose_trained(NAMES, ["attention"], 12)
    assert len(taken) == 36 and all(".attn1." in name for name in taken)
    taken = choose_trained(NAMES, ["last 2 blocks"], 12)
    assert taken == [name for name in NAMES if name.startswith(("transformer_blocks.10.", "transformer_blocks.11."))]
    assert choose_trained(NAMES, ["last 1 blocks"], 12) == taken[5:]


def test_ends_of_names_and_regular_expressions() -> None:
    assert count("to_q") == 24 and count("attn1.to_q") == 24 and count("to_q.weight") == 12 and count("net.2") == 12
    assert count("proj_out") == 1 and count("bias") == 13
    assert count(r"transformer_blocks\.[01]\..*") == 10, "block 10 and 11 are not 1"
    assert count(r"transformer_blocks\.3") == 5, "a layer's name takes all in it"
    assert count("to_q", "to_q.bias", "proj_out") == 25, "each once"
    with pytest.raises(UserError):
        count("o_q")


@pytest.mark.parametrize(
    "pattern, parts",
    [
        ("attn1.to_w", ["'attn1.to_w' matches no weight; did you mean attn1.to_q?", "names: "]),
        ("atention", ["did you mean attention?"]),
        ("last 13 blocks", ["the model has 12 blocks"]),
        ("last 0 blocks", ["the model has 12 blocks"]),
        ("to_[q", ["is no regular expression"]),
    ],
)
def test_what_matches_nothing_is_named(pattern: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        count("to_q", pattern)
    for part in ["train.trained_weights", *parts]:
        assert re.search(re.escape(part), str(caught.value)), caught.value


def test_frozen_numbers_of_a_block() -> None:
    shapes = dict.fromkeys(NAMES, 10)
    assert count_frozen_in_blocks(shapes, choose_trained(NAMES, ["attention"], 12), 12) == 20
    assert count_frozen_in_blocks(shapes, choose_trained(NAMES, ["last 6 blocks"], 12), 12) == 25
