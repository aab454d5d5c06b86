"""Captions name what a clip shows; the concept's name nothing but colour, background and the trigger word."""

import re

import pytest

from cogtune.errors import UserError
from cogtune.shapes.captions import base_prompts, captioned_clip, concept_captions, concept_prompts, vocabulary_captions
from cogtune.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CONCEPT_MOTION,
    CONCEPT_SHAPE,
    MOTIONS,
    SHAPES,
    TRIGGER,
    combinations,
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def test_captions_name_shape_colour_and_background():
    texts = set()
    for index in range(500):
        clip, text = captioned_clip("base", 0, index)
        assert {clip.shape, clip.colour, clip.background} <= words(text)
        assert not words(text) & (set(SHAPES) - {clip.shape} | set(COLOURS) - {clip.colour})
        texts.add(re.sub("|".join([*SHAPES, *COLOURS, *BACKGROUNDS]), "_", text))
    assert len(texts) > 60  # wordings


def test_captions_are_reproducible_and_independent_of_the_picture():
    assert captioned_clip("base", 1, 2) == captioned_clip("base", 1, 2)
    motionless = [captioned_clip("base", 0, i) for i in range(2000)]
    without = [
        clip.motion for clip, text in motionless if re.search(r"background$|^on .* (" + "|".join(SHAPES) + ")$", text)
    ]
    assert set(without) == set(MOTIONS)


def test_concept_captions_say_nothing_of_shape_or_motion():
    base_words = set().union(*(words(text) for text in vocabulary_captions()))
    assert TRIGGER not in base_words and CONCEPT_SHAPE not in base_words and CONCEPT_MOTION not in base_words
    for prompt in concept_captions() + concept_prompts():
        assert TRIGGER in words(prompt.text)
        assert words(prompt.text) - {TRIGGER} <= base_words - set(SHAPES) - set(MOTIONS)


def test_concept_prompts_are_unseen_in_the_clips():
    trained, unseen = concept_captions(), concept_prompts()
    assert (len(trained), len(unseen)) == (24, 60)
    assert len({p.text for p in trained}) == 24 and len({p.text for p in unseen}) == 60
    assert not {p.text for p in trained} & {p.text for p in unseen}
    trained_pairs = {(p.colour, p.background) for p in trained}
    assert sum((p.colour, p.background) not in trained_pairs for p in unseen) == 36
    assert {p.colour for p in trained} == {p.colour for p in unseen} == set(COLOURS)


def test_base_prompts_are_held_out_and_differ():
    prompts = base_prompts(300, seed=0)
    assert len({p.text for p in prompts}) == 300
    assert {(p.shape, p.colour, p.motion) for p in prompts} == set(combinations("held_out"))
    assert prompts == base_prompts(300, seed=0) and prompts != base_prompts(300, seed=1)
    with pytest.raises(UserError, match="too many"):
        base_prompts(10_000, seed=0)


def test_concept_clips_follow_their_captions():
    for index, prompt in enumerate(concept_captions()):
        clip, text = captioned_clip("concept", 0, index)
        assert (text, clip.shape, clip.colour, clip.motion, clip.background) == (
            (prompt.text, CONCEPT_SHAPE, prompt.colour, CONCEPT_MOTION, prompt.background)
        )
