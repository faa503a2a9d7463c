"""`diffplug train finetune FOLDER`: the plain loss on pictures with captions, for any tuner.

    L = mean w(t) |output - target|^2        target: noise, v, or the flow's velocity, as the model predicts

Timesteps are one from each of `batch` equal parts. Captions are dropped now and then, so that guidance goes
on working. Pictures of the old domain may be trained on beside the new ones (see `prior`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions, embeds_guidance
from diffplug.training.data import size_of
from diffplug.training.finetune.buckets import batch_of
from diffplug.training.finetune.pictures import Bucket, bucketed, captions_of, pixel_step, read_buckets
from diffplug.training.finetune.prior import null_of, prior_buckets, prior_prompts
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath, Prediction
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.student import Sampling

__all__ = ["Finetune", "FinetuneSettings", "output_error"]

STEPS = tuple(range(1, 101))  # tuned weights are tied to no number of steps


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """The table [objective] of `finetune`; the pictures are data.pictures.

    caption: of pictures without a text of their own. trigger: words before every caption, "sketch style, ".
    square: cut all pictures square; without it they keep about their aspect, in buckets of one area. prior:
    what should not be forgotten: a folder of pictures, a file of prompts or a prompt, of which prior_count
    pictures are drawn at first. prior_share: of a batch's rows; prior_weight: of their loss. snr_gamma:
    weighs the noise error by (min(snr, gamma) + snr_floor) / snr (arXiv 2303.09556), None for 1. timesteps:
    "uniform", or "logit-normal" (arXiv 2403.03206); "auto" takes the latter for flows. offset_noise: strength
    of noise that is one number a channel. guidance: scale that the result is drawn with, None for models
    without.
    """

    caption: str = ""
    trigger: str = ""
    square: bool = False
    prior: str | None = None
    prior_count: int = 100
    prior_share: float = 0.5
    prior_weight: float = 1.0
    snr_gamma: float | None = None
    snr_floor: float = 0.0
    timesteps: Literal["auto", "uniform", "logit-normal"] = "auto"
    offset_noise: float = 0.0
    guidance: float | None = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.prior_share < 1:
            raise ValueError(f"prior_share must be between 0 and 1, got {self.prior_share:g}")
        if self.prior_count < 1:
            raise ValueError(f"prior_count must be a whole number of at least 1, got {self.prior_count}")
        for name in ("prior_weight", "offset_noise", "snr_floor"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name):g}")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma must be above 0, got {self.snr_gamma:g}: leave it out for none")


_NEEDED = {"prior_count": "prior", "prior_share": "prior", "prior_weight": "prior", "snr_floor": "snr_gamma"}
"""Settings, and the one without which they would do nothing."""


class Finetune(Objective):
    """Trains `network` on buckets of pictures, and on those of a prior beside them.

    null: condition of the empty prompt, one row. drop: share of captions that become empty.
    """

    Settings: type = FinetuneSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "run": {"batch": 4, "updates": 500},
        "optimizer": {"betas": [0.9, 0.999]},
        "tuner": {"rank": 16},
        "student": {"name": "finetuned"},
    }
    RATES: ClassVar[dict[str, float]] = {"full": 1e-5, "sara": 5e-4}
    OTHERS = 1e-4
    STUDENT = "fine-tuned"

    def __init__(
        self,
        network: Network,
        buckets: Sequence[Bucket],
        prior: Sequence[Bucket],
        null: Conditions,
        settings: FinetuneSettings,
        *,
        drop: float = 0.1,
    ) -> None:
        self.network, self.buckets, self.prior, self.null = network, list(buckets), list(prior), null
        self.settings, self.drop = settings, drop

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults for a config: the learning rate is that of its tuner."""
        kind = str((values.get("tuner") or {}).get("kind", "lora"))
        rate = cls.RATES.get(kind, cls.OTHERS)
        return {**cls.DEFAULTS, "optimizer": {**cls.DEFAULTS["optimizer"], "lr": rate}}

    @classmethod
    def from_job(cls, job: Any) -> Finetune:
        """Return the objective of `diffplug train`."""
        told, call, cache = job.objective, job.call, job.cache
        size, step = _size(job), pixel_step(job.pipe)
        groups = bucketed(pairs_of(job), size, step, square=told.square)
        buckets = read_buckets(job.pipe, groups, cache / "latents", call)
        prior = [] if told.prior is None else cls.prior_of(job, size)
        null = null_of(job.pipe, (size, size), call)
        return cls(job.network, buckets, prior, null, told, drop=job.config.data.drop)

    @staticmethod
    def prior_of(job: Any, size: int) -> list[Bucket]:
        """Return the pictures of the prior; those that the model draws are drawn before it is tuned."""
        told = job.objective
        with job.tuner.original():
            return prior_buckets(
                job.pipe,
                told.prior,
                count=told.prior_count,
                size=size,
                square=told.square,
                guidance=None if embeds_guidance(job.pipe) else told.guidance,  # then it is in job.call
                steps=25,
                seed=job.config.run.seed,
                cache=job.cache,
                call=job.call,
            )

    @staticmethod
    def prompts(job: Any) -> list[str]:
        """Return the captions, of which sheets are drawn."""
        return list(dict.fromkeys(text for _, text in pairs_of(job)))

    @staticmethod
    def reads_pictures(job: Any) -> bool:
        """They are what is learnt."""
        return True

    @staticmethod
    def sampling(job: Any) -> Sampling:
        """Return how the result is drawn with: guided, in any usual number of steps."""
        return Sampling(job.path, STEPS, 0.0, _guidance(job), default=25)

    @staticmethod
    def check(job: Any) -> None:
        """Raise ValueError for settings that pictures and model cannot serve, before any work."""
        told, defaults = job.config, type(job.config)()
        pairs, size = pairs_of(job), _size(job)
        bucketed(pairs, size, pixel_step(job.pipe), square=job.objective.square)
        if told.student.guidance is not None or told.student.steps != defaults.student.steps:
            raise ValueError(
                "student.steps and student.guidance are for distillation: see objective.guidance"
            )
        if told.data.prompts != defaults.data.prompts:
            raise ValueError(
                f"data.prompts={told.data.prompts!r} would do nothing: captions are beside the pictures"
            )
        idle = _idle(job)
        if idle:
            raise ValueError(f"{idle[0]} would do nothing without {idle[1]}: set that too, or leave it out")
        prior = job.objective.prior
        if prior is None:
            return
        rows = job.config.run.batch * job.objective.prior_share
        if round(rows) < 1 or round(rows) >= job.config.run.batch:
            raise ValueError(
                f"objective.prior_share of {job.objective.prior_share:g} leaves no row of run.batch="
                f"{job.config.run.batch} to one of the two: take a larger batch"
            )
        if Path(prior).is_dir():
            captions_of(Path(prior))
        else:
            prior_prompts(prior, 1, job.pipe)

    def groups(self) -> list[Group]:
        """The tuner's weights."""
        return [Group("student", self.network.weights)]

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of each row; rows of the prior come last in a batch."""
        batch, own = rows.batch, list(rows.rows)
        old = round(batch * self.settings.prior_share) if self.prior else 0
        parts = [self._part(self.buckets, [r for r in own if r < batch - old], batch - old, 0, rows)]
        if old:
            parts.append(self._part(self.prior, [r for r in own if r >= batch - old], old, batch - old, rows))
        found = [part for part in parts if part is not None]
        log = {}
        if old and parts[0] is not None and parts[1] is not None:
            log = {"new": parts[0][0].detach().mean(), "old": parts[1][0].detach().mean()}
        errors = torch.cat([errors for errors, _ in found])
        weights = torch.ones(len(errors), device=errors.device)
        if old and parts[1] is not None:
            weights[len(errors) - len(parts[1][0]) :] = self.settings.prior_weight
        timesteps = self.network.path.timesteps(torch.cat([index for _, index in found]))
        return Loss(errors, weights if old else None, log=log, timesteps=timesteps)

    def _part(
        self, buckets: Sequence[Bucket], rows: list[int], batch: int, first: int, told: Rows
    ) -> tuple[Tensor, Tensor] | None:
        """Return errors [n] and indices [n] of the rows that take their pictures from these buckets."""
        if not rows:
            return None
        which, items = batch_of([len(b) for b in buckets], batch, told.update, told.seed + first)
        places = [row - first for row in rows]
        bucket, picked = buckets[which], torch.tensor([items[place] for place in places])
        mine = Rows(told.seed, told.update, told.batch, range(rows[0], rows[-1] + 1), told.device)
        x0 = bucket.latents[picked].to(told.device, torch.float32)
        eps = mine.normal(*x0.shape[1:])
        if self.settings.offset_noise:
            eps = eps + self.settings.offset_noise * mine.normal(x0.shape[1], *(1,) * (x0.ndim - 2))
        index = self._index(mine, places, batch)
        conditions = self._dropped(bucket.conditions[picked], mine)
        x = self.network.path.noised(x0, eps, torch.zeros_like(index), index)
        said = self.network(x, index, conditions.to(told.device))
        errors = output_error(self.network.path, said, x0, eps, index)
        return errors * self._weight(index).to(errors), index

    def _dropped(self, conditions: Conditions, rows: Rows) -> Conditions:
        """Return conditions of which a share is the empty prompt's."""
        return conditions.replaced(rows.uniform() < self.drop, self.null)

    def _index(self, rows: Rows, places: list[int], batch: int) -> Tensor:
        """Return a noise level for each row: one from each of `batch` equal parts of the distribution."""
        path = self.network.path
        u = (torch.tensor(places, dtype=torch.float64) + rows.uniform()) / batch
        kind = self.settings.timesteps
        if kind == "logit-normal" or (kind == "auto" and path.flow):
            u = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
        index = u * path.train_steps
        return index if path.flow else (index.long() + 1).clamp(max=path.train_steps).double()

    def _weight(self, index: Tensor) -> Tensor:
        if self.settings.snr_gamma is None:
            return torch.ones_like(index)
        alpha, sigma = self.network.path.levels(index)
        snr = (alpha / sigma.clamp(min=1e-8)).square()
        capped = snr.clamp(max=self.settings.snr_gamma) + self.settings.snr_floor
        return capped / (snr + 1 if self.network.path.prediction == "v_prediction" else snr.clamp(min=1e-12))

    def updated(self, update: int, totals: Mapping[str, Tensor]) -> None:
        """Nothing but the tuner's."""
        self.network.tuner.updated(update)

    @staticmethod
    def opening(job: Any, row: Any, seconds: float) -> str:
        """Return the first sentence of the model card."""
        pictures = len(pairs_of(job))
        return (
            f"`{job.config.model}` fine-tuned on {pictures} pictures by `diffplug train finetune` (tuner "
            f"{job.config.tuner.kind}, {row.meta['updates']} updates, {seconds:.0f} s)."
        )


