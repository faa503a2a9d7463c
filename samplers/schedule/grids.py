"""Named grids: where N steps of a solver lie between pure noise and the picture.

Each is a function (steps, levels, final) -> the N + 1 stored sigmas of its nodes, float64, decreasing; final
is "zero" or "sigma_min". Grids over sigmas run from the largest to the smallest of training: with "zero" the
smallest is the last evaluation and 0 follows; with "sigma_min" the smallest is the end itself, so that no
evaluation is spent on a step of length 0. Flow models: sigma itself, and grids over time are shifted; with a
terminal sigma that is the smallest one, and `Nodes` stretches the grids over time down to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from diffplug.registry import unknown
from diffplug.samplers.model_noise import Floats, NoiseLevels

Grid = Callable[[int, NoiseLevels, str], Floats]


def with_end(nodes: Any, levels: NoiseLevels, final: str) -> Floats:
    """The nodes and the terminal one after them: 0, or the smallest sigma of training."""
    return np.append(nodes, 0.0 if final == "zero" else levels.sigma_min)


def whole_where_apart(times: Any) -> Floats:
    """The times rounded to whole ones, as training knew them; as they are where two would become one."""
    whole = np.asarray(times, dtype=np.float64).round()
    return whole if (np.diff(whole) < 0).all() else np.asarray(times, dtype=np.float64)


def _times(times: Any, levels: NoiseLevels, final: str) -> Floats:
    return with_end(levels.sigma_of_time(times), levels, final)


def _between(curve: Callable[[Floats], Floats], steps: int, levels: NoiseLevels, final: str) -> Floats:
    """curve(u) at even u in [0, 1], from the largest sigma (0) to the smallest (1)."""
    if final == "sigma_min":
        return np.append(curve(np.linspace(0.0, 1.0, steps + 1))[:-1], levels.last)
    return np.append(curve(np.linspace(0.0, 1.0, steps)), 0.0)


def linspace(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Even timesteps from the noisiest one, rounded to whole ones where they stay apart (flow: not)."""
    if levels.flow:
        times = np.linspace(levels.train_steps, 1, steps + 1)[:-1]
    else:
        times = whole_where_apart(np.linspace(0, levels.train_steps - 1, steps + 1)[:0:-1])
    return _times(times, levels, final)


def leading(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Multiples of T // (N + 1), so the noisiest levels are left out."""
    return _times(levels.train_steps // (steps + 1) * np.arange(steps, 0, -1.0), levels, final)


def trailing(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Even timesteps counted from the noisy end: round(T - i T / N) - 1 (flow: T - i T / N)."""
    times = levels.train_steps * (1 - np.arange(steps) / steps)
    return _times(times if levels.flow else whole_where_apart(times) - 1, levels, final)


def karras(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Even in sigma^(1/7) (arXiv 2206.00364, eq. 5)."""
    low, high = levels.last ** (1 / 7), levels.sigma_max ** (1 / 7)
    return _between(lambda u: (high + u * (low - high)) ** 7, steps, levels, final)


def exponential(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Even in log sigma."""
    low, high = math.log(levels.last), math.log(levels.sigma_max)
    return _between(lambda u: np.exp(high + u * (low - high)), steps, levels, final)


def log_snr(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Even in lambda; flow models start at sigma 1 (lambda is infinite there) and go on from 1 - 1/T."""
    high = levels.sigma_max if not levels.flow else 1.0 - 1.0 / levels.train_steps
    first, last = levels.level(high).lam, levels.level(levels.last).lam
    nodes = _between(lambda u: levels.sigma_of_lambda(first + u * (last - first)), steps, levels, final)
    nodes[0] = levels.sigma_max
    return nodes


def _beta_quantiles(u: Floats, a: float, b: float) -> Floats:
    from scipy.stats import beta

    return np.asarray(beta.ppf(1.0 - u, a, b), dtype=np.float64)


def beta(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Quantiles of Beta(0.6, 0.6) over sigma (arXiv 2407.12173), as Diffusers' use_beta_sigmas."""
    low, high = levels.last, levels.sigma_max
    return _between(lambda u: low + (high - low) * _beta_quantiles(u, 0.6, 0.6), steps, levels, final)


def beta57(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Quantiles of Beta(0.5, 0.7) over time, rounded to whole timesteps where they stay apart (flow: not)."""
    quantiles = _beta_quantiles(np.arange(steps) / steps, 0.5, 0.7)
    if levels.flow:
        return _times(levels.train_steps * quantiles, levels, final)
    return _times(whole_where_apart((levels.train_steps - 1) * quantiles), levels, final)


def _ays(name: str) -> Grid:
    def grid(steps: int, levels: NoiseLevels, final: str) -> Floats:
        """Align Your Steps (arXiv 2404.14507): ten published timesteps; other N lie between in log sigma."""
        from diffusers.schedulers.scheduling_utils import AysSchedules

        table = AysSchedules[name]
        if levels.flow or levels.train_steps <= max(table):
            raise ValueError(
                "the AYS tables are timesteps of VP models with 1000 of them: choose another grid"
            )
        if steps == len(table):
            return _times(table, levels, final)
        known = np.log(_times(table, levels, "sigma_min"))
        count = steps + 1 if final == "sigma_min" else steps
        at = np.linspace(0, len(known) - 1 if final == "sigma_min" else len(known) - 2, count)
        nodes = np.exp(np.interp(at, np.arange(len(known)), known))
        return np.append(nodes[:-1], levels.last) if final == "sigma_min" else np.append(nodes, 0.0)

    return grid


ays_sd = _ays("StableDiffusionTimesteps")
ays_sdxl = _ays("StableDiffusionXLTimesteps")


def bong_tangent(steps: int, levels: NoiseLevels, final: str) -> Floats:
    """Two arcs of an arctangent, from 1 to 0.5 and on to 0, times the largest sigma (RES4LYF)."""
    count = steps + 2
    slope = 0.2 * 40 / count
    first = int(0.6 * count)

    def arc(points: int, pivot: int, high: float, low: float) -> Floats:
        curve = 0.5 * (1 + 2 / math.pi * np.arctan(-slope * (np.arange(points) - pivot)))
        return low + (high - low) * (curve - curve[-1]) / (curve[0] - curve[-1])

    if first < 2 or count - first < 2:
        return _between(lambda u: levels.sigma_max * (1 - u) + levels.last * u, steps, levels, final)
    shape = np.concatenate([arc(first, first, 1.0, 0.5)[:-1], arc(count - first, 0, 0.5, 0.0)])
    nodes = levels.sigma_max * shape
    nodes[-1] = 0.0 if final == "zero" else levels.sigma_min
    return nodes


GRIDS: dict[str, Grid] = {
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "beta57": beta57,
    "ays-sd": ays_sd,
    "ays-sdxl": ays_sdxl,
    "log-snr": log_snr,
    "bong_tangent": bong_tangent,
}


def named_grid(name: str) -> Grid:
    """The grid function of a name; ValueError with the nearest names for an unknown one."""
    if name not in GRIDS:
        raise unknown("grid", name, sorted(GRIDS))
    return GRIDS[name]
