"""The clean picture that a step sees, small and cheap: a linear map from latents to colours.

The map is fitted to the pipeline's own autoencoder, so it suits every model that has one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffplug import noise
from diffplug.intercept import StepCall, StepInterceptor, Undo, intercept_step
from diffplug.latents import decoder_of, unpack
from diffplug.scheduler.plug import current_scheduler

__all__ = ["Colours", "Preview"]

SIDE = 256
_EVERY = 0.25  # seconds between two frames


class Colours:
    """A linear map from the channels of latents to red, green and blue; `fit` finds that of a pipeline."""

    def __init__(self, weights: Tensor | None) -> None:
        self.weights = weights

    @classmethod
    @torch.no_grad()
    def fit(cls, pipe: Any) -> Colours:
        """Return the map by which simple pictures are told best from what the autoencoder makes of them."""
        vae = decoder_of(pipe)
        with suppress(Exception):  # decoders without an encoder, of videos, of their own kind
            pictures = _pictures(32, 64).to(next(vae.parameters()))
            latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
            z = (latents - (vae.config.get("shift_factor") or 0)) * (vae.config.get("scaling_factor") or 1)
            small = torch.nn.functional.adaptive_avg_pool2d(pictures.float(), z.shape[-2:])
            rows = z.float().movedim(1, -1).reshape(-1, z.shape[1])
            rows = torch.cat([rows, torch.ones(len(rows), 1, device=rows.device)], 1).cpu()
            colours = small.movedim(1, -1).reshape(-1, 3).cpu()
            return cls(torch.linalg.lstsq(rows, colours).solution)
        return cls(None)

    def draw(self, z: Tensor) -> Image.Image:
        """Return a picture of SIDE pixels of one row of latents `[c, h, w]`."""
        z = z.detach().float().cpu()
        if self.weights is not None and len(self.weights) == len(z) + 1:
            rgb = torch.einsum("chw,cd->hwd", z, self.weights[:-1]) + self.weights[-1]
        elif len(z) == 3:
            rgb = z.movedim(0, -1) / 2 + 0.5
        else:
            grey = z.mean(0)
            rgb = ((grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-6))[..., None].expand(
                -1, -1, 3
            )
        data = (rgb.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        image = Image.fromarray(np.ascontiguousarray(data))
        return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


class Preview(StepInterceptor):
    """A plug that gives `show(picture)` what the first row will become, at most four times a second."""

    first = True

    def __init__(self, pipe: Any, colours: Colours, show: Callable[[Image.Image], None]) -> None:
        self.pipe, self.colours, self.show = pipe, colours, show
        self._last = 0.0

    def attach(self, pipe: Any) -> Undo:
        """Return a function that takes it off the pipeline's scheduler."""
        return intercept_step(current_scheduler(pipe), self)

    def on_step(self, call: StepCall) -> Any:
        if monotonic() - self._last >= _EVERY:
            with suppress(ValueError, RuntimeError, AttributeError, IndexError):  # no preview, but a picture
                clean = noise.x0hat(call.scheduler, call.model_output, call.timestep, call.sample)
                row = unpack(self.pipe, clean[:1])[0]
                self.show(self.colours.draw(row if row.ndim == 3 else row[:, 0]))
                self._last = monotonic()
        return call.run()


def _pictures(n: int, side: int) -> Tensor:
    """Return n pictures in [0, 1], the same every time: soft colours, and plain discs and squares on grey."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    soft = torch.nn.functional.interpolate(draw(n // 2, 3, 4, 4), size=(side, side), mode="bicubic")
    plain = draw(n - n // 2, 1, 1, 1).expand(-1, 3, side, side).clone()
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    for picture in plain:
        for shape in range(4):
            (cx, cy, r), colour = draw(3), draw(3)
            dx, dy = (x - cx).abs(), (y - cy).abs()
            inside = (dx**2 + dy**2).sqrt() if shape % 2 else torch.maximum(dx, dy)
            picture[:, inside < 0.08 + 0.2 * r] = colour[:, None]
    return torch.cat([soft, plain]).clamp(0, 1)
