"""The particle engine: stands at `scheduler.step`, scores clean predictions, selects, and lets the solver go
on.

At a scored call, with output m and sample x of P groups of k particles, in this order (arXiv 2501.06848,
algorithm 1):

    x0 = x0hat(m, t, x) -> rewards -> ancestors a -> (m, x, solver's history) become theirs at [a] -> step

so that copies of one particle part at once through the fresh noise of that very step. It needs no pipeline:

    engine = ParticleSteps(rule, score)            # a `Rule`, and a `Score` of its scored steps
    undo = intercept_step(scheduler, engine)
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffplug.intercept import StepCall, StepInterceptor
from diffplug.steering.engine.denoised import StepNoise, noise_ahead, scored_step
from diffplug.steering.engine.history import Rows, move_particles
from diffplug.steering.engine.rule import Filter, Rule, Score
from diffplug.steering.engine.slots import Slots
from diffplug.steering.proposals import Proposal


class DuplicateWatch:
    """Warns once when duplicates are still identical after the step that should have parted them.

    strict: raise ValueError instead, for rules that are nothing without noise. Two-stage solvers are looked
    at when both stages are done, tokens not at all. Costs one comparison of the duplicated rows, until the
    first warning.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.warned = False
        self.rows: Rows | None = None

    def look(self, scheduler: Any, rows: Rows | None, result: Any) -> None:
        """Compare the rows of a step's result with the rows they continue from (survivors keep their slots).

        rows: None = nothing was duplicated at this call.
        """
        self.rows = rows if rows is not None else self.rows
        if self.warned or self.rows is None or not getattr(scheduler, "state_in_first_order", True):
            return
        rows, self.rows = self.rows, None
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        if not after.is_floating_point():  # few tokens may be equal by chance
            return
        if rows.everywhere(torch.equal(after, rows.take(after))):
            self._tell(type(scheduler).__name__)

    def _tell(self, name: str) -> None:
        said = f"{name} added no noise after a selection, so"
        if self.strict:
            raise ValueError(
                f"{said} all candidates of a group are the same and there is nothing to choose from: "
                f"{_ADVICE}; or take BestOfN or NoiseSearch, which work with every solver"
            )
        self.warned = True
        warnings.warn(
            f"{said} duplicated particles stay identical to the end and steering explores little: {_ADVICE}",
            stacklevel=4,
        )


_ADVICE = (
    "leave out proposal=None (proposal='auto' adds noise at the scored calls of most solvers), or use a "
    "stochastic one, such as DDIMScheduler with eta=1, EulerAncestralDiscreteScheduler, or "
    "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++' (diffplug.steering.stochastic)"
)


class ParticleSteps(StepInterceptor):
    """Steers one run of a scheduler; `filter` holds the weights and the selections of the run so far.

    rule: which calls are scored, and how particles are weighed and selected; the batch must be a multiple of
    its particles, groups are consecutive blocks. score: from a scored step to rewards `[P * k]`. watch: what
    happens when duplicates stay identical, by default a warning. proposal: changes the steps of scored calls,
    by default not at all. slots: which particles are here, by default all; `score` returns the rewards of
    all. guiders: Diffusers' guider objects, whose momentum moves with its particles. A new `set_timesteps`
    starts over. Raises ValueError if the particles do not divide the batch, and for steps that another thread
    makes: they would belong to another run.
    """

    def __init__(
        self,
        rule: Rule,
        score: Score,
        *,
        watch: DuplicateWatch | None = None,
        proposal: Proposal | None = None,
        slots: Slots | None = None,
        guiders: Sequence[Any] = (),
    ) -> None:
        self.rule, self.score, self.guiders = rule, score, guiders
        self.slots = Slots(rule.particles) if slots is None else slots
        self.watch = DuplicateWatch() if watch is None else watch
        self.proposal = Proposal() if proposal is None else proposal
        self.thread = threading.get_ident()
        self.disturbed = False
        self._restart()

    def _restart(self) -> None:
        self.filter: Filter | None = None
        self.made = 0
        self.steps = 0
        self.moves: dict[int, Rows] = {}
        self.due: list[int] = []
        self.ahead: dict[int, StepNoise] = {}
        self.watch.rows = None

    def on_set_timesteps(self, scheduler: Any) -> None:
        """Forget the last run. Raises ValueError in another thread than the run's."""
        self.disturbed |= threading.get_ident() != self.thread
        if self.disturbed:
            raise _disturbed(scheduler)
        self._restart()

    def follower(self) -> StepInterceptor:
        """Return what a copy of the scheduler gets: it repeats this engine's selections."""
        return FollowingSteps(self)

    def on_step(self, call: StepCall) -> Any:
        """Return the step's result for the particles that survive this call."""
        if self.disturbed or threading.get_ident() != self.thread:
            raise _disturbed(call.scheduler)
        if self.filter is None:
            self.filter = self._begun(call)
        index, rows = self.made, None
        self.made += 1
        first_stage = getattr(call.scheduler, "state_in_first_order", True)
        if self.due and index >= self.due[0] and first_stage:  # x0hat of a second stage is no main estimate
            self.due = [due for due in self.due if due > index]
            rows = self.selected(call, index, self.filter)
        result, log_ratio = self.proposal.after(call, call.run())
        if log_ratio is not None:
            self.filter.twisted(self.slots.all(log_ratio))
        if index < self.steps - 1:
            self.watch.look(call.scheduler, rows, result)
        return result

    def selected(self, call: StepCall, index: int, particles: Filter) -> Rows | None:
        """Let the survivors of a scored call take its rows, and prepare the proposal.

        Returns the rows that continue from others, None where every particle stays.
        """
        step = scored_step(call, index, self.steps, self.ahead)
        rewards = self.score(step)
        if self.disturbed:  # while they were made
            raise _disturbed(call.scheduler)
        chosen = particles.select(rewards, call=index, progress=step.progress)
        rows = self.slots.moved(chosen.ancestors)
        if rows is not None:
            self.moves[index] = rows
            move_particles(call, rows, self.guiders)
            step = replace(step, x0=rows.take(step.x0))
        self.proposal.before(step)
        return rows

    def _begun(self, call: StepCall) -> Filter:
        """Return fresh weights, once the first step tells how many rows and steps there are."""
        batch, size = len(call.sample), len(self.slots.own)
        if batch % size:
            raise ValueError(
                f"a batch of {batch} cannot be split into groups of {size} particles: "
                f"run a multiple of {size} rows, or change particles"
            )
        self.steps = remaining_steps(call.scheduler, call.timestep)
        self.due = sorted(self.rule.plan()(self.steps))
        if call.sample.is_floating_point():
            start = len(call.scheduler.timesteps) - self.steps
            self.ahead = noise_ahead(call.scheduler, start, self.due)
        self.proposal.begin(call.scheduler, batch // size, self.slots.own)
        return self.rule.build_filter(batch // size)


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


def _disturbed(scheduler: Any) -> ValueError:
    return ValueError(
        f"two threads use one {type(scheduler).__name__} while a steered run is under way: give every thread "
        "its own pipeline with its own scheduler (they may share the weights)"
    )


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
