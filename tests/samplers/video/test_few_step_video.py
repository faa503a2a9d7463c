"""Few-step rows of the catalogue under windows, in long videos and in the chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import video_pipelines as made
from safetensors.torch import save_file

from diffplug.plug import plug
from diffplug.samplers import FewStep
from diffplug.samplers.video import ImageThenVideo, LongVideo, Windows
from diffplug.testing import tiny

GRID = [1000.0, 937.5, 833.333, 625.0]
CALL = {"prompt": "a", "height": 16, "width": 16, "max_sequence_length": 16}


def lora(folder: Path, network: torch.nn.Module) -> Path:
    """A random LoRA of rank 2 on every Linear of a network."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, part in network.named_modules():
        if isinstance(part, torch.nn.Linear):
            down = torch.randn(2, part.in_features, generator=generator) * 0.1
            state[f"transformer.{name}.lora_A.weight"] = down
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(
                part.out_features, 2, generator=generator
            )
    save_file(state, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def spied(pipe: Any) -> list[float]:
    """The timesteps of every call of the network from now on."""
    seen: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    return seen


@pytest.mark.pipe
def test_windows_keep_a_rows_steps_and_guidance(tmp_path: Path) -> None:
    pipe = tiny("wan")
    few = FewStep("wan21-t2v-lightx2v-4", weights=lora(tmp_path, pipe.transformer))
    with plug(pipe, few, Windows(frames=9, overlap=4)):
        seen = spied(pipe)
        video = pipe(**CALL, num_frames=33, num_inference_steps=4, output_type="latent").frames
    assert video.shape[2] == 9
    assert seen == pytest.approx(GRID, abs=0.01)


@pytest.mark.pipe
def test_every_clip_of_a_long_video_runs_the_rows_steps(tmp_path: Path) -> None:
    pipe = made.wan_i2v()
    few = FewStep("wan21-i2v-lightx2v-4", weights=lora(tmp_path, pipe.transformer))
    with plug(pipe, few):
        seen = spied(pipe)
        result = LongVideo(pipe, frames=25, clip_frames=9)(
            image=made.picture(), num_inference_steps=4, **CALL
        )
    assert len(result.frames) == 25
    assert seen == pytest.approx(GRID * 3, abs=0.01)


@pytest.mark.pipe
def test_the_chains_video_runs_the_rows_steps(tmp_path: Path) -> None:
    pipe = made.wan_i2v()
    few = FewStep("wan21-i2v-lightx2v-4", weights=lora(tmp_path, pipe.transformer))
    chain = ImageThenVideo(tiny("sd15"), pipe, picture="steps=2")
    small = {key: value for key, value in CALL.items() if key != "prompt"}
    with plug(pipe, few):
        seen = spied(pipe)
        found = chain("a", num_frames=9, num_inference_steps=4, **small)
    assert len(found.frames) == 9
    assert seen == pytest.approx(GRID, abs=0.01)
