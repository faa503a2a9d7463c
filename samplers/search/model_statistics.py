"""A model's statistics for "ems" steps (arXiv 2310.13268), measured from runs: no gradient of the network.

One run with many steps gives states X_j and noise predictions E_j. A second one shows the network the same
states, each moved by a small step in random signs v; how E follows is the diagonal of its Jacobian on average
(Hutchinson). With f = (sigma E - l X) / alpha and f' its change along the trajectory,

    l = E[sigma diag(dE / dX)]      s = (E[f f'] - E f E f') / (E f^2 - (E f)^2)      b = E f' - s E f

where s is drawn towards l - 1 as f varies less between pairs: a ratio of two small numbers would make the
steps unstable.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffplug.files import output_folder
from diffplug.network.denoiser import denoisers
from diffplug.rollout import Rollouts
from diffplug.samplers.fingerprint import fingerprint
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp
from diffplug.samplers.search.pipeline_problem import PipelineProblem, ends_of
from diffplug.samplers.search.problem import Problem
from diffplug.samplers.solver.statistics import ModelStatistics, load_statistics

__all__ = ["kept_statistics", "measure_statistics", "pipeline_statistics"]

Floats = npt.NDArray[np.float64]
RIDGE = 0.1  # a share of E f^2 beside the variance of f, which vanishes where all pairs do the same
REACH = 1.0  # how far s may lie from l - 1, what it is for data and for noise prediction
TINY = 1e-12
NO_SIGNAL = -8.0  # the lambda below which noise predictions say nothing
MEASURED = 16  # pairs for statistics by channel


def measure_statistics(
    problem: Problem,
    *,
    points: int = 60,
    elements: bool = False,
    smooth: int = 1,
    probe: float = 1e-2,
    seed: int = 0,
    told: dict[str, str] | None = None,
) -> ModelStatistics:
    """Return the statistics of a problem's model at up to so many lambdas; costs two evaluations for each.

    elements: numbers for every element of the latents, good for that size only and for thousands of pairs;
    else for every channel, the same at all places, for which sixteen pairs do. smooth: l is averaged over as
    many neighbours on both sides. probe: length of the random step, 5e-2 for half precision. told: what they
    were measured on, texts. Raises ValueError for fewer than 8 points.
    """
    if points < 8:
        raise ValueError(f"points={points}: differences along lambda need at least 8")
    schedule = dpmpp(points, Nodes(kind="name", name="log-snr", final="sigma_min"), order=2)
    sigmas = schedule.nodes.sigmas(problem.levels, points)[:-1]
    levels = [problem.levels.level(float(sigma)) for sigma in sigmas]
    run = problem.run(schedule)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], run.states.shape)
    moved = problem.predictions(schedule, run.states + probe * signs)
    used = [i for i, at in enumerate(levels) if i and at.lam > NO_SIGNAL]  # the start itself cannot be moved
    shape = (len(used), -1, *problem.sample_shape)
    x, x0, change, v = (a[used].reshape(shape) for a in (run.states, run.data, moved - run.data, signs))
    alpha = np.array([levels[i].alpha for i in used]).reshape(-1, *(1,) * (x.ndim - 1))
    lams = np.array([levels[i].lam for i in used])
    axes = (1,) if elements else (1, *_places(x.ndim))

    def mean(values: Floats) -> Floats:
        return np.asarray(values.mean(axis=axes, keepdims=True))

    l = _smoothed(mean(1 - alpha * v * change / probe), smooth)  # noqa: E741 - sigma E = X - alpha D
    f = (1 - l) * x / alpha - x0
    slope = np.gradient(f, lams, axis=0)
    variance, covariance = mean(f * f) - mean(f) ** 2, mean(f * slope) - mean(f) * mean(slope)
    rest, usual = RIDGE * mean(f * f) + TINY, l - 1
    s = np.clip((covariance + rest * usual) / (variance + rest), usual - REACH, usual + REACH)
    b = mean(slope) - s * mean(f)
    l, s, b = (each.squeeze(1) for each in (l, s, b))  # noqa: E741
    return ModelStatistics(lambdas=lams, l=l, s=s, b=b, told=told or {})


def _places(dimensions: int) -> tuple[int, ...]:
    """Return the axes of [points, n, ...] but those and the channels: packed latents have these last."""
    return (2,) if dimensions == 4 else tuple(range(3, dimensions))


def _smoothed(values: Floats, reach: int) -> Floats:
    """Return averages over neighbours along the first axis, over fewer of them at the ends."""
    found = [values[max(0, i - reach) : i + reach + 1].mean(axis=0) for i in range(len(values))]
    return np.stack(found)


def pipeline_statistics(
    pipe: Any,
    prompts: Sequence[str],
    guidance_scale: float | None = None,
    *,
    points: int = 60,
    elements: bool = False,
    options: dict[str, Any] | None = None,
    max_rows: int = 16,
    seed: int = 0,
) -> ModelStatistics:
    """Return the statistics of a pipeline's model (`measure_statistics`) on these prompts, a noise for each.

    Save them, and name the file in `search_schedule(statistics=...)` or in a schedule with "ems" steps.
    options: further keywords of the pipeline's call.
    """
    seeds = list(range(seed, seed + len(prompts)))
    rollouts = Rollouts(pipe, list(prompts), seeds, points, guidance_scale, options or {}, max_rows)
    problem = PipelineProblem(rollouts, ends_of(pipe, "linspace"))
    return _measured(problem, points=points, elements=elements, told=_whose(pipe, guidance_scale))


def _measured(problem: PipelineProblem, **options: Any) -> ModelStatistics:
    """Return statistics, with a longer probe where the network rounds more."""
    weights = (weight for module in denoisers(problem.rollouts.pipe) for weight in module.parameters())
    fine = {weight.dtype for weight in weights} <= {torch.float32, torch.float64}
    return measure_statistics(problem, probe=1e-2 if fine else 5e-2, **options)


def _whose(pipe: Any, guidance: float | None) -> dict[str, str]:
    said = "the pipeline's own" if guidance is None else f"{guidance:g}"
    return {"model": fingerprint(pipe), "guidance": said}


def kept_statistics(train: PipelineProblem, path: Path) -> str:
    """Return the path of the model's statistics, measured where they are not there.

    Raises ValueError for those of another model or guidance.
    """
    whose = _whose(train.rollouts.pipe, train.rollouts.guidance)
    if not path.exists():
        output_folder(path.absolute().parent)
        some = train.part(0, min(MEASURED, len(train.prompts)))
        _measured(some, told=whose).save(path)
    known = load_statistics(path).told
    for name, here in whose.items():
        if known.get(name, here) != here:
            raise ValueError(
                f"the statistics in {str(path)!r} are of {name} {known[name]}, this is {here}: "
                "name another file, and they are measured"
            )
    return str(path.absolute())
