"""Running a scheduler by hand on `GaussianModel`, with fixed noise and one random stream a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.testing.closed_form.gaussian import GaussianModel

STEPS = 6
ROWS = 4
SHAPE = (3, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Hook = Callable[[int, Any, Tensor, list[torch.Generator]], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A scheduler class or factory under test. A factory is called as `make(steps, **config)`."""

    make: Callable[..., Any]
    name: str

    def new(self, steps: int = STEPS, **config: Any) -> Any:
        """A fresh scheduler for runs of `steps` steps, with Stable Diffusion's betas if it has any."""
        if not inspect.isclass(self.make):
            return self.make(steps, **config, **self._betas(config))
        return self.make(**config, **self._betas(config, self.make))

    def _betas(self, config: dict[str, Any], cls: type | None = None) -> dict[str, Any]:
        cls = cls or type(self.make(STEPS, **config))
        known = inspect.signature(cls).parameters
        return {name: BETAS[name] for name in BETAS if name in known and name not in config}

    def takes(self, option: str) -> bool:
        """Whether the scheduler's constructor has this option."""
        return option in inspect.signature(type(self.new())).parameters


def model(variance: float = 0.25) -> GaussianModel:
    """The network of the laws; its data differ from pixel to pixel, not from row to row."""
    return GaussianModel(
        mean=torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(SHAPE), variance=variance
    )


def noise(rows: int = ROWS, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard noise [rows, 3, 4, 4]; row i depends on i and the seed alone."""
    own = [torch.Generator().manual_seed(1000 * seed + row) for row in range(rows)]
    return torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in own]).to(dtype)


def streams(rows: int = ROWS) -> list[torch.Generator]:
    """One random generator per row, for samplers that add noise."""
    return [torch.Generator().manual_seed(77 + row) for row in range(rows)]


def finish(
    scheduler: Any,
    x: Tensor,
    generators: list[torch.Generator],
    *,
    start: int = 0,
    stop: int | None = None,
    network: GaussianModel | None = None,
    before: Hook | None = None,
) -> Tensor:
    """x after calls start..stop of a run that is set up; `before` may change x and the state at a call."""
    network = network or model()
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    for call, t in enumerate(scheduler.timesteps[start:stop], start):
        if before is not None:
            x = before(call, scheduler, x, generators)
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scheduler, seen, t)
        x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
    return x


def first_sample(scheduler: Any, start: Tensor) -> Tensor:
    """The first x of a run: standard noise at the scheduler's own scale."""
    return start * torch.as_tensor(getattr(scheduler, "init_noise_sigma", 1.0), dtype=start.dtype)


def run(scheduler: Any, start: Tensor | None = None, steps: int = STEPS, **options: Any) -> Tensor:
    """The samples of a whole run from standard noise."""
    start = noise() if start is None else start
    scheduler.set_timesteps(steps)
    return finish(scheduler, first_sample(scheduler, start), streams(len(start)), **options)


def permute_state(scheduler: Any, rows: Tensor) -> None:
    """Reorder every per-sample tensor: those named by `per_sample_state()`, else all of x's shape."""
    names = scheduler.per_sample_state() if hasattr(scheduler, "per_sample_state") else list(vars(scheduler))
    for name in names:
        setattr(scheduler, name, _permuted(getattr(scheduler, name), rows))


def _permuted(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.shape == (len(rows), *SHAPE) else value
    if type(value) in (list, tuple):
        return type(value)(_permuted(item, rows) for item in value)
    return value
