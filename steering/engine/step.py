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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffplug.intercept import StepCall, StepInterceptor
from diffplug.steering.engine.denoised import StepNoise, noise_ahead, scored_step
from diffplug.steering.engine.history import Rows, move_particles
from diffplug.steering.engine.population import Population
from diffplug.steering.engine.rule import Filter, Rule, Score
from diffplug.steering.engine.slots import Slots
from diffplug.steering.engine.twins import DuplicateWatch
from diffplug.steering.proposals import Proposal, stepped


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
        self.population: Population | None = None
        self.made = 0
        self.ahead: dict[int, StepNoise] = {}
        self.watch.rows = None

    @property
    def filter(self) -> Filter | None:
        """Return the weights and selections so far; None before the first step."""
        return self.population.filter if self.population else None

    @property
    def steps(self) -> int:
        """Return how many steps the run makes; 0 before the first one."""
        return self.population.steps if self.population else 0

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
        if self.population is None:
            self.population = self._begun(call)
        population, index = self.population, self.made
        self.made += 1
        first_stage = getattr(call.scheduler, "state_in_first_order", True)
        if population.is_due(index) and first_stage:  # x0hat of a second stage is no main estimate
            rows = self.selected(call, index, population)
            if index < population.steps - 1:
                self.watch.note(rows)
        result, log_ratio = self.proposal.after(call, call.run())
        if log_ratio is not None:
            population.filter.twisted(self.slots.all(log_ratio))
        if index < population.steps - 1 and getattr(call.scheduler, "state_in_first_order", True):
            self.watch.look(type(call.scheduler).__name__, [stepped(result)])
        return result

    def selected(self, call: StepCall, index: int, population: Population) -> Rows | None:
        """Let the survivors of a scored call take its rows, and prepare the proposal.

        Returns the rows that continue from others, None where every particle stays.
        """
        step = scored_step(call, index, population.steps, self.ahead)
        rewards = self.score(step)
        if self.disturbed:  # while they were made
            raise _disturbed(call.scheduler)
        rows = population.select(rewards, index)
        if rows is not None:
            move_particles(call, rows, self.guiders)
            step = replace(step, x0=rows.take(step.x0))
        self.proposal.before(step)
        return rows

    def _begun(self, call: StepCall) -> Population:
        """Return a fresh population, once the first step tells how many rows and steps there are."""
        batch, size = len(call.sample), len(self.slots.own)
        if batch % size:
            raise ValueError(
                f"a batch of {batch} cannot be split into groups of {size} particles: "
                f"run a multiple of {size} rows, or change particles"
            )
        steps = remaining_steps(call.scheduler, call.timestep)
        begun = Population(self.rule, self.slots, batch // size, steps)
        if call.sample.is_floating_point():
            self.ahead = noise_ahead(call.scheduler, len(call.scheduler.timesteps) - steps, begun.due)
        self.proposal.begin(call.scheduler, batch // size, self.slots.own)
        return begun


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
        if self.leader.population is not None and index in self.leader.population.moves:
            move_particles(call, self.leader.population.moves[index])
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
