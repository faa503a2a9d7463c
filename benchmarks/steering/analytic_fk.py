"""Feynman-Kac steering (arXiv 2501.06848) on chains whose laws are known; see `benchmarks.steering.chain`.

Expected figures are exact (normalisers, weighted means for many particles) or long runs of an independent
implementation (means and deviations for few particles).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from benchmarks.steering.chain import Steered, steer
from benchmarks.steering.published import Dropping, Lagging
from benchmarks.steering.rows import (
    Row,
    moments,
    normaliser,
    plain_mean,
    spread,
    weighted_mean,
    weighted_moments,
)
from diffplug.steering.engine import step as engine_module
from diffplug.steering.engine.twins import DuplicateWatch
from diffplug.steering.proposals import Twist, TwistedSteps
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference, Max, MaxIncrement, Potential, Sum
from diffplug.steering.smc.resampling import resample
from diffplug.testing.closed_form.chain import BETAS, GAUSSIAN, TWO_HUMPS, Mixture

PART = "Feynman-Kac"


@dataclass(frozen=True, kw_only=True)
class SumIncrement(Potential):
    """The sum of the rewards so far; only the published code has it, as `rt`."""

    def statistic(self, path: Tensor) -> Tensor:
        """Return sum_{j <= i} r_j."""
        return path.nan_to_num(nan=0.0, neginf=-torch.inf).sum(0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data law with a reward and a strength, and the exact normaliser."""

    name: str
    data: Mixture
    reward: Callable[[Tensor], Tensor]
    strength: float
    z: float

    def run(self, groups: int, **options: Any) -> Steered:
        """A steered run of the chain; options as in `steer`."""
        return steer(self.data, self.reward, strength=self.strength, groups=groups, **options)


def identity(x: Tensor) -> Tensor:
    """The reward r(x) = x."""
    return x


def quadratic(x: Tensor) -> Tensor:
    """The reward r(x) = -(x - 2)^2 / 2."""
    return -0.5 * (x - 2) ** 2


LINEAR = Case(name="Gaussian, linear", data=GAUSSIAN, reward=identity, strength=2.0, z=10.2877135)
QUADRATIC = Case(name="Gaussian, quadratic", data=GAUSSIAN, reward=quadratic, strength=4.0, z=0.2326412)
HUMPS = Case(name="two humps, 1", data=TWO_HUMPS, reward=identity, strength=1.0, z=2.3410407)
STEEP = Case(name="two humps, 3", data=TWO_HUMPS, reward=identity, strength=3.0, z=225.80105)


def five(n: int) -> list[int]:
    """Five calls of twenty, the last one among them."""
    return [4, 8, 12, 16, 19]


def every(n: int) -> range:
    """Every call."""
    return range(n)


def none(n: int) -> tuple[int, ...]:
    """No call."""
    return ()


# k, name, potential, sd of Z_hat/Z, weighted mean, plain mean
POTENTIALS: tuple[tuple[int, str, type[Potential] | None, float, float, float], ...] = (
    (4, "importance sampling", None, 0.488, 1.216, 1.001),
    (4, "difference", Difference, 0.442, 1.238, 1.238),
    (4, "max-increment", MaxIncrement, 0.459, 1.225, 1.132),
    (4, "max", Max, 0.566, 1.244, 1.228),
    (4, "sum of rewards", SumIncrement, 0.656, 1.290, 1.359),
    (4, "sum", Sum, 4.0, 1.381, 1.415),
    (16, "difference", Difference, 0.218, 1.307, 1.307),
    (16, "max", Max, 0.273, 1.308, 1.376),
    (16, "sum", Sum, 5.7, 1.500, 1.657),
)


