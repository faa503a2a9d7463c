"""What every method that learns from its own pictures does: draw, judge, and only then a loss.

A row of an update is a prompt with K candidates. They are drawn from the policy as it is, so that one update
is one roll-out; all noise is a function of seed, update and row, so there is nothing to store: runs resume
bit for bit, and roll-outs are shared by processes as the rows are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.network import Network
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.preference.gauges import Gauges, GaugeSettings
from diffplug.training.preference.kernel import OMEGA_MAX, Kernel, Reduction
from diffplug.training.preference.kernels import SchedulerSampling, kernel_of, sampling_of
from diffplug.training.preference.rollout import Paths, rollout, starts
from diffplug.training.preference.scorer import PictureScorer
from diffplug.training.preference.start import policy
from diffplug.training.student import Sampling
from diffplug.training.tuner import Tuner

__all__ = ["Drawn", "Online", "OnlineSettings", "Transitions"]


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """What all online methods are told.

    reward: what is preferred, a spec of `diffplug.rewards`. candidates: pictures a prompt. start: whether
    they begin at "shared" or "independent" noise. kernel: "ddim" (any model, with `eta`), "renoise" (LCM,
    DMD2), "flow-sde", or a scheduler class of Diffusers; timesteps: of the latter, None for trailing ones.
    guidance: classifier-free, in roll-outs, policy and reference, at two rows a state; the result is drawn
    with it, or at student.guidance. logprob: "mean" over dimensions, the convention of published betas, or
    "sum". omega_max: steps whose KL weight is larger count as deterministic. patience: updates without a pair
    before the run gives up.
    """

    reward: str = "shapes"
    candidates: int = 2
    start: Literal["shared", "independent"] = "shared"
    kernel: str = "ddim"
    eta: float = 1.0
    timesteps: tuple[int, ...] | None = None
    guidance: float = 1.0
    logprob: Reduction = "mean"
    omega_max: float = OMEGA_MAX
    patience: int = 5
    gauges: GaugeSettings = field(default_factory=GaugeSettings)

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}: one has no rival")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {self.eta}")
        if not self.guidance >= 1:
            raise ValueError(f"guidance must be at least 1, which is none, got {self.guidance}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


@dataclass(frozen=True, eq=False)
class Drawn:
    """Candidates of n prompts: paths of n * K rows, conditions of as many, scores [n, K] float64."""

    paths: Paths
    conditions: Conditions
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Transitions:
    """What policy and reference say of m paths: ell, kl [m, T] at the trainable steps, float64 with a graph;
    anchor [m]: the mean squared difference of x0hat at the others."""

    ell: Tensor
    kl: Tensor
    anchor: Tensor


class Online(Objective):
    """Base of the online methods; they write `compared(drawn)`."""

    needs_pipe = True
    needs_noise = True  # steps with a density are what is learnt from
    Settings: type = OnlineSettings

    def __init__(
        self,
        network: Network,
        kernel: Kernel,
        conditions: Conditions,
        prompts: list[str],
        settings: Any,
        *,
        scorer: Any,
        gauges: Gauges | None = None,
    ) -> None:
        self.network, self.kernel, self.conditions, self.prompts = network, kernel, conditions, prompts
        self.settings, self.scorer, self.gauges = settings, scorer, gauges
        self.idle = torch.zeros((), dtype=torch.long)
        self.looked: dict[str, float] = {}
        if self.needs_noise:
            check_stochastic(kernel)

    @classmethod
    def from_job(cls, job: Any) -> Online:
        """Return the objective of `diffplug train`."""
        scorer = PictureScorer(job.pipe, job.objective.reward)
        made = cls(job.network, kernel_of(job), job.conditions, job.prompts, job.objective, scorer=scorer)
        made.gauges = _gauges(made, job)
        return made

    @staticmethod
    def tuner_of(job: Any) -> Tuner:
        """Return the policy, on top of the student that it begins from."""
        return policy(job)

    @staticmethod
    def needs_null(job: Any) -> bool:
        """Where policy and reference are guided."""
        return bool(job.objective.guidance > 1)

    @staticmethod
    def sampling(job: Any) -> Sampling:
        """Return how the tuned model is drawn with."""
        return sampling_of(job)

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for what cannot be trained online, before any work."""
        check_guidance(job)
        check_stochastic(kernel_of(job))
        PictureScorer(job.pipe, job.objective.reward).prepare(job.prompts)
        if job.objective.gauges.judge:
            PictureScorer(job.pipe, job.objective.gauges.judge).prepare(job.prompts[:1])

    def groups(self) -> list[Group]:
        """The policy."""
        return [Group("student", self.network.weights)]

    def before(self, update: int) -> None:
        """Look at the gauges, where it is time."""
        self.looked = {}
        if self.gauges is not None and self.gauges.due(update):
            self.looked = self.gauges.look()

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of prompts: their candidates are drawn and judged first."""
        drawn = self.drawn(rows)
        loss = self.compared(drawn)
        counted = (loss.weights > 0).double().sum() if loss.weights is not None else torch.tensor(1.0)
        log = {name: torch.zeros(()) for name in self.figures()}
        log |= {"reward": drawn.scores.mean(), "reward_std": drawn.scores.std(1).mean(), **loss.log}
        log |= {name: torch.tensor(value, dtype=torch.float64) for name, value in self.looked.items()}
        log = {name: value.to(rows.device) for name, value in log.items()}
        return Loss(loss.errors, loss.weights, log=log, totals={"counted": counted.to(rows.device)})

    def figures(self) -> list[str]:
        """Return the names that `compared` logs; all are told of every part of a batch, pairs or none."""
        return []

    def compared(self, drawn: Drawn) -> Loss:
        """Return the loss [n] of n prompts with their candidates."""
        raise NotImplementedError

    @torch.no_grad()
    def drawn(self, rows: Rows) -> Drawn:
        """Return the candidates of each row's prompt with their scores."""
        k, told = self.settings.candidates, self.settings
        item = rows.items(len(self.prompts)).repeat_interleave(k)
        conditions = self.conditions[item].to(rows.device)
        shape = self.network.form.shape
        x, z = starts(rows, k, len(self.kernel), shape, told.start == "shared")
        both = (x.flatten(0, 1), z.flatten(0, 1))
        paths = rollout(self.network, self.kernel, conditions, *both, guidance=told.guidance)
        scores = self.scorer(paths.final, [self.prompts[i] for i in item.tolist()])
        return Drawn(paths, conditions, scores.view(len(rows), k))

    def transitions(self, drawn: Drawn, which: Tensor, *, anchor: bool) -> Transitions:
        """Return log-ratios of the paths `which` [m]; one pass of the policy, one of the reference.

        anchor: also compare the clean predictions at the steps without a density.
        """
        kernel, steps = self.kernel, self.kernel.trainable
        held = [i for i in range(len(kernel)) if i not in steps] if anchor else []
        m, states = len(which), drawn.paths.states[which]
        at = torch.tensor([*steps, *held]).repeat(m)
        x, following = (states[:, [i + j for i in (*steps, *held)]].flatten(0, 1) for j in (0, 1))
        conditions = drawn.conditions[which.repeat_interleave(len(steps) + len(held))]
        g = self.settings.guidance
        x0 = kernel.predict(self.network, x, at, conditions, guidance=g)
        ref = kernel.predict(self.network, x, at, conditions, original=True, guidance=g)
        dense = torch.tensor([True] * len(steps) + [False] * len(held)).repeat(m)
        said = (x[dense], x0[dense], ref[dense], following[dense], at[dense])
        ell = kernel.log_ratio(*said, self.settings.logprob).view(m, len(steps))
        kl = kernel.kl(x0[dense], ref[dense], at[dense], self.settings.logprob).view(m, len(steps))
        gap = (x0[~dense] - ref[~dense]).square().flatten(1).mean(1) if held else x0.new_zeros(m)
        return Transitions(ell, kl, gap.view(m, -1).mean(1))

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Give up where nothing could be compared for long: the reward does not tell pictures apart."""
        self.network.tuner.updated(update)
        if "counted" not in totals:
            return
        self.idle = torch.zeros_like(self.idle) if float(totals["counted"]) > 0 else self.idle + 1
        if int(self.idle) >= self.settings.patience:
            raise ValueError(
                f"reward {self.settings.reward!r} gave every candidate of a prompt the same score in "
                f"{int(self.idle)} updates in a row: there is nothing to prefer; take a finer reward or more "
                "candidates"
            )

    def finished(self) -> str:
        """Return what the gauges object to."""
        return self.gauges.reason if self.gauges is not None else ""

    def state_dict(self) -> dict[str, Tensor]:
        """The count of idle updates, the start model's sharpness, and how far it had moved."""
        if self.gauges is None:
            return {"idle": self.idle}
        return {"idle": self.idle, "sharpness": self.gauges.first, "moved": self.gauges.moved}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.idle = state["idle"]
        if self.gauges is not None:
            self.gauges.first = state["sharpness"]
            self.gauges.moved = state.get("moved", torch.zeros_like(self.gauges.moved))


