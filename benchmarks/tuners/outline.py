"""The Shapes model in outline style, by each tuner: how many pictures took the style, and how many are right.

The style has no trigger word, so that ordinary prompts should be drawn in outline; whether a picture is right
is judged after filling its outlines. The autoencoder of Shapes was never shown outlines and changes their
colours: what it makes of true ones is the row "round trip", which no tuner of the denoiser can surpass.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug import load
from diffplug.shapes import grade, sample_prompts
from diffplug.shapes.captions import captioned_scenes, phrase
from diffplug.shapes.grading import as_pixels, find
from diffplug.shapes.rendering import render
from diffplug.training.conditions import encode
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.finetune.objective import Finetune, FinetuneSettings
from diffplug.training.finetune.pictures import Bucket
from diffplug.training.finetune.prior import null_of
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath
from diffplug.training.precision import autocast
from diffplug.training.student import Sampling, draw
from diffplug.training.trainer import Trainer
from diffplug.training.tuners.by_name import tuner_of
from diffplug.training.tuners.settings import TunerSettings

SCENES, BATCH, DRAWN, SHOWN = 200, 16, 16, 8

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"kind": "full"}, 5e-4),
    "lora": ({"kind": "lora", "rank": 16}, 2e-3),
    "oft": ({"kind": "oft", "rank": 16}, 2e-3),
    "sara": ({"kind": "sara", "density": 0.05}, 3e-3),
}


@dataclass(frozen=True)
class Styled:
    """Shares: of objects that are outlines, and of `DRAWN` pictures that are right when filled."""

    method: str
    trained: int
    styled: float
    right: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def styled(method: str, updates: int, seed: int = 0) -> tuple[Styled, Tensor]:
    """Return a tuner's figures, and the first pictures; "base" is the model as it is."""
    pipe: Any = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    path, trained = NoisePath.of(pipe.scheduler), 0
    if method == "round trip":
        return _figures(method, 0, *_round_trip(pipe))
    with autocast(pipe.unet, torch.bfloat16):
        if method != "base":
            trained = _tuned(pipe, path, method, updates, seed)
        prompts = sample_prompts(DRAWN, seed=0, split="test")
        images = draw(pipe, Sampling(path, (20,), guidance=5.0), prompts, list(range(DRAWN))).images
    return _figures(method, trained, images, prompts)


def _figures(method: str, trained: int, images: Tensor, prompts: list[str]) -> tuple[Styled, Tensor]:
    blobs = [blob for _, found in find(as_pixels(images), fill=True) for blob in found]
    styled = sum(blob.hollow for blob in blobs) / max(len(blobs), 1)
    right = float(grade(images, prompts, style="any").strict.mean())
    return Styled(method, trained, styled, right), images[:SHOWN]


@torch.no_grad()
def _round_trip(pipe: Any) -> tuple[Tensor, list[str]]:
    """Return true outlines as the autoencoder gives them back, and their captions."""
    rng = np.random.default_rng(5)
    pairs = captioned_scenes(rng, DRAWN)
    images = render([scene for scene, _ in pairs], style="outline") * 2 - 1
    decoded = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample
    return (decoded / 2 + 0.5).clamp(0, 1), [phrase(told, rng) for _, told in pairs]


def _tuned(pipe: Any, path: NoisePath, method: str, updates: int, seed: int) -> int:
    """Train a tuner on outlines; return how many numbers it trained."""
    rng = np.random.default_rng(7)
    pairs = captioned_scenes(rng, SCENES)
    images = render([scene for scene, _ in pairs], style="outline") * 2 - 1
    with torch.no_grad():
        means = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in images.split(50)])
    texts = [phrase(told, rng) for _, told in pairs]
    bucket = Bucket((64, 64), means * pipe.vae.config.scaling_factor, encode(pipe, texts)[1], texts)
    null, options = null_of(pipe, (64, 64), {}), METHODS[method]
    torch.manual_seed(seed)
    tuner = tuner_of(TunerSettings(**options[0]))
    tuner.attach(pipe.unet)
    network = Network(pipe.unet, path, encode(pipe, ["a red circle"])[0], tuner)
    objective = Finetune(network, [bucket], [], null, FinetuneSettings(snr_gamma=5.0, snr_floor=0.3))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            objective,
            RunSettings(updates=updates, batch=BATCH, seed=seed, save_every=10_000),
            OptimizerSettings(lr=options[1], warmup=5, floor=0.05, ema=0.0),
            folder=Path(folder),
            cpu=True,
        ).run()
    return sum(value.numel() for value in tuner.parameters.values())


def sheet(rows: list[tuple[Styled, Tensor]], file: Path) -> None:
    """Write pictures, a tuner a row, with its figures beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), SHOWN, figsize=(1.25 * SHOWN + 2.6, 1.32 * len(rows)))
    for row, (told, images) in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
        label = f"{told.method}\n{told.trained:,} trained\noutlines {told.styled:.0%}\nright {told.right:.0%}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=90)
