"""What the small CLIP of the Shapes world can tell: facts, kinds of fact, and blurred or noisy pictures.

    python -m benchmarks.shapes_clip

Scenes and captions come from the test split, whose contents it was never trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug import load
from diffplug.files import output_folder, write_json
from diffplug.rewards.networks.clip_network import clip_network
from diffplug.rewards.networks.shapes_clip_model import clip_tokenizer
from diffplug.rewards.shapes_clip import ShapesClipReward, shapes_clip_folder
from diffplug.shapes.captions import captioned_scenes, phrase
from diffplug.shapes.rendering import render
from diffplug.training.shapes.clip import also_true, changed, preferred, similarities

RESULTS = Path(__file__).parent / "results"
NOISES = (0.0, 0.3, 0.6)


@torch.no_grad()
def retrieval(model: Any, n: int, among: int = 100) -> float:
    """The share of pictures whose own caption scores highest among that many, other true ones apart."""
    rng = np.random.default_rng(5)
    scenes, told = zip(*captioned_scenes(rng, n, "test"), strict=True)
    images, texts = render(scenes), [phrase(content, rng) for content in told]
    words, right = clip_tokenizer(), 0
    for start in range(0, n, among):
        part = slice(start, start + among)
        scores = similarities(model, words, images[part], texts[part])
        scores = scores.masked_fill(also_true(scenes[part], told[part]), -torch.inf)
        right += int((scores.argmax(1) == torch.arange(len(scores))).sum())
    return right / n


@torch.no_grad()
def after_round_trip(n: int) -> dict[str, float]:
    """The share of pictures that prefer their caption to one with a fact changed, decoded from latents with
    noise of these shares of the latents' own deviation.
    """
    rng, vae, reward = np.random.default_rng(6), load("shapes").vae, ShapesClipReward()
    scenes, told = zip(*captioned_scenes(rng, n, "test"), strict=True)
    texts = [phrase(content, rng) for content in told]
    others = [phrase(changed(content, rng), rng) for content in told]
    pictures = (render(scenes) * 2 - 1).split(50)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def decoded(x: Tensor) -> Tensor:
        return (torch.cat([vae.decode(part).sample for part in x.split(50)]) / 2 + 0.5).clamp(0, 1)

    found = {}
    for share in NOISES:
        images = decoded(latents + share * latents.std() * noise)
        found[str(share)] = float((reward(images, texts) > reward(images, others)).double().mean())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, prints and writes the JSON document."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes_clip", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=RESULTS / "shapes_clip.json")
    given = parser.parse_args(arguments)
    output_folder(given.json.parent)
    network: Any = clip_network(str(shapes_clip_folder()), None)
    model = network.model.eval()
    document = {
        "prefers the true caption": preferred(model, clip_tokenizer(), n=given.scenes, split="test"),
        "finds its caption among 100": retrieval(model, given.scenes),
        "prefers it after a round trip with noise": after_round_trip(min(given.scenes, 300)),
    }
    for name, value in document.items():
        print(f"{name}: {value}")
    write_json(given.json, document)
    print(given.json)


if __name__ == "__main__":
    main()
