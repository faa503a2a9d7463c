"""Step-by-step Preference Optimization (SPO, arXiv 2406.04314): pairs of candidates that share their past.

    L = -log sigmoid(beta [l(w) - l(l)]) for the best and worst of K candidates drawn from one state

A step judge looks at the clean predictions of the candidates; pairs whose soft-maxed scores differ by less
than a threshold are left out. For models of many steps, and for few-step ones with any kernel that draws
noise. Where winner and loser share their state one evaluation gives both log-ratios.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.objective import Loss, Rows
from diffplug.training.preference.branching import Segment, branch
from diffplug.training.preference.online import Online, OnlineSettings
from diffplug.training.preference.pair_loss import Clip, check_clip, pair_loss
from diffplug.training.preference.scorer import StepScorer, X0Proxy
from diffplug.training.preference.selectors import Pairs, step_best_worst
from diffplug.training.preference.step_preference import StepJudge, StepPreference

__all__ = ["SPO", "SPOSettings", "Steps", "thresholds"]


@dataclass(frozen=True, kw_only=True)
class SPOSettings(OnlineSettings):
    """The table [objective] of `spo`.

    first: steps that are ordinary sampling; the earliest predictions are too coarse to be judged. length:
    steps of a chain before it is judged (j). threshold: of the soft-maxed gap of scores, a second number
    makes it grow with the noise of the step. scale: scores times this are logits. beta, clip,
    epsilon: as for `pso`. judge: folder of a step-aware preference model, None to judge x0hat by `reward`.
    """

    candidates: int = 4
    first: int = 4
    length: int = 1
    threshold: float = 0.3
    threshold_noisy: float | None = None
    scale: float = 1.0
    guidance: float = 5.0
    beta: float = 10.0
    clip: Clip = "two_sided"
    epsilon: float = 0.1
    judge: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 0 or self.length < 1:
            raise ValueError(f"first is at least 0 and length at least 1, got {self.first}, {self.length}")
        for name in ("threshold", "threshold_noisy"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        check_clip(self.clip, self.epsilon, SPOSettings.epsilon)
        if not (self.beta > 0 and self.scale > 0):
            raise ValueError(f"beta and scale must be above 0, got {self.beta}, {self.scale}")


@dataclass(frozen=True, eq=False)
class Steps:
    """Transitions of m pairs: where winner and loser stand, where they go; row: of the batch."""

    row: Tensor
    step: Tensor
    winner: Tensor
    loser: Tensor
    winner_next: Tensor
    loser_next: Tensor
    shared: bool

    def __len__(self) -> int:
        return len(self.row)


class SPO(Online):
    """Online SPO."""

    Settings = SPOSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "student": {"steps": 20},
        "run": {"batch": 10, "updates": 400},
        "optimizer": {"lr": 6e-5, "weight_decay": 1e-4, "warmup": 1, "floor": 1.0, "betas": [0.9, 0.999]},
        "tuner": {"rank": 4, "targets": ["to_q", "to_k", "to_v", "to_out.0"]},
        "teacher": {"guidance": 1.0},
    }
    step_scorer: StepScorer | None = None
    share: bool = True

    @classmethod
    def from_job(cls, job: Any) -> SPO:
        """Return the objective of `diffplug train spo`, with its step judge."""
        made = super().from_job(job)
        assert isinstance(made, cls)  # noqa: S101 - for the type checker
        if job.objective.judge is not None:
            judge = StepPreference.open(job.objective.judge).to(job.device)
            made.step_scorer = StepJudge(judge, made.scorer.images)
        return made

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for steps that are not there, beside what `Online` refuses."""
        Online.check(job)
        if job.objective.start != SPOSettings().start:
            raise ValueError(
                "objective.start would do nothing: candidates of spo branch from one state; leave it out"
            )
        if job.objective.judge is not None:
            StepPreference.open(job.objective.judge)
        told, steps = job.objective, job.config.student.steps
        if told.first >= steps - 1:
            raise ValueError(
                f"objective.first is {told.first}: with {steps} steps it is at most {steps - 2}, so that "
                "there is something to branch"
            )

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of each prompt: the mean over its transitions, weighed by their number."""
        item = rows.items(len(self.prompts))
        conditions = self.conditions[item].to(rows.device)
        segments = self.segments(rows, conditions, [self.prompts[i] for i in item.tolist()])
        found = self.selected(segments)
        n, m = len(rows), sum(len(part) for part in found)
        log = {name: value.to(rows.device) for name, value in self._figures(segments, found).items()}
        totals = {"counted": torch.tensor(float(m), dtype=torch.float64, device=rows.device)}
        if not m:
            zero = torch.zeros(n, device=rows.device)
            return Loss(zero, zero, log, totals)
        ells = [self.ratios(part, conditions) for part in found if len(part)]
        ell_w, ell_l = (torch.cat([pair[i] for pair in ells])[:, None] for i in (0, 1))
        told = self.settings
        loss = pair_loss(ell_w, ell_l, beta=told.beta, clip=told.clip, epsilon=told.epsilon)
        row = torch.cat([part.row for part in found]).to(loss.errors.device)
        zero = loss.errors.new_zeros(n)
        count = zero.index_add(0, row, torch.ones_like(loss.errors))
        errors = zero.index_add(0, row, loss.errors) / count.clamp(min=1)
        return Loss(errors, count, {**log, **loss.log}, totals)

    @torch.no_grad()
    def segments(self, rows: Rows, conditions: Conditions, prompts: list[str]) -> list[Segment]:
        """Return what is drawn for prompts, judged."""
        told, k, steps = self.settings, self.settings.candidates, len(self.kernel)
        drawn = rows.normal(k * steps + 1, *self.network.form.shape)
        x, z = drawn[:, 0], drawn[:, 1:].unflatten(1, (k, steps))
        words = [prompt for prompt in prompts for _ in range(k)]
        scorer = self.step_scorer or X0Proxy(self.scorer)

        def predict(x: Tensor, step: Tensor, conditions: Conditions) -> Tensor:
            return self.kernel.predict(self.network, x, step, conditions, guidance=told.guidance)

        def judge(clean: Tensor, step: int) -> Tensor:
            at = self.kernel.index[step : step + 1] if step < steps else torch.ones(1)
            return scorer(clean, words, float(self.network.path.timesteps(at)))

        picks = rows.uniform(steps)
        return branch(
            self.kernel, predict, judge, conditions, x, z, picks, first=told.first, length=told.length
        )

    def selected(self, segments: list[Segment]) -> list[Steps]:
        """Return the transitions of the pairs that pass their threshold."""
        limits = thresholds(self.kernel, self.settings.threshold, self.settings.threshold_noisy)
        return [
            steps
            for segment in segments
            for steps in _steps(
                segment,
                step_best_worst(self.settings.scale * segment.scores, limits[segment.first]),
                [i for i in range(segment.length) if self.kernel.stochastic(segment.first + i)],
                self.share,
            )
        ]

    def ratios(self, part: Steps, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Return the log-ratios [m] of winners and losers; one evaluation where they share their state."""
        told = conditions[part.row]
        if part.shared:
            x0, ref = self._said(part.winner, part.step, told)
            return (
                self._ratio(part.winner, x0, ref, part.winner_next, part.step),
                self._ratio(part.loser, x0, ref, part.loser_next, part.step),
            )
        x, step = torch.cat([part.winner, part.loser]), part.step.repeat(2)
        x0, ref = self._said(x, step, Conditions.cat([told, told]))
        after = torch.cat([part.winner_next, part.loser_next])
        winner, loser = self._ratio(x, x0, ref, after, step).chunk(2)
        return winner, loser

    def _said(self, x: Tensor, step: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        g = self.settings.guidance
        x0 = self.kernel.predict(self.network, x, step, conditions, guidance=g)
        return x0, self.kernel.predict(self.network, x, step, conditions, original=True, guidance=g)

    def _ratio(self, x: Tensor, x0: Tensor, ref: Tensor, after: Tensor, step: Tensor) -> Tensor:
        return self.kernel.log_ratio(x, x0, ref, after, step, self.settings.logprob)

    def _figures(self, segments: list[Segment], found: list[Steps]) -> dict[str, Tensor]:
        names = ("accuracy", "logit", "winner", "loser", "clipped")
        log = {name: torch.zeros((), dtype=torch.float64) for name in names}
        pairs = sum(len(segment.scores) * segment.length for segment in segments)
        log["kept"] = torch.tensor(sum(len(part) for part in found) / max(pairs, 1))
        log["reward"] = segments[-1].scores.mean()
        log |= {f"pairs_{i}": torch.zeros(()) for i in self.kernel.trainable if i >= self.settings.first}
        log |= {f"pairs_{int(part.step[0])}": torch.tensor(float(len(part))) for part in found if len(part)}
        return log | {name: torch.tensor(value) for name, value in self.looked.items()}


def thresholds(kernel: Any, clean: float, noisy: float | None) -> list[float]:
    """Return the threshold of every step: constant, or from `clean` to `noisy` with the step's std (arXiv
    2502.01051)."""
    if noisy is None:
        return [clean] * len(kernel)
    stds = [kernel.forms[i].s for i in range(len(kernel))]
    known = [stds[i] for i in kernel.trainable]
    low, high = min(known), max(known)
    return [clean + (s - low) / max(high - low, 1e-12) * (noisy - clean) for s in stds]


def _steps(segment: Segment, pairs: Pairs, stochastic: list[int], share: bool) -> list[Steps]:
    """Return the transitions of the pairs of a segment, one part a step."""
    row, states = pairs.row, segment.states
    return [
        Steps(
            row,
            torch.full((len(row),), segment.first + i),
            states[row, pairs.winner, i],
            states[row, pairs.loser, i],
            states[row, pairs.winner, i + 1],
            states[row, pairs.loser, i + 1],
            share and i == 0,
        )
        for i in stochastic
    ]
