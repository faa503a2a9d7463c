"""Scenes to words and words to facts: a small grammar with paraphrases, and its inverse.

    prompt     = [opening] objects [on/against a BACKGROUND background]
    objects    = thing | thing (and | with | beside) thing | thing RELATION thing | thing, thing and thing
    thing      = (a | an | one) [SIZE] COLOR SHAPE

Which prompts belong to training, to searches and to tests is decided by the content of the prompt (its
objects, their sizes, its relation, its background), so that a paraphrase never leaks a test prompt into
training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffplug.shapes.world import (
    BACKGROUNDS,
    COLORS,
    CONVERSE,
    HELD_OUT_SHAPE,
    KINDS,
    SHAPES,
    SIZES,
    Scene,
    sample_scene,
)

SPLITS = ("train", "search", "test")

_OPENINGS = ("", "", "", "a picture of ", "an image of ")
_AND = (" and ", " and ", " with ", " beside ")
_PHRASES = {
    "left of": (" left of ", " to the left of "),
    "right of": (" right of ", " to the right of "),
    "above": (" above ", " over "),
    "below": (" below ", " under "),
}
_ON = (" on a {} background", " against a {} background")
_NUMBER_WORDS = ("a", "an", "one")
_GRAMMAR_WORDS = set(
    " ".join([*_OPENINGS, *_AND, *(p for ps in _PHRASES.values() for p in ps), *_ON, *_NUMBER_WORDS, "gray"])
    .replace("{}", "")
    .split()
)

VOCABULARY: frozenset[str] = frozenset(
    {*COLORS, *SHAPES, HELD_OUT_SHAPE, *SIZES, *BACKGROUNDS, *_GRAMMAR_WORDS}
)
"""Every word that the model has an idea of."""

_SHAPE_WORDS = "|".join((*SHAPES, HELD_OUT_SHAPE))
_THING = re.compile(
    rf"(?:(?P<size>{'|'.join(SIZES)}) )?(?P<color>{'|'.join(COLORS)}) (?P<shape>{_SHAPE_WORDS})\b"
)
_BACKGROUND = re.compile(rf"(?P<name>{'|'.join((*BACKGROUNDS, 'gray'))}) background\b")
_RELATION = [(phrase.strip(), name) for name, phrases in _PHRASES.items() for phrase in reversed(phrases)]


@dataclass(frozen=True, kw_only=True)
class Noun:
    """An object as a prompt tells it: colour, shape and, if told, its size word."""

    color: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a prompt says: its objects, what the first is to the second, and the background, if told."""

    nouns: tuple[Noun, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def key(self) -> str:
        """The content without the wording: equal for paraphrases, swapped objects and converse relations."""
        nouns = [str(noun) for noun in self.nouns]
        if self.relation in ("right of", "below"):
            return f"{nouns[1]} {CONVERSE[self.relation]} {nouns[0]} | {self.background}"
        if self.relation:
            return f"{nouns[0]} {self.relation} {nouns[1]} | {self.background}"
        return f"{' + '.join(sorted(nouns))} | {self.background}"

    @property
    def split(self) -> str:
        """ "test" and "search" hold a tenth of all contents each, "train" the rest."""
        bucket = hashlib.sha256(self.key.encode()).digest()[0] % 10
        return {0: "test", 1: "search"}.get(bucket, "train")


def tell(scene: Scene, rng: np.random.Generator) -> Told:
    """What a random caption of a scene says: every size and the background are told half of the time."""
    return Told(
        nouns=tuple(
            Noun(color=t.color, shape=t.shape, size=t.size if rng.random() < 0.5 else None)
            for t in scene.things
        ),
        relation=scene.relation,
        background=scene.background if rng.random() < 0.5 else None,
    )


def phrase(told: Told, rng: np.random.Generator) -> str:
    """One of the wordings of a content."""
    nouns, relation = list(told.nouns), told.relation
    if relation and rng.random() < 0.5:
        nouns, relation = nouns[::-1], CONVERSE[relation]
    elif not relation:
        nouns = [nouns[int(i)] for i in rng.permutation(len(nouns))]
    words = [_article(str(noun), rng) for noun in nouns]
    if relation:
        text = str(rng.choice(_PHRASES[relation])).join(words)
    elif len(words) == 3:
        text = f"{words[0]}, {words[1]} and {words[2]}"
    else:
        text = str(rng.choice(_AND)).join(words)
    ending = str(rng.choice(_ON)).format(told.background) if told.background else ""
    return str(rng.choice(_OPENINGS)) + text + ending


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random true caption of a scene."""
    return phrase(tell(scene, rng), rng)


def parse(prompt: str) -> Told:
    """What a prompt says about a picture, as far as the grammar goes; words outside it are passed over.

    Raises:
        ValueError: the prompt names no object that the grammar knows.
    """
    text = " ".join(re.findall(r"[a-z]+", prompt.lower()))
    found = list(_THING.finditer(text))
    if not found:
        raise ValueError(
            f"prompt {prompt!r} names no object of the Shapes world: say a colour ({', '.join(COLORS)}) "
            f"and a shape ({', '.join((*SHAPES, HELD_OUT_SHAPE))}), as in 'a red circle'."
        )
    nouns = tuple(Noun(color=m["color"], shape=m["shape"], size=m["size"]) for m in found)
    between = text[found[0].end() : found[1].start()] if len(found) > 1 else ""
    relation = next((name for words, name in _RELATION if words in between), None)
    ground = _BACKGROUND.search(text)
    name = ground["name"].replace("gray", "grey") if ground else None
    return Told(nouns=nouns, relation=relation, background=name)


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the Shapes model has never read, in order, once each."""
    return [word for word in dict.fromkeys(re.findall(r"[^\W_]+", prompt.lower())) if word not in VOCABULARY]


def sample_prompts(n: int, seed: int = 0, kind: str = "mixed", *, split: str = "test") -> list[str]:
    """`n` prompts of a kind, the same for the same arguments; the contents of the three splits never meet.

    Args:
        kind: "one", "two", "relation" or "three" objects, or "mixed" for all four in turn.
        split: "train", "search" (for searches and tuning) or "test" (for figures that are published).

    Raises:
        ValueError: an unknown kind or split, or a negative n.
    """
    kinds = KINDS if kind == "mixed" else (kind,)
    if kind not in (*KINDS, "mixed"):
        raise ValueError(f"prompt kind {kind!r} is not known: take one of {', '.join((*KINDS, 'mixed'))}.")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known: take one of {', '.join(SPLITS)}.")
    if n < 0:
        raise ValueError(f"n is {n}: ask for zero prompts or more.")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return [_prompt_of(rng, kinds[i % len(kinds)], split) for i in range(n)]


def captioned_scenes(rng: np.random.Generator, n: int, split: str = "train") -> list[tuple[Scene, Told]]:
    """`n` random scenes of every kind, each with a content of the split that is true of it."""
    return [_scene_of(rng, KINDS[int(rng.choice(len(KINDS), p=_MIX))], split) for _ in range(n)]


_MIX = (0.2, 0.25, 0.4, 0.15)  # share of each kind in training: relations are the hardest to learn


def _scene_of(rng: np.random.Generator, kind: str, split: str) -> tuple[Scene, Told]:
    while True:
        scene = sample_scene(rng, kind)
        told = tell(scene, rng)
        if told.split == split:
            return scene, told


def _prompt_of(rng: np.random.Generator, kind: str, split: str) -> str:
    return phrase(_scene_of(rng, kind, split)[1], rng)


def _article(noun: str, rng: np.random.Generator) -> str:
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{'one' if rng.random() < 0.1 else article} {noun}"


def all_words(prompts: Sequence[str]) -> set[str]:
    """Every word of some prompts, lower case."""
    return {word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower())}
