"""One pipeline, the same prompts and noises, one solver after another: what searches and benchmarks run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import StepCall, StepInterceptor, intercept_step
from diffplug.network.cache import NetworkCache, remember
from diffplug.plug import plug
from diffplug.seeds import Seeds

__all__ = ["Rollouts", "Trajectory", "with_sample"]


@dataclass(frozen=True)
class Trajectory:
    """What a run went through, float64 on the host.

    samples: [steps, n, ...] the sample that the network saw at each step. outputs: [steps, n, ...] what the
    solver was told, guidance included. corrected: [steps, n, ...] the sample each step started from, after
    the solver's corrector. timesteps: [steps]. final: [n, ...], None for a run that was stopped before.
    """

    samples: Tensor
    outputs: Tensor
    corrected: Tensor
    timesteps: Tensor
    final: Tensor | None


@dataclass
class Rollouts:
    """Runs of `pipe` from fixed prompts and seeds; `network_cache` counts what they cost.

    prompts, seeds: n of each. steps: the pipeline's num_inference_steps. guidance: its guidance_scale, None
    for its own. options: further keywords of the call. max_rows: prompts in one call of the pipeline.
    Used as a context manager, network outputs are remembered between runs (see `remember`).
    """

    pipe: Any
    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int
    guidance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_rows: int = 64
    network_cache: NetworkCache = field(default_factory=NetworkCache, init=False)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds) or not self.prompts:
            raise ValueError(
                f"{len(self.prompts)} prompts and {len(self.seeds)} seeds: give one seed for each prompt"
            )
        if "prompt" not in inspect.signature(self.pipe.__call__).parameters:
            raise ValueError(
                f"{type(self.pipe).__name__} takes no prompt: a search runs on a pipeline that does"
            )

    @contextmanager
    def remembering(self, limit: int = 2**30) -> Iterator[Rollouts]:
        """Inside the block an evaluation that was made before costs nothing."""
        with remember(self.pipe, limit) as self.network_cache:
            yield self

    @property
    def evaluations(self) -> int:
        """Evaluations of the network, a guided pair counted once, for all prompts together."""
        return self.network_cache.evaluated

    def final(self, scheduler: Any) -> Tensor:
        """The final latents [n, ...] of a run with this scheduler, float64 on the host."""
        return torch.cat([self._call(scheduler, part) for part in self._parts()])

    def trajectory(self, scheduler: Any, until: int | None = None, shown: Tensor | None = None) -> Trajectory:
        """A run with this scheduler, recorded; `until` stops it after so many evaluations.

        shown: [steps, n, ...] what the network is shown at each step but the first, whatever the solver does.
        """
        runs = []
        for part in self._parts():
            recorder = _Recorder(until, None if shown is None else shown[:, part])
            undo = intercept_step(scheduler, recorder)
            try:
                final = self._call(scheduler, part)
            except _Enough:
                final = None
            finally:
                undo()
            runs.append((recorder, final))
        made = len(runs[0][0].samples)
        if until is None and made < self.steps:
            raise ValueError(
                f"{type(self.pipe).__name__} made {made} of {self.steps} steps: a search needs all of them, "
                "so leave out strength and the like"
            )
        finals = [final for _, final in runs]
        rows = {name: [torch.stack(getattr(r, name)) for r, _ in runs] for name in _RECORDED}
        return Trajectory(
            **{name: torch.cat(parts, dim=1) for name, parts in rows.items()},
            timesteps=torch.tensor(runs[0][0].timesteps, dtype=torch.float64),
            final=None if None in finals else torch.cat([f for f in finals if f is not None]),
        )

    def _parts(self) -> list[slice]:
        return [slice(i, i + self.max_rows) for i in range(0, len(self.prompts), self.max_rows)]

    def _call(self, scheduler: Any, part: slice) -> Tensor:
        return self.latents(scheduler, part).detach().cpu().double()

    def latents(self, scheduler: Any, part: slice, *plugs: Any) -> Tensor:
        """What one call of the pipeline gives with this scheduler, and more plugs, for some of the pairs."""
        call: dict[str, Any] = {"num_inference_steps": self.steps, "output_type": "latent", **self.options}
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        with plug(self.pipe, scheduler, Seeds(list(self.seeds[part])), *plugs):
            made = self.pipe(prompt=list(self.prompts[part]), **call)[0]
        if not isinstance(made, Tensor):
            raise ValueError(
                f"{type(self.pipe).__name__} gives no latents for output_type='latent': it cannot be searched"
            )
        return made


_RECORDED = ("samples", "outputs", "corrected")


class _Enough(Exception):
    """Ends a run that has gone far enough."""


class _Recorder(StepInterceptor):
    def __init__(self, until: int | None, shown: Tensor | None = None) -> None:
        self.until, self.shown = until, shown
        self.samples: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.corrected: list[Tensor] = []
        self.timesteps: list[float] = []

    def on_step(self, call: StepCall) -> Any:
        self.samples.append(call.sample.detach().cpu().double())
        self.outputs.append(call.model_output.detach().cpu().double())
        self.timesteps.append(float(call.timestep))
        result = call.run()
        states = getattr(call.scheduler, "solver_states", None) or [
            getattr(call.scheduler, "last_sample", None)
        ]
        self.corrected.append(self.samples[-1] if states[-1] is None else states[-1].detach().cpu().double())
        if len(self.samples) == self.until:
            raise _Enough
        if self.shown is None or len(self.samples) >= len(self.shown):
            return result
        return with_sample(result, self.shown[len(self.samples)].to(call.sample))


def with_sample(result: Any, x: Tensor) -> Any:
    """What a scheduler's step has returned, with another sample in it."""
    if isinstance(result, tuple):
        return (x, *result[1:])
    result.prev_sample = x
    return result
