"""The decisions of one solver step, as frozen values that check themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffplug.checks import as_list, as_numbers, as_object, check_keys, finite, is_finite, whole
from diffplug.messages import shown

SCALES = ("none", "const", "linear", "exp", "bh1", "bh2")
SCALES_WITH_NUMBER = ("const", "linear", "exp")
VARIABLES = ("lambda", "index")
NAMED_PARAMS = ("data", "noise", "ems")
MAX_ORDER = 6
LARGEST_RATIO = 10.0  # of a compensation, either sign; searches stay in 0.3 to 2


@dataclass(frozen=True)
class Scale:
    """The factor on a derivative (see `exponential.relaxation`): one of `SCALES`, three of them with a c."""

    kind: str = "none"
    c: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCALES:
            raise ValueError(f"scale {shown(self.kind)} is unknown: allowed are {', '.join(SCALES)}")
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
            raise ValueError(
                f"points {shown(list(points))}: give different whole numbers, none of them the start 0"
            )
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
            allowed = " and ".join(VARIABLES)
            raise ValueError(f"variable {shown(self.variable)} is unknown: allowed are {allowed}")
        if len(self.derivatives) != self.order - 1:
            raise ValueError(
                f"order {self.order} needs {self.order - 1} derivatives, got {len(self.derivatives)}"
            )
        for k, derivative in enumerate(self.derivatives, 1):
            if len(derivative.points) < k:
                raise ValueError(f"derivative {k} needs at least {k} points, got {list(derivative.points)}")

    @cached_property
    def points(self) -> frozenset[int]:
        """All points that the derivatives use."""
        return frozenset({point for derivative in self.derivatives for point in derivative.points})


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
                f"param {shown(self.param)} is unknown: allowed are {', '.join(NAMED_PARAMS)} and an l with "
                "an s"
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


MAX_DC_ORDER = 3
MOST_STEPS = 10_000  # of a run; more are no schedule, and take minutes to check


def checked_ratios(ratios: Any, order: int) -> list[float] | None:
    """Ratios as a list of floats, one per step; None stays None.

    ratios: any sequence or array of numbers up to 10. order: K; a compensation needs K + 1 outputs, so the
    first K ratios can do nothing and have to be 1. Raises ValueError otherwise.
    """
    if ratios is None:
        return None
    values = ratios.tolist() if hasattr(ratios, "tolist") else ratios
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ValueError(
            f"DC ratios are a {type(ratios).__name__}: give a list with one number per step, or None"
        )
    if len(values) > MOST_STEPS:
        raise ValueError(f"{len(values)} DC ratios: runs have up to {MOST_STEPS} steps")
    if not values:
        raise ValueError("DC ratios are an empty list: give one number per step, or None for no compensation")
    for step, ratio in enumerate(values):
        if not is_finite(ratio):
            raise ValueError(
                f"DC ratio {shown(ratio)} of step {step} is not a finite number: 1.0 means no compensation"
            )
        if abs(float(ratio)) > LARGEST_RATIO:
            raise ValueError(
                f"DC ratio {float(ratio):g} of step {step} extrapolates too far: allowed are up to "
                f"{LARGEST_RATIO:g}, searches stay in 0.3 to 2"
            )
        if step < order and ratio != 1:
            raise ValueError(
                f"DC ratio {float(ratio)} of step {step} can do nothing: with dc_order={order} a step needs "
                f"{order + 1} outputs, so the first {order} ratios have to be 1.0"
            )
    return [float(ratio) for ratio in values]


def check_step_count(ratios: Sequence[float], steps: int) -> None:
    """Raise ValueError unless there is one ratio per step."""
    if len(ratios) != steps:
        raise ValueError(
            f"DC ratios are for {len(ratios)} steps, the pipeline asked for {steps}: "
            f"run {len(ratios)} steps, search ratios for {steps}, or set dc_ratios=None"
        )


_STEP = ("param", "start", "order", "d", "variable", "ratio", "correct")


def _step_to_json(step: SolverStep) -> dict[str, Any]:
    param = step.param if isinstance(step.param, str) else {"l": step.param.l, "s": step.param.s}
    document = {"param": param, **_update_to_json(step.predict)}
    if step.ratio != 1:
        document["ratio"] = step.ratio
    document["correct"] = None if step.correct is None else _update_to_json(step.correct)
    return document


def _update_to_json(update: Update) -> dict[str, Any]:
    document: dict[str, Any] = {"start": update.start, "order": update.order}
    document["d"] = [
        {"points": list(d.points), "scale": {"kind": d.scale.kind, "c": d.scale.c}}
        for d in update.derivatives
    ]
    if update.variable != "lambda":
        document["variable"] = update.variable
    return document


def _step(document: Any) -> SolverStep:
    document = as_object("a step", document, _STEP)
    param, correct = document.get("param", "data"), document.get("correct")
    if isinstance(param, Mapping):
        check_keys("param", param, ("l", "s"))
        param = Linear(param.get("l"), param.get("s"))  # type: ignore[arg-type]
    return SolverStep(
        param=param,
        predict=_update({k: v for k, v in document.items() if k in ("start", "order", "d", "variable")}, -1),
        correct=None if correct is None else _update(as_object("correct", correct), 1),
        ratio=document.get("ratio", 1.0),
    )


def _update(document: Mapping[str, Any], newest: int) -> Update:
    """An update; newest: 1 where the new evaluation is among the points by default, -1 where it is not."""
    check_keys("update", document, ("start", "order", "d", "variable"))
    order = document.get("order", 1)
    derivatives = document.get("d")
    if derivatives is None and isinstance(order, int) and order > 1:
        points = list(range(-1, -order, -1)) if newest < 0 else [1, *range(-1, 1 - order, -1)]
        derivatives = [{"points": points}] * (order - 1)
    return Update(
        order=order,
        derivatives=tuple(_derivative(each) for each in as_list("d", derivatives or [])),
        start=document.get("start", 0),
        variable=document.get("variable", "lambda"),
    )


def _derivative(document: Any) -> Derivative:
    document = as_object("a derivative", document, ("points", "scale"))
    scale = as_object("scale", document.get("scale", {}), ("kind", "c"))
    points = tuple(as_list("points", document.get("points")))
    return Derivative(points, Scale(scale.get("kind", "none"), scale.get("c", 0.0)))


def _delta(document: Any) -> Delta | None:
    if document is None:
        return None
    check_keys("delta", as_object("a delta", document), ("data", "states"))
    data, states = as_numbers("data", document.get("data")), as_numbers("states", document.get("states"))
    return Delta(data or (), states or ())
