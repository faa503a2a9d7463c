"""A concept that the Shapes model has never seen, the star, learned beside a replay of ordinary scenes.

Each tuner trains until the loss on held-out star scenes is down to a target; what it forgot on the way is the
loss on held-out ordinary scenes, and the share of ordinary prompts that are drawn right.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug import load
from diffplug.shapes import grade, sample_prompts
from diffplug.shapes.captions import phrase, tell
from diffplug.shapes.rendering import ALL_SHAPES, render
from diffplug.shapes.world import HELD_OUT_SHAPE, SHAPES, Scene, sample_scene
from diffplug.training import probe_threshold
from diffplug.training.conditions import encode
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.finetune.objective import Finetune, FinetuneSettings, output_error
from diffplug.training.finetune.pictures import Bucket
from diffplug.training.finetune.prior import null_of
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath
from diffplug.training.precision import autocast
from diffplug.training.student import Sampling, draw
from diffplug.training.trainer import Trainer
from diffplug.training.tuners.by_name import tuner_of
from diffplug.training.tuners.sara.probe import Probe
from diffplug.training.tuners.settings import TunerSettings

SCENES, CAPTIONS, BATCH, EVERY = 400, 2, 32, 5
HELD_OUT = 128
REPLAY = 0.25  # share of a batch that shows ordinary scenes

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "sara": ({"kind": "sara", "density": 0.1}, 1e-3),
    "random": ({"kind": "sara", "density": 0.1, "score": "random"}, 1e-3),
    "largest": ({"kind": "sara", "density": 0.1, "score": "largest"}, 1e-3),
    "lora": ({"kind": "lora", "rank": 8}, 1e-3),
    "full": ({"kind": "full"}, 1e-3),
    "lora 32": ({"kind": "lora", "rank": 32}, 2e-3),
    "sara .3": ({"kind": "sara", "density": 0.3}, 3e-3),
}
"""Tuner and learning rate by name; the first four train about 430 thousand numbers."""


@dataclass
class Run:
    """One training. curve: (update, loss on star scenes, on ordinary ones)."""

    method: str
    seed: int
    trained: int = 0
    updates: int = 0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    star: float = float("nan")
    ordinary: float = float("nan")
    cpu_seconds: float = 0.0


def scenes(rng: np.random.Generator, count: int, split: str, *, star: bool) -> list[tuple[Scene, Any]]:
    """Return scenes of one, two or related objects, with what a caption says of them."""
    found: list[tuple[Scene, Any]] = []
    shapes = ALL_SHAPES if star else SHAPES
    while len(found) < count:
        kind = ("one", "two", "relation")[len(found) % 3]
        scene = sample_scene(rng, kind, shapes=shapes)
        told = tell(scene, rng)
        if told.split == split and (not star or any(t.shape == HELD_OUT_SHAPE for t in scene.things)):
            found.append((scene, told))
    return found


@torch.no_grad()
def bucket_of(pipe: Any, pairs: list[tuple[Scene, Any]], rng: np.random.Generator, captions: int) -> Bucket:
    """Return scenes as a bucket, each with several captions."""
    images = render([scene for scene, _ in pairs]) * 2 - 1
    means = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in images.split(50)])
    latents = (means * pipe.vae.config.scaling_factor).repeat(captions, 1, 1, 1)
    texts = [phrase(told, rng) for _ in range(captions) for _, told in pairs]
    return Bucket((64, 64), latents, encode(pipe, texts)[1], texts)


class Watched(Finetune):
    """Fine-tuning that measures held-out losses now and then, and ends at a target."""

    def watch(self, run: Run, held_out: tuple[Bucket, Bucket], target: float) -> None:
        """Measure into `run`; held_out: star scenes and ordinary ones."""
        self.run, self.held_out, self.target, self.reason = run, held_out, target, ""

    def updated(self, update: int, totals: Any) -> None:
        """Measure every so many updates."""
        super().updated(update, totals)
        self.run.updates = update + 1
        if (update + 1) % EVERY == 0:
            new, old = (self.held_out_loss(bucket) for bucket in self.held_out)
            self.run.curve.append((update + 1, new, old))
            print(f"{self.run.method} {self.run.seed}: {update + 1} new {new:.4f} old {old:.4f}", flush=True)
            self.reason = "target" if new <= self.target else ""

    def finished(self) -> str:
        """Say that the target is reached."""
        return self.reason

    @torch.no_grad()
    def held_out_loss(self, bucket: Bucket) -> float:
        """Return the weighted loss on held-out scenes with fixed noise and timesteps."""
        n, path = len(bucket), self.network.path
        eps = torch.randn(bucket.latents.shape, generator=torch.Generator().manual_seed(5))
        index = ((torch.arange(n) + 0.5) / n * path.train_steps).long().double() + 1
        index = index[torch.randperm(n, generator=torch.Generator().manual_seed(6))]
        total = 0.0
        for part in torch.arange(n).split(64):
            x0, e, i = bucket.latents[part], eps[part], index[part]
            x = path.noised(x0, e, torch.zeros_like(i), i)
            said = self.network(x, i, bucket.conditions[part])
            total += float((output_error(path, said, x0, e, i) * self._weight(i)).sum())
        return total / n


def trained(method: str, seed: int, target: float, updates: int, *, pictures: bool = True) -> Run:
    """Return what one tuner comes to."""
    run = Run(method, seed)
    options, lr = METHODS[method]
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    rng = np.random.default_rng(7)  # the same scenes for all
    new = bucket_of(pipe, scenes(rng, SCENES, "train", star=True), rng, CAPTIONS)
    old = bucket_of(pipe, scenes(rng, SCENES, "train", star=False), rng, CAPTIONS)
    held = (
        bucket_of(pipe, scenes(rng, HELD_OUT, "search", star=True), rng, 1),
        bucket_of(pipe, scenes(rng, HELD_OUT, "search", star=False), rng, 1),
    )
    null = null_of(pipe, (64, 64), {})
    torch.manual_seed(seed)
    tuner = tuner_of(TunerSettings(**options))
    pipe.unet.to(memory_format=torch.channels_last)
    tuner.attach(pipe.unet)
    path = NoisePath.of(pipe.scheduler)
    network = Network(pipe.unet, path, encode(pipe, ["a red star"])[0], tuner)
    settings = FinetuneSettings(snr_gamma=5.0, snr_floor=0.3, prior_share=REPLAY)
    objective = Watched(network, [new], [old], null, settings)
    objective.watch(run, held, target)
    run.trained = sum(v.numel() for v in tuner.parameters.values())
    began = process_time()
    with tempfile.TemporaryDirectory() as folder, autocast(pipe.unet, torch.bfloat16):
        run.curve.append((0, *(objective.held_out_loss(bucket) for bucket in held)))
        Trainer(
            objective,
            RunSettings(updates=updates, batch=BATCH, seed=seed, save_every=10_000),
            OptimizerSettings(lr=lr, warmup=10, floor=0.1, ema=0.0, betas=(0.9, 0.99)),
            folder=Path(folder),
            cpu=True,
        ).run()
        run.cpu_seconds = process_time() - began
        if pictures:
            run.star, run.ordinary = strict(pipe, path)
    return run


def probed() -> list[Probe]:
    """Return what zeroing the smallest weights does to the loss on held-out ordinary scenes."""
    pipe = load("shapes")
    pipe.unet.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(7)
    bucket = bucket_of(pipe, scenes(rng, HELD_OUT, "search", star=False), rng, 1)
    tuner = tuner_of(TunerSettings(kind="full"))
    tuner.attach(pipe.unet)
    network = Network(pipe.unet, NoisePath.of(pipe.scheduler), encode(pipe, ["a red star"])[0], tuner)
    told = FinetuneSettings(snr_gamma=5.0, snr_floor=0.3)
    objective = Watched(network, [bucket], [], null_of(pipe, (64, 64), {}), told)
    with torch.no_grad():
        return probe_threshold(pipe.unet, lambda: objective.held_out_loss(bucket), densities=(0.05, 0.1, 0.2))


def strict(pipe: Any, path: NoisePath) -> tuple[float, float]:
    """Return the shares of 60 star prompts and of 200 ordinary ones that are drawn right, 20 steps."""
    rng = np.random.default_rng(11)
    stars = [phrase(told, rng) for _, told in scenes(rng, 60, "test", star=True)]
    ordinary = sample_prompts(200, seed=0, split="test")
    sampling = Sampling(path, (20,), guidance=5.0)
    shares = []
    for prompts in (stars, ordinary):
        images: Tensor = draw(pipe, sampling, prompts, list(range(len(prompts)))).images
        shares.append(float(grade(images, prompts).strict.mean()))
    return shares[0], shares[1]
