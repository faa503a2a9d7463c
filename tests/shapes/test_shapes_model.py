"""The embedded model: plain Diffusers reads it, and its pictures show what the prompt says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffplug
from diffplug.loading import shapes_folder
from diffplug.seeds import generators
from diffplug.shapes import caption, grade, render, sample_prompts, sample_scene
from diffplug.shapes.grading import as_pixels, find
from diffplug.shapes.world import KINDS

pytestmark = pytest.mark.pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = diffplug.load("shapes")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    given = {"num_inference_steps": 12, "guidance_scale": 5.0, "output_type": "pt", **options}
    return pipe(prompts, generator=generators(0, len(prompts)), **given).images


def test_plain_diffusers_reads_the_folder_without_diffplug(tmp_path: Path) -> None:
    code = f"""
import sys
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(shapes_folder())!r})
assert not any(name.startswith("diffplug") for name in sys.modules)
image = pipe("a red circle", num_inference_steps=2).images[0]
print(image.size, type(pipe.scheduler).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "(64, 64) DDIMScheduler"


def test_the_folder_is_small_safe_and_like_stable_diffusion(pipe: Any) -> None:
    files = [path for path in shapes_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert not [
        path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text("utf-8")
    ]
    index = json.loads((shapes_folder() / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert 3e6 <= sum(p.numel() for p in pipe.unet.parameters()) <= 8e6
    config = pipe.scheduler.config
    assert (config.prediction_type, config.beta_schedule) == ("epsilon", "scaled_linear")
    assert (config.beta_start, config.beta_end) == (0.00085, 0.012)
    assert pipe.vae_scale_factor == 4 and pipe.vae.config.latent_channels == 4


@torch.no_grad()
def test_the_autoencoder_keeps_what_the_grader_reads(pipe: Any) -> None:
    rng = np.random.default_rng(21)
    scenes = [sample_scene(rng, KINDS[i % 4]) for i in range(400)]
    prompts = [caption(scene, rng) for scene in scenes]
    parts = [pipe.vae.encode(x * 2 - 1).latent_dist.mode() for x in render(scenes).split(50)]
    decoded = torch.cat([pipe.vae.decode(z).sample / 2 + 0.5 for z in parts])
    assert grade(decoded, prompts).strict.mean() >= 0.98
    assert torch.cat(parts).std() * pipe.vae.config.scaling_factor == pytest.approx(1.0, abs=0.05)


def test_pictures_show_what_the_prompt_says(pipe: Any) -> None:
    prompts = sample_prompts(32, seed=1, kind="one", split="search")
    right = grade(draw(pipe, prompts), prompts)
    wrong = grade(draw(pipe, prompts), prompts[1:] + prompts[:1])
    assert right.strict.mean() > wrong.strict.mean() + 0.2
    assert right.score.mean() > wrong.score.mean() + 0.2


def test_one_object_is_nearly_always_right(pipe: Any) -> None:
    prompts = sample_prompts(32, seed=1, kind="one", split="search")
    assert grade(draw(pipe, prompts), prompts).strict.mean() >= 0.9


def test_guidance_helps(pipe: Any) -> None:
    prompts = sample_prompts(32, seed=2, kind="two", split="search")
    guided, free = (grade(draw(pipe, prompts, guidance_scale=g), prompts).score.mean() for g in (5.0, 1.0))
    assert guided > free


def test_negative_prompts_act(pipe: Any) -> None:
    def black(**options: Any) -> int:
        images = draw(pipe, ["a red circle"] * 24, **options)
        return sum(ground == "black" for ground, _ in find(as_pixels(images)))

    assert black(negative_prompt=["a red circle on a black background"] * 24) < black()


def test_a_picture_is_the_same_alone_and_in_a_batch(pipe: Any) -> None:
    prompts = sample_prompts(3, seed=3, split="search")
    together = draw(pipe, prompts)
    alone = pipe(
        prompts[1], generator=generators(1, 1), num_inference_steps=12, guidance_scale=5.0, output_type="pt"
    ).images
    assert torch.allclose(together[1], alone[0], atol=1e-4)
