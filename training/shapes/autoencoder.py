"""The Shapes autoencoder: from nothing to round trips that the grader cannot tell from renderings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from diffplug.shapes.model import autoencoder
from diffplug.shapes.rendering import render
from diffplug.shapes.world import KINDS, sample_scene
from diffplug.training.shapes.loop import Loop

L1_WEIGHT = 0.03


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """How the autoencoder is trained. `kl` weighs the mean of the KL term over latent dimensions."""

    steps: int = 2400
    batch: int = 8
    lr: float = 1e-3
    kl: float = 5e-6
    ema: float = 0.998
    seed: int = 0


def scenes_of_step(seed: int, step: int, batch: int) -> list:
    """The scenes of a training step: a function of (seed, step), so that a resumed run sees the same data."""
    rng = np.random.default_rng([seed, step])
    return [sample_scene(rng, KINDS[int(rng.integers(len(KINDS)))]) for _ in range(batch)]


def vae_loss(vae: AutoencoderKL, images: Tensor, kl: float) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction (MSE with a little L1, on images in [-1, 1]) plus the weighed KL term; and what to log.

    Most of a picture is background: L1 alone spends its gradient there, on errors that nobody sees.
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    l1, mse = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return mse + L1_WEIGHT * l1 + kl * divergence, {
        "l1": l1.item(),
        "mse": mse.item(),
        "kl": divergence.item(),
    }


def train_vae(recipe: VaeRecipe, loop: Loop, start: AutoencoderKL | None = None) -> AutoencoderKL:
    """Train, resuming where the folder of `loop` stands, and return the averaged autoencoder.

    Its scaling factor is set to one over the standard deviation of its latents, as in Stable Diffusion.
    """
    torch.manual_seed(recipe.seed)
    vae = (start or autoencoder()).train().to(memory_format=torch.channels_last)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        images = render(scenes_of_step(recipe.seed, step, recipe.batch), device=loop.device) * 2 - 1
        return vae_loss(vae, images.contiguous(memory_format=torch.channels_last), recipe.kl)

    averaged = loop.run(
        {"vae": vae}, loss, steps=recipe.steps, lr=recipe.lr, ema=recipe.ema, weight_decay=0.0
    )["vae"]
    vae.load_state_dict(averaged)
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, recipe.seed), 5))
    return vae


@torch.no_grad()
def latent_std(vae: AutoencoderKL, seed: int, n: int = 512) -> float:
    """Standard deviation of latents over `n` renderings, before scaling."""
    images = render(scenes_of_step(seed, -1 & 0x7FFFFFFF, n), device=vae.device) * 2 - 1
    return float(torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)]).std())
