"""A learned value: a small network that reads a noised latent and says what its picture will be worth."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.files import atomic_path, read_json, write_json
from diffplug.noise.families import Level
from diffplug.steering.engine.rule import State

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ValueCard:
    """What belongs to the weights of a learned value.

    channels, ndim: of the latents it reads. width: of the network. mean, std: of the rewards it was fitted
    to. strength: lambda of the soft value it was fitted as, 0 for the expected reward. r2: share of the
    held-out rewards' variance that it explains, for each scheduler step of the roll-outs, first to last; a
    number near 0 says that selecting at that step is no better than chance.
    """

    channels: int
    ndim: int
    width: int
    mean: float
    std: float
    strength: float
    r2: tuple[float, ...] = ()
    version: int = _FORMAT


class ValueNetwork(nn.Module):
    """Two convolutions, a mean over the picture, and two linear layers; reads log-SNR as one more channel."""

    def __init__(self, card: ValueCard) -> None:
        super().__init__()
        w = card.width
        self.body = nn.Sequential(
            nn.Conv2d(card.channels + 1, w, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.head = nn.Sequential(nn.Linear(2 * w + 1, 2 * w), nn.SiLU(), nn.Linear(2 * w, 1))

    def forward(self, x: Tensor, ell: Tensor) -> Tensor:
        """Return standardised values `[n]` of scaled latents `[n, c, h, w]` at log-SNR / 2 `ell: [n]`."""
        time = (ell.clamp(-6, 6) / 4).reshape(-1, 1, 1, 1)
        features = self.body(torch.cat([x, time.expand(-1, 1, *x.shape[2:])], 1)).mean((2, 3))
        return self.head(torch.cat([features, time[:, :, 0, 0]], 1))[:, 0]


class LearnedValue:
    """A value for `steerer(value=...)` that costs one small network call and decodes nothing.

    It does not read the prompt: fit it on the prompts that it will serve. Made by `fit_value`, or by
    `LearnedValue.load(folder)`.
    """

    def __init__(self, card: ValueCard, network: ValueNetwork) -> None:
        self.card, self.network = card, network

    def __call__(self, state: State) -> Tensor:
        """Return values in reward units, `[n]` float64. Raises ValueError for latents of another kind."""
        if state.level is None:
            raise ValueError("a learned value reads latents, this pipeline makes tokens: use ManySamples")
        self._check(state.sample)
        x, ell = scaled(state.sample.float(), state.level)
        with torch.no_grad():
            found = self.network.to(x.device)(planes(x), torch.full((len(x),), ell, device=x.device))
        return self.card.mean + self.card.std * found.double()

    def _check(self, sample: Tensor) -> None:
        channels = sample.shape[-1] if sample.ndim == 3 else sample.shape[1]
        if (sample.ndim, channels) != (self.card.ndim, self.card.channels):
            raise ValueError(
                f"this value was fitted to latents of {self.card.ndim} axes and {self.card.channels} "
                f"channels, the pipeline has shape {tuple(sample.shape)}: fit another one"
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write value.json and value.safetensors into a folder, each whole or not at all."""
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with atomic_path(target / "value.safetensors") as path:
            save_file({k: v.contiguous().cpu() for k, v in self.network.state_dict().items()}, path)
        write_json(target / "value.json", asdict(self.card))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LearnedValue:
        """Return a saved value. Raises ValueError for files that are damaged or of another version."""
        from safetensors.torch import load_file

        source = Path(folder)
        try:
            values: dict[str, Any] = read_json(source / "value.json")
            if values.get("version") != _FORMAT:
                raise ValueError(f"its version is {values.get('version')!r}, this package reads {_FORMAT}")
            card = replace(ValueCard(**values), r2=tuple(values["r2"]))
            network = ValueNetwork(card)
            network.load_state_dict(load_file(source / "value.safetensors"))
        except FileNotFoundError:
            raise ValueError(f"{os.fspath(folder)!r} holds no value.json and value.safetensors") from None
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{os.fspath(folder)!r} holds no readable value: {reason}") from error
        return cls(card, network.eval())


def scaled(x: Tensor, level: Level) -> tuple[Tensor, float]:
    """Return latents of about unit variance, and log(alpha / sigma) of their level."""
    size = math.hypot(level.alpha, level.sigma)
    ell = math.log(max(level.alpha, 1e-6) / max(level.sigma, 1e-6))
    return x / size, ell


def planes(x: Tensor) -> Tensor:
    """Return latents as `[n, c, h, w]`: packed tokens `[n, t, c]` as one row, videos frame above frame."""
    if x.ndim == 3:
        return x.movedim(-1, 1)[:, :, None]
    return x.flatten(2, 3) if x.ndim == 5 else x
