"""What all steerers share: a plug whose call runs k particles per prompt and hands back chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from diffplug import rewards
from diffplug.checks import check_texts, check_whole
from diffplug.intercept import intercept_call, intercept_step
from diffplug.rewards import Reward
from diffplug.steering.engine.ranks import Ranks
from diffplug.steering.engine.refusals import refuse_caches, refuse_pipeline
from diffplug.steering.engine.request import Request, read_request
from diffplug.steering.engine.run import SteeredRun
from diffplug.steering.engine.score_times import Plan
from diffplug.steering.engine.step import Filter
from diffplug.steering.proposals import Proposal
from diffplug.steering.report import SteeringReport
from diffplug.steering.values.many_samples import Value

RETURNS = ("best", "all", "sample")


@dataclass(frozen=True)
class Steerer:
    """Base of all steerers. A subclass says how the particles are weighed (`build_filter`) and when (`plan`).

    reward: `reward(images, prompts) -> scores`, or a registered name. particles: k copies of every prompt.
    returns: "best" gives as many pictures per prompt as the call asks for, best reward first; "sample" draws
    them from the final weights; "all" gives every particle in slot order. prompts: texts for the reward, one
    per prompt of the call, where the call has only embeddings. decode: `decode(pipe, latents, height=,
    width=, num_frames=, batch_size=) -> images` for the scored calls before the end, by default
    `diffplug.latents.decode`. preview: a small decoder of the same latents for those calls, such as an
    `AutoencoderTiny`; the finished pictures are the pipeline's own. decode_batch_size: rows decoded at once,
    fewer when memory runs out. network_batch_size: rows (guidance counts twice) that the denoiser takes at
    once, for populations that do not fit into memory; by default all. value: what an unfinished state is
    worth (see `diffplug.steering.values`), by default the reward of its clean prediction. ranks: True shares
    the particles of every prompt among all processes of the job (`accelerate launch`), a `Ranks` among those
    of a group; every process makes the same call and gets the same pictures. Raises ValueError for anything
    out of range.
    """

    reward: Reward | str
    _: KW_ONLY
    particles: int = 8
    returns: str = "best"
    prompts: str | Sequence[str] | None = None
    decode: Callable[..., Tensor] | None = None
    decode_batch_size: int = 4
    network_batch_size: int | None = None
    preview: Any = None
    value: Value | None = None
    ranks: bool | Ranks = False
    _reports: list[SteeringReport] = field(default_factory=list, init=False, repr=False, compare=False)

    slot: ClassVar[str] = "steering"
    needs_noise: ClassVar[bool] = False  # refuse solvers that add none
    copies: ClassVar[bool] = True  # copy particles on the way, so that noise has to part them

    def __post_init__(self) -> None:
        if isinstance(self.reward, str):
            object.__setattr__(self, "reward", rewards.get(self.reward))
        if not callable(self.reward):
            raise ValueError(
                f"reward={self.reward!r} cannot be called: give a function of (images, prompts) or a "
                f"name of {rewards.names()}"
            )
        if self.preview is not None and self.decode is not None:
            raise ValueError("preview and decode both say how to decode on the way: give one of them")
        if self.decode is not None and not callable(self.decode):
            raise ValueError(
                f"decode={self.decode!r} cannot be called: give decode(pipe, latents, ...) -> images"
            )
        if self.preview is not None and not hasattr(self.preview, "decode"):
            raise ValueError(
                f"preview={self.preview!r} decodes nothing: give an autoencoder, as AutoencoderTiny"
            )
        if self.value is not None and not callable(self.value):
            raise ValueError(f"value={self.value!r} cannot be called: see diffplug.steering.values")
        if not isinstance(self.ranks, (bool, Ranks)):
            raise ValueError(f"ranks={self.ranks!r}: give True, False or Ranks.of(group)")
        for name in ("particles", "decode_batch_size"):
            check_whole(name, getattr(self, name))
        if self.network_batch_size is not None:
            check_whole("network_batch_size", self.network_batch_size)
        check_texts(self.prompts)
        if self.returns not in RETURNS:
            raise ValueError(f"unknown returns {self.returns!r}: choose one of {', '.join(RETURNS)}")

    @property
    def report(self) -> SteeringReport | None:
        """Return what the last call did; None before the first one."""
        return self._reports[-1] if self._reports else None

    @property
    def weight(self) -> float:
        """Return lambda of the tilt exp(lambda * reward) that the final weights stand for."""
        raise NotImplementedError

    @property
    def scores(self) -> bool:
        """Return whether the reward is needed at all."""
        return True

    @property
    def leaders_first(self) -> bool:
        """Return whether "best" gives the best of every separate population before any other picture."""
        return True

    def plan(self) -> Plan:
        """Return the plan of scored calls before the end."""
        raise NotImplementedError

    def build_filter(self, groups: int) -> Filter:
        """Return a fresh particle filter for this many prompts."""
        raise NotImplementedError

    def build_proposal(self, gradient: Callable[[Tensor], Tensor]) -> Proposal | None:
        """Return what changes the steps of scored calls, if anything does.

        gradient: from clean latents to the reward's gradient, for rewards that have one.
        """
        return None

    def build_run(self, pipe: Any, request: Request, ranks: Ranks | None) -> SteeredRun:
        """Return the run of one call."""
        return SteeredRun(self, pipe, request, ranks)

    def attach(self, pipe: Any) -> Callable[[], None]:
        """Return a function that detaches this steerer from the pipeline; until then every call of `pipe` is
        steered.

        Raises ValueError, with the reason, for a pipeline that cannot be steered at a scheduler.
        """
        refuse_pipeline(pipe, copies=self.copies)
        return intercept_call(pipe, lambda call, kwargs: self._around(pipe, call, kwargs))

    def _around(self, pipe: Any, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Return the output of a steered call; the scheduler is intercepted while it lasts."""
        if self.copies:
            refuse_caches(pipe)
        ranks = Ranks.of() if self.ranks is True else self.ranks or None
        request = read_request(pipe, kwargs, self.particles, ranks)
        run = self.build_run(pipe, request, ranks)
        undo = intercept_step(pipe.scheduler, run.engine)
        try:
            output = run(call)
        finally:
            undo()
        self._reports[:] = [run.report()]
        return output
