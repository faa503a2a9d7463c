"""The Shapes text encoder, taught to read before it is asked to guide a picture.

A text encoder that learns from the denoising loss alone takes most of the U-Net's training to bind "red" to
"circle", and longer to notice who stands left of whom. Told directly, it takes minutes: linear heads read the
facts of the caption from the states at the last positions, which are always padding and, the mask being
causal, are the ones that have seen the whole caption. The U-Net then finds one object a position, with its
place, and trains the encoder further. The heads stay for that training, so that what the U-Net does not use
yet is not forgotten, and are thrown away at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffplug.shapes.captions import Told, parse, phrase
from diffplug.shapes.model import text_encoder
from diffplug.shapes.world import BACKGROUNDS, COLORS, CONVERSE, HELD_OUT_SHAPE, SHAPES, SIZES
from diffplug.training.shapes.loop import Loop

NOUNS = 3
"""How many objects a caption names at most; each is read from a position of its own, counted from the end."""

LAYOUT = -NOUNS - 1
"""The position from which it is read what stands in each direction, for captions that tell a relation."""

UNTOLD = -100
"""The class number of what an empty caption says: cross entropies leave it out."""

_CHOICES = {
    "color": (None, *COLORS),
    "shape": (None, *SHAPES, HELD_OUT_SHAPE),
    "size": (None, *SIZES),
    "place": (None, *CONVERSE),
    "background": (None, *BACKGROUNDS),
}

_DIRECTIONS = tuple(CONVERSE)


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """How the text encoder is taught to read."""

    steps: int = 500
    batch: int = 128
    lr: float = 1e-3
    ema: float = 0.99
    seed: int = 2


def classes(told: Told) -> np.ndarray:
    """What a caption says as class numbers [3 objects, 5 facts]; 0 where it says nothing."""
    places = (told.relation, CONVERSE[told.relation]) if told.relation else ()
    rows = []
    for i in range(NOUNS):
        noun = told.nouns[i] if i < len(told.nouns) else None
        said = {
            "color": noun and noun.color,
            "shape": noun and noun.shape,
            "size": noun and noun.size,
            "place": places[i] if i < len(places) else None,
            "background": told.background,
        }
        rows.append([_CHOICES[name].index(value) for name, value in said.items()])
    return np.array(rows)


def layout(told: Told) -> np.ndarray:
    """Colour and shape of what a caption puts in each direction as class numbers [4, 2]; 0 for nothing."""
    rows = np.zeros((len(_DIRECTIONS), 2), dtype=np.int64)
    if told.relation:
        for place, row in zip((told.relation, CONVERSE[told.relation]), classes(told), strict=False):
            rows[_DIRECTIONS.index(place)] = row[:2]
    return rows


class Reader(nn.Module):
    """Linear heads over the states of the last positions.

    "Red is on the left" is a fact of its own here, not only the conjunction of a red object and its place:
    the U-Net found no use for the conjunction in 7,000 steps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in _CHOICES.items()})
        self.layout = nn.ModuleDict(
            {name: nn.Linear(width, len(_DIRECTIONS) * len(_CHOICES[name])) for name in ("color", "shape")}
        )

    def forward(self, states: Tensor) -> list[Tensor]:
        """Logits [n, 3, classes] of each fact from states [n, tokens, width]."""
        slots = states[:, -NOUNS:]
        return [head(slots) for head in self.heads.values()]

    def loss(self, states: Tensor, facts: Tensor, layouts: Tensor) -> tuple[Tensor, Tensor]:
        """The summed cross entropies of all facts, and the share of captions of which every fact was read.

        facts, layouts: of `wanted`; captions that say nothing do not count.
        """
        logits = self(states)
        across = [
            head(states[:, LAYOUT]).unflatten(-1, (len(_DIRECTIONS), -1)) for head in self.layout.values()
        ]
        asked = [(row, facts[..., i]) for i, row in enumerate(logits)]
        asked += [(row, layouts[..., i]) for i, row in enumerate(across)]
        errors = [
            nn.functional.cross_entropy(row.flatten(0, 1), answers.flatten(), ignore_index=UNTOLD)
            for row, answers in asked
        ]
        right = torch.stack([row.argmax(-1) == facts[..., i] for i, row in enumerate(logits)])
        told = facts[:, 0, 0] != UNTOLD
        return torch.stack(errors).sum(), right.all(0).all(-1).double().sum() / told.sum()


def wanted(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What captions say as class numbers: facts [n, 3, 5], layouts [n, 4, 2]; UNTOLD where one is empty."""
    facts = np.full((len(captions), NOUNS, len(_CHOICES)), UNTOLD)
    layouts = np.full((len(captions), len(_DIRECTIONS), 2), UNTOLD)
    for i, caption in enumerate(captions):
        if caption:
            told = parse(caption)
            facts[i], layouts[i] = classes(told), layout(told)
    return torch.from_numpy(facts), torch.from_numpy(layouts)


def train_text(
    recipe: TextRecipe, loop: Loop, captions: list[Told], words: CLIPTokenizer
) -> tuple[CLIPTextModel, Reader]:
    """Teach a fresh text encoder to read wordings of `captions`, resuming where the folder of `loop` stands.

    Returns the averaged text encoder and the heads that read from it.
    """
    torch.manual_seed(recipe.seed)
    text = text_encoder(words)
    reader = Reader(text.config.hidden_size)

    def loss(step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        rng = np.random.default_rng([recipe.seed, step, 11])
        prompts = [phrase(captions[row], rng) for row in rng.integers(len(captions), size=recipe.batch)]
        ids = words(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        told = (each.to(loop.device) for each in wanted(prompts))
        value, read = reader.loss(text(ids.to(loop.device)).last_hidden_state, *told)
        return value, {"loss": value.detach(), "read": read}

    averaged = loop.run(
        {"text": text, "reader": reader}, loss, steps=recipe.steps, lr=recipe.lr, ema=recipe.ema
    )
    text.load_state_dict(averaged["text"])
    reader.load_state_dict(averaged["reader"])
    return text.eval(), reader.eval()
