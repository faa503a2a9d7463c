"""The decisions of one solver step, as frozen values that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

SCALES = ("none", "const", "linear", "exp", "bh1", "bh2")
SCALES_WITH_NUMBER = ("const", "linear", "exp")
VARIABLES = ("lambda", "index")
NAMED_PARAMS = ("data", "noise", "ems")
MAX_ORDER = 6
LARGEST_RATIO = 10.0  # of a compensation, either sign; searches stay in 0.3 to 2


def finite(name: str, value: Any) -> float:
    """The value as a float. Raises ValueError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: give a finite number")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """The value as an int. Raises ValueError unless it is a whole number in low..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: allowed are whole numbers from {low} to {high}")
    return value


@dataclass(frozen=True)
class Scale:
    """The factor on a derivative (see `exponential.relaxation`): one of `SCALES`, three of them with a c."""

    kind: str = "none"
    c: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCALES:
            raise ValueError(f"scale {self.kind!r} is unknown: allowed are {', '.join(SCALES)}")
        object.__setattr__(self, "c", finite(f"c of scale {self.kind!r}", self.c))
        if self.kind not in SCALES_WITH_NUMBER and self.c:
            raise ValueError(f"scale {self.kind!r} takes no c: leave it out")


@dataclass(frozen=True)
class Derivative:
    """Which evaluations estimate a derivative, counted from the start (-1 one before, 1 one after)."""

    points: tuple[int, ...]
    scale: Scale = Scale()

    def __post_init__(self) -> None:
        points = tuple(self.points)
        for point in points:
            whole("point", point, -64, 64)
        if not points or 0 in points or len(set(points)) < len(points):
            raise ValueError(f"points {list(points)}: give different whole numbers, none of them the start 0")
        object.__setattr__(self, "points", points)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One exponential-integrator update: where it starts, its order, and order - 1 derivatives.

    start: 0 the newest state, -1 the one before. variable: what differences are taken over, "lambda" (exact
    exponential integrals) or "index" (equal weights of steps, as Adams-Bashforth has them). Source: arXiv
    2312.07243, section 3; Raises ValueError when the parts do not fit.
    """

    order: int = 1
    derivatives: tuple[Derivative, ...] = ()
    start: int = 0
    variable: str = "lambda"

    def __post_init__(self) -> None:
        whole("order", self.order, 1, MAX_ORDER)
        whole("start", self.start, -64, 0)
        object.__setattr__(self, "derivatives", tuple(self.derivatives))
        if self.variable not in VARIABLES:
            raise ValueError(f"variable {self.variable!r} is unknown: allowed are {' and '.join(VARIABLES)}")
        if len(self.derivatives) != self.order - 1:
            raise ValueError(
                f"order {self.order} needs {self.order - 1} derivatives, got {len(self.derivatives)}"
            )
        for k, derivative in enumerate(self.derivatives, 1):
            if len(derivative.points) < k:
                raise ValueError(f"derivative {k} needs at least {k} points, got {list(derivative.points)}")

    @property
    def points(self) -> set[int]:
        """All points that the derivatives use."""
        return {point for derivative in self.derivatives for point in derivative.points}


@dataclass(frozen=True)
class Linear:
    """The prediction type between noise and data: g = (sigma eps - l x) / alpha with growth s removed.

    (l, s) = (1, 0) is data prediction, (0, -1) noise prediction; constant over a step.
    """

    l: float  # noqa: E741 - the paper's name
    s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "l", finite("l", self.l))
        object.__setattr__(self, "s", finite("s", self.s))


@dataclass(frozen=True, kw_only=True)
class SolverStep:
    """All decisions of the step from node i to node i + 1.

    param: "data", "noise", a `Linear`, or "ems" (DPM-Solver-v3: needs the model's `ModelStatistics`).
    correct: how the state is computed again once the network has seen the predicted one; None for not.
    ratio: DC-Solver's compensation of this step's output; 1.0 changes nothing.
    """

    param: str | Linear = "data"
    predict: Update = Update()
    correct: Update | None = None
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.param, Linear) and self.param not in NAMED_PARAMS:
            raise ValueError(
                f"param {self.param!r} is unknown: allowed are {', '.join(NAMED_PARAMS)} and an l with an s"
            )
        object.__setattr__(self, "ratio", finite("ratio", self.ratio))
        if abs(self.ratio) > LARGEST_RATIO:
            raise ValueError(
                f"ratio {self.ratio:g} extrapolates too far: allowed are up to {LARGEST_RATIO:g}"
            )
        if self.correct is not None and 1 - self.correct.start not in self.correct.points:
            raise ValueError(
                "the corrector does not use the new evaluation: add it to its points, or drop it"
            )

    def check_place(self, index: int, steps: int) -> None:
        """Raise ValueError unless a step with this index can do what is asked with the history it has."""
        self._check_history("the predictor", self.predict, index, index)
        if self.correct is not None:
            if index == steps - 1:
                raise ValueError(
                    "the last step has a corrector, which would cost one more evaluation: drop it"
                )
            self._check_history("the corrector", self.correct, index, index + 1)

    def _check_history(self, who: str, update: Update, index: int, newest: int) -> None:
        first = index + update.start
        if first < 0:
            raise ValueError(f"{who} starts {-update.start} nodes back, before the first one")
        for point in sorted(update.points):
            if not 0 <= first + point <= newest:
                raise ValueError(
                    f"{who} uses point {point} from start {update.start}, where no evaluation exists yet: "
                    f"evaluations 0 to {newest} do"
                )


@dataclass(frozen=True)
class Delta:
    """Learned additions to a predictor's row: to the weights of data predictions and of states, newest first.

    data[k] is added to the weight of D_{i-k}, states[k] to the weight of x_{i-k}. Zero changes nothing.
    """

    data: tuple[float, ...] = ()
    states: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("data", "states"):
            numbers = tuple(finite(f"{name} delta", value) for value in getattr(self, name))
            object.__setattr__(self, name, numbers)

    @property
    def reach(self) -> int:
        """How many evaluations it looks at, the newest included."""
        return max(len(self.data), len(self.states))
