"""How a student is drawn with: scheduler, steps, guidance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.latents import decode
from diffplug.plug import plug
from diffplug.seeds import Seeds
from diffplug.training.conditions import embeds_guidance
from diffplug.training.noise_path import NoisePath
from diffplug.watch import quiet

__all__ = ["Drawn", "Sampling", "draw"]


@dataclass(frozen=True)
class Sampling:
    """A student's way of drawing.

    path: of its model, a flow's shift included. steps: the numbers of evaluations it is for. eta: noise of
    DDIM's steps. guidance: None for a student that needs none (one row a picture), else the scale at which
    guidance acts as usual. default: the number of evaluations where none is asked for, None for the last.
    """

    path: NoisePath
    steps: tuple[int, ...]
    eta: float = 0.0
    guidance: float | None = None
    default: int | None = None

    @property
    def usual(self) -> int:
        """The number of evaluations where none is asked for."""
        return self.default or self.steps[-1]

    @property
    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """The class of Diffusers, and what differs from the configuration of the pipeline's own."""
        if self.path.flow:
            options = {"shift": self.path.shift, "use_dynamic_shifting": False, "shift_terminal": None}
            return "FlowMatchEulerDiscreteScheduler", options
        return "DDIMScheduler", {
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            "clip_sample": False,
            "steps_offset": 0,
        }

    def built(self, pipe: Any) -> Any:
        """Return the scheduler, made for a pipeline."""
        import diffusers

        name, options = self.scheduler
        return getattr(diffusers, name).from_config(pipe.scheduler.config, **options)

    def given(self, steps: int) -> tuple[int, ...] | None:
        """Return the timesteps that the scheduler has to be given, None where it finds them by itself."""
        return None

    def call(self, pipe: Any, steps: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call: steps, guidance off or at its scale, eta.

        Raises ValueError for a pipeline that hands no timesteps on, where they have to be given.
        """
        known = inspect.signature(pipe.__call__).parameters
        call: dict[str, Any] = {"num_inference_steps": steps}
        if "guidance_scale" in known and not embeds_guidance(pipe):
            call["guidance_scale"] = 1.0 if self.guidance is None else self.guidance
        if self.path.flow and "sigmas" in known:
            call["sigmas"] = [1 - j / steps for j in range(steps)]
        if self.eta and "eta" in known:
            call["eta"] = self.eta
        if (timesteps := self.given(steps)) is not None:
            if "timesteps" not in known:
                raise ValueError(
                    f"{type(pipe).__name__} takes no timesteps, which {self.scheduler[0]} has to be given: "
                    "take objective.kernel=ddim"
                )
            call["timesteps"] = list(timesteps)
        return call


@dataclass(frozen=True)
class Drawn:
    """Final latents [n, ...] and pictures [n, 3, h, w] in [0, 1], float32 on the CPU."""

    latents: Tensor
    images: Tensor


@torch.no_grad()
def draw(
    pipe: Any,
    sampling: Sampling,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    call: Mapping[str, Any] | None = None,
    max_rows: int = 50,
) -> Drawn:
    """Return what a pipeline with a student's weights in it draws, one picture a prompt from its own seed.

    steps: the student's usual number where none is given.
    """
    told = {**(call or {}), **sampling.call(pipe, steps or sampling.usual), "output_type": "latent"}
    parts = []
    for begin in range(0, len(prompts), max_rows):
        part = slice(begin, begin + max_rows)
        with plug(pipe, sampling.built(pipe), Seeds(list(seeds[part]))), quiet(pipe):
            parts.append(pipe(prompt=list(prompts[part]), **told)[0])
    latents = torch.cat(parts)
    size: dict[str, Any] = {name: told.get(name) for name in ("height", "width", "num_frames")}
    vae = getattr(pipe, "vae", None)
    dtype = latents.dtype if vae is None else next(vae.parameters()).dtype
    images = decode(pipe, latents.to(dtype), **size)
    images = images[:, images.shape[1] // 2] if images.ndim == 5 else images
    return Drawn(latents.float().cpu(), images.float().cpu())
