"""The recipe of the Shapes CLIP: `python -m diffplug.training.shapes.clip`.

Contrastive training (arXiv 2103.00020) on rendered scenes and their captions. Beside the captions of the
other scenes, every picture is shown its own caption with one fact changed: without these, a bag of words
suffices. Where a caption happens to be true of another scene too, that pair counts neither way. Pictures get
noise and blur, since the reward is for what a diffusion model draws, early clean predictions included.
Resumes where it was stopped; needs open_clip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffplug.rewards.networks.shapes_clip_model import clip_config, clip_model, clip_tokenizer, save_clip
from diffplug.rewards.shapes_clip import shapes_clip_folder
from diffplug.shapes.captions import Noun, Told, captioned_scenes, phrase
from diffplug.shapes.rendering import render
from diffplug.shapes.world import BACKGROUNDS, COLORS, CONVERSE, SHAPES, SIZES, Scene, holds
from diffplug.training.shapes.loop import Loop

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """How the CLIP is trained."""

    steps: int = 3_000
    batch: int = 128
    lr: float = 1e-3
    ema: float = 0.998
    noise: float = 0.1
    seed: int = 3


@app.command()
def train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints and the log.")
    ] = Path("runs/shapes-clip"),
    into: Annotated[
        Path | None, typer.Option(help="Folder for the result; else where `shapes-clip` looks for it.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = ClipRecipe.seed,
    steps: Annotated[int, typer.Option(min=1)] = ClipRecipe.steps,
    batch: Annotated[int, typer.Option(min=2, help="Scenes in a step.")] = ClipRecipe.batch,
    check: Annotated[int, typer.Option(min=1, help="Scenes to measure the result on.")] = 1000,
    minutes: Annotated[float | None, typer.Option(help="Stop, saved, after this long.")] = None,
) -> None:
    """Train the CLIP of the Shapes world from nothing, or go on where a run stopped.

    Example: python -m diffplug.training.shapes.clip -o runs/shapes-clip --device cpu
    """
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"device {device!r} is not known: take auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device 'cuda' was asked for and PyTorch finds no GPU: take --device cpu.")
    words = clip_tokenizer()
    config = clip_config(words)
    loop = Loop(output, cpu=device == "cpu", minutes=minutes, save_every=500)
    model = train_clip(ClipRecipe(steps=steps, batch=batch, seed=seed), loop, config, words)
    if loop.stopped_early:
        typer.echo(f"stopped and saved in {output}: the same command goes on from there")
        raise typer.Exit
    folder = into or shapes_clip_folder()
    save_clip(model, words, config, folder)
    right = ", ".join(f"{kind} {share:.1%}" for kind, share in preferred(model, words, n=check).items())
    typer.echo(f"{folder}: prefers the true caption to one with a changed fact: {right}")


def train_clip(recipe: ClipRecipe, loop: Loop, config: dict[str, Any], words: CLIPTokenizer) -> nn.Module:
    """Train a fresh model of `config`, resuming where the folder of `loop` stands, and return it averaged."""
    torch.manual_seed(recipe.seed)
    model = clip_model(config)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([recipe.seed, step, 13])
        scenes, told = zip(*captioned_scenes(rng, recipe.batch), strict=True)
        texts = [*told, *(changed(content, rng) for content in told)]
        images = roughened(render(scenes, device=loop.device), recipe.noise)
        logits = similarities(model, words, images, [phrase(content, rng) for content in texts])
        logits = logits.masked_fill(also_true(scenes, texts).to(loop.device), -torch.inf)
        wanted = torch.arange(recipe.batch, device=loop.device)
        of_images = F.cross_entropy(logits, wanted)
        of_texts = F.cross_entropy(logits[:, : recipe.batch].T, wanted)
        value = (of_images + of_texts) / 2
        own, other = logits.diagonal(), logits[:, recipe.batch :].diagonal()
        return value, {"loss": value.item(), "preferred": (own > other).double().mean().item()}

    averaged = loop.run({"clip": model}, loss, steps=recipe.steps, lr=recipe.lr, ema=recipe.ema)
    model.load_state_dict(averaged["clip"])
    return model.eval()


def similarities(model: Any, words: CLIPTokenizer, images: Tensor, texts: list[str]) -> Tensor:
    """Scaled cosines [pictures, texts]; the scale is held to 100, as CLIP's is."""
    ids = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(images.device)
    pictures = model.encode_image(images * 2 - 1, normalize=True)
    scale = model.logit_scale.exp().clamp(max=100)
    return scale * pictures @ model.encode_text(ids, normalize=True).T


def roughened(images: Tensor, noise: float) -> Tensor:
    """Pictures as a diffusion model makes them: a third as they are, a third slightly blurred, a third as an
    early clean prediction is, coarse and faded; all with noise of up to that deviation.
    """
    n, device = len(images), images.device
    kind = torch.randint(3, (n, 1, 1, 1), device=device)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = F.interpolate(
        F.avg_pool2d(images, _COARSE), scale_factor=_COARSE, mode="bilinear", align_corners=False
    )
    faded = 0.6 * torch.rand(n, 1, 1, 1, device=device)
    early = coarse.lerp(images.mean((0, 2, 3), keepdim=True), faded)
    strength = noise * torch.rand(n, 1, 1, 1, device=device)
    rough = torch.where(kind == 2, early, torch.where(kind == 1, soft, images))
    return (rough + strength * torch.randn_like(images)).clamp(0, 1)


