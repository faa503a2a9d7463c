"""A model's statistics for "ems" steps (arXiv 2310.13268), measured from runs: no gradient of the network.

One run with many steps gives states X_j and noise predictions E_j. A second one shows the network the same
states, each moved by a small step in random signs v; how E follows is the diagonal of its Jacobian on average
(Hutchinson). With f = (sigma E - l X) / alpha and f' its change along the trajectory,

    l = E[sigma diag(dE / dX)]      s = (E[f f'] - E f E f') / (E f^2 - (E f)^2)      b = E f' - s E f

where s is drawn towards l - 1 as f varies less between pairs: a ratio of two small numbers would make the
steps unstable.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.presets import dpmpp
from diffplug.samplers.search.problem import Problem
from diffplug.samplers.solver.statistics import ModelStatistics

__all__ = ["measure_statistics"]

Floats = npt.NDArray[np.float64]
RIDGE = 0.1  # a share of E f^2 beside the variance of f, which vanishes where all pairs do the same
REACH = 1.0  # how far s may lie from l - 1, what it is for data and for noise prediction
TINY = 1e-12
NO_SIGNAL = -8.0  # the lambda below which noise predictions say nothing


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
    """The statistics of a problem's model at up to so many lambdas; costs two evaluations for each.

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
    """The axes of [points, n, ...] that are neither those nor channels: packed latents have those last."""
    return (2,) if dimensions == 4 else tuple(range(3, dimensions))


def _smoothed(values: Floats, reach: int) -> Floats:
    """Averages over neighbours along the first axis, over fewer of them at the ends."""
    found = [values[max(0, i - reach) : i + reach + 1].mean(axis=0) for i in range(len(values))]
    return np.stack(found)
