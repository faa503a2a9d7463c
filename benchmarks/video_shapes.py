"""Long videos of Moving Shapes by every scheme, and pictures chosen before clips."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffplug import load
from diffplug.network.denoiser import count_network
from diffplug.plug import plug
from diffplug.samplers.video import ImageThenVideo, LongVideo, Windows
from diffplug.samplers.video.animation import save_animation
from diffplug.shapes import grade, sample_prompts
from diffplug.shapes.moving import grade_video, render_video, sample_moving

LENGTH, STEPS = 97, 10
SCHEMES = (
    "whole",
    "continuation, 4 frames",
    "continuation, 1 frame",
    "windows, free noise",
    "windows, fused",
)


def long_video(pipe: Any, scheme: str, start: Tensor, seed: int) -> Tensor:
    """Return a video [97, 3, 64, 64] by a scheme, without a prompt.

    start: 4 rendered frames that continuation begins with, and that the whole video is given; windows belong
    to text-to-video models and begin with noise alone.
    """
    call: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": STEPS}
    if scheme.startswith("continuation"):
        overlap = int(scheme.split()[1])
        return LongVideo(pipe, frames=LENGTH, overlap=overlap)(
            "", seed=seed, video=start[:overlap], **call
        ).frames
    generator = torch.Generator().manual_seed(seed)
    call |= {"prompt": "", "num_frames": LENGTH, "generator": generator, "output_type": "pt"}
    if scheme == "whole":
        frames: Tensor = pipe(video=start, **call).frames[0]
        return frames
    free = scheme.endswith("free noise")
    windows = Windows(frames=16, overlap=12 if free else 8, noise="free" if free else "iid")
    with plug(pipe, windows):
        made: Tensor = pipe(**call).frames[0]
        return made


def scheme_figures(told: Any) -> dict[str, Any]:
    """Return what videos of every scheme keep of their first frame, and how things move in them."""
    pipe = _model()
    starts = [
        render_video(sample_moving(np.random.default_rng([seed, 77]), "one"), 4)
        for seed in range(told.videos)
    ]
    return {scheme: _figures(pipe, scheme, starts) for scheme in SCHEMES}


def _figures(pipe: Any, scheme: str, starts: list[Tensor]) -> dict[str, Any]:
    kept, last, steady, began = [], [], [], time.perf_counter()
    empty = 0
    with count_network(pipe) as network:
        for seed, start in enumerate(starts):
            frames = long_video(pipe, scheme, start, seed)
            if not scheme.startswith("windows"):
                frames = torch.cat([start[:1], frames[1:]])  # what was given is what is to be kept
            try:
                grades = grade_video(frames)
            except ValueError:  # a first frame without any object: nothing was begun
                empty += 1
                continue
            kept.append(grades.mean)
            last.append(float(grades.kept[96]))
            steady.append(grades.steady)
    figures = {"facts at frame 96": last, "facts, all frames": kept, "steady motion": steady}
    means = {name: [round(float(np.mean(v)), 3), round(_error(v), 3)] for name, v in figures.items() if v}
    return {
        **means,
        "videos": len(kept),
        "empty": empty,
        "network calls": network.calls,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def chain_figures(told: Any) -> dict[str, Any]:
    """Return facts of clips chosen by their picture and of clips chosen as clips, at network seconds.

    Four candidates either way; the reward is the grader's, on the first picture or on all frames. Pictures
    take one evaluation unless told otherwise, clips twenty guided steps: a picture costs a fortieth of a
    clip, as with the large models of the kind.
    """
    still, moving = load("shapes"), _model()
    still.set_progress_bar_config(disable=True)
    prompts = sample_prompts(told.videos, seed=3, kind="one", split="test")
    call = {"num_inference_steps": 20, "guidance_scale": 3.0}
    picture = f"sampler={told.picture}"
    first = ImageThenVideo(still, moving, picture=picture, pictures=4, reward="shapes")
    one = ImageThenVideo(still, moving, picture=picture)
    rows = {"no selection": (one, 1), "pictures, then one clip": (first, 1), "clips": (one, 4)}
    return {name: _chain_row(still, moving, chain, n, prompts, call) for name, (chain, n) in rows.items()}


def _chain_row(
    still: Any, moving: Any, chain: ImageThenVideo, clips: int, prompts: list[str], call: dict[str, Any]
) -> dict[str, Any]:
    facts: list[float] = []
    with count_network(still) as pictures, count_network(moving) as videos:
        for number, prompt in enumerate(prompts):
            made = [chain(prompt, seed=100 * number + j, **call).frames for j in range(clips)]
            facts.append(max(float(grade(frames, prompt).score.mean()) for frames in made))
    seconds = pictures.seconds + videos.seconds
    return {
        "facts of the prompt, all frames": [round(float(np.mean(facts)), 3), round(_error(facts), 3)],
        "network seconds a video": round(seconds / len(prompts), 3),
        "of pictures": round(pictures.seconds / len(prompts), 3),
    }


def _model() -> Any:
    pipe = load("moving-shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(sheet: Path | None, animation: Path | None) -> None:
    """Write a sheet of every eighth frame of one video by each scheme, and an animation of all frames."""
    pipe = _model()
    scene = sample_moving(np.random.default_rng([1, 77]), "one")
    start = render_video(scene, 4)
    made = [render_video(scene, LENGTH), *(long_video(pipe, scheme, start, 1) for scheme in SCHEMES)]
    if sheet is not None:
        rows = [torch.cat([*video[::8]], dim=2) for video in made]
        _picture(torch.cat(_spaced(rows), dim=1)).save(sheet)
    if animation is not None:
        _animate(made, animation)


def _animate(made: list[Tensor], path: Path) -> None:
    side: Callable[[int], Tensor] = lambda i: torch.cat([video[i] for video in made], dim=2)  # noqa: E731
    save_animation((side(i) for i in range(LENGTH)), path, fps=12, scale=2)


def _spaced(rows: list[Tensor]) -> list[Tensor]:
    gap = torch.ones(3, 4, rows[0].shape[2])
    return [part for row in rows for part in (row, gap)][:-1]


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())
