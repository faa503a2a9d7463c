"""Cascade polynomial regression: compensation ratios for step counts and guidance scales nobody searched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from diffplug.checks import finite, whole
from diffplug.files import read_json, write_json
from diffplug.foreign_files import damaged, read_array
from diffplug.messages import reason, shown

__all__ = ["CompensationPolynomial"]

FORMAT, VERSION = "compensation-polynomial", 1
SHAPE = (4, 3, 3)  # powers of step / steps ascending, of guidance / 12 and of steps / 50 descending
LOWEST, HIGHEST = 0.3, 1.6  # ratios outside are signs of extrapolation
PUBLIC_STEPS, PUBLIC_GUIDANCE = (5, 20), (3.0, 9.0)  # beyond, the published polynomial reaches hundreds


@dataclass(frozen=True, eq=False)
class CompensationPolynomial:
    """Ratios as a polynomial in step, guidance scale and number of steps (arXiv 2409.03755, section 3.4).

    coefficients: 36 numbers in the reference's order, or [4, 3, 3]. steps, guidance: the closed ranges in
    which the polynomial was fitted; it is not evaluated outside. The first two ratios are always 1. meta:
    where it came from (model, ...), JSON.

    Raises ValueError for another number of coefficients and for numbers that are not finite.
    """

    coefficients: Any
    steps: tuple[int, int] = PUBLIC_STEPS
    guidance: tuple[float, float] = PUBLIC_GUIDANCE
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            array = np.asarray(self.coefficients, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"coefficients are not numbers ({error}): give {np.prod(SHAPE)} of them"
            ) from None
        if array.size != np.prod(SHAPE):
            raise ValueError(f"{array.size} coefficients: a compensation polynomial has {np.prod(SHAPE)}")
        if not np.isfinite(array).all():
            raise ValueError("a coefficient is not finite: the file is damaged, get it again")
        for name in ("steps", "guidance"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name} from {low!r} to {high!r} is no range: the smaller one comes first")
            object.__setattr__(self, name, (low, high))
        object.__setattr__(self, "coefficients", array.reshape(SHAPE))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompensationPolynomial) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.coefficients.tobytes(), self.steps, self.guidance))

    def ratios(self, num_inference_steps: int, guidance_scale: float) -> list[float]:
        """One ratio per step, in [0.3, 1.6]; evaluated in float64, the terms cancel to 1 part in 10^4.

        Raises ValueError outside the ranges of the fit.
        """
        whole("num_inference_steps", num_inference_steps, 1, 10_000)
        self._check(num_inference_steps, guidance_scale)
        x = np.arange(3, num_inference_steps + 1) / num_inference_steps
        n = (num_inference_steps / 50) ** np.arange(2, -1, -1)
        c = (guidance_scale / 12) ** np.arange(2, -1, -1)
        values = np.einsum("xk,kjl,j,l->x", x[:, None] ** np.arange(4), self.coefficients, c, n)
        return [1.0, 1.0, *np.clip(values, LOWEST, HIGHEST).tolist()][:num_inference_steps]

    def covers(self, num_inference_steps: int, guidance_scale: float) -> bool:
        """Whether `ratios` answers for these."""
        low, high = self.guidance
        return self.steps[0] <= num_inference_steps <= self.steps[1] and low <= guidance_scale <= high

    def _check(self, steps: int, guidance: float) -> None:
        for name, value, (low, high) in (
            ("num_inference_steps", steps, self.steps),
            ("guidance_scale", guidance, self.guidance),
        ):
            if not low <= value <= high:
                raise ValueError(
                    f"{name}={value:g} lies outside {low:g} to {high:g}, where this polynomial was fitted: "
                    "search ratios for it (diffplug search)"
                )

    @classmethod
    def fit(
        cls, searched: Mapping[tuple[int, float], Sequence[float]], ridge: float = 1e-6
    ) -> CompensationPolynomial:
        """The least-squares polynomial through searched ratios {(steps, guidance): ratios}.

        The model is linear in its 36 numbers, so it is solved for, in a Chebyshev basis over the data's own
        ranges, where the problem is well conditioned; `ridge` weighs the squared size of those coefficients,
        which decides only what the data leave open. Raises ValueError for no data or ratios of another
        length than their number of steps.
        """
        for key in searched:
            if not isinstance(key, tuple) or len(key) != 2:
                raise ValueError(f"key {key!r} of the searched ratios: give (steps, guidance scale)")
        rows = [
            (step / steps, guidance / 12, steps / 50, ratio)
            for (steps, guidance), ratios in searched.items()
            for step, ratio in enumerate(_as_many(ratios, steps), start=1)
            if step > 2
        ]
        if not rows:
            raise ValueError("nothing to fit: give the ratios of at least one search of three steps or more")
        x, c, n, wanted = np.array(rows, dtype=np.float64).T
        bases = [_Basis.over(values, degree) for values, degree in ((x, 3), (c, 2), (n, 2))]
        terms = np.einsum("ia,ib,ic->iabc", *(b.at(v) for b, v in zip(bases, (x, c, n), strict=True)))
        design = terms.reshape(len(rows), -1)
        augmented = np.vstack([design, np.sqrt(ridge * len(rows)) * np.eye(design.shape[1])])
        solved = np.linalg.lstsq(augmented, np.append(wanted, np.zeros(design.shape[1])), rcond=None)[0]
        powers = np.einsum("abc,ap,bq,cr->pqr", solved.reshape(SHAPE), *(b.to_powers() for b in bases))
        steps = [steps for steps, _ in searched]
        scales = [scale for _, scale in searched]
        return cls(powers[:, ::-1, ::-1], (min(steps), max(steps)), (min(scales), max(scales)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompensationPolynomial:
        """A polynomial from our JSON or from the reference's `.npy` of 36 float64 numbers.

        Raises ValueError, with the file's name, for anything else; pickled arrays are not read.
        """
        name = os.fspath(path)
        if Path(path).suffix == ".npy":
            array = read_array(path, "compensation polynomial")
            with damaged(path, "compensation polynomial"):
                return cls(array)
        document = read_json(path)
        try:
            return cls.from_json(document)
        except ValueError as error:
            raise ValueError(f"{name!r} holds no compensation polynomial: {error}") from error

    @classmethod
    def from_json(cls, document: Any) -> CompensationPolynomial:
        """The polynomial of our JSON; ValueError for anything else, and for files of a newer version."""
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise ValueError(f"its 'format' has to be {FORMAT!r}")
        if document.get("version") != VERSION:
            raise ValueError(
                f"it has version {shown(document.get('version'))}, not {VERSION}: update diffplug"
            )
        try:
            numbers, steps, guidance = (document[name] for name in ("coefficients", "steps", "guidance"))
            return cls(numbers, tuple(steps), tuple(guidance), dict(document.get("meta", {})))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"it lacks or garbles {reason(error)}: write it again") from error

    def to_json(self) -> dict[str, Any]:
        """The polynomial as plain JSON values; `from_json` gives it back."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "steps": list(self.steps),
            "guidance": list(self.guidance),
            "coefficients": self.coefficients.ravel().tolist(),
            "meta": dict(self.meta),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write our JSON, whole or not at all."""
        write_json(path, self.to_json())


@dataclass(frozen=True)
class _Basis:
    """Chebyshev polynomials over an interval."""

    center: float
    half: float
    degree: int

    @classmethod
    def over(cls, values: NDArray[np.float64], degree: int) -> _Basis:
        low, high = float(values.min()), float(values.max())
        half = (high - low) / 2
        # data of a single guidance scale say nothing about others: use the constant alone
        return cls((low + high) / 2, half or 1.0, degree)

    def at(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n, degree + 1]: every polynomial at every value."""
        values = (values - self.center) / self.half
        return np.asarray(chebyshev.chebvander(values, self.degree), dtype=np.float64)

    def to_powers(self) -> NDArray[np.float64]:
        """[degree + 1, degree + 1]: row k holds the powers, ascending, of the k-th polynomial."""
        rows = []
        inner = np.polynomial.Polynomial([-self.center / self.half, 1 / self.half])
        for k in range(self.degree + 1):
            powers = np.polynomial.Polynomial(chebyshev.cheb2poly([0] * k + [1]))(inner).coef
            rows.append(np.pad(powers, (0, self.degree + 1 - len(powers))))
        return np.array(rows)


def _as_many(ratios: Sequence[float], steps: int) -> Sequence[float]:
    if len(ratios) != steps:
        raise ValueError(f"{len(ratios)} ratios for {steps} steps: give one for each step")
    return [finite(f"ratio {i} of {steps} steps", ratio) for i, ratio in enumerate(ratios)]
