"""`Crowd`: particle steering in a sampling loop of one's own.

    crowd = FeynmanKac(reward, particles=8, strength=2).crowd(groups=4, steps=len(times), seeds=0)
    state = prior(crowd)                                       # a row for every particle, `crowd.rows`
    for i, t in enumerate(times):
        out = net(state, t)
        state, out = crowd.at(i, state, out, clean=see)        # before the noise of the step
        state = step(state, out, t, crowd)
    result = crowd.finish(state, clean=see_finished)           # .best .sample .all .log_z .report

The filter is exact for every loop whose particles, given their state, go on independently: copies of a state
are then copies of a particle, and no likelihood of a step is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffplug.checks import check_number, check_whole
from diffplug.seeds import particle_seed, picture_seeds
from diffplug.steering.crowd.nest import Nest
from diffplug.steering.crowd.ragged import Ragged, ragged
from diffplug.steering.crowd.result import CrowdResult
from diffplug.steering.engine.population import Choosing, Ending, Population, Unscored
from diffplug.steering.engine.rating import Rater
from diffplug.steering.engine.slots import Slots
from diffplug.steering.engine.twins import DuplicateWatch
from diffplug.steering.report import SteeringReport, told

if TYPE_CHECKING:
    from diffplug.steering.parts import Scoring

_ADVICE = (
    "call crowd.at before the step draws its noise, and draw that noise for every row "
    "(crowd.normal, crowd.uniform, or generator=crowd.generators)"
)


class Steering(Choosing, Protocol):
    """What a crowd asks of a steerer beside its rule."""

    @property
    def reward(self) -> Any: ...
    @property
    def scoring(self) -> Scoring: ...


class Crowd:
    """P groups of k particles in a loop of so many steps; rows are group-major, `rows` = P * k.

    Made by `steerer.crowd(...)`, see there for the arguments. One loop, one crowd. Raises ValueError in one
    line for state that it cannot move, for calls out of order, and for results of the wrong number.
    """

    def __init__(
        self,
        steering: Steering,
        *,
        groups: int,
        steps: int,
        seeds: int | Sequence[int],
        prompts: Sequence[Any] | None = None,
        shared: Iterable[str] = (),
        floor: float | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        check_whole("groups", groups)
        check_whole("steps", steps)
        self.steering, self.groups, self.particles, self.steps = steering, groups, steering.particles, steps
        self.floor = _floor(floor)
        slots = Slots(self.particles)
        labels = _labels(prompts, steering.scoring, groups)
        needed = steering.scores
        self.rater = Rater(steering.reward, labels, slots, timeout=steering.scoring.timeout, needed=needed)
        self.population = Population(steering if needed else Unscored(steering), slots, groups, steps)
        self.generators = [
            torch.Generator(device).manual_seed(particle_seed(seed, slot))
            for seed in group_seeds(seeds, groups)
            for slot in slots.own
        ]
        self.nest = Nest(self.rows, _shared(shared))
        self.watch = DuplicateWatch(strict=steering.needs_noise, advice=_ADVICE)
        self.made = 0
        self.finished = False
        self.started = perf_counter()

    @property
    def rows(self) -> int:
        """Return P * k, the first size of everything that belongs to particles."""
        return self.groups * self.particles

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers `[rows, *shape]`, each row from its own generator."""
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self.generators])

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), `[rows, *shape]`, each row from its own generator."""
        return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in self.generators])

    def ragged(self, batch: Any, *, graphs: Iterable[str] = ()) -> Ragged:
        """Return graphs of different size as state that moves by whole graphs; see `Ragged`.

        batch: a mapping, or torch_geometric's `Batch`, with `batch` (the graph of every node, rows of them),
        `edge_index` where there are edges, and tensors. graphs: names of those with one entry a graph. Warns
        where the graphs of a group differ in size. Raises ValueError for what does not fit.
        """
        return ragged(batch, self.rows, self.particles, graphs)

    @torch.no_grad()
    def at(self, i: int, state: Any, out: Any = None, *, clean: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        """Return state and output of the survivors; call it in every step, before the step's own noise.

        i: which step, 0 to steps - 1, in order. state: whatever the loop carries on, histories of a multistep
        solver included. out: what the network said of it. clean: `clean(state, out)` gives what every
        particle would become, a sequence of `rows` things for the reward; only called where the rule scores.
        """
        self._check_turn(i)
        self.nest.check(out, "out")
        self.watch.look("the loop", self.nest.parts(state, "state"))
        self.made += 1
        if not self.population.is_due(i):
            return state, out
        rewards = self._rated(lambda: clean(state, out), f"step {i + 1} of {self.steps}")[1]
        if self.floor is not None:
            rewards = torch.where(torch.isnan(rewards), self.floor, rewards)
        rows = self.population.select(rewards, i)
        if rows is None:
            return state, out
        self.watch.note(rows)
        return self.nest.moved(state, rows, "state"), self.nest.moved(out, rows, "out")

    @torch.no_grad()
    def finish(self, state: Any, *, clean: Callable[[Any], Any] | None = None) -> CrowdResult:
        """Return the results of a loop that made all its steps.

        clean: `clean(state)` gives the finished things, `rows` of them; without it they are the state itself.
        Here a reward of NaN ends a particle whatever the floor is.
        """
        self._check_end()
        self.nest.check(state, "state")
        if idle := self.nest.idle():
            warnings.warn(
                f"shared path {idle[0]!r} named nothing in any step: write it as the loop calls it, or leave "
                "it out",
                stacklevel=2,
            )
        things, rated = self._rated(lambda: state if clean is None else clean(state), "the end")
        self.finished = True
        particles, k = self.population.filter, self.particles
        scores = self.steering.scores
        ending = Ending.judged(particles, rated) if scores else Ending.unscored(self.groups, k)
        best = [ending.best(self.steering, particles, group)[0] for group in range(self.groups)]
        return CrowdResult(
            all=things,
            state=state,
            best_rows=self._rows_of(best),
            report=self._report(ending, best),
            _drawn=self._drawn(ending),
        )

    def _check_turn(self, i: int) -> None:
        if self.finished:
            raise ValueError("this crowd has finished: make a new one for another loop")
        if i != self.made:
            told = "comes twice" if i < self.made else f"skips step {self.made}"
            raise ValueError(
                f"crowd.at({i}, ...) {told}: call it once in every step, 0 to {self.steps - 1} in order"
            )
        if i >= self.steps:
            raise ValueError(f"crowd.at({i}, ...) is past the end: the crowd was made for steps={self.steps}")

    def _check_end(self) -> None:
        if self.finished:
            raise ValueError("crowd.finish comes twice: its first result holds everything")
        if self.made != self.steps:
            raise ValueError(
                f"crowd.finish after {self.made} of {self.steps} steps: call crowd.at in every step, or make "
                f"the crowd with steps={max(self.made, 1)}"
            )

    def _rated(self, make: Callable[[], Any], where: str) -> tuple[Any, Tensor]:
        """Return what `clean` made and its rewards `[rows]`; rows of tensors that are not finite get NaN."""
        start = perf_counter()
        items = make()
        self.rater.seconds.decode += perf_counter() - start
        count = len(items) if hasattr(items, "__len__") else None
        if count != self.rows:
            given = type(items).__name__ if count is None else f"{count} things"
            raise ValueError(
                f"clean returned {given} at {where}, it must return {self.rows}: one for every row of the "
                "crowd, in order"
            )
        if not self.steering.scores:
            return items, torch.zeros(self.rows)
        found = self.rater.rate(items, where)
        if isinstance(items, Tensor) and items.is_floating_point():
            finite = torch.isfinite(items).reshape(self.rows, -1).all(1).cpu()
            found = torch.where(finite, found, torch.nan)
        return items, found

    def _rows_of(self, slots: Sequence[int]) -> list[int]:
        return [group * self.particles + slot for group, slot in enumerate(slots)]

    def _drawn(self, ending: Ending) -> list[int] | None:
        """Return rows drawn by the weights; None for rules whose weights say nothing of the reward."""
        particles = self.population.filter
        weightless = self.steering.scores and (
            self.steering.weight == 0 or not getattr(particles, "exact", True)
        )
        if weightless:
            return None
        slots = [
            0 if ending.nothing_valid(self.steering, group) else ending.sample(particles, group, 1)[0]
            for group in range(self.groups)
        ]
        return self._rows_of(slots)

    def _report(self, ending: Ending, best: Sequence[int]) -> SteeringReport:
        seconds = self.rater.seconds
        return SteeringReport(
            method=type(self.steering).__name__,
            strength=self.steering.weight,
            prompts=tuple(str(label) for label in self.rater.prompts),
            steps=self.steps,
            noise="the loop's own",
            returned=tuple((slot,) for slot in best),
            network_calls=0,
            network_rows=0,
            network_seconds=0.0,
            decode_seconds=seconds.decode,
            reward_seconds=seconds.reward,
            total_seconds=perf_counter() - self.started,
            **told(self.population.filter, ending),
        )


def group_seeds(seeds: int | Sequence[int], groups: int) -> list[int]:
    """Return a seed for every group. Raises ValueError for a wrong number of them."""
    listed = list(seeds) if isinstance(seeds, (range, Sequence)) and not isinstance(seeds, str) else seeds
    if isinstance(listed, list) and len(listed) != groups:
        raise ValueError(f"{len(listed)} seeds for {groups} groups: give one number, or one for each group")
    return picture_seeds(listed, groups)


def _labels(prompts: Sequence[Any] | None, scoring: Scoring, groups: int) -> list[Any]:
    """Return what the reward is told of each group: texts, or whatever labels the loop has."""
    if prompts is not None and scoring.prompts is not None:
        raise ValueError("prompts= and scoring.prompts both label the groups: give one of them")
    found = prompts if prompts is not None else scoring.prompts
    listed = [found] if isinstance(found, str) else found
    labels = [""] * groups if listed is None else list(listed)
    if len(labels) != groups:
        raise ValueError(f"{len(labels)} prompts for {groups} groups: give one for each")
    return labels


def _floor(floor: float | None) -> float | None:
    if floor is not None:
        check_number("floor", floor)
        if not np.isfinite(floor):
            raise ValueError(f"floor={floor}: give a finite reward for what has none yet, or None")
    return floor


def _shared(shared: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of what stays. Raises ValueError for one that begins with neither state nor out."""
    if isinstance(shared, str):
        raise ValueError(f"shared={shared!r}: give a list of paths, as shared=({shared!r},)")
    paths = tuple(shared)
    for path in paths:
        if str(path).partition(".")[0] not in ("state", "out"):
            raise ValueError(f"shared path {path!r}: begin with 'state' or 'out', as 'state.table'")
    return paths
