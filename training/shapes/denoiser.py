"""The Shapes U-Net, trained together with its text encoder on latents of rendered scenes.

The error of x0 weighs min(SNR, 5) (arXiv 2303.09556), which keeps the almost clean timesteps from drowning
the others, and 0.3 more, so that the noisiest count, at which it is decided what stands where. One caption in
ten is dropped, for classifier-free guidance.

Samplers start from noise that knows nothing of a picture, while the last state of Stable Diffusion's
schedule still shows its mean: enough, over 16x16 places, to tell a black background from a white one. So the
network is shown independent noise at the last timesteps, and learns to take the mean from the prompt there.

What stands where, and how many there are, is decided between the timesteps 900 and 650: there the latents
tell between 1.5 and 14 nats about an object, and some 9 are needed for its place, colour and shape. So half
of a batch comes from there and above. And the text encoder goes on reading (`text_encoder.py`): without that
it forgot, within 5,000 steps, who stands left of whom, since the U-Net learns to use that last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from diffplug.files import atomic_path
from diffplug.shapes.captions import Told, captioned_scenes, phrase
from diffplug.shapes.model import scheduler
from diffplug.shapes.rendering import render
from diffplug.training.precision import keep_single
from diffplug.training.shapes.loop import Loop
from diffplug.training.shapes.text_encoder import Reader, wanted


@dataclass(frozen=True, kw_only=True)
class DenoiserRecipe:
    """How the U-Net and the text encoder are trained; `scenes` renderings are encoded once and kept.

    `reading` weighs the loss of the text encoder's reading heads. `dtype` is that of matrix products and
    convolutions; bfloat16 saves a third of the time on processors with AVX512-BF16.
    """

    steps: int = 10_000
    batch: int = 64
    lr: float = 1e-3
    ema: float = 0.999
    drop: float = 0.1
    snr_cap: float = 5.0
    snr_floor: float = 0.3
    noisy_from: int = 650
    blind_from: int = 970
    reading: float = 0.1
    scenes: int = 40_000
    seed: int = 1
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Latents:
    """Means of encoded scenes, scaled, [n, 4, 16, 16], and what the captions of each say."""

    means: Tensor
    told: list[Told]

    def draw(self, rng: np.random.Generator, recipe: DenoiserRecipe) -> tuple[np.ndarray, list[str]]:
        """Rows of a batch and a caption for each, some of them "".

        A third of those without a caption show one object: the picture that guidance pushes away from has
        fewer objects then, which keeps it from emptying pictures of one. With half of them, it put a third
        object into pictures of two.
        """
        rows = rng.integers(len(self.told), size=recipe.batch)
        dropped = np.flatnonzero(rng.random(recipe.batch) < recipe.drop)
        rows[dropped[::3]] = rng.choice(self._single, len(dropped[::3]))
        captions = [phrase(self.told[row], rng) for row in rows]
        return rows, ["" if i in dropped else caption for i, caption in enumerate(captions)]

    @cached_property
    def _single(self) -> np.ndarray:
        return np.flatnonzero([len(told.nouns) == 1 for told in self.told])


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, recipe: DenoiserRecipe, cache: Path, chunk: int = 500) -> Latents:
    """The training latents, from `cache` (a safetensors file) if it is there, else encoded and kept there."""
    from safetensors.torch import save_file

    told: list[Told] = []
    means: list[Tensor] = []
    kept = load_file(cache)["means"] if cache.exists() else None
    for start in range(0, recipe.scenes, chunk):
        pairs = captioned_scenes(
            np.random.default_rng([recipe.seed, start]), min(chunk, recipe.scenes - start)
        )
        told += [content for _, content in pairs]
        if kept is None:
            images = render([scene for scene, _ in pairs], device=vae.device) * 2 - 1
            parts = [vae.encode(part).latent_dist.mean.cpu() for part in images.split(50)]
            means.append(torch.cat(parts) * vae.config.scaling_factor)
    if kept is None:
        kept = torch.cat(means)
        with atomic_path(cache) as temporary:
            save_file({"means": kept.contiguous()}, temporary)
    if len(kept) != recipe.scenes:
        raise ValueError(
            f"{str(cache)!r} holds {len(kept)} latents, the recipe asks for {recipe.scenes}: remove it."
        )
    return Latents(kept, told)


def train_denoiser(
    recipe: DenoiserRecipe,
    loop: Loop,
    data: Latents,
    *,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    words: CLIPTokenizer,
    reader: Reader,
    compiled: bool = False,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train both, resuming where the folder of `loop` stands, and return them averaged.

    `words` is the tokenizer of `text`, `reader` its heads. `compiled` runs the U-Net through torch.compile,
    which needs a C++ compiler and minutes at the start. On a GPU the objective is recorded as a graph
    otherwise: so small a network costs it little, and starting its kernels one by one nearly everything.
    """
    unet = unet.to(memory_format=torch.channels_last)
    single = keep_single(unet) if recipe.dtype != torch.float32 else nullcontext()
    gpu = loop.device.type == "cuda"
    network: Any = torch.compile(unet) if compiled else unet
    objective = Objective(network, text, reader, recipe).to(loop.device).train()
    means = data.means.to(loop.device)
    batches: Iterator[tuple[Tensor, ...]] = iter(())

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal batches
        batch = next(batches, None)
        first = batch is None
        if batch is None:
            batches = iter(Batches(data, recipe, words).loader(range(step, recipe.steps), workers=6 * gpu))
            batch = next(batches)
        rows, *told = (part.to(loop.device, non_blocking=True) for part in batch)
        x0, t = means[rows], mixed_timesteps(recipe.batch, recipe.noisy_from, loop.device)
        shown = (x0, torch.randn_like(x0), t, *told)
        if first and gpu and not compiled and recipe.dtype == torch.float32:
            torch.cuda.make_graphed_callables(objective, shown, allow_unused_input=True)
        value, *seen = objective(*shown)
        return value, {name: each.detach() for name, each in zip(("loss", "mse", "read"), seen, strict=True)}

    parts = {"unet": unet, "text": text, "reader": reader}
    with single:
        averaged = loop.run(parts, loss, steps=recipe.steps, lr=recipe.lr, ema=recipe.ema)
    unet.load_state_dict(averaged["unet"])
    text.load_state_dict(averaged["text"])
    return unet.eval(), text.eval()


