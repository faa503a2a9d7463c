"""Fits of a few numbers of a sampler, from runs alone: no gradient of the network.

Least squares where the errors are smooth in the numbers; a simplex where they are not, as when nodes move
and pictures tip over into other ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares, minimize

__all__ = ["fit", "simplex"]

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
    if start.size == 0:
        return start.copy()
    told = on_iterate or (lambda _: None)
    penalty = np.sqrt(np.broadcast_to(np.asarray(ridge, dtype=np.float64), start.shape))
    problem = _Penalised(residuals, start, penalty)

    def jacobian(theta: Floats) -> Floats:
        told(theta.copy())
        return problem.jacobian(
            theta, np.broadcast_to(step, start.shape), np.broadcast_to(bounds[1], start.shape)
        )

    found = least_squares(
        problem,
        start,
        jacobian,
        bounds=bounds,
        method="trf",
        max_nfev=iterations,
        ftol=1e-5,
        xtol=1e-6,
        gtol=1e-12,
    )
    told(found.x.copy())
    return np.asarray(found.x, dtype=np.float64)


def simplex(
    value: Callable[[Floats], float],
    start: Floats,
    *,
    size: float = 0.5,
    evaluations: int = 60,
    on_better: Callable[[Floats], None] | None = None,
) -> Floats:
    """The numbers with the smallest value that the simplex method of Nelder and Mead (1965) comes to.

    The first simplex is `start` and one point `size` away along each axis. on_better: told every point that
    is better than all before it, `start` first. A value that is not finite counts as infinite.
    """
    if start.size == 0:
        return start.copy()
    best = np.inf

    def told(theta: Floats) -> float:
        nonlocal best
        found = value(theta)
        found = found if np.isfinite(found) else np.inf
        if found < best or best == np.inf:
            best = min(best, found)
            if on_better is not None:
                on_better(theta.copy())
        return found

    found = minimize(
        told,
        start,
        method="Nelder-Mead",
        options={
            "initial_simplex": np.vstack([start, start + size * np.eye(start.size)]),
            "maxfev": evaluations,
            "xatol": 1e-3,
            "fatol": 1e-9,
        },
    )
    return np.asarray(found.x, dtype=np.float64)


@dataclass
class _Penalised:
    """Residuals, and those of the ridge below them; the newest ones are remembered."""

    residuals: Callable[[Floats], Floats]
    start: Floats
    weight: Floats
    known: tuple[bytes, Floats] = (b"", np.empty(0))

    def __call__(self, theta: Floats) -> Floats:
        if self.known[0] != theta.tobytes():  # the solver only comes back to the newest point
            self.known = theta.tobytes(), self.at(theta)
        return self.known[1]

    def at(self, theta: Floats) -> Floats:
        return np.concatenate([_finite(self.residuals(theta)), self.weight * (theta - self.start)])

    def jacobian(self, theta: Floats, steps: Floats, highest: Floats) -> Floats:
        """Forward differences; backward ones where forward would leave the bounds."""
        here, columns = self(theta), []
        for k, size in enumerate(steps):
            shifted = theta.copy()
            shifted[k] += size if theta[k] + size <= highest[k] else -size
            columns.append((self.at(shifted) - here) / (shifted[k] - theta[k]))
        return np.stack(columns, axis=1)


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, 1e3)