def potentials(groups: int) -> Iterator[Row]:
    """Every potential at five scored calls, always resampled."""
    for seed, (k, name, kind, deviation, weighted, plain) in enumerate(POTENTIALS):
        built = kind(strength=LINEAR.strength, tilt="constant") if kind else None
        plan = five if kind else none
        run = LINEAR.run(groups * 4 // k, particles=k, plan=plan, potential=built, seed=seed)
        case, heavy = f"{name}, k = {k}", kind is Sum
        yield normaliser(PART, case, run, LINEAR.z, shown=heavy)
        yield weighted_mean(PART, case, run, weighted, slack=0.01 if heavy else 0.004)
        yield plain_mean(PART, case, run, plain, slack=0.01 if heavy else 0.004)
        if kind not in (Sum, SumIncrement):
            yield spread(PART, case, run, LINEAR.z, deviation)


def sizes(groups: int) -> Iterator[Row]:
    """The weighted mean nears the exact one as particles are added; the normaliser is unbiased for all."""
    stated = ((LINEAR, 4, 1.247), (LINEAR, 16, 1.310), (QUADRATIC, 4, 1.353), (QUADRATIC, 16, 1.3915))
    for seed, (case, k, mean) in enumerate((*stated, (QUADRATIC, 64, 1.3967)), start=20):
        run = case.run(groups * 4 // k, particles=k, plan=every, seed=seed)
        name = f"{case.name}, difference at every call, k = {k}"
        yield normaliser(PART, name, run, case.z)
        yield weighted_mean(PART, name, run, mean)


def tilts(groups: int) -> Iterator[Row]:
    """A steep tilt of two humps, 16 particles: what a rising tilt is for."""
    options: dict[str, Any] = {"particles": 16, "plan": every}
    stated: tuple[tuple[str, dict[str, Any], float, float], ...] = (
        ("importance sampling", {"plan": none}, 0.96, 2.237),
        ("difference, constant", {}, 5.7, 2.557),
        ("difference, constant, ESS < k/2", {"ess_threshold": 0.5}, 2.8, 2.511),
        ("difference, rising", {"tilt": "rising"}, 0.76, 2.474),
    )
    for seed, (name, extra, deviation, mean) in enumerate(stated, start=30):
        run = STEEP.run(groups // 4, seed=seed, **{**options, **extra})
        heavy = deviation > 1
        yield normaliser(PART, f"{STEEP.name}: {name}", run, STEEP.z, shown=heavy)
        yield weighted_mean(PART, f"{STEEP.name}: {name}", run, mean, slack=0.01)
        if not heavy:
            yield spread(PART, f"{STEEP.name}: {name}", run, STEEP.z, deviation, slack=0.25)
    adaptive = Difference(strength=1.0, tilt="adaptive", target_ess=0.5)
    run = HUMPS.run(groups // 4, particles=4, plan=every, potential=adaptive, ess_threshold=None)
    yield normaliser(PART, f"{HUMPS.name}: tilt that keeps ESS = k/2", run, HUMPS.z)


def traps(groups: int) -> Iterator[Row]:
    """Plausible but wrong versions give other numbers than the right ones, and these are known too."""
    rule: dict[str, Any] = {"plan": every, "ess_threshold": 0.5, "seed": 40}
    yield weighted_mean(PART, "ESS < k/2, weights carried", LINEAR.run(groups, **rule), 1.215)
    dropped = LINEAR.run(groups, **rule, make_filter=lambda n: _dropping(n, 4, LINEAR.strength))
    yield weighted_mean(PART, "trap: weights dropped (unsteered mean)", dropped, 0.9965)
    yield weighted_mean(
        PART, "copies before the step", STEEP.run(groups, plan=every, seed=41), 2.456, slack=0.01
    )
    lagged = STEEP.run(groups, plan=every, stand=Lagging, seed=41)
    yield weighted_mean(PART, "trap: copies after the step", lagged, 2.170, slack=0.015)
    yield from _history(groups)
    yield _distinct(groups // 10)
    yield from _drift(groups)


def _dropping(groups: int, k: int, strength: float) -> ParticleFilter:
    return Dropping(
        groups=groups,
        particles=k,
        potential=Difference(strength=strength, tilt="constant"),
        generators=[torch.Generator().manual_seed(1)],
        ess_threshold=0.5,
    )


def _history(groups: int) -> Iterator[Row]:
    """A solver of second order, its history moved with its particle or not; diffusion and flow."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    name = "SDE-DPM-Solver++(2M)"
    yield from _moved(name, groups, {}, (0.99883, 0.16273), ratio=1.0, variance=0.160)
    yield from _moved(f"flow {name}", groups, flow, (1.0, 0.15196), ratio=1.0)
    with mock.patch.object(engine_module, "reindex_scheduler", lambda *given: None):
        left = "trap: history left behind,"
        yield from _moved(f"{left} {name}", groups, {}, (0.99883, 0.16273), ratio=1.0153, variance=0.183)
        yield from _moved(f"{left} flow {name}", groups, flow, (1.0, 0.15196), ratio=1.0131)


def _moved(
    case: str,
    groups: int,
    options: dict[str, Any],
    base: tuple[float, float],
    *,
    ratio: float,
    variance: float | None = None,
) -> Iterator[Row]:
    """Normaliser and weighted variance of ten steps with 16 particles; base: mean and variance unsteered."""
    run = LINEAR.run(groups, particles=16, plan=every, steps=10, scheduler=_sde(**options), seed=42)
    found, error, _ = run.ratio(math.exp(2 * base[0] + 2 * base[1]))
    yield Row(
        part=PART, case=case, quantity="E Z_hat/Z", expected=ratio, found=found, error=error, slack=0.002
    )
    if variance is not None:
        share = torch.softmax(run.logw, -1)
        found = weighted_moments(run.x, share)[1]
        yield Row(
            part=PART,
            case=case,
            quantity="weighted variance",
            expected=variance,
            found=found,
            slack=0.006,
        )


def _sde(**options: Any) -> Any:
    kept = {"timestep_spacing": "trailing"} if options else BETAS
    return DPMSolverMultistepScheduler(**kept, algorithm_type="sde-dpmsolver++", solver_order=2, **options)


def _distinct(groups: int) -> Row:
    """How many different ends eight particles reach with a deterministic solver."""
    watch = DuplicateWatch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = LINEAR.run(
            groups,
            particles=8,
            plan=every,
            scheduler=DPMSolverMultistepScheduler(**BETAS, solver_order=2),
            watch=watch,
        )
    found, _, error = moments(torch.tensor([float(len(row.unique())) for row in run.x]))
    return Row(
        part=PART,
        case=f"trap: deterministic solver, k = 8 (warned: {watch.warned})",
        quantity="distinct ends",
        expected=5.8,
        found=found,
        error=error,
        slack=0.1,
    )


def _drift(groups: int) -> Iterator[Row]:
    """Roots left of four after four passes over weights that are equal but for a jitter of 1e-12."""
    for scheme, expected in (("systematic", 4.0), ("multinomial", 1.58)):
        generator = torch.Generator().manual_seed(0)
        roots = torch.arange(4).expand(groups, 4)
        for _ in range(4):
            jitter = 1e-12 * torch.rand(groups, 4, generator=generator, dtype=torch.float64)
            roots = roots.gather(-1, resample(jitter, generator, scheme))
        left, _, error = moments(torch.zeros(groups, 4).scatter(-1, roots, 1.0).sum(-1))
        yield Row(
            part=PART,
            case=f"equal weights, {scheme}, 4 passes",
            quantity="roots of 4",
            expected=expected,
            found=left,
            error=error,
            slack=0.005,
        )


def twists(groups: int) -> Iterator[Row]:
    """Proposals along the gradient: exact for every slope, nearly without variance for the right one."""
    stated: tuple[tuple[Case, Callable[[Tensor], Tensor], tuple[float, ...]], ...] = (
        (LINEAR, torch.ones_like, (0.433, 0.017, 0.55)),
        (QUADRATIC, lambda x0: 2 - x0, (0.582, 0.237, 1.88)),
        (HUMPS, torch.ones_like, (1.04, 0.86, 0.64)),
    )
    for seed, (case, slope, deviations) in enumerate(stated, start=50):
        for prior, deviation in zip((None, 0.5, 1.0), deviations, strict=True):
            twist = None if prior is None else TwistedSteps(Twist(1e9, prior), slope, strength=case.strength)
            run = case.run(groups, plan=every, proposal=twist, seed=seed)
            title = f"{case.name}, {'no gradient' if prior is None else f'gradient, spread {prior}'}"
            heavy = deviation > 1
            yield normaliser(PART, title, run, case.z, shown=heavy)
            if not heavy:
                yield spread(PART, title, run, case.z, deviation, slack=0.15)


def rows(groups: int) -> Iterator[Row]:
    """All of it; `groups` is the number of populations of 4 particles."""
    for measure in (potentials, sizes, tilts, traps, twists):
        yield from measure(groups)
