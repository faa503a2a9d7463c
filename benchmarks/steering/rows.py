"""A figure beside the one that it must be: by theory, or as the sources of a method measured it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.steering.chain import Steered


@dataclass(frozen=True, kw_only=True)
class Row:
    """found must be within four standard errors (of this run) and a slack of `expected`.

    slack: for expectations that are rounded, or measured themselves. shown: not judged, because heavy tails
    make the standard error mean little, or because ties may be broken in more than one way.
    """

    part: str
    case: str
    quantity: str
    expected: float
    found: float
    error: float = 0.0
    slack: float = 0.0
    shown: bool = False

    @property
    def good(self) -> bool:
        """Whether the figure holds."""
        return self.shown or abs(self.found - self.expected) <= 4 * self.error + self.slack

    def to_dict(self) -> dict[str, Any]:
        """The row and its verdict, ready for JSON."""
        return {**asdict(self), "good": self.good}


def normaliser(part: str, case: str, run: Steered, z: float, *, shown: bool = False) -> Row:
    """The mean of Z_hat / Z, which must be 1."""
    ratio, error, _ = run.ratio(z)
    return Row(
        part=part, case=case, quantity="E Z_hat/Z", expected=1.0, found=ratio, error=error, shown=shown
    )


def weighted_mean(part: str, case: str, run: Steered, expected: float, slack: float = 0.004) -> Row:
    """The mean of a group's weighted mean."""
    return _mean(part, case, "weighted mean", run.weighted_mean(), expected, slack)


def plain_mean(part: str, case: str, run: Steered, expected: float, slack: float = 0.004) -> Row:
    """The mean of all particles as they are."""
    mean, _, error = moments(run.x.mean(-1))
    return _mean(part, case, "plain mean", (mean, error), expected, slack)


def _mean(
    part: str, case: str, quantity: str, found: tuple[float, float], expected: float, slack: float
) -> Row:
    """A mean and its standard error beside what is expected."""
    mean, error = found
    return Row(
        part=part, case=case, quantity=quantity, expected=expected, found=mean, error=error, slack=slack
    )


def spread(part: str, case: str, run: Steered, z: float, expected: float, slack: float = 0.1) -> Row:
    """The standard deviation of Z_hat / Z, within a share `slack` of what is expected."""
    return Row(
        part=part,
        case=case,
        quantity="sd Z_hat/Z",
        expected=expected,
        found=run.ratio(z)[2],
        slack=slack * expected,
    )


def moments(x: Tensor) -> tuple[float, float, float]:
    """Mean, variance and the mean's standard error of independent numbers `[n]`."""
    return float(x.mean()), float(x.var()), float(x.std() / len(x) ** 0.5)


def weighted_moments(x: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """Mean, variance and the mean's standard error of x under weights of any sum."""
    share = weights / weights.sum()
    mean = (share * x).sum()
    around = x - mean
    return float(mean), float((share * around.square()).sum()), float((share * around).square().sum().sqrt())


def pooled_moments(run: Steered) -> tuple[float, float, float]:
    """Mean, variance and standard error over all groups, each weighing as much as its normaliser."""
    by_group = torch.softmax(run.logw, -1) * run.log_z.exp()[:, None]
    mean, variance, _ = weighted_moments(run.x, by_group)
    each = (by_group * (run.x - mean)).sum(-1) / by_group.sum()
    return mean, variance, float(each.square().sum().sqrt())


def table(rows: Iterable[Row]) -> str:
    """The rows as a markdown table; a star marks those that do not hold, "(shown)" the ones not judged."""
    lines = ["| part | case | quantity | expected | found | standard error | |", f"|{'---|' * 7}"]
    for row in rows:
        mark = "(shown)" if row.shown else "" if row.good else "*"
        numbers = f"{row.expected:.4g} | {row.found:.4f} | {row.error:.4f} | {mark}"
        lines.append(f"| {row.part} | {row.case} | {row.quantity} | {numbers} |")
    return "\n".join(lines)