def output_error(path: NoisePath, said: Prediction, x0: Tensor, eps: Tensor, index: Tensor) -> Tensor:
    """Return the squared error of the network's own output, averaged over dimensions, [n]."""
    alpha, sigma = (v.to(x0).view(-1, *(1,) * (x0.ndim - 1)) for v in path.levels(index))
    if path.prediction == "flow_prediction":
        gap = (said.eps - said.x0) - (eps - x0)
    elif path.prediction == "v_prediction":
        gap = (alpha * said.eps - sigma * said.x0) - (alpha * eps - sigma * x0)
    elif path.prediction == "sample":
        gap = said.x0 - x0
    else:
        gap = said.eps - eps
    return gap.square().flatten(1).mean(1)


def pairs_of(job: Any) -> list[tuple[Path, str]]:
    """Return a job's pictures with their captions."""
    if job.config.data.pictures is None:
        raise ValueError("which pictures? Give their folder: diffplug train finetune FOLDER")
    return captions_of(Path(job.config.data.pictures), job.objective.caption, job.objective.trigger)


def _idle(job: Any) -> tuple[str, str] | None:
    """Return a setting that would do nothing, and what it needs; None where each does something."""
    told, plain = job.objective, FinetuneSettings()
    for name, needed in _NEEDED.items():
        if getattr(told, needed) is None and getattr(told, name) != getattr(plain, name):
            return f"objective.{name}", f"objective.{needed}"
    return None


def _size(job: Any) -> int:
    return int(job.config.data.size or (job.config.teacher.call or {}).get("height") or size_of(job.pipe))


def _guidance(job: Any) -> float | None:
    import inspect

    known = inspect.signature(job.pipe.__call__).parameters
    scale: float | None = job.objective.guidance
    takes = "guidance_scale" in known and not embeds_guidance(job.pipe) and scale is not None and scale > 1
    return scale if takes and math.isfinite(float(scale or 0)) else None
