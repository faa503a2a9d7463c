"""Nonlinear least squares for a few numbers of a sampler, from runs alone: no gradient of the network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

__all__ = ["fit"]

Floats = npt.NDArray[np.float64]


def fit(
    residuals: Callable[[Floats], Floats],
    start: Floats,
    *,
    step: float | Floats = 1e-2,
    ridge: float | Floats = 0.0,
    bounds: tuple[float | Floats, float | Floats] = (-np.inf, np.inf),
    iterations: int = 8,
    on_iterate: Callable[[Floats], None] | None = None,
) -> Floats:
    """The numbers near `start` that minimise |residuals|^2 + ridge |numbers - start|^2.

    Levenberg-Marquardt in a trust region (scipy's "trf"), its Jacobian from forward differences of size
    `step`, which asks for one run more per number and iteration. step, ridge: one for all or one each.
    iterations: steps tried. on_iterate: told every accepted point, `start` first. Residuals that are not
    finite count as very bad ones.
    """
    weight = np.sqrt(np.broadcast_to(np.asarray(ridge, dtype=np.float64), start.shape))
    steps = np.broadcast_to(np.asarray(step, dtype=np.float64), start.shape)
    known: dict[bytes, Floats] = {}

    def padded(theta: Floats) -> Floats:
        key = theta.tobytes()
        if key not in known:
            known.clear()  # the solver only comes back to the newest point
            values = residuals(theta)
            known[key] = np.where(np.isfinite(values), values, 1e3)
        return np.concatenate([known[key], weight * (theta - start)])

    def jacobian(theta: Floats) -> Floats:
        here = padded(theta)
        if on_iterate is not None:
            on_iterate(theta.copy())
        columns = []
        for k, size in enumerate(steps):
            shifted = theta.copy()
            inside = theta[k] + size <= np.broadcast_to(bounds[1], theta.shape)[k]
            shifted[k] += size if inside else -size
            columns.append(
                (np.concatenate([_finite(residuals(shifted)), weight * (shifted - start)]) - here)
                / (shifted[k] - theta[k])
            )
        return np.stack(columns, axis=1)

    if start.size == 0:
        return start.copy()
    found = least_squares(
        padded,
        start,
        jacobian,
        bounds=bounds,
        method="trf",
        max_nfev=iterations,
        ftol=1e-5,
        xtol=1e-6,
        gtol=1e-12,
    )
    if on_iterate is not None:
        on_iterate(found.x.copy())
    return np.asarray(found.x, dtype=np.float64)


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, 1e3)
