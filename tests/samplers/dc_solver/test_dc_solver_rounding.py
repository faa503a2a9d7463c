"""How far neutral DC-Solver is from UniPC: UniPC rounds its numbers to float32, ours are float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from dc_runs import SD, network, ours, run, start
from diffusers import UniPCMultistepScheduler
from torch import Tensor
from unipc_arithmetic import UniPCArithmetic

STEPS, OFF = 8, (0,)
ORDERS = pytest.mark.parametrize("order", [1, 2, 3])
KINDS = pytest.mark.parametrize("kind", ["bh1", "bh2"])
PARAMS = pytest.mark.parametrize("predict_x0", [True, False], ids=["data", "noise"])


def options(order: int, kind: str, predict_x0: bool) -> dict[str, Any]:
    return {"solver_order": order, "solver_type": kind, "predict_x0": predict_x0}


def unipc(**config: Any) -> UniPCMultistepScheduler:
    fixed = {"final_sigmas_type": "sigma_min", "disable_corrector": list(OFF)}
    return UniPCMultistepScheduler(**SD, **fixed, **config)


def arithmetic(dtype: torch.dtype, kind: str, predict_x0: bool) -> UniPCArithmetic:
    scheduler = ours()
    scheduler.set_timesteps(STEPS)
    return UniPCArithmetic(scheduler.sigmas.to(dtype), kind, predict_x0)


@pytest.mark.contract
@ORDERS
@KINDS
@PARAMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_numbers_in_float32_it_is_diffusers_bit_for_bit(
    order: int, kind: str, predict_x0: bool, dtype: torch.dtype
) -> None:
    stock = run(unipc(**options(order, kind, predict_x0)), dtype, STEPS)
    again = arithmetic(torch.float32, kind, predict_x0).run(network, start(dtype), order, OFF)
    assert torch.equal(again, stock)


@pytest.mark.law
@ORDERS
@KINDS
@PARAMS
def test_with_numbers_in_float64_it_is_ours(order: int, kind: str, predict_x0: bool) -> None:
    """In float64; what is left is the order of adding up, a few parts in 10^15 of the largest value."""
    wanted = arithmetic(torch.float64, kind, predict_x0).run(network, start(), order, OFF)
    got = run(ours(**options(order, kind, predict_x0)), steps=STEPS)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-14 * float(wanted.abs().max()))


def step_errors(order: int, kind: str, predict_x0: bool) -> list[tuple[float, float, int]]:
    """(of ours, of UniPC's, number of terms) for each step of a float32 run.

    Errors are the largest distance of an entry from the exact update of the same states and stored
    predictions, in roundings: halves of a unit in the last place of the largest number that is added up.
    """
    scheduler = ours(**options(order, kind, predict_x0))
    scheduler.set_timesteps(STEPS)
    exact, rough = (arithmetic(dtype, kind, predict_x0) for dtype in (torch.float64, torch.float32))
    x, outputs, found = start(torch.float32), list[Tensor](), []
    for i, t in enumerate(scheduler.timesteps):
        outputs.insert(0, network(x, i))
        x = scheduler.step(outputs[0], t, x).prev_sample
        state, used = scheduler.solver_states[-1], min(order, i + 1, STEPS - i)
        history = scheduler.model_outputs[::-1] if predict_x0 else outputs
        wanted = exact.update(i, state.double(), [each.double() for each in history], used)
        parts = terms(scheduler, i)
        unit = torch.stack(parts).amax(0).double() * torch.finfo(torch.float32).eps / 2
        theirs = rough.update(i, state, history, used)
        off = [float(((each - wanted) / unit).abs().max()) for each in (x, theirs)]
        found.append((off[0], off[1], len(parts)))
    return found


def terms(scheduler: Any, i: int) -> list[Tensor]:
    """What is added up at step i, without signs."""
    kept = (scheduler.model_outputs, scheduler.solver_states, scheduler.seen_samples)
    row = scheduler._table.steps[i].predict
    return [abs(term.weight) * kept[term.history][term.back].abs() for term in row]


@pytest.mark.law
@ORDERS
@KINDS
@PARAMS
def test_a_step_in_float32_is_a_rounding_of_each_number_away(order: int, kind: str, predict_x0: bool) -> None:
    """Each term rounds its weight, its product and its sum, no more."""
    assert all(ours <= 3 * count for ours, _, count in step_errors(order, kind, predict_x0))


@pytest.mark.law
def test_numbers_in_float32_cost_unipc_more_than_the_rounding_of_its_terms() -> None:
    cases = itertools.product([1, 2, 3], ["bh1", "bh2"], [True, False])
    found = [each for case in cases for each in step_errors(*case)]
    assert sum(ours for ours, _, _ in found) < 0.9 * sum(theirs for _, theirs, _ in found)