_COARSE = 4  # pixels of an early prediction's detail


def changed(told: Told, rng: np.random.Generator) -> Told:
    """The content with one fact changed: one of `changes`, those that concern the places oftenest."""
    found = changes(told, rng)
    kinds = [kind for kind in found for _ in range(_OFTEN.get(kind, 1))]
    return found[kinds[int(rng.integers(len(kinds)))]]


_OFTEN = {"converse": 2}  # the hardest fact, so the commonest change


def changes(told: Told, rng: np.random.Generator) -> dict[str, Told]:
    """The content with one fact changed, for every kind of fact that it tells.

    "colour", "shape", "size" of an object; "background"; "converse" of the relation (left for right) and
    another "relation"; "exchange" of two objects' colours.
    """
    i = int(rng.integers(len(told.nouns)))
    noun = told.nouns[i]
    found = {
        "colour": _with(told, i, replace(noun, color=_other(COLORS, noun.color, rng))),
        "shape": _with(told, i, replace(noun, shape=_other(SHAPES, noun.shape, rng))),
    }
    if noun.size:
        found["size"] = _with(told, i, replace(noun, size=_other(SIZES, noun.size, rng)))
    if told.background:
        found["background"] = replace(told, background=_other(BACKGROUNDS, told.background, rng))
    if told.relation:
        found["converse"] = replace(told, relation=CONVERSE[told.relation])
        found["relation"] = replace(told, relation=_other(CONVERSE, told.relation, rng))
    if len(told.nouns) > 1 and _differ(told):
        found["exchange"] = _colors_exchanged(told)
    return found


def _with(told: Told, i: int, noun: Noun) -> Told:
    return replace(told, nouns=(*told.nouns[:i], noun, *told.nouns[i + 1 :]))


def _other(values: Any, value: str, rng: np.random.Generator) -> str:
    return str(rng.choice([v for v in values if v != value]))


def _differ(told: Told) -> bool:
    """Whether the content is another one after the first two colours are exchanged."""
    first, second = told.nouns[:2]
    return first.color != second.color and (first.shape != second.shape or told.relation is not None)


def _colors_exchanged(told: Told) -> Told:
    first, second, *rest = told.nouns
    pair = (replace(first, color=second.color), replace(second, color=first.color))
    return replace(told, nouns=(*pair, *rest))


def also_true(scenes: Sequence[Scene], texts: Sequence[Told]) -> Tensor:
    """Which texts are true of which scenes [scenes, texts], a scene's own text (the same index) left out."""
    rows: dict[frozenset[tuple[str, str]], list[int]] = defaultdict(list)
    for i, scene in enumerate(scenes):
        rows[frozenset((thing.color, thing.shape) for thing in scene.things)].append(i)
    found = torch.zeros(len(scenes), len(texts), dtype=torch.bool)
    for j, told in enumerate(texts):
        for i in rows.get(frozenset((noun.color, noun.shape) for noun in told.nouns), ()):
            found[i, j] = i != j and true_of(told, scenes[i])
    return found


def true_of(told: Told, scene: Scene) -> bool:
    """Whether all facts of a content hold: its objects and no others, sizes, places, background."""
    things = {(thing.color, thing.shape): thing for thing in scene.things}
    named = [things.get((noun.color, noun.shape)) for noun in told.nouns]
    if len(told.nouns) != len(things) or len({(noun.color, noun.shape) for noun in told.nouns}) != len(
        things
    ):
        return False
    found = [thing for thing in named if thing is not None]
    if len(found) != len(named) or told.background not in (None, scene.background):
        return False
    if any(noun.size not in (None, thing.size) for noun, thing in zip(told.nouns, found, strict=True)):
        return False
    if told.relation is None:
        return True
    first, second = found[:2]
    return holds(told.relation, (first.x, first.y), (second.x, second.y))


@torch.no_grad()
def preferred(
    model: nn.Module, words: CLIPTokenizer, *, n: int, seed: int = 0, split: str = "search"
) -> dict[str, float]:
    """The share of scenes that score higher with their caption than with one that has a fact changed.

    For each kind of `changes`, over those of the n scenes whose caption tells such a fact, and for "all".
    """
    rng = np.random.default_rng([seed, 17])
    scenes, told = zip(*captioned_scenes(rng, n, split), strict=True)
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, content in zip(scenes, told, strict=True):
        others = changes(content, rng)
        texts = [phrase(text, rng) for text in (content, *others.values())]
        image = render([scene], device=next(model.parameters()).device)
        own, *rest = similarities(model, words, image, texts)[0].tolist()
        for kind, score in zip(others, rest, strict=True):
            right[kind].append(own > score)
    shares = {kind: sum(found) / len(found) for kind, found in sorted(right.items())}
    every = [found for kind in right.values() for found in kind]
    return {"all": sum(every) / len(every), **shares}


if __name__ == "__main__":
    app()