def check_guidance(job: Any) -> None:
    """Raise ValueError for a result that would be drawn with guidance, and was trained without."""
    scale = job.config.student.guidance
    if scale is not None and job.objective.guidance == 1:
        raise ValueError(
            f"student.guidance is {scale:g}, and {job.name} would train without guidance: set "
            f"objective.guidance={scale:g} too, or leave it out"
        )
    if job.objective.guidance > 1:
        job.null  # noqa: B018 - a model without guidance is refused where it is asked for


def check_stochastic(kernel: Kernel) -> None:
    """Raise ValueError for a schedule without a single step that draws noise."""
    if kernel.trainable:
        return
    if len(kernel) == 1:
        raise ValueError(
            "a model of one step has no random step to learn from online: take `pso-offline` (pairs of "
            "pictures), or `reward` for a differentiable reward"
        )
    raise ValueError(
        "every step of this kernel is deterministic: give objective.eta above 0, or a kernel that draws "
        "noise (ddim, renoise, flow-sde)"
    )


def _gauges(made: Online, job: Any) -> Gauges | None:
    """Return gauges that draw the first prompts from fixed seeds, as the result is drawn."""
    told = job.objective.gauges
    if not told.every:
        return None
    prompts = job.prompts[: told.prompts]
    sampling = sampling_of(job)
    own = isinstance(sampling, SchedulerSampling)  # drawn with the kernel's scheduler, noise and all
    kernel = made.kernel if own else Kernel.ddim(job.path, job.config.student.steps, sampling.eta)
    count = len(prompts) * told.seeds
    conditions = job.conditions[torch.arange(len(prompts)).repeat_interleave(told.seeds)].to(job.device)

    def draw() -> Tensor:
        rows = Rows(job.config.validation.seed, 0, count, range(count), job.device)
        noise = rows.normal(len(kernel) + 1, *job.network.form.shape)
        scale = sampling.guidance or 1.0
        return rollout(job.network, kernel, conditions, noise[:, 0], noise[:, 1:], guidance=scale).final

    return Gauges(told, draw, made.scorer, prompts)
