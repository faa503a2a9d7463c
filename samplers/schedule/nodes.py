"""Where a solver's nodes lie: lambdas, timesteps or sigmas, or the name of a grid, and what comes last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from diffplug.checks import as_list, check_keys, finite
from diffplug.messages import shown
from diffplug.samplers.model_noise import Floats, NoiseLevels
from diffplug.samplers.schedule.grids import GRIDS, named_grid, with_end

KINDS = ("lambda", "timesteps", "sigmas", "name")
FINALS = ("node", "zero", "sigma_min")


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a schedule of N steps; nothing is rounded.

    kind: "lambda" (log alpha - log sigma, increasing; the same for every model), "timesteps" or "sigmas" (as
    the scheduler stores them; decreasing), or "name" of a grid of `grids.GRIDS`, made for the model at hand.
    final: "node" when the values hold the end too (N + 1 of them; the last lambda may be infinite, the last
    sigma 0), else the end is added: "zero", or "sigma_min", the smallest sigma of training.
    Raises ValueError for values that are not finite or not in order.
    """

    kind: str
    values: tuple[float, ...] = ()
    name: str = ""
    final: str = "node"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"grid of kind {shown(self.kind)}: allowed are {', '.join(KINDS)}")
        if self.final not in FINALS:
            raise ValueError(f"final {shown(self.final)}: allowed are {', '.join(FINALS)}")
        if self.kind == "name":
            self._check_name()
        else:
            self._check_values()

    def _check_name(self) -> None:
        if self.name not in GRIDS:
            named_grid(self.name)  # raises, with the nearest names
        if self.values or self.final == "node":
            raise ValueError(f"grid {self.name!r} takes no values, and final 'zero' or 'sigma_min'")

    def _check_values(self) -> None:
        try:
            values = list(self.values)
        except TypeError:
            raise ValueError(
                f"a grid of {self.kind} is {shown(self.values)}: give a list of numbers"
            ) from None
        open_end = self.kind == "lambda" and self.final == "node" and values[-1:] == [math.inf]
        checked = [
            finite(f"node {i} of the grid", v) for i, v in enumerate(values[:-1] if open_end else values)
        ]
        object.__setattr__(self, "values", tuple(checked + [math.inf] * open_end))
        if self.name:
            raise ValueError(f"a grid of {self.kind} takes no name, got {shown(self.name)}")
        sign = 1 if self.kind == "lambda" else -1
        for i, (one, two) in enumerate(pairwise(self.values)):
            if not sign * (two - one) > 0:
                word = "increase" if sign == 1 else "decrease"
                raise ValueError(f"step {i}: {self.kind} go from {one:g} to {two:g}, they have to {word}")
        self._check_signs()

    def _check_signs(self) -> None:
        if self.kind == "lambda" or not self.values:
            return
        low, end = self.values[-1], self.final == "node"
        if low < 0 or (low == 0 and self.kind == "sigmas" and not end):
            hint = ": leave the final 0 to final='zero'" if low == 0 else ""
            raise ValueError(f"the last of the {self.kind} is {low:g}, which is too small{hint}")

    def check_count(self, steps: int) -> None:
        """Raise ValueError unless there are nodes for so many steps."""
        wanted = steps + (self.final == "node")
        if self.kind != "name" and len(self.values) != wanted:
            raise ValueError(
                f"{steps} steps with final {self.final!r} need {wanted} nodes, there are {len(self.values)}"
            )

    @property
    def ends_clean(self) -> bool:
        """Whether the last node has no noise at all."""
        if self.final == "node":
            return (
                self.values[-1] == (math.inf if self.kind == "lambda" else 0.0) and self.kind != "timesteps"
            )
        return self.final == "zero"

    def sigmas(self, levels: NoiseLevels, steps: int) -> Floats:
        """The N + 1 stored sigmas of the nodes for a model, float64, strictly decreasing.

        Raises ValueError when the model's noise levels leave no room for the nodes.
        """
        if self.kind == "name":
            return checked(levels.stretched(GRIDS[self.name](steps, levels, self.final)), self.final)
        values = np.asarray(self.values)
        if self.kind == "timesteps":
            _check_start("timesteps", values, levels.train_steps - (not levels.flow))
        if self.kind == "lambda":
            nodes = levels.sigma_of_lambda(values)
        else:
            nodes = levels.sigma_of_time(values) if self.kind == "timesteps" else values
        if levels.flow:
            _check_start("sigmas", nodes, 1)
        return checked(nodes if self.final == "node" else with_end(nodes, levels, self.final), self.final)


def _check_start(what: str, values: Floats, highest: float) -> None:
    if values[0] > highest:
        raise ValueError(f"{what} of this model end at {highest:g}, the grid starts at {values[0]:g}")


def checked(sigmas: Floats, final: str) -> Floats:
    """The sigmas; ValueError with the step's number unless they decrease strictly down to 0 at the least."""
    for i, (one, two) in enumerate(pairwise(sigmas.tolist())):
        if not one > two >= 0:
            hint = (
                f": leave out the last node, or end otherwise than with {final!r}"
                if i == len(sigmas) - 2
                else ""
            )
            raise ValueError(f"step {i}: sigma goes from {one:g} to {two:g}, it has to decrease{hint}")
    return sigmas


def _grid_to_json(nodes: Nodes) -> dict[str, Any]:
    if nodes.kind == "name":
        return {"name": nodes.name, "final": nodes.final}
    values = ["inf" if value == math.inf else value for value in nodes.values]
    return {nodes.kind: values, "final": nodes.final}


def _grid(document: Mapping[str, Any]) -> Nodes:
    kinds = [kind for kind in KINDS if kind in document]
    check_keys("grid", document, (*KINDS, "final"))
    if len(kinds) != 1:
        raise ValueError(f"a grid has exactly one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    kind = kinds[0]
    if kind == "name":
        return Nodes(kind="name", name=str(document["name"]), final=document.get("final", "zero"))
    values = [math.inf if value == "inf" else value for value in as_list(kind, document[kind])]
    return Nodes(kind=kind, values=tuple(values), final=document.get("final", "node"))
