"""From decisions to numbers: `compile_schedule` turns a SolverSchedule into the SolverTable of a model.

Every update is an exponential integrator (arXiv 2312.07243, section 3): from node s to node t,

    data:   x_t = (sigma_t / sigma_s) x_s + alpha_t sum_k h^(k+1) phi_{k+1}(-h) D^(k)
    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t sum_k h^(k+1) phi_{k+1}(h) E^(k)
    (l, s): x_t = (alpha_t / alpha_s) e^(-l h) x_s - alpha_t e^(s h) sum_k h^(k+1) phi_{k+1}(-(l+s) h) g^(k)
    ems:    x_t = (alpha_t / alpha_s) e^-L x_s - alpha_t e^-L (int e^(L+S) B + sum_k J_k g^(k)),
            J_k = int e^(L+S) (lambda - lambda_s)^k / k!, with L, S, B and g of `samplers.solver.statistics`

with derivatives from differences of stored predictions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffplug.noise.noise_level import Level
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Linear, Update
from diffplug.samplers.solver.compensation import compensation_weights
from diffplug.samplers.solver.exponential import difference_weights, moment, relaxation
from diffplug.samplers.solver.statistics import Between, ModelStatistics, load_statistics
from diffplug.samplers.solver.table import (
    CONSTANT,
    DATA,
    SEEN,
    STATES,
    AnalyticStep,
    Row,
    SolverTable,
    TableStep,
    Term,
    Weight,
)

LEAST_ALPHA = 1e-5  # below it the weights of a noise prediction explode
LARGEST_DELTA = 1e3  # of a learned addition; those that help are far below 1
LARGEST_WEIGHT = 1e30  # what float32 still multiplies
Weights = dict[tuple[int, int], Any]  # (history, node) -> weight, a float or, of "ems" steps, an array


def compile_schedule(
    schedule: SolverSchedule,
    levels: NoiseLevels,
    *,
    sigmas: Sequence[float] | None = None,
    times: Sequence[float] | None = None,
    begin: int = 0,
    statistics: ModelStatistics | None = None,
) -> SolverTable:
    """The table of a schedule for a model; costs no network evaluation.

    sigmas: the N + 1 stored sigmas of the nodes, times: what the network is told at the first N of them;
    default: the schedule's nodes, and their times. begin: the first node of a run that starts late (img2img):
    what would look at earlier evaluations is left out, and orders fall, as in a run of the tail alone.
    statistics: of the model, for "ems" steps; default: those in the schedule's own file.
    Raises ValueError, with the step's number, for what cannot be computed.
    """
    count = len(schedule.steps)
    if sigmas is None:
        sigmas = schedule.nodes.sigmas(levels, count).tolist()
    if len(sigmas) != count + 1:
        raise ValueError(f"{count} steps need {count + 1} sigmas, got {len(sigmas)}")
    if not 0 <= begin < count:
        raise ValueError(f"begin={begin} is outside the {count} steps of the schedule")
    if times is None:
        times = levels.time_of_sigma(sigmas[:-1]).tolist()
    nodes = tuple(levels.level(float(sigma)) for sigma in sigmas)
    if statistics is None and schedule.statistics is not None and schedule.needs_statistics:
        statistics = load_statistics(schedule.statistics)
    compiler = _Compiler(schedule, nodes, [node.lam for node in nodes], list(times), begin, statistics)
    steps = tuple(compiler.step(i) for i in range(count))
    first = None if schedule.first == "model" or begin else compiler.analytic(steps[0])
    return SolverTable(tuple(map(float, sigmas)), nodes, steps, begin, first)


@dataclass(frozen=True)
class _Compiler:
    schedule: SolverSchedule
    nodes: tuple[Level, ...]
    lams: list[float]
    times: list[float]
    begin: int
    statistics: ModelStatistics | None = None

    def step(self, i: int) -> TableStep:
        """The rows that are applied at node i."""
        try:
            step = TableStep(self.predict(i), self.correct(i), self.compensate(i))
            _check_weights(step)
            return step
        except (ValueError, OverflowError) as error:
            raise ValueError(f"step {i}: {error}") from None

    def predict(self, i: int) -> Row:
        step = self.schedule.steps[i]
        weights = self.update(step.param, step.predict, i, newest=i, target=i + 1)
        delta = None if self.schedule.deltas is None else self.schedule.deltas[i]
        if delta is not None and delta.reach <= i - self.begin + 1:
            for history, additions in ((DATA, delta.data), (STATES, delta.states)):
                for back, addition in enumerate(additions):
                    if abs(addition) > LARGEST_DELTA:
                        raise ValueError(
                            f"a weight is {addition:g}, too large: allowed are {LARGEST_DELTA:g}"
                        )
                    weights[history, i - back] += addition
        return self.row(weights, i)

    def correct(self, i: int) -> Row | None:
        """The corrector of the step that led to node i."""
        if not self.corrected(i):
            return None
        step = self.schedule.steps[i - 1]
        assert step.correct is not None  # noqa: S101 - `corrected` has looked
        return self.row(self.update(step.param, step.correct, i - 1, newest=i, target=i), i)

    def corrected(self, node: int) -> bool:
        return node > self.begin and self.schedule.steps[node - 1].correct is not None

    def compensate(self, i: int) -> Row | None:
        """What replaces D_i: the Lagrange polynomial of the last K + 1 outputs at a shifted time."""
        order, variable = self.schedule.compensation
        if self.schedule.steps[i].ratio == 1 or i - self.begin < order:
            return None
        nodes = self.times if variable == "timestep" else self.lams[:-1]
        mix = compensation_weights(nodes, self.schedule.ratios[: i + 1], order)[i]
        if self.schedule.steps[i].param != "noise":
            return self.row({(DATA, i - k): weight for k, weight in enumerate(mix)}, i)
        weights: Weights = defaultdict(float, {(SEEN, i): 1.0 / self.nodes[i].alpha})
        ratio = self.nodes[i].sigma / self.nodes[i].alpha
        for k, weight in enumerate(mix):
            for term, share in self.value("noise", i - k, i).items():
                weights[term] -= ratio * weight * share
        return self.row(weights, i)

    def update(self, param: str | Linear, update: Update, i: int, *, newest: int, target: int) -> Weights:
        """Weights of one update; evaluations before `begin` do not exist."""
        start = i + update.start
        points = [[start + p for p in derivative.points] for derivative in update.derivatives]
        if start < self.begin:
            start = i
        points = [[p for p in group if p >= self.begin and p != start] for group in points]
        order = next((k for k, group in enumerate(points, 1) if len(group) < k), update.order)
        h = self.lams[target] - self.lams[start]
        if h == 0:  # Diffusers' grids that end at sigma_min repeat it: nothing is left to do
            return defaultdict(float, {(STATES, start): 1.0})
        if h < 0:
            raise ValueError(f"lambda goes from {self.lams[start]:g} on by {h:g}: it has to increase")
        if order == 1 and param == "noise" and not self.corrected(start):
            param = "data"  # the same where X = x, without a division by the start's signal
        elif param != "data" and self.nodes[start].alpha < LEAST_ALPHA:
            raise ValueError(f"param {param!r} cannot start where there is almost no signal: use 'data'")
        grow, moments, z = self.integral(param, update, order, start, target)
        weights: Weights = defaultdict(float, {(STATES, start): grow})
        if param == "ems":
            weights[CONSTANT, 0] -= self.nodes[target].alpha * self.between(start, target).constant()
        for term, share in self.value(param, start, start).items():
            weights[term] += moments[0] * share
        for k in range(1, order):
            scale = update.derivatives[k - 1].scale
            weight = moments[k] * relaxation(scale.kind, scale.c, h, z)
            self.add_derivative(weights, param, (k, weight, update.variable), start, points[k - 1])
        return weights

    def add_derivative(
        self,
        weights: Weights,
        param: str | Linear,
        what: tuple[int, float, str],
        start: int,
        points: Sequence[int],
    ) -> None:
        """Add weight times the k-th derivative's estimate; what: (k, weight, variable)."""
        k, weight, variable = what
        place: Sequence[float] = self.lams if variable == "lambda" else range(len(self.nodes))
        if len({place[p] for p in (start, *points)}) <= len(points):
            raise ValueError("two of the evaluations it uses are at the same noise level")
        shares = difference_weights([place[p] - place[start] for p in points], k)
        for node, factor in [*zip(points, shares, strict=True), (start, -math.fsum(shares))]:
            for term, share in self.value(param, node, start).items():
                weights[term] += weight * factor * share

    def integral(
        self, param: str | Linear, update: Update, order: int, start: int, target: int
    ) -> tuple[Any, list[Any], float]:
        """(weight of the start, weights of value and derivatives, z) of an update between two nodes."""
        one, two = self.nodes[start], self.nodes[target]
        h = self.lams[target] - self.lams[start]
        moments: list[Any]
        if param == "data":
            z, grow = -h, two.sigma / one.sigma
            moments = [two.alpha * moment(k, h, z) for k in range(order)]
        elif param == "noise":
            z, grow = h, two.alpha / one.alpha
            end = two.alpha * one.sigma / one.alpha  # sigma_t e^h, finite at sigma_t = 0 too
            moments = [-two.sigma * math.expm1(h) if h < 1 else two.sigma - end]
            if update.variable == "lambda":
                moments += [-two.sigma * moment(k, h, z) for k in range(1, order)]
        elif isinstance(param, Linear):
            z, grow = -(param.l + param.s) * h, two.alpha / one.alpha * math.exp(-param.l * h)
            moments = [-two.alpha * math.exp(param.s * h) * moment(k, h, z) for k in range(order)]
        else:
            way = self.between(start, target)
            z, grow = h, two.alpha / one.alpha * np.exp(-way.l[-1])
            moments = [-two.alpha * way.moment(k) for k in range(order)]
        if update.variable == "index":
            moments = [moments[0] / math.factorial(k + 1) for k in range(order)]
        return grow, moments, z

    def value(self, param: str | Linear, node: int, start: int) -> Weights:
        """The prediction at a node as weights of D and X; start matters for (l, s) and "ems" only."""
        alpha, sigma = self.nodes[node].alpha, self.nodes[node].sigma
        if param == "data":
            return {(DATA, node): 1.0}
        if isinstance(param, Linear):
            shrink = math.exp(-param.s * (self.lams[node] - self.lams[start]))
            return {(DATA, node): -shrink, (SEEN, node): shrink * (1.0 - param.l) / alpha}
        if param == "ems":
            way = self.between(start, node)
            shrink, here = np.exp(-way.s[-1]), self.model.at("l", [self.nodes[node].lam])[0]
            found: Weights = {(DATA, node): -shrink, (SEEN, node): shrink * (1.0 - here) / alpha}
            return {**found, (CONSTANT, 0): -way.b[-1]}
        return {(DATA, node): -alpha / sigma, (SEEN, node): 1.0 / sigma}

    @property
    def model(self) -> ModelStatistics:
        if self.statistics is None:
            raise ValueError(
                "param 'ems' needs the model's statistics (DPM-Solver-v3), and the schedule names no file of "
                "them: measure them (diffplug schedule measure), then replace(schedule, statistics=FILE)"
            )
        return self.statistics

    def between(self, start: int, end: int) -> Between:
        """The integrals of the model's statistics from one node to another."""
        return self.model.between(self.nodes[start].lam, self.nodes[end].lam)

    def row(self, weights: Weights, i: int) -> Row:
        """The weights as a row at node i, newest first; what was never corrected counts as a state."""
        merged: Weights = defaultdict(float)
        for (history, node), weight in weights.items():
            plain = history == SEEN and not self.corrected(node)
            merged[STATES if plain else history, node] += weight
        ordered = sorted(merged.items(), key=lambda item: _rank(*item[0]))
        terms = tuple(
            Term(history, -1 if history == CONSTANT else node - i - 1, _plain(weight))
            for (history, node), weight in ordered
            if np.any(weight != 0)
        )
        return terms or (Term(DATA, -1, 0.0),)

    def analytic(self, step: TableStep) -> AnalyticStep:
        """The first step without an evaluation: E_0 = x_0 / |(alpha, sigma)|, or D_0 = the data's mean."""
        alpha, sigma = self.nodes[0].alpha, self.nodes[0].sigma
        norm = math.hypot(alpha, sigma)
        mean = self.schedule.mean
        gain = alpha / (norm * (norm + sigma)) if mean is None else 0.0

        def on(*histories: int) -> Weight:
            return sum((term.weight for term in step.predict if term.history in histories), 0.0)

        scale = on(STATES, SEEN) + on(DATA) * gain
        return AnalyticStep(scale, on(DATA), gain, mean or (0.0,), on(CONSTANT))


def _check_weights(step: TableStep) -> None:
    for row in step.rows:
        for term in row:
            largest = np.abs(np.asarray(term.weight)).max()
            if not largest < LARGEST_WEIGHT:
                raise ValueError(
                    f"a weight is {largest:g}, too large to add up: use smaller ratios, deltas or steps"
                )


def _rank(history: int, node: int) -> tuple[bool, bool, int, int]:
    """The order of a row's terms: states, then the others from the newest on, last what is added."""
    return history == CONSTANT, history != STATES, -node, history


def _plain(weight: Any) -> Weight:
    """A float as it is, an array as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(weight)) if np.ndim(weight) else float(weight)
