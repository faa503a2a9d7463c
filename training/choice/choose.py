"""`diffplug train choose FOLDER`: Optuna chooses which blocks a tuner moves, how many weights and how fast.

Every trial fine-tunes for a while and is measured by two losses, both to be small, with the same pictures,
timesteps and noise in each: how well held-out new pictures are denoised, and either how much is forgotten
(the loss on pictures of objective.prior) or how near what it draws comes to its training pictures. What no
other trial beats in both is kept; the middle of it is written as a config for `diffplug train finetune`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffplug.files import atomic_write, output_folder, write_json
from diffplug.training.choice.groups import block_groups
from diffplug.training.conditions import one_denoiser
from diffplug.training.finetune.objective import Finetune, FinetuneSettings, output_error, pairs_of
from diffplug.training.finetune.pictures import Bucket
from diffplug.training.memorisation import average_minimum_distance, pixel_features
from diffplug.training.precision import autocast
from diffplug.training.student import draw
from diffplug.training.trainer import Trainer
from diffplug.training.tuners.settings import TunerSettings

__all__ = ["Choose", "ChooseSettings", "Trial", "middle_of", "pareto"]


@dataclass(frozen=True, kw_only=True)
class ChooseSettings(FinetuneSettings):
    """The table [objective] of `choose`; run.updates is the length of a trial.

    trials: fine-tunings. against: "forgetting" (needs objective.prior) or "copying". held_out: share of the
    pictures that no trial trains on. density: range of the share of weights, for sara. ranks: for adapters.
    lr_factor: range of the learning rate's factor. drawn: pictures drawn a trial for "copying".
    """

    trials: int = 12
    against: Literal["forgetting", "copying"] = "forgetting"
    held_out: float = 0.2
    density: tuple[float, float] = (0.002, 0.15)
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    lr_factor: tuple[float, float] = (0.3, 3.0)
    drawn: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials < 1:
            raise ValueError(f"trials must be a whole number of at least 1, got {self.trials}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out:g}")
        for name, (low, high) in (("density", self.density), ("lr_factor", self.lr_factor)):
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be two numbers above 0, the smaller first, got {low:g}, {high:g}"
                )
        if self.against == "forgetting" and self.prior is None:
            raise ValueError(
                "against='forgetting' needs objective.prior: pictures or prompts of the old domain"
            )


@dataclass(frozen=True)
class Trial:
    """One fine-tuning: what was moved, and its figures, both better when smaller."""

    number: int
    choices: dict[str, Any]
    new: float
    other: float


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other beats in both figures, by rising `new`."""
    found: list[Trial] = []
    for one in sorted(trials, key=lambda t: (t.new, t.other, t.number)):
        if not found or one.other < found[-1].other:
            found.append(one)
    return found


def middle_of(front: Sequence[Trial], weight: float = 0.5) -> Trial:
    """Return the trial of least weighted sum of the figures, each scaled to 0 ... 1 over the front."""

    def scaled(values: list[float]) -> list[float]:
        low, width = min(values), max(values) - min(values)
        return [(value - low) / width if width else 0.0 for value in values]

    sums = [
        weight * a + (1 - weight) * b
        for a, b in zip(scaled([t.new for t in front]), scaled([t.other for t in front]), strict=True)
    ]
    return front[sums.index(min(sums))]


def settings_of(choices: Mapping[str, Any], groups: Mapping[str, Sequence[str]], kind: str) -> dict[str, Any]:
    """Return the table [tuner] that a trial's choices mean."""
    names = [name for group, names in groups.items() if choices[group] for name in names]
    if kind == "sara":
        return {"kind": kind, "density": choices["density"], "include": names}
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return {"kind": kind, "rank": choices["rank"], "targets": layers}


