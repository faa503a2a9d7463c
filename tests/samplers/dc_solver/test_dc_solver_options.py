"""DC-Solver's options: checked at once, kept by configurations and copies."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from dc_runs import FLOW, NAN, RATIOS, ours, run
from diffusers import DDIMScheduler

from diffplug.samplers import DCSolverScheduler


@pytest.mark.law
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"dc_ratios": [1, 1, NAN]}, "ratio nan of step 2 is not a finite number"),
        ({"dc_ratios": [1, 1, "1.1"]}, "not a finite number"),
        ({"dc_ratios": [1, 1, True]}, "not a finite number"),
        ({"dc_ratios": []}, "empty list"),
        ({"dc_ratios": "1,1,1"}, "are a str"),
        ({"dc_ratios": 1.1}, "are a float"),
        ({"dc_ratios": [1.1, 1, 1]}, "step 0 can do nothing"),
        ({"dc_ratios": [1, 1, 1.1], "dc_order": 3}, "step 2 can do nothing"),
        ({"dc_order": 0}, "allowed are 1 to 3"),
        ({"dc_order": 2.0}, "allowed are 1 to 3"),
        ({"dc_variable": "sigma"}, "'timestep' and 'lambda'"),
        ({"prediction_type": "flow_prediction"}, "use_flow_sigmas=True"),
        ({**FLOW, "predict_x0": False}, "predict_x0=True"),
        ({"dc_ratios": [1, 1, 1.1], "solver_p": DDIMScheduler()}, "solver_p"),
    ],
    ids=str,
)
def test_bad_options_are_refused_at_once(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DCSolverScheduler(**config)


@pytest.mark.law
def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="dc_ratio"):
        DCSolverScheduler(dc_ratio=[1.0])


@pytest.mark.law
def test_ratios_for_another_number_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="DC ratios are for 6 steps, the pipeline asked for 8: run 6 steps"):
        ours(dc_ratios=RATIOS).set_timesteps(8)
    with pytest.raises(ValueError, match="for 6 steps, the pipeline asked for 2"):
        ours(dc_ratios=RATIOS).set_timesteps(sigmas=[5.0, 1.0])


@pytest.mark.law
@pytest.mark.parametrize("wrap", [tuple, np.array, torch.tensor])
def test_ratios_are_kept_by_from_config_and_save(wrap: Any, tmp_path: Any) -> None:
    scheduler = ours(dc_ratios=wrap(RATIOS), dc_variable="lambda")
    assert scheduler.config.dc_ratios == pytest.approx(RATIOS)
    scheduler.save_pretrained(tmp_path)
    for copied in (
        DCSolverScheduler.from_pretrained(tmp_path),
        DCSolverScheduler.from_config(scheduler.config),
        copy.deepcopy(scheduler),
    ):
        assert copied.config.dc_ratios == scheduler.config.dc_ratios
        assert copied.config.dc_variable == "lambda"
        assert torch.equal(run(copied), run(scheduler))


@pytest.mark.law
def test_twins_do_not_share_their_lists() -> None:
    one, other = DCSolverScheduler(), DCSolverScheduler()
    one.disable_corrector.append(3)
    assert other.disable_corrector == [0] == DCSolverScheduler().config.disable_corrector


@pytest.mark.contract
def test_diffusers_can_load_a_saved_pipeline_that_names_this_class() -> None:
    """Its loader searches base classes by name inside the module of the class."""
    import diffplug.samplers.dc_solver.scheduler as module

    assert hasattr(module, "SchedulerMixin")
    assert DCSolverScheduler.__module__ == module.__name__ == "diffplug.samplers.dc_solver.scheduler"
