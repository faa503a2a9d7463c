"""The recipe of the SpeedUpNet adapter that comes with Shapes: about seven minutes of one CPU core.

    python -m diffplug.training.shapes.negative_adapter -o runs/negative

Two phases, the second from the weights of the first: every row by the guidance that it misses, then large
offsets by more. States are those of 576 guided roll-outs, and their last pictures noised afresh.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter, put_on
from diffplug.samplers.negative.sun_file import save_adapter
from diffplug.training.conditions import encode
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.noise_path import NoisePath
from diffplug.training.objectives.guidance_distillation import DistillationSettings, GuidanceDistillation
from diffplug.training.precision import autocast
from diffplug.training.speedupnet.guidance_states import GuidanceStates, StateSettings, TextNetwork, collect
from diffplug.training.speedupnet.negatives import NegativeSettings, draw_pairs
from diffplug.training.trainer import Trainer

__all__ = ["PHASES", "Phase", "main", "renderings"]


@dataclass(frozen=True)
class Phase:
    """Updates at a learning rate, and how evenly rows count (`DistillationSettings.evenness`)."""

    updates: int
    lr: float
    evenness: float


PHASES = (Phase(450, 2e-3, 1.0), Phase(220, 1e-3, 0.5))
ROLLOUTS, FRESH = 576, 7680


@torch.no_grad()
def renderings(pipe: Any, n: int, split: str = "train", seed: int = 1) -> tuple[list[str], Tensor]:
    """Return captions of n scenes of a split, and the latents [n, 4, 16, 16] of their pictures."""
    from diffplug.shapes.captions import captioned_scenes, phrase
    from diffplug.shapes.rendering import render

    rng = np.random.default_rng([seed, 23])
    scenes = captioned_scenes(rng, n, split)
    pictures = render([scene for scene, _ in scenes])
    parts = [pipe.vae.encode(2 * part - 1).latent_dist.mean for part in pictures.split(64)]
    return [phrase(words, rng) for _, words in scenes], torch.cat(parts) * pipe.vae.config.scaling_factor


def own_states(pipe: Any, network: TextNetwork) -> GuidanceStates:
    """Return the states of guided roll-outs, and their last pictures noised afresh."""
    from diffplug.shapes import sample_prompts

    prompts = sample_prompts(ROLLOUTS, seed=1, kind="mixed", split="train")
    pairs = draw_pairs(prompts, NegativeSettings(), 0)
    settings = StateSettings(rollouts=ROLLOUTS, fresh=FRESH)
    return collect(network, pairs, lambda texts: encode(pipe, texts)[1], settings)


def train_phase(
    adapter: SunAdapter,
    state: NegativeState,
    network: TextNetwork,
    states: GuidanceStates,
    phase: Phase,
    folder: Path,
) -> None:
    """Train an adapter in place by one phase; it ends with the averaged weights."""
    settings = replace(DistillationSettings(), evenness=phase.evenness)
    undo = put_on(adapter, network.denoiser, state)
    try:
        result = Trainer(
            GuidanceDistillation(network, adapter, state, states, settings),
            RunSettings(updates=phase.updates, batch=64, save_every=50),
            OptimizerSettings(lr=phase.lr, warmup=30, floor=0.02, ema=0.99),
            folder=folder,
            cpu=True,
        ).run()
    finally:
        undo()
    adapter.load_state_dict(result.weights["adapter"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the adapter, phase after phase, and write its file."""
    from diffplug.loading import load

    parser = argparse.ArgumentParser(prog="python -m diffplug.training.shapes.negative_adapter")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/negative"))
    out = parser.parse_args(arguments).out
    pipe = load("shapes")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.unet.to(memory_format=torch.channels_last)
    form, _ = encode(pipe, ["a red circle"])
    network = TextNetwork(pipe.unet, NoisePath.of(pipe.scheduler), form)
    meta = AdapterMeta(family="sd15", model=fingerprint(pipe), architecture=architecture(pipe))
    torch.manual_seed(0)
    adapter, state = SunAdapter.beside(pipe.unet, meta), NegativeState()
    with autocast(pipe.unet, torch.bfloat16):
        states = own_states(pipe, network)
        for number, phase in enumerate(PHASES, 1):
            train_phase(adapter, state, network, states, phase, out / f"phase-{number}")
    save_adapter(adapter.requires_grad_(False), out / "speedupnet.safetensors")


if __name__ == "__main__":
    main()