def run(
    job: Any,
    folder: Path,
    *,
    resume: bool | None = None,
    minutes: float | None = None,
    on_progress: Callable[..., None] = lambda *told: None,
) -> Any:
    """Search in `folder`, and return what it has come to; trials that are there already count."""
    from diffplug.training.train import Trained

    began = time.monotonic()
    optuna = _optuna()
    output_folder(folder)
    _check(job)
    groups, kind, told = block_groups(one_denoiser(job.pipe)), job.config.tuner.kind, job.objective
    study = _study(optuna, job, folder, resume)

    def measured(trial: Any) -> tuple[float, float]:
        choices = _choices(trial, groups, told, kind)
        if not any(choices[group] for group in groups):
            raise optuna.TrialPruned()
        return _trial(
            job, folder / "trials" / f"{trial.number:04d}", settings_of(choices, groups, kind), choices
        )

    while (done := sum(trial.state.is_finished() for trial in study.trials)) < told.trials:
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            return Trained(None, done, None, time.monotonic() - began)
        study.optimize(measured, n_trials=1)
        on_progress("trials", done + 1, told.trials, {})
    _write(job, study, groups, kind, folder)
    return Trained(folder, told.trials, None, time.monotonic() - began)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError('diffplug train choose needs Optuna: pip install "diffplug[search]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that is stopped is no failure
    return optuna


def _study(optuna: Any, job: Any, folder: Path, resume: bool | None) -> Any:
    """Return the study in `folder`: multivariate TPE, of which the first ten trials are random."""
    import warnings

    file = folder / "study.db"
    if resume is False and file.exists():
        raise ValueError(f"{str(folder)!r} holds a search: add --resume, or take another folder")
    if resume and not file.exists():
        raise ValueError(f"there is nothing to resume in {str(folder)!r}: begin without --resume")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "multivariate" is called experimental
        sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=10, seed=job.config.run.seed)
    study = optuna.create_study(
        study_name="choose",
        storage=f"sqlite:///{file.absolute()}",
        sampler=sampler,
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    config = json.dumps(job.mapping(), sort_keys=True)
    if study.user_attrs.get("config", config) != config:
        raise ValueError(f"the search in {str(folder)!r} was made with another config: take another folder")
    study.set_user_attr("config", config)
    return study


def _choices(trial: Any, groups: Mapping[str, Any], told: ChooseSettings, kind: str) -> dict[str, Any]:
    choices: dict[str, Any] = {group: trial.suggest_categorical(group, [True, False]) for group in groups}
    if kind == "sara":
        choices["density"] = trial.suggest_float("density", *told.density, log=True)
    else:
        choices["rank"] = trial.suggest_categorical("rank", list(told.ranks))
    choices["lr_factor"] = trial.suggest_float("lr_factor", *told.lr_factor, log=True)
    return choices


def _trial(
    job: Any, folder: Path, tuner: Mapping[str, Any], choices: Mapping[str, Any]
) -> tuple[float, float]:
    """Fine-tune with these choices, and return the two figures."""
    from diffplug.training.config import settings
    from diffplug.training.job import Job

    wanted = settings(TunerSettings, {**tuner, "save_dtype": job.config.tuner.save_dtype}, "tuner")
    optimizer = replace(job.config.optimizer, lr=job.config.optimizer.lr * choices["lr_factor"])
    run = replace(job.config.run, save_every=10**9)
    config = replace(job.config, tuner=wanted, optimizer=optimizer, run=run)
    own = Job(job.name, config, job.objective, device=job.device, cache=job.cache)
    objective = Choose.from_job(own)
    dtype = torch.bfloat16 if run.precision == "bf16" else None
    with autocast(one_denoiser(own.pipe), dtype):
        result = Trainer(
            objective, run, optimizer, folder=folder, config=own.mapping(), cpu=job.device == "cpu"
        ).run()
        own.network.put(result.weights["student"])
        new = objective.fixed_loss(objective.held_out)
        if job.objective.against == "forgetting":
            return new, objective.fixed_loss(objective.prior)
        return new, copying(own, objective.buckets, job.objective.drawn)


def copying(job: Any, buckets: Sequence[Bucket], count: int) -> float:
    """Return 1 - AMD of what the model draws of its training captions, to its training pictures."""
    from diffplug.latents import decode

    bucket = max(buckets, key=len)
    drawn = draw(job.pipe, job.sampling(), bucket.captions[:count], list(range(len(bucket.captions[:count]))))
    real = torch.cat([decode(job.pipe, part).cpu() for part in bucket.latents.to(job.device).split(16)])
    return 1 - average_minimum_distance(pixel_features(drawn.images), pixel_features(real))


def _check(job: Any) -> None:
    """Raise ValueError for what would only be noticed after hours."""
    job.check()
    Finetune.check(job)
    if job.config.tuner.kind == "full":
        raise ValueError("choose is for tuners of which a part can be moved: sara, lora, dora, oft, ...")
    told, plain = job.config.tuner, TunerSettings()
    idle = [f.name for f in fields(told) if f.name not in ("kind", "save_dtype")
            and getattr(told, f.name) != getattr(plain, f.name)]  # fmt: skip
    if idle:
        raise ValueError(
            f"tuner.{idle[0]} would do nothing: choose searches layers, density and rank; see "
            "objective.density and objective.ranks"
        )
    if len(pairs_of(job)) < 2:
        raise ValueError("choose needs two pictures or more: some are held out to judge by")


def _write(job: Any, study: Any, groups: Mapping[str, Any], kind: str, folder: Path) -> None:
    """Write all trials, what no other beats, and the config of its middle."""
    trials = [Trial(t.number, dict(t.params), *t.values) for t in study.trials if t.values]
    if not trials:
        raise ValueError("no trial moved anything: ask for more trials")
    front = pareto(trials)
    best = middle_of(front)
    write_json(
        folder / "choice.json",
        {
            "against": job.objective.against,
            "trials": [vars(t) for t in trials],
            "front": [t.number for t in front],
            "chosen": best.number,
        },
    )
    table = settings_of(best.choices, groups, kind)
    lr = job.config.optimizer.lr * best.choices["lr_factor"]
    lines = ["[tuner]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    lines += ["", "[optimizer]", f"lr = {lr:.6g}", ""]
    atomic_write(folder / "choice.toml", "\n".join(lines))


def _toml(value: Any) -> str:
    return json.dumps(value)


class Choose(Finetune):
    """The method `choose` of `diffplug train`: fine-tuning with some pictures held out."""

    Settings = ChooseSettings
    DEFAULTS: ClassVar[dict[str, Any]] = {
        **Finetune.DEFAULTS,
        "run": {"batch": 4, "updates": 100},
        "tuner": {"kind": "sara"},
    }
    run = staticmethod(run)
    held_out: list[Bucket]

    @classmethod
    def from_job(cls, job: Any) -> Choose:
        """Return the objective of a trial; the last pictures of each size are held out."""
        whole: Any = super().from_job(job)
        parts = [_split(bucket, job.objective.held_out) for bucket in whole.buckets]
        whole.buckets = [kept for kept, _ in parts if len(kept)]
        whole.held_out = [held for _, held in parts if len(held)]
        return whole

    @torch.no_grad()
    def fixed_loss(self, buckets: Sequence[Bucket]) -> float:
        """Return the loss on pictures with timesteps and noise that are the same for every trial."""
        total, count, path = 0.0, 0, self.network.path
        for bucket in buckets:
            n = len(bucket)
            device: Any = next(self.network.denoiser.parameters()).device
            eps = torch.randn(bucket.latents.shape, generator=torch.Generator().manual_seed(n))
            index: Tensor = ((torch.arange(n) + 0.5) / n * path.train_steps).long().double() + 1
            index = index[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
            for part in torch.arange(n).split(16):
                x0, e, i = bucket.latents[part].to(device), eps[part].to(device), index[part]
                x = path.noised(x0, e, torch.zeros_like(i), i)
                said = self.network(x, i, bucket.conditions[part].to(device))
                total += float(output_error(path, said, x0, e, i).sum())
            count += n
        return total / max(count, 1)


def _split(bucket: Bucket, share: float) -> tuple[Bucket, Bucket]:
    """Return a bucket in two: what is trained on, and what is held out."""
    cut = len(bucket) - round(share * len(bucket)) if len(bucket) > 1 else len(bucket)
    cut = min(max(cut, 1), len(bucket))

    def part(rows: slice) -> Bucket:
        return Bucket(bucket.size, bucket.latents[rows], bucket.conditions[rows], bucket.captions[rows])

    return part(slice(0, cut)), part(slice(cut, None))
