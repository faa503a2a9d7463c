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

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffplug.intercept import StepCall, StepInterceptor
from diffplug.steering.engine.denoised import clean_prediction
from diffplug.steering.engine.duplicates import CopyWatch
from diffplug.steering.engine.history import reindex, reindex_arguments, reindex_guiders, reindex_scheduler
from diffplug.steering.engine.ranks import ALONE, Ranks, Rows, Slots, moved_rows
from diffplug.steering.engine.score_times import Plan
from diffplug.steering.proposals import Proposal
from diffplug.steering.smc.filter import Selection

Score = Callable[[Tensor, int], Tensor]


class Filter(Protocol):
    """What the engine asks of a particle filter; see `ParticleFilter` and `Populations`."""

    groups: int
    particles: int
    selections: list[Selection]
    generators: Sequence[torch.Generator]

    def select(self, rewards: Tensor, *, call: int, progress: float) -> Selection:
        """Return the selection for the rewards of a call."""
        ...

    def twisted(self, log_ratio: Tensor) -> None:
        """Take log p/tau of a proposal into the weights."""
        ...

    def finish(self, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights, log normalisers and checked rewards of the end."""
        ...


class ParticleSteps(StepInterceptor):
    """Steers one run of a scheduler; `filter` holds the weights and the selections of the run so far, `now`
    the call that is being scored.

    build_filter: from the number of groups to a fresh filter. score: from (clean predictions `[P * k, ...]`,
    call index) to rewards `[P * k]`. particles: k; the batch must be a multiple of it, groups are consecutive
    blocks. calls: plan of scored call indices for n steps. watch: what happens when copies stay
    identical, by default a warning. proposal: changes the steps of scored calls, by default not at all.
    ranks: the processes that share the particles of every prompt: the batch then holds k / W rows for each,
    and `score` returns the rewards of all. guiders: Diffusers' guider objects, whose momentum moves with its
    particles. A new `set_timesteps` starts over. Raises ValueError if k (or k / W) does not divide the batch.
    """

    def __init__(
        self,
        build_filter: Callable[[int], Filter],
        score: Score,
        *,
        particles: int,
        calls: Plan,
        watch: CopyWatch | None = None,
        proposal: Proposal | None = None,
        ranks: Ranks = ALONE,
        guiders: Sequence[Any] = (),
    ) -> None:
        self.guiders = guiders
        self.build_filter = build_filter
        self.score = score
        self.slots = Slots(particles, ranks)
        self.plan = calls
        self.watch = CopyWatch() if watch is None else watch
        self.proposal = Proposal() if proposal is None else proposal
        self._restart()

    def _restart(self) -> None:
        self.filter: Filter | None = None
        self.made = 0
        self.steps = 0
        self.moves: dict[int, Rows] = {}
        self.now: StepCall | None = None
        self._due: list[int] = []
        self.watch.restart()

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
        assert self.filter is not None  # noqa: S101  # for type checkers; _begin has made it
        index = self.made
        self.made += 1
        rows = self._score(call, index) if self._is_due(call.scheduler, index) else None
        result = self.proposal.after(call, call.run())
        ratio = self.proposal.log_ratio()
        if ratio is not None:
            self.filter.twisted(self.slots.all(ratio))
        if index < self.steps - 1:
            self.watch.look(call.scheduler, rows, result)
        return result

    def _score(self, call: StepCall, index: int) -> Rows | None:
        """Let the survivors of a scored call take its rows, and prepare the proposal; return where from."""
        x0 = clean_prediction(call)
        self.now = call
        progress = (index + 1) / max(self.steps, index + 1)
        rows = self._select(self.score(x0, index), index, progress)
        if rows is not None:
            self.moves[index] = rows
            move_particles(call, rows)
            reindex_guiders(self.guiders, rows)
            x0 = reindex(x0, rows)
        self.proposal.before(call, x0, progress)
        return rows

    def _begin(self, call: StepCall) -> None:
        batch, size = len(call.sample), len(self.slots.own)
        if batch % size:
            raise ValueError(
                f"a batch of {batch} cannot be split into groups of {size} particles: "
                f"run a multiple of {size} rows, or change particles"
            )
        self.filter = self.build_filter(batch // size)
        self.steps = remaining_steps(call.scheduler, call.timestep)
        self._due = sorted(self.plan(self.steps))
        self.proposal.begin(call.scheduler, self.filter.groups, self.slots.own)

    def _is_due(self, scheduler: Any, index: int) -> bool:
        """Return whether to score now; two-stage solvers wait for a first stage, where x0hat is the main
        estimate.
        """
        if not self._due or index < self._due[0] or not getattr(scheduler, "state_in_first_order", True):
            return False
        self._due = [due for due in self._due if due > index]
        return True

    def _select(self, rewards: Tensor, index: int, progress: float) -> Rows | None:
        """Return where each row continues from; None where every particle stays."""
        assert self.filter is not None  # noqa: S101  # for type checkers; on_step begins first
        selection = self.filter.select(rewards, call=index, progress=progress)
        return moved_rows(selection.ancestors, self.slots)


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


def move_particles(call: StepCall, rows: Rows) -> None:
    """Make every per-particle tensor of the call and of its scheduler continue from `rows`."""
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
