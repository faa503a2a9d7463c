"""Tables: exact where the answer is known, of the right order, and the same as formulas written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from table_runs import FLOW_LEVELS, VP_LEVELS, ours, start
from torch import Tensor

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Delta, Derivative, Linear, Scale, SolverStep, Update
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.solver.exponential import difference_weights, moment, phi, relaxation

WIDE = NoiseLevels(np.geomspace(1e-3, 200.0, 1000))


def even(low: float, high: float, steps: int) -> Nodes:
    """Nodes even in lambda."""
    return Nodes(kind="lambda", values=tuple(np.linspace(low, high, steps + 1).tolist()))


# --------------------------------------------------------------------------------- exponential integrals


@pytest.mark.law
@pytest.mark.parametrize("k", range(6))
def test_phi_is_right_on_both_sides_of_the_seam(k: int) -> None:
    for z in (-30.0, -1.0000001, -0.9999999, -0.02, 0.0, 1e-9, 0.1, 0.9999999, 1.0000001, 20.0):
        terms = [z**n / math.factorial(n + k) for n in range(160)]
        exact = math.fsum(terms) if z > -5 else None
        if exact is not None:
            assert phi(k, z) == pytest.approx(exact, rel=1e-12)
    assert phi(k, -math.inf) == 0.0
    assert moment(0, math.inf, -math.inf) == 1.0


@pytest.mark.law
def test_moments_integrate_monomials() -> None:
    """h^(k+1) phi_{k+1}(z) is the integral of e^(z (1 - u)) (h u)^k / k! over a step."""
    u = (np.arange(20000) + 0.5) / 20000
    for h, k in ((0.7, 0), (0.7, 2), (2.5, 1)):
        integral = h * np.mean(np.exp(-h * (1 - u)) * (h * u) ** k / math.factorial(k))
        assert moment(k, h, -h) == pytest.approx(integral, rel=1e-6)


@pytest.mark.law
def test_difference_weights_are_exact_for_polynomials() -> None:
    offsets = [-0.4, -1.1, 0.7]
    for k in (1, 2, 3):
        weights = difference_weights(offsets, k)
        for degree in range(4):
            got = sum(w * (o**degree - 0.0**degree) for w, o in zip(weights, offsets, strict=True))
            assert got == pytest.approx(math.factorial(k) if degree == k else 0.0, abs=1e-10)


@pytest.mark.law
def test_relaxations_are_one_at_small_steps() -> None:
    for kind, c, slope in (("bh2", 0, 1 / 6), ("bh1", 0, -1 / 3), ("exp", 0.5, 0.5), ("linear", 0.3, 0.3)):
        for h in (1e-3, 1e-2):
            assert relaxation(kind, c, h, h) == pytest.approx(1 + slope * h, abs=h * h)
    assert relaxation("bh2", 0, 2.0, -2.0) == pytest.approx(-1 * math.expm1(-2.0) / (math.expm1(-2.0) + 2.0))


# ---------------------------------------------------------------------------------------- exact properties


def every(steps: int, nodes: Any) -> dict[str, SolverSchedule]:
    """One schedule of each kind."""
    ratio = [1.0, 1.0, 0.6, 1.7, -0.4, 1.3, 1.1]
    compensated = presets.unipc(steps, nodes)
    decided = tuple(replace(s, ratio=ratio[i]) for i, s in enumerate(compensated.steps))
    mixed = (
        SolverStep(param="noise"),
        *(
            SolverStep(
                param="noise" if i % 2 else "data",
                predict=Update(order=2, derivatives=(Derivative((-1,), Scale("linear", 0.2)),)),
                correct=Update(order=2, derivatives=(Derivative((1,)),)),
            )
            for i in range(1, steps - 1)
        ),
        SolverStep(),
    )
    return {
        "unipc-3": presets.unipc(steps, nodes, order=3),
        "unipc-noise": presets.unipc(steps, nodes, order=3, param="noise"),
        "dpm++-3": presets.dpmpp(steps, nodes, order=3),
        "deis": presets.deis(steps, nodes, order=3),
        "ipndm": presets.ipndm(steps, nodes),
        "singlestep": presets.singlestep(steps, nodes, order=3),
        "compensated": replace(compensated, steps=decided),
        "mixed": replace(compensated, steps=mixed),
    }


@pytest.mark.law
@pytest.mark.parametrize("name", every(7, "linspace"))
@pytest.mark.parametrize("variable", ["timestep", "lambda"])
def test_a_point_mass_is_exact(name: str, variable: str) -> None:
    """All weights sum to what keeps a constant prediction: 1e-12, for any decisions and any ratios."""
    for levels, grid in ((VP_LEVELS, "linspace"), (VP_LEVELS, even(-2.0, 2.0, 7)), (FLOW_LEVELS, "trailing")):
        schedule = every(7, grid)[name]
        if levels.flow and name in ("unipc-noise", "mixed"):
            continue  # noise predictions cannot start from pure noise
        table = compile_schedule(replace(schedule, compensation=(2, variable)), levels)
        x = table.run(lambda x, i: torch.full_like(x, 0.7), start())
        one, end = table.levels[0], table.levels[-1]
        exact = end.alpha * 0.7 + end.sigma / one.sigma * (start() - one.alpha * 0.7)
        torch.testing.assert_close(x, exact, rtol=0, atol=1e-11)


@pytest.mark.law
def test_a_constant_noise_prediction_is_exact_too() -> None:
    for name in ("unipc-noise", "deis", "ipndm"):
        schedule = every(7, even(-2.0, 2.0, 7))[name]
        table = compile_schedule(schedule, VP_LEVELS)
        eps = start().flip(0)

        def denoise(x: Tensor, i: int, at: Any = table.levels, eps: Tensor = eps) -> Tensor:
            return (x - at[i].sigma * eps) / at[i].alpha

        x = table.run(denoise, start())
        one, end = table.levels[0], table.levels[-1]
        exact = end.alpha / one.alpha * (start() - one.sigma * eps) + end.sigma * eps
        torch.testing.assert_close(x, exact, rtol=0, atol=1e-11)


def error(schedule: SolverSchedule) -> float:
    """Of the final state for data N(0.5, 0.3), against the exact solution of the ODE."""
    table = compile_schedule(schedule, WIDE)
    spread = [(at.alpha**2 * 0.3 + at.sigma**2) ** 0.5 for at in table.levels]

    def denoise(x: Tensor, i: int) -> Tensor:
        at = table.levels[i]
        return 0.5 + at.alpha * 0.3 / spread[i] ** 2 * (x - at.alpha * 0.5)

    x = torch.tensor([[1.7], [-0.4]], dtype=torch.float64)
    end, one = table.levels[-1], table.levels[0]
    exact = end.alpha * 0.5 + spread[-1] / spread[0] * (x - one.alpha * 0.5)
    return float((table.run(denoise, x) - exact).abs().max())


def slope(make: Any, **options: Any) -> float:
    counts = (20, 40, 80, 160)
    errors = [error(make(n, even(-2.5, 2.5, n), **options)) for n in counts]
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])


FREE = {"lower_order_final": False}
OFF = {"disable_corrector": range(200), **FREE}


@pytest.mark.law
@pytest.mark.parametrize(
    ("make", "options", "low", "high"),
    [
        (presets.ddim, {}, 0.9, 1.1),
        (presets.unipc, {"order": 1, **OFF}, 0.9, 1.1),
        (presets.unipc, {"order": 1, **FREE}, 1.8, 2.2),
        (presets.unipc, {"order": 2, "kind": "bh1", **OFF}, 1.8, 2.2),
        (presets.unipc, {"order": 2, **OFF}, 1.8, 2.2),
        (presets.unipc, {"order": 2, "kind": "bh1", **FREE}, 2.8, 3.25),
        (presets.unipc, {"order": 2, **FREE}, 2.8, 3.25),
        (
            presets.unipc,
            {"order": 2},
            0.9,
            2.2,
        ),  # lower orders at the end help a few steps and cost the order
        (presets.unipc, {"order": 3, **FREE}, 3.4, 4.3),
        (presets.unipc, {"order": 2, "param": "noise", **FREE}, 2.7, 3.3),
        (presets.res_multistep, {}, 1.8, 2.2),
        (presets.deis, {"order": 3, **FREE}, 1.8, 2.8),
        (presets.ipndm, {}, 1.7, 2.4),
        (presets.singlestep, {"order": 2}, 1.8, 2.3),
        (presets.singlestep, {"order": 3, "kind": "heun"}, 1.7, 2.4),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_order_of_convergence(make: Any, options: dict[str, Any], low: float, high: float) -> None:
    """A first step of order 1 limits what is not corrected to order 2 in all."""
    assert low < slope(make, **options) < high


@pytest.mark.law
def test_a_constant_ratio_costs_the_order() -> None:
    def compensated(n: int, nodes: Nodes) -> SolverSchedule:
        plain = presets.unipc(n, nodes, **FREE)
        steps = tuple(replace(s, ratio=1.1 if i > 1 else 1.0) for i, s in enumerate(plain.steps))
        return replace(plain, steps=steps, compensation=(2, "lambda"))

    assert slope(compensated) == pytest.approx(1.0, abs=0.25)


def local_error(order: int, points: tuple[tuple[int, ...], ...], param: Any, scale: Scale, h: float) -> float:
    """Of the last of `order` steps of size h, all evaluations of the others exact; data N(0.5, 0.3)."""
    derivatives = tuple(Derivative(p, scale if k == 0 else Scale()) for k, p in enumerate(points))
    last = SolverStep(param=param, predict=Update(order=order, derivatives=derivatives))
    lambdas = tuple(0.3 + h * i for i in range(-order + 1, 2))
    steps = (*[SolverStep()] * (order - 1), last)
    schedule = SolverSchedule(nodes=Nodes(kind="lambda", values=lambdas), steps=steps)
    table = compile_schedule(schedule, WIDE)
    spread = [(at.alpha**2 * 0.3 + at.sigma**2) ** 0.5 for at in table.levels]
    states = [table.levels[i].alpha * 0.5 + spread[i] * 1.3 for i in range(len(spread))]
    data = [
        0.5 + at.alpha * 0.3 / spread[i] ** 2 * (states[i] - at.alpha * 0.5)
        for i, at in enumerate(table.levels)
    ]
    got = 0.0
    for term in table.steps[-1].predict:
        node = order + term.back
        got += term.weight * (data[node] if term.history == 0 else states[node])
    return abs(got - states[-1])


@pytest.mark.law
@pytest.mark.parametrize("param", ["data", "noise", Linear(0.6, -0.3)], ids=str)
@pytest.mark.parametrize(
    ("order", "points", "scale", "wanted"),
    [
        (1, (), Scale(), 2.0),
        (2, ((-1,),), Scale(), 3.0),
        (2, ((-1,),), Scale("bh1"), 3.0),
        (2, ((-1,),), Scale("linear", -0.2), 3.0),
        (3, ((-1, -2), (-1, -2)), Scale(), 4.0),
        (4, ((-1, -2, -3),) * 3, Scale(), 5.0),
    ],
    ids=str,
)
def test_local_errors_fall_with_the_order(
    param: Any, order: int, points: Any, scale: Scale, wanted: float
) -> None:
    one, two = (local_error(order, points, param, scale, h) for h in (0.08, 0.04))
    assert math.log2(one / two) == pytest.approx(wanted, abs=0.5)


@pytest.mark.law
def test_the_two_scalar_form_holds_noise_and_data_prediction() -> None:
    for name, other in (("data", Linear(1.0, 0.0)), ("noise", Linear(0.0, -1.0))):
        plain = presets.unipc(7, even(-2.0, 2.0, 7), order=3, param=name)
        steps = tuple(replace(step, param=other) for step in plain.steps)
        torch.testing.assert_close(ours(replace(plain, steps=steps)), ours(plain), rtol=0, atol=1e-11)


@pytest.mark.law
def test_scaling_the_latents_changes_nothing() -> None:
    """A VP and a flow model with the same lambdas: x / alpha is the same state."""
    nodes = even(-2.0, 2.0, 6)
    for name, schedule in every(6, nodes).items():
        if name == "compensated":
            schedule = replace(schedule, compensation=(2, "lambda"))
        ends = []
        for levels in (VP_LEVELS, FLOW_LEVELS):
            table = compile_schedule(schedule, levels)
            one, end = table.levels[0], table.levels[-1]
            x = table.run(lambda x, i, t=table: torch.tanh(x / t.levels[i].alpha), start() * one.alpha)  # type: ignore[misc]
            ends.append(x / end.alpha)
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------- learned rows, late starts


@pytest.mark.law
def test_deltas_are_added_to_the_predictors_rows() -> None:
    schedule = presets.dpmpp(3, even(-2.0, 2.0, 3), lower_order_final=False)
    deltas = (None, Delta((0.1, -0.2), (0.01,)), Delta((0.0, 0.0, 0.3), (0.0, 0.02, 0.5)))
    plain, learned = (compile_schedule(s, VP_LEVELS) for s in (schedule, replace(schedule, deltas=deltas)))
    for i, delta in enumerate(deltas):
        before = {(t.history, t.back): t.weight for t in plain.steps[i].predict}
        after = {(t.history, t.back): t.weight for t in learned.steps[i].predict}
        for history, numbers in ((0, delta.data if delta else ()), (1, delta.states if delta else ())):
            for back, number in enumerate(numbers):
                key = (history, -back - 1)
                assert after.get(key, 0.0) == pytest.approx(before.get(key, 0.0) + number, abs=1e-15)
    late = compile_schedule(replace(schedule, deltas=deltas), VP_LEVELS, begin=1)
    assert late.steps[2].predict == compile_schedule(schedule, VP_LEVELS, begin=1).steps[2].predict


@pytest.mark.law
def test_a_schedule_that_needs_statistics_is_refused_when_compiled() -> None:
    steps = (SolverStep(), SolverStep(param="ems"))
    schedule = SolverSchedule(nodes=even(-2.0, 2.0, 2), steps=steps)
    with pytest.raises(ValueError, match="step 1: param 'ems' needs the model's statistics"):
        compile_schedule(schedule, VP_LEVELS)


@pytest.mark.law
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sigmas": [3.0, 2.0, 1.0]}, "3 steps need 4 sigmas, got 3"),
        ({"sigmas": [3.0, 3.0, 3.0, 1.0]}, "has to increase|same noise level"),
        ({"sigmas": [1.0, 2.0, 3.0, 4.0]}, "has to increase"),
        ({"begin": 3}, "begin=3 is outside"),
    ],
    ids=str,
)
def test_nodes_that_cannot_be_computed_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compile_schedule(presets.dpmpp(3, lower_order_final=False, final="sigma_min"), VP_LEVELS, **given)


@pytest.mark.law
def test_noise_predictions_do_not_start_from_pure_noise() -> None:
    with pytest.raises(
        ValueError, match="step 1: param 'noise' cannot start where there is almost no signal"
    ):
        compile_schedule(presets.unipc(4, param="noise"), FLOW_LEVELS)
