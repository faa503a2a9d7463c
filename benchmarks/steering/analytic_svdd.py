"""SVDD on chains and on a token model whose laws are known (arXiv 2408.08252)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.steering.analytic_fk import HUMPS, LINEAR, QUADRATIC, STEEP, Case
from benchmarks.steering.chain import Steered
from benchmarks.steering.masked_svdd import handed_over, selected
from benchmarks.steering.rows import Row, moments, normaliser, pooled_moments, spread, weighted_moments
from diffplug.noise.families import level
from diffplug.steering.engine.score_times import every_block
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.islands import Islands
from diffplug.steering.smc.potentials import Difference
from diffplug.steering.smc.resampling import Selector, one_survivor, the_best
from diffplug.testing.closed_form.chain import GAUSSIAN, ddim
from diffplug.testing.closed_form.masked_tokens import MASK, STEPS, STRENGTH, MaskedModel, Z
from diffplug.transition import transition

PART = "SVDD"
_row = partial(Row, part=PART)


def decode(
    case: Case,
    m: int,
    groups: int,
    *,
    count: int = 1,
    tilt: str = "constant",
    block: int = 1,
    rule: Selector = one_survivor,
    **options: Any,
) -> Steered:
    """A chain with m candidates a group; with `count` groups of a population, these are resampled as well."""
    seed = options.get("seed", 0)

    def build(rows: int) -> Any:
        inner = ParticleFilter(
            groups=rows * count,
            particles=m,
            potential=Difference(strength=case.strength, tilt=tilt),
            generators=[torch.Generator().manual_seed(seed + 1)],
            resampler=rule,
        )
        if count == 1:
            return inner
        above = [torch.Generator().manual_seed(seed + 2)]
        return Islands(inner, groups=rows, generators=above, ess_threshold=0.5)

    options.setdefault("plan", every_block(block))
    return case.run(groups, particles=m * count, make_filter=build, **options)


def chosen(run: Steered, case: Case, m: int) -> tuple[float, float, float]:
    """Mean, variance and error of the outputs: in every group one finished candidate, drawn by softmax."""
    x = run.x.reshape(-1, m)
    share = torch.softmax(case.strength * case.reward(x), -1)
    mean, variance, _ = weighted_moments(x, share)
    return mean, variance, float((share * (x - mean)).sum(-1).std() / len(x) ** 0.5)


def _mean_and_variance(
    name: str, found: tuple[float, float, float], mean: float, variance: float | None, slack: float
) -> Iterator[Row]:
    yield _row(case=name, quantity="mean", expected=mean, found=found[0], error=found[2], slack=slack)
    if variance is not None:
        # the error of a variance is taken from that of the mean: exact for a normal law but for sqrt(2)
        error = found[2] * math.sqrt(2 * max(found[1], variance)) * 1.5
        yield _row(
            case=name, quantity="variance", expected=variance, found=found[1], error=error, slack=slack
        )


OUTPUTS: tuple[tuple[Case, int, float, float | None], ...] = (
    (LINEAR, 2, 1.1635, None),
    (LINEAR, 4, 1.2400, None),
    (LINEAR, 8, 1.2832, None),
    (LINEAR, 20, 1.3166, None),
    (LINEAR, 64, 1.3290, None),
    (QUADRATIC, 2, 1.2665, 0.1250),
    (QUADRATIC, 8, 1.4246, 0.0996),
    (QUADRATIC, 20, 1.4602, 0.0976),
    (QUADRATIC, 64, 1.4720, 0.0933),
    (HUMPS, 2, 0.671, 3.75),
    (HUMPS, 8, 1.687, 1.97),
    (HUMPS, 20, 1.851, 1.57),
    (HUMPS, 64, 1.906, 1.42),
)
_OWN_ERROR = {LINEAR.name: 0.016, QUADRATIC.name: 0.016, HUMPS.name: 0.048}  # four of the stated figures' own


def outputs(groups: int) -> Iterator[Row]:
    """Means and variances of what the published rule hands back: biased for few candidates, as stated."""
    for seed, (case, m, mean, variance) in enumerate(OUTPUTS):
        run = decode(case, m, groups, seed=seed)
        name = f"{case.name}, M = {m}"
        yield from _mean_and_variance(name, chosen(run, case, m), mean, variance, _OWN_ERROR[case.name])
        yield normaliser(PART, name, run, case.z)
    for seed, (m, mean) in enumerate(((2, 1.2206), (8, 1.3535), (20, 1.3865), (64, 1.3968)), start=20):
        run = decode(QUADRATIC, m, groups, seed=seed, score=lambda step: soft_value(step.x0, step.index))
        name = f"{QUADRATIC.name}, exact soft value, M = {m}"
        yield from _mean_and_variance(name, chosen(run, QUADRATIC, m), mean, None, 0.016)
        yield normaliser(PART, name, run, QUADRATIC.z)


@cache
def _ahead(steps: int = 20) -> list[tuple[float, float, float, float, float]]:
    """For every call: slope, intercept and variance of x_n given x, and slope and intercept of x0hat in x."""
    scheduler = ddim()
    scheduler.set_timesteps(steps)
    two = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found: list[tuple[float, float, float, float, float]] = []
    slope, intercept, variance = 1.0, 0.0, 0.0
    for t in reversed(scheduler.timesteps):
        here = level(scheduler, t)
        x0 = GAUSSIAN.x0hat(two, here.alpha, here.sigma)
        step = transition(scheduler, (two - here.alpha * x0) / here.sigma, t, two, eta=1.0)
        at_zero, at_one = (float(value) for value in step.mean)
        variance += (slope * float(step.std)) ** 2
        slope, intercept = slope * (at_one - at_zero), intercept + slope * at_zero
        found.insert(0, (slope, intercept, variance, float(x0[1] - x0[0]), float(x0[0])))
    return found


def soft_value(x0: Tensor, call: int) -> Tensor:
    """log E[exp(strength r(x_n)) | x] / strength of the Gaussian chain and the quadratic reward, exactly.

    A state is told by its clean prediction `[n, 1]`, which is linear in it.
    """
    slope, intercept, variance, a, b = _ahead()[call]
    mean = slope * (x0[:, 0] - b) / a + intercept
    lam = QUADRATIC.strength
    spread = 1 + lam * variance
    return (-0.5 * math.log(spread) - 0.5 * lam * (mean - 2) ** 2 / spread) / lam


def greedy(groups: int) -> Iterator[Row]:
    """The best candidate survives: the outputs leave the law of the data, the further the more candidates."""
    stated: tuple[tuple[Case, int, float, float | None], ...] = (
        (LINEAR, 2, 1.871, 0.113),
        (LINEAR, 4, 2.585, 0.082),
        (LINEAR, 8, 3.195, 0.063),
        (LINEAR, 20, 3.879, 0.046),
        (LINEAR, 64, 4.611, 0.034),
        (HUMPS, 2, 2.588, None),
        (HUMPS, 8, 4.165, None),
        (HUMPS, 20, 4.858, None),
        (HUMPS, 64, 5.595, None),
        (QUADRATIC, 64, 2.0, 0.0),
    )
    for seed, (case, m, mean, variance) in enumerate(stated, start=30):
        run = decode(case, m, groups, seed=seed, rule=the_best, one_start=True)
        best = run.x.gather(1, case.reward(run.x).argmax(-1, keepdim=True))[:, 0]
        yield from _mean_and_variance(f"{case.name}, greedy, M = {m}", moments(best), mean, variance, 0.02)


def blocks(groups: int) -> Iterator[Row]:
    """Selecting every few calls stays nearer to the unsteered law (the means before the last choice)."""
    stated: tuple[tuple[Case, int, tuple[float, ...]], ...] = (
        (HUMPS, 8, (1.672, 1.581, 1.030, -0.796)),
        (HUMPS, 4, (1.350, 1.159, 0.563, -0.784)),
        (STEEP, 8, (2.503, 2.248, 1.642, -0.694)),
    )
    for case, m, means in stated:
        for block, mean in zip((2, 5, 10, 20), means, strict=True):
            run = decode(case, m, groups, block=block, seed=40 + block)
            found = moments(run.x.mean(-1))
            yield from _mean_and_variance(f"{case.name}, M = {m}, block {block}", found, mean, None, 0.048)


# case, M, groups of a population, tilt, block, sd of Z_hat/Z, mean and variance of all outputs by weight
WEIGHTS: tuple[tuple[Case, int, int, str, int, float, float, float], ...] = (
    (LINEAR, 2, 1, "constant", 1, 0.634, 1.3321, 0.1666),
    (LINEAR, 8, 1, "constant", 1, 0.299, 1.3321, 0.1666),
    (LINEAR, 4, 4, "constant", 1, 0.215, 1.3321, 0.1666),
    (LINEAR, 4, 4, "rising", 1, 0.240, 1.3321, 0.1666),
    (QUADRATIC, 4, 1, "constant", 1, 0.711, 1.3993, 0.1000),
    (QUADRATIC, 4, 4, "constant", 1, 0.341, 1.3993, 0.1000),
    (QUADRATIC, 4, 4, "rising", 1, 0.267, 1.3993, 0.1000),
    (HUMPS, 2, 1, "constant", 1, 1.48, 1.9505, 0.8588),
    (HUMPS, 4, 4, "constant", 1, 0.651, 1.9505, 0.8588),
    (HUMPS, 4, 4, "rising", 1, 0.499, 1.9505, 0.8588),
    (STEEP, 4, 1, "constant", 1, 9.8, 2.4817, 0.1719),
    (STEEP, 4, 1, "rising", 1, 3.5, 2.4817, 0.1719),
    (STEEP, 4, 4, "rising", 1, 1.02, 2.4817, 0.1719),
    (STEEP, 4, 4, "rising", 2, 1.06, 2.4817, 0.1719),
)


def weights(groups: int) -> Iterator[Row]:
    """With the weight of each group the outputs are exact, whatever M, schedule and tilt; two levels too."""
    for seed, (case, m, count, tilt, block, deviation, mean, variance) in enumerate(WEIGHTS, start=60):
        run = decode(case, m, max(groups // count, 1), count=count, tilt=tilt, block=block, seed=seed)
        levels = "" if count == 1 else f", {count} groups, two levels"
        name = f"{case.name}, M = {m}{levels}, {tilt}" + ("" if block == 1 else f", block {block}")
        heavy = deviation > 2
        yield normaliser(PART, name, run, case.z, shown=heavy)
        if not heavy:
            if case is not STEEP:
                yield spread(PART, name, run, case.z, deviation, slack=0.12)
            yield from _mean_and_variance(f"{name}, weighted", pooled_moments(run), mean, variance, 0.004)


# value of a state, mean reward for M -> infinity, distance to the target, mean for M = 10, and greedily
TOKENS: tuple[tuple[str, float, float, float | None, float | None], ...] = (
    ("exact soft value", 3.02395, 0.0, None, None),
    ("log-mean-exp", 3.02146, 0.0035, 2.320, 3.431),
    ("expected reward", 2.85821, 0.063, 2.111, 3.355),
    ("likeliest tokens", 3.41269, 0.181, 2.080, 2.704),
    ("masks count nothing", 2.29772, 0.281, 1.711, 2.574),
)


def tokens(groups: int) -> Iterator[Row]:
    """A masked token model of 256 states: limits by enumeration, ten candidates by simulation."""
    model = MaskedModel()
    soft_values = model.soft_values[:STEPS]
    target = _limit(model, soft_values)
    for name, mean, distance, soft, best in TOKENS:
        values = soft_values if name == "exact soft value" else [_value(model, name)] * STEPS
        law = _limit(model, values)
        for quantity, expected, found in (
            ("mean, M = inf", mean, float(law @ model.reward(model.states))),
            ("total variation, M = inf", distance, float((law - target).abs().sum() / 2)),
        ):
            yield _row(case=f"tokens, {name}", quantity=quantity, expected=expected, found=found, slack=6e-4)
        for greedy, expected_mean in ((False, soft), (True, best)):
            if expected_mean is not None:
                yield from _simulated(model, name, values[0], groups, greedy, expected_mean)


def _value(model: MaskedModel, name: str) -> Tensor:
    if name == "log-mean-exp":
        return model.log_mean_exp_value
    if name == "expected reward":
        return model.mean_value
    if name == "likeliest tokens":
        likely = torch.where(model.states == MASK, model.marginals.argmax(-1), model.states)
        return model.reward(likely)
    return model.reward(model.states)


def _limit(model: MaskedModel, values: list[Tensor]) -> Tensor:
    """The law of the outputs for infinitely many candidates: every step tilted by the value of where it ends,
    the last by the reward.
    """
    law = torch.zeros(len(model.states), dtype=torch.float64)
    law[model.number(torch.full((model.states.shape[1],), MASK))] = 1.0
    for step, value in enumerate([*values[1:], model.reward(model.states)]):
        tilted = model.kernel(step) * (STRENGTH * value).exp()
        law = law @ (tilted / tilted.sum(-1, keepdim=True))
    return law


def _simulated(
    model: MaskedModel, name: str, value: Tensor, groups: int, greedy: bool, expected: float
) -> Iterator[Row]:
    x, log_z = selected(model, value, groups, 10, greedy=greedy)
    case = f"tokens, {name}, M = 10{', greedy' if greedy else ''}"
    ties = name in ("likeliest tokens", "masks count nothing")  # candidates of equal value all stay here
    mean, _, error = moments(handed_over(model, x, greedy=greedy))
    yield _row(case=case, quantity="mean", expected=expected, found=mean, error=error, slack=0.03, shown=ties)
    if not greedy and not ties:
        ratio, _, error = moments(log_z.exp() / Z)
        yield _row(case=case, quantity="E Z_hat/Z", expected=1.0, found=ratio, error=error)


MEASURES: tuple[Callable[[int], Iterator[Row]], ...] = (outputs, greedy, blocks, weights, tokens)


def rows(groups: int) -> Iterator[Row]:
    """All of it, with this many groups of candidates."""
    for measure in MEASURES:
        yield from measure(groups)
