"""The recipe of the embedded model: `python -m diffplug.training.shapes.train`.

Trains the autoencoder, encodes renderings, teaches the text encoder to read, trains the U-Net with it and
writes a Stable Diffusion pipeline folder in half precision. Every stage resumes where it was stopped; nothing
is downloaded. One process, one device: two CPU cores take about three hours, a GPU minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from diffplug.files import read_json, write_json
from diffplug.loading import load
from diffplug.shapes.captions import sample_prompts
from diffplug.shapes.model import autoencoder, denoiser, pipeline, text_encoder, tokenizer
from diffplug.shapes.rendering import render
from diffplug.training.shapes.autoencoder import VaeRecipe, scenes_of_step, train_vae
from diffplug.training.shapes.denoiser import DenoiserRecipe, encode_scenes, train_denoiser
from diffplug.training.shapes.loop import Loop, OnSave
from diffplug.training.shapes.text_encoder import Reader, TextRecipe, train_text

app = typer.Typer(add_completion=False)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@app.command()
def train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints and the result.")
    ] = Path("runs/shapes"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
    vae_steps: Annotated[int, typer.Option(min=1)] = VaeRecipe.steps,
    text_steps: Annotated[int, typer.Option(min=1)] = TextRecipe.steps,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the U-Net.")] = DenoiserRecipe.steps,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate of the U-Net.")] = DenoiserRecipe.lr,
    scenes: Annotated[
        int, typer.Option(min=64, help="Renderings to train the U-Net on.")
    ] = DenoiserRecipe.scenes,
    start: Annotated[
        str | None, typer.Option(help="Go on from these weights: shapes, or the folder of a pipeline.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the U-Net's products: float32 or bfloat16.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the U-Net through torch.compile.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop each stage, saved, after this long.")] = None,
) -> None:
    """Train the Shapes model from nothing, go on where a run stopped, or train its U-Net further.

    Example: python -m diffplug.training.shapes.train -o runs/shapes --device cuda
    """
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"device {device!r} is not known: take auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device 'cuda' was asked for and PyTorch finds no GPU: take --device cpu.")
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"dtype {dtype!r} is not known: take {' or '.join(_DTYPES)}.")
    cpu = device == "cpu" or not torch.accelerator.is_available()
    if cpu and dtype == "bfloat16" and _imitates_bfloat16():
        typer.echo(
            "warning: this processor has no bfloat16 arithmetic and imitates it at a tenth of the speed: "
            "take --dtype float32",
            err=True,
        )
    trained = load(start) if start else None
    vae = (
        trained.vae.eval()
        if trained
        else finished_vae(output / "vae", VaeRecipe(steps=vae_steps, seed=seed), cpu=cpu, minutes=minutes)
    )
    recipe = DenoiserRecipe(steps=steps, scenes=scenes, lr=lr, seed=seed + 1, dtype=_DTYPES[dtype])
    words = trained.tokenizer if trained else tokenizer()
    show = _sampler(output, vae, words)
    loop = Loop(output / "denoiser", cpu=cpu, minutes=minutes, save_every=500, on_save=show)
    data = encode_scenes(vae.to(loop.device), recipe, output / "latents.safetensors")
    if trained:
        unet, text = trained.unet, trained.text_encoder
        reader = Reader(text.config.hidden_size)
    else:
        torch.manual_seed(recipe.seed)
        unet, reading = denoiser(), Loop(output / "text", cpu=cpu, save_every=500)
        text, reader = train_text(TextRecipe(steps=text_steps, seed=seed + 2), reading, data.told, words)
    parts = {"unet": unet, "text": text, "words": words, "reader": reader}
    unet, text = train_denoiser(recipe, loop, data, **parts, compiled=compiled)
    export(pipeline(vae.cpu(), text.cpu(), words, unet.cpu()), output / "pipeline")
    typer.echo(str(output / "pipeline"))


def _imitates_bfloat16() -> bool:
    """Whether this processor is known to lack bfloat16 arithmetic; builds without oneDNN do not tell."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def finished_vae(folder: Path, recipe: VaeRecipe, *, cpu: bool, minutes: float | None) -> AutoencoderKL:
    """The trained autoencoder of a run, trained now if it is not there yet."""
    if not (folder / "final" / "config.json").exists():
        loop = Loop(folder, cpu=cpu, minutes=minutes, on_save=_round_trip(folder))
        vae = train_vae(recipe, loop)
        if loop.stopped_early:
            raise typer.Exit(code=0)
        vae.save_pretrained(folder / "final")
    return AutoencoderKL.from_pretrained(folder / "final").eval()


def export(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision; the text encoder in single: Transformers loads what it finds."""
    pipe.unet.half(), pipe.vae.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    pipe.unet.float(), pipe.vae.float()
    for path in folder.rglob("*.json"):
        config = read_json(path)
        if config.pop("_name_or_path", None) is not None:  # where the parts lay on this machine
            write_json(path, config)


def save_grid(images: torch.Tensor, path: Path, columns: int = 16) -> None:
    """A PNG of pictures [n, 3, h, w] in [0, 1], row by row."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns) if len(row) == columns]
    grid = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(grid.cpu().numpy()).save(path)


def _round_trip(folder: Path) -> OnSave:
    def show(step: int, parts: dict[str, dict[str, torch.Tensor]]) -> None:
        vae = autoencoder().eval()
        vae.load_state_dict({name: value.cpu() for name, value in parts["vae"].items()})
        images = render(scenes_of_step(99, 0, 32)) * 2 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
        save_grid(torch.cat([images, decoded]) * 0.5 + 0.5, folder / f"step_{step:06d}.png")

    return show


def _sampler(output: Path, vae: AutoencoderKL, words: CLIPTokenizer) -> OnSave:
    def show(step: int, parts: dict[str, dict[str, torch.Tensor]]) -> None:
        unet, text = denoiser().eval(), text_encoder(words).eval()
        unet.load_state_dict({name: value.cpu() for name, value in parts["unet"].items()})
        text.load_state_dict({name: value.cpu() for name, value in parts["text"].items()})
        pipe = pipeline(vae.cpu(), text, words, unet)
        pipe.set_progress_bar_config(disable=True)
        prompts = sample_prompts(32, seed=0, split="search")
        noise = torch.Generator().manual_seed(0)
        images = pipe(
            prompts, num_inference_steps=20, guidance_scale=5.0, generator=noise, output_type="pt"
        ).images
        save_grid(images, output / "denoiser" / f"step_{step:06d}.png")

    return show


if __name__ == "__main__":
    app()