@dataclass(frozen=True)
class Batches(Dataset[tuple[Tensor, ...]]):
    """The batch of every step: rows of the latents, token ids of their captions, and what these say."""

    data: Latents
    recipe: DenoiserRecipe
    words: CLIPTokenizer

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        rows, captions = self.data.draw(np.random.default_rng([self.recipe.seed, step, 7]), self.recipe)
        ids = self.words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return (torch.from_numpy(rows), ids, *wanted(captions))

    def loader(self, steps: range, workers: int) -> DataLoader[tuple[Tensor, ...]]:
        """These steps in order, prepared by so many processes; the global seed is left alone."""
        return DataLoader(
            self, batch_size=None, sampler=steps, num_workers=workers, generator=torch.Generator()
        )


class Objective(nn.Module):
    """What training makes small: the weighed error of the noise prediction, and that of reading."""

    abar: Tensor

    def __init__(self, unet: nn.Module, text: nn.Module, reader: Reader, recipe: DenoiserRecipe) -> None:
        super().__init__()
        self.unet, self.text, self.reader, self.recipe = unet, text, reader, recipe
        self.register_buffer("abar", scheduler().alphas_cumprod)

    def forward(
        self, x0: Tensor, eps: Tensor, t: Tensor, ids: Tensor, facts: Tensor, layouts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(the objective, its denoising part, the plain error, the share of captions read), scalars.

        x0, eps: latents and noise [n, 4, 16, 16]; t: timesteps [n]; ids: tokens [n, 32]; the rest: `wanted`.
        """
        recipe, abar = self.recipe, self.abar[t]
        alpha, sigma = abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]
        states = self.text(ids).last_hidden_state
        blind = (t >= recipe.blind_from)[:, None, None, None]
        x = torch.where(blind, eps, alpha * x0 + sigma * eps).contiguous(memory_format=torch.channels_last)
        target = torch.where(blind, (x - alpha * x0) / sigma, eps)
        with torch.autocast(x.device.type, recipe.dtype, enabled=recipe.dtype != torch.float32):
            output = self.unet(x, t, states, return_dict=False)[0].float()
        error = (output - target).square().mean((1, 2, 3))
        snr = abar / (1 - abar)
        denoising = (error * (snr.clamp(max=recipe.snr_cap) + recipe.snr_floor) / snr).mean()
        unread, read = self.reader.loss(states, facts, layouts)
        return denoising + recipe.reading * unread, denoising, error.mean(), read


def mixed_timesteps(n: int, noisy_from: int, device: torch.device, steps: int = 1000) -> Tensor:
    """`n` timesteps: half of them from all, the others from `noisy_from` on."""
    noisy = noisy_from + stratified_timesteps(n // 2, device, steps - noisy_from)
    return torch.cat([stratified_timesteps(n - n // 2, device, steps), noisy])


def stratified_timesteps(n: int, device: torch.device, steps: int = 1000) -> Tensor:
    """`n` timesteps, one from each of n equal parts of [0, steps): uniform, less varied than free draws."""
    return (
        ((torch.arange(n, device=device) + torch.rand(n, device=device)) * steps / n)
        .long()
        .clamp(max=steps - 1)
    )
