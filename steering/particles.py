"""The particle engine: stands at `scheduler.step`, scores clean predictions, selects, and lets the solver go
on.

At a scored call, with output m and sample x of P groups of k particles, in this order (arXiv 2501.06848,
algorithm 1):

    x0 = x0hat(m, t, x) -> rewards -> ancestors a -> (m, x, solver's history) become theirs at [a] -> step

so that copies of one particle part at once through the fresh noise of that very step. It needs no pipeline:

    engine = ParticleSteps(build_filter, score, particles=8, calls=scored_calls((0.2, 0.5)))
    undo = intercept_step(scheduler, engine)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import StepCall, StepInterceptor
from diffplug.noise import x0hat
from diffplug.steering.history import reindex, reindex_arguments, reindex_scheduler
from diffplug.steering.particle_filter import ParticleFilter

Score = Callable[[Tensor, int], Tensor]
Plan = Callable[[int], Iterable[int]]

_ADVICE = (
    "use a stochastic one, such as DDIMScheduler with eta=1, EulerAncestralDiscreteScheduler, or "
    "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++' (with use_flow_sigmas=True for "
    "flow models)"
)


def scored_calls(fractions: Iterable[float]) -> Plan:
    """Return a plan: from the number of steps n to the call indices at these fractions of the run, in order.

    The last call is never among them: its clean prediction is the finished picture, and copies made there
    stay copies.
    """
    fractions = tuple(fractions)
    return lambda n: sorted({math.floor(f * n + 0.5) for f in fractions} & set(range(n - 1)))


def every_call(n: int) -> Iterable[int]:
    """Return the plan that scores at every call but the last."""
    return range(n - 1)


class ParticleSteps(StepInterceptor):
    """Steers one run of a scheduler; `filter` holds the weights and the selections of the run so far.

    build_filter: from the number of groups to a fresh `ParticleFilter`. score: from (clean predictions `[P *
    k, ...]`, call index) to rewards `[P * k]`. particles: k; the batch must be a multiple of it, groups are
    consecutive blocks. calls: plan of scored call indices for n steps. A new `set_timesteps` starts over.
    Raises ValueError if k does not divide the batch.
    """

    def __init__(
        self, build_filter: Callable[[int], ParticleFilter], score: Score, *, particles: int, calls: Plan
    ) -> None:
        self.build_filter = build_filter
        self.score = score
        self.particles = particles
        self.plan = calls
        self.warned = False
        self._restart()

    def _restart(self) -> None:
        self.filter: ParticleFilter | None = None
        self.made = 0
        self.steps = 0
        self.moves: dict[int, Tensor] = {}
        self._due: list[int] = []

    def on_set_timesteps(self, scheduler: Any) -> None:
        """Forget the last run."""
        self._restart()

    def follower(self) -> StepInterceptor:
        """Return what a copy of the scheduler gets: it repeats this engine's selections."""
        return FollowingSteps(self)

    def on_step(self, call: StepCall) -> Any:
        """Return the step's result for the particles that survive this call."""
        if self.filter is None:
            self._begin(call)
        index = self.made
        self.made += 1
        rows = self._select(call, index) if self._is_due(call.scheduler, index) else None
        if rows is None:
            return call.run()
        self.moves[index] = rows
        move_particles(call, rows)
        result = call.run()
        if not self.warned and index < self.steps - 1:
            self._warn_of_copies(call.scheduler, rows, result)
        return result

    def _begin(self, call: StepCall) -> None:
        batch = len(call.sample)
        if batch % self.particles:
            raise ValueError(
                f"a batch of {batch} cannot be split into groups of {self.particles} particles: "
                f"run a multiple of {self.particles} rows, or change particles"
            )
        self.filter = self.build_filter(batch // self.particles)
        self.steps = remaining_steps(call.scheduler, call.timestep)
        self._due = sorted(self.plan(self.steps))

    def _is_due(self, scheduler: Any, index: int) -> bool:
        """Return whether to score now; two-stage solvers wait for a first stage, where x0hat is the main
        estimate.
        """
        if not self._due or index < self._due[0] or not getattr(scheduler, "state_in_first_order", True):
            return False
        self._due = [due for due in self._due if due > index]
        return True

    def _select(self, call: StepCall, index: int) -> Tensor | None:
        """Return the row that each row continues from, `[P * k]`; None where every particle stays."""
        assert self.filter is not None  # noqa: S101  # for type checkers; on_step begins first
        x0 = x0hat(call.scheduler, call.model_output, call.timestep, call.sample)
        progress = (index + 1) / max(self.steps, index + 1)
        selection = self.filter.select(self.score(x0, index), call=index, progress=progress)
        if not selection.moves:
            return None
        offset = torch.arange(self.filter.groups)[:, None] * self.particles
        return (selection.ancestors + offset).reshape(-1)

    def _warn_of_copies(self, scheduler: Any, rows: Tensor, result: Any) -> None:
        """Warn once if copied rows are still equal after the step: then the solver adds no noise."""
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        copies = torch.nonzero(rows != torch.arange(len(rows)))[:, 0].to(after.device)
        if torch.equal(after[copies], after[rows.to(after.device)[copies]]):
            self.warned = True
            warnings.warn(
                f"{type(scheduler).__name__} added no noise after a selection, so copied particles stay "
                "identical to "
                f"the end and steering explores little: {_ADVICE}",
                stacklevel=2,
            )


class FollowingSteps(StepInterceptor):
    """Repeats a leader's selections on a copy of its scheduler (pipelines with a second stream), call by
    call.
    """

    def __init__(self, leader: ParticleSteps) -> None:
        self.leader = leader
        self.made = 0

    def on_set_timesteps(self, scheduler: Any) -> None:
        """Start counting again."""
        self.made = 0

    def follower(self) -> StepInterceptor:
        """Return another follower of the same leader."""
        return FollowingSteps(self.leader)

    def on_step(self, call: StepCall) -> Any:
        """Return the step's result for the particles that the leader kept at this call. Raises ValueError
        when ahead of it.
        """
        index = self.made
        self.made += 1
        if index >= self.leader.made:
            raise ValueError(
                f"a copied {type(call.scheduler).__name__} made step {index} before its original did: "
                "this pipeline cannot be steered"
            )
        if index in self.leader.moves:
            move_particles(call, self.leader.moves[index])
        return call.run()


def move_particles(call: StepCall, rows: Tensor) -> None:
    """Make every per-particle tensor of the call and of its scheduler continue from `rows: [n]`."""
    shapes = {call.sample.shape, call.model_output.shape}
    reindex_scheduler(call.scheduler, rows, shapes)
    call.model_output = reindex(call.model_output, rows)
    call.sample = reindex(call.sample, rows)
    call.kwargs = reindex_arguments(call.kwargs, rows, shapes)


def remaining_steps(scheduler: Any, timestep: Any) -> int:
    """Return how many step calls a run makes that begins at `timestep` (image-to-image starts late).
    Synchronises once.
    """
    timesteps = scheduler.timesteps
    start = getattr(scheduler, "begin_index", None)
    if start is None:
        t = torch.as_tensor(timestep).reshape(-1).to("cpu")
        found = torch.nonzero(timesteps.to("cpu") == t).reshape(-1) if len(t) == 1 else t[:0]
        start = int(found[0]) if len(found) else 0
    return len(timesteps) - start
