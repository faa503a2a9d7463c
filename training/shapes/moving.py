"""The recipe of the Moving Shapes video model: `python -m diffplug.training.shapes.moving -o runs/moving`.

Renders moving scenes, encodes their frames with the shipped Shapes autoencoder, reads captions with the
shipped text encoder (both stay as they are) and trains the transformer by flow matching. Four updates of five
see clips of 8 or 16 frames, of which none, the first, or the first four are known; every fifth sees one or
two longer clips, up to 97 frames, so that the same network can also be asked for a long video at once. Every
stage resumes where it was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffplug.files import atomic_path, read_json, write_json
from diffplug.loading import load
from diffplug.shapes.captions import Told, phrase, tell
from diffplug.shapes.moving.model import (
    LONG_FRAMES,
    PREFIX_FRAMES,
    WINDOW_FRAMES,
    normalised,
    scheduler,
    shown_latents,
    transformer,
)
from diffplug.shapes.moving.world import MovingScene, render_video, sample_moving
from diffplug.training.shapes.loop import Loop, OnSave

__all__ = ["Clips", "MovingRecipe", "app", "encode_clips", "export", "flow_loss", "train_moving"]

app = typer.Typer(add_completion=False)

Batch = tuple[Tensor, Tensor, list[str]]


@dataclass(frozen=True, kw_only=True)
class MovingRecipe:
    """How the network is trained.

    scenes: moving scenes, each rendered to 97 frames once. batch: clips of 16 frames an update. long_every:
    an update in so many shows longer clips. known: shares of clips with no known frame, with one and with
    four. single: share of clips that show one object. drop: share of captions that are empty. blur: largest
    deviation of the noise on known frames, for prefixes are generated frames later on, which are not perfect.
    """

    steps: int = 5000
    batch: int = 8
    lr: float = 2e-3
    ema: float = 0.998
    scenes: int = 1200
    long_every: int = 5
    known: tuple[float, float, float] = (0.2, 0.3, 0.5)
    single: float = 0.7
    drop: float = 0.25
    blur: float = 0.1
    seed: int = 0

    def shape_of(self, step: int, rng: np.random.Generator) -> tuple[int, int]:
        """Return frames and clips of an update: ever about as many frames in all.

        Half of the updates see twice as many clips of half the length: what shapes look like is learnt from
        many scenes, not from many frames.
        """
        if step % self.long_every == self.long_every - 1:
            frames = int(rng.choice([32, 48, LONG_FRAMES, LONG_FRAMES]))
            return frames, max(1, 112 // frames)
        return (WINDOW_FRAMES // 2, 2 * self.batch) if step % 2 else (WINDOW_FRAMES, self.batch)


@dataclass(frozen=True)
class Clips:
    """Latents of rendered scenes, [n, 97, 4, 16, 16] in half precision, and what captions say of each."""

    latents: Tensor
    told: list[Told]

    @cached_property
    def _singles(self) -> np.ndarray:
        return np.flatnonzero([len(told.nouns) == 1 for told in self.told])

    @cached_property
    def _pairs(self) -> np.ndarray:
        return np.flatnonzero([len(told.nouns) > 1 for told in self.told])

    def draw(self, rng: np.random.Generator, n: int, frames: int, recipe: MovingRecipe) -> Batch:
        """Return n clips [n, 4, frames, 16, 16], which frames of them are known [n, frames], and captions.

        Half of the clips are shown backwards: the world's motion has no direction of time.
        """
        several = rng.random(n) >= recipe.single
        rows = [int(rng.choice(self._pairs if two else self._singles)) for two in several]
        starts = rng.integers(self.latents.shape[1] - frames + 1, size=n)
        clips = torch.stack([self.latents[r, s : s + frames] for r, s in zip(rows, starts, strict=True)])
        back = torch.from_numpy(rng.random(n) < 0.5)
        clips = torch.where(back[:, None, None, None, None], clips.flip(1), clips).float().transpose(1, 2)
        counts = torch.from_numpy(rng.choice((0, *PREFIX_FRAMES), size=n, p=recipe.known))
        known = torch.arange(frames) < counts[:, None]
        empty = rng.random(n) < recipe.drop
        captions = ["" if e else phrase(self.told[r], rng) for r, e in zip(rows, empty, strict=True)]
        return clips, known.float(), captions


def captioned_moving(rng: np.random.Generator) -> tuple[MovingScene, Told]:
    """Return a moving scene and what a caption of the training split says of it."""
    while True:
        moving = sample_moving(rng, "one" if rng.random() < 0.4 else "two")
        told = tell(moving.scene, rng)
        if told.split == "train":
            return moving, told


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, recipe: MovingRecipe, cache: Path, part: int = 50) -> Clips:
    """Return the training clips; each part of 50 scenes is encoded once and kept in the folder `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    told: list[Told] = []
    latents: list[Tensor] = []
    vae = vae.to(memory_format=torch.channels_last)
    for start in range(0, recipe.scenes, part):
        rng = np.random.default_rng([recipe.seed, start, 31])
        n = min(part, recipe.scenes - start)
        pairs = [captioned_moving(rng) for _ in range(n)]
        told += [words for _, words in pairs]
        file = cache / f"seed-{recipe.seed}-scenes-{start}-{start + n}.safetensors"  # one draw, one file
        if not file.exists():
            encoded = torch.stack([_encoded(vae, moving) for moving, _ in pairs])
            with atomic_path(file) as temporary:
                save_file({"latents": encoded.half().contiguous()}, temporary)
        latents.append(load_file(file)["latents"])
    return Clips(torch.cat(latents), told)


def _encoded(vae: AutoencoderKL, moving: MovingScene) -> Tensor:
    frames = render_video(moving, LONG_FRAMES).to(vae.device, memory_format=torch.channels_last)
    with torch.autocast(vae.device.type, torch.bfloat16):
        mean = vae.encode(2 * frames - 1).latent_dist.mean
    return normalised(mean.float().cpu() * vae.config.scaling_factor)


def flow_loss(
    network: Any, clips: Tensor, known: Tensor, states: Tensor, *, blur: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighed squared error of the clean latents, and what to log.

    clips: x0 [n, 4, f, 16, 16]. known: [n, f] ones and zeros. states: the captions' [n, 32, 128]. The weight
    is 1 / (sigma^2 + 0.1): that of the velocity, but for the last few steps, which would drown the others.
    """
    n = len(clips)
    spread = (torch.arange(n, dtype=torch.float32) + torch.rand(n)) / n
    shift = scheduler().config.shift
    sigma = (shift * spread / (1 + (shift - 1) * spread)).to(clips.device)
    at = sigma[:, None, None, None, None]
    x = (1 - at) * clips + at * torch.randn_like(clips)
    mask = known[:, None, :, None, None].expand(-1, 1, -1, *clips.shape[-2:])
    seen = clips + blur * torch.rand(n, 1, 1, 1, 1) * torch.randn_like(clips)
    shown = shown_latents(seen, known.sum(1).long())
    with torch.autocast(x.device.type, torch.bfloat16):
        x0 = network(torch.cat([x, shown, mask], 1), 1000 * sigma, states, return_dict=False)[0]
    wrong = (x0.float() - clips).square().mean((1, 3, 4)) / (sigma.square() + 0.1)[:, None]
    free = 1 - known
    told = known.sum(1) > 0
    log = {"unknown": (wrong * free).sum() / free.sum().clamp(min=1)}
    log |= {"continued": (wrong * free)[told].sum() / free[told].sum()} if bool(told.any()) else {}
    return wrong.mean(), {name: value.detach() for name, value in log.items()}


def train_moving(
    recipe: MovingRecipe, loop: Loop, clips: Clips, network: WanTransformer3DModel, pipe: Any
) -> WanTransformer3DModel:
    """Train the network, resuming where the folder of `loop` stands, and return it averaged."""
    words, text = pipe.tokenizer, pipe.text_encoder.eval().requires_grad_(False)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng([recipe.seed, step, 37])
        frames, n = recipe.shape_of(step, rng)
        x0, known, captions = clips.draw(rng, n, frames, recipe)
        ids = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = text(ids).last_hidden_state
        error, log = flow_loss(network, x0, known, states, blur=recipe.blur)
        kind = "long" if frames > WINDOW_FRAMES else "short"
        return error, {kind: error.detach(), **{f"{kind}_{k}": v for k, v in log.items()}}

    averaged = loop.run({"transformer": network}, loss, steps=recipe.steps, lr=recipe.lr, ema=recipe.ema)
    network.load_state_dict(averaged["transformer"])
    return network.eval()


def export(network: WanTransformer3DModel, folder: Path) -> None:
    """Write the network in half precision, with the scheduler's config beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    network.half().save_pretrained(folder / "transformer", safe_serialization=True)
    network.float()
    config = read_json(folder / "transformer" / "config.json")
    config.pop("_name_or_path", None)  # where the weights that it began with lay on this machine
    write_json(folder / "transformer" / "config.json", config)
    scheduler().save_pretrained(folder / "scheduler")


@app.command()
def train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints and the result.")
    ] = Path("runs/moving"),
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = MovingRecipe.steps,
    scenes: Annotated[int, typer.Option(min=50, help="Scenes to render.")] = MovingRecipe.scenes,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate.")] = MovingRecipe.lr,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Stop, saved, after so long.")] = None,
    start: Annotated[Path | None, typer.Option(help="Begin with the weights of this folder.")] = None,
) -> None:
    """Train the Moving Shapes model from nothing, or go on where a run stopped."""
    recipe = MovingRecipe(steps=steps, scenes=scenes, lr=lr, seed=seed)
    pipe = load("shapes")
    clips = encode_clips(pipe.vae.eval(), recipe, output / "latents")
    torch.manual_seed(seed)
    network = transformer() if start is None else WanTransformer3DModel.from_pretrained(start).float()
    loop = Loop(output / "run", cpu=True, minutes=minutes, save_every=100, on_save=_exporting(output))
    train_moving(recipe, loop, clips, network, pipe)
    export(network, output / "weights")
    typer.echo(str(output / "weights"))


def _exporting(output: Path) -> OnSave:
    """Return a function that writes the averaged network after each checkpoint, to be looked at."""

    def save(step: int, parts: dict[str, dict[str, Tensor]]) -> None:
        network = transformer()
        network.load_state_dict(parts["transformer"])
        export(network, output / "latest")

    return save


if __name__ == "__main__":
    app()
