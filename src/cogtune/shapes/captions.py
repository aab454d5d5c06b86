"""English captions of clips, in several wordings, and the prompts on which models are measured.

The base model's captions name shape, colour, motion and background; one in eight leaves the motion out, so that a
caption without one is nothing new to the model. The concept's captions carry only its trigger word beside colour and
background: neither its shape nor its motion is described, so what the word means can only come from the clips.
"""

from dataclasses import dataclass

import numpy as np

from cogtune.errors import UserError
from cogtune.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CONCEPT_MOTION,
    CONCEPT_SHAPE,
    SHAPES,
    TRIGGER,
    Clip,
    clip_random,
    combinations,
    place_clip,
    sample_clip,
)

# Each motion as (participle, verb) pairs.
_MOTION_WORDS: dict[str, list[tuple[str, str]]] = {
    "left": [("moving left", "moves left"), ("sliding to the left", "slides to the left")],
    "right": [("moving right", "moves right"), ("sliding to the right", "slides to the right")],
    "up": [("moving up", "moves up"), ("rising", "rises")],
    "down": [("moving down", "moves down"), ("sinking", "sinks")],
    "growing": [("growing", "grows"), ("getting bigger", "gets bigger")],
    "shrinking": [("shrinking", "shrinks"), ("getting smaller", "gets smaller")],
    "bouncing": [("bouncing", "bounces"), ("hopping up and down", "hops up and down")],
    "still": [("staying still", "stays still"), ("not moving", "does not move")],
}

_WORDINGS = (
    "a {colour} {shape} {participle} on a {background} background",
    "a {colour} {shape} {verb} on a {background} background",
    "a {colour} {shape} {verb} in front of a {background} background",
    "on a {background} background, a {colour} {shape} {verb}",
    "a video of a {colour} {shape} {participle}, {background} background",
    "the {shape} is {colour} and {verb}; the background is {background}",
)
# Without a motion; the first half words the concept's training clips, the second half only its unseen prompts.
_STILL_LIFE_WORDINGS = (
    "a {colour} {shape} on a {background} background",
    "a video of a {colour} {shape}, {background} background",
    "{background} background, a {colour} {shape}",
    "on a {background} background, a {colour} {shape}",
    "a {colour} {shape} in front of a {background} background",
    "the {shape} is {colour}; the background is {background}",
)
_NUM_CONCEPT_WORDINGS = 3
_MOTIONLESS_SHARE = 1 / 8
_MOST_BASE_PROMPTS = 600  # of 864


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a video of it must show."""

    text: str
    shape: str
    colour: str
    motion: str
    background: str


def _pick(options: tuple[str, ...] | list[tuple[str, str]], rng: np.random.Generator) -> int:
    return int(rng.random() * len(options))


def caption(clip: Clip, rng: np.random.Generator, *, always_motion: bool = False) -> str:
    """One wording of a clip of the base world; `always_motion` never leaves the motion out."""
    words = {"shape": clip.shape, "colour": clip.colour, "background": clip.background}
    if rng.random() < _MOTIONLESS_SHARE and not always_motion:
        return _STILL_LIFE_WORDINGS[_pick(_STILL_LIFE_WORDINGS, rng)].format(**words)
    pairs = _MOTION_WORDS[clip.motion]
    participle, verb = pairs[_pick(pairs, rng)]
    return _WORDINGS[_pick(_WORDINGS, rng)].format(**words, participle=participle, verb=verb)


def captioned_clip(split: str, seed: int, index: int) -> tuple[Clip, str]:
    """Clip number `index` of a split under a seed, and its caption. The concept's splits go round their captions."""
    if split.startswith("concept"):
        prompts = concept_captions() if split == "concept" else concept_prompts()
        prompt = prompts[index % len(prompts)]
        rng = clip_random(split, seed, index, stream="picture")
        words = {"shape": prompt.shape, "colour": prompt.colour, "background": prompt.background}
        return place_clip(rng, motion=prompt.motion, **words), prompt.text
    clip = sample_clip(split, seed, index)
    return clip, caption(clip, clip_random(split, seed, index, stream="words"), always_motion=split == "held_out")


def concept_captions() -> list[Prompt]:
    """What the concept's 24 training clips show: 12 of the 18 pairs of colour and background, in two wordings each."""
    prompts = []
    for pair, (colour, background) in enumerate(_concept_pairs(held_out=False)):
        for repeat in range(2):
            wording = _STILL_LIFE_WORDINGS[(pair + repeat) % _NUM_CONCEPT_WORDINGS]
            prompts.append(_concept_prompt(wording, colour, background))
    return prompts


def concept_prompts() -> list[Prompt]:
    """60 prompts that no concept clip carries: unseen pairs in every wording, and seen pairs in unseen wordings."""
    unseen = _STILL_LIFE_WORDINGS[_NUM_CONCEPT_WORDINGS:]
    new_pairs = [(wording, pair) for pair in _concept_pairs(held_out=True) for wording in _STILL_LIFE_WORDINGS]
    known_pairs = [(unseen[(n + k) % 3], pair) for n, pair in enumerate(_concept_pairs(held_out=False)) for k in (0, 1)]
    return [_concept_prompt(wording, *pair) for wording, pair in new_pairs + known_pairs]


def base_prompts(count: int, seed: int) -> list[Prompt]:
    """Different prompts of the held-out combinations, which base training never saw, in turn."""
    rng = np.random.Generator(np.random.PCG64([len(_WORDINGS), seed]))
    choices = combinations("held_out")
    backgrounds = list(BACKGROUNDS)
    if count > _MOST_BASE_PROMPTS:
        raise UserError(f"{count} prompts are too many: the held-out combinations give {_MOST_BASE_PROMPTS} at most")
    prompts: dict[str, Prompt] = {}
    number = 0
    while len(prompts) < count:
        shape, colour, motion = choices[number % len(choices)]
        background = backgrounds[number // len(choices) % len(backgrounds)]
        clip = Clip(shape, colour, motion, background, x=0.0, y=0.0, radius=1.0, travel=0.0)
        text = caption(clip, rng, always_motion=True)
        prompts.setdefault(text, Prompt(text, shape, colour, motion, background))
        number += 1
    return list(prompts.values())


def vocabulary_captions() -> list[str]:
    """Captions that together hold every word of the base world and no other: the trigger word is left out."""
    return [
        wording.format(shape=shape, colour=colour, background=background, participle=participle, verb=verb)
        for words in _MOTION_WORDS.values()
        for participle, verb in words
        for wording in _WORDINGS
        for shape, colour in zip(SHAPES, COLOURS, strict=True)
        for background in BACKGROUNDS
    ]


def _concept_pairs(*, held_out: bool) -> list[tuple[str, str]]:
    """The (colour, background) pairs of the concept's unseen prompts, one for each colour, or those of its clips."""
    pairs = [(i, j, colour, background) for i, colour in enumerate(COLOURS) for j, background in enumerate(BACKGROUNDS)]
    return [(colour, background) for i, j, colour, background in pairs if ((i + j) % len(BACKGROUNDS) == 0) == held_out]


def _concept_prompt(wording: str, colour: str, background: str) -> Prompt:
    text = wording.format(shape=TRIGGER, colour=colour, background=background)
    return Prompt(text, CONCEPT_SHAPE, colour, CONCEPT_MOTION, background)
