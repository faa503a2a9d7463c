"""Bad input, as a user gives it: one line that says what is wrong, and nothing run, written or changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dc_runs import NAN, RATIOS
from typer.testing import CliRunner

from diffplug.cli.main import app
from diffplug.network.denoiser import count_network
from diffplug.plug import plug
from diffplug.samplers import (
    CompensationPolynomial,
    DCSolver,
    DCSolverScheduler,
    Solver,
    SolverSchedule,
    SolverScheduler,
)
from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.steps import Delta
from diffplug.testing import tiny

FOUR, INF = [1.0, 1.0, 0.9, 1.2], float("inf")


def at(guidance: Any) -> SolverSchedule:
    return replace(presets.ddim(4), meta={"guidance_scale": guidance})


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny("sd15")


def call(pipe: Any, plugged: Any, **options: Any) -> None:
    with plug(pipe, plugged):
        pipe("a red circle", output_type="latent", **options)


@pytest.mark.law
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DCSolver([1, 1, INF, 1]), "ratio inf of step 2 is not a finite number"),
        (
            lambda: DCSolver([1, 1, 1e20, 1]),
            "ratio 1e.20 of step 2 extrapolates too far: allowed are up to 10",
        ),
        (lambda: DCSolver([FOUR]), "of step 0 is not a finite number"),
        (lambda: DCSolver({}), "an empty dictionary"),
        (lambda: DCSolver({(4, NAN): FOUR}), "key .4, nan. of the DC ratios"),
        (lambda: DCSolver(at("high")), "guidance_scale in the meta is 'high'"),
        (lambda: DCSolver(solver_order=9), "solver_order=9: allowed are 1, 2, 3, 4, 5"),
        (lambda: DCSolver(final_sigmas_type="node"), "allowed are zero, sigma_min"),
        (lambda: DCSolver(timestep_spacing="even"), "allowed are linspace, leading, trailing"),
        (lambda: DCSolver(prediction_type="score"), "allowed are epsilon, v_prediction"),
        (lambda: DCSolver(disable_corrector="0"), "disable_corrector='0': give a list"),
        (lambda: DCSolver(disable_corrector=[-1]), "disable_corrector holds -1"),
        (lambda: Solver(5), "5 is no solver schedule"),
        (lambda: Solver([]), "schedules is empty"),
        (lambda: Solver(FOUR), "1.0 is no solver schedule.*DCSolver"),
        (lambda: Solver("{"), "text of a solver schedule is not valid JSON"),
        (lambda: Solver(at("high")), "guidance_scale in the meta is 'high'"),
        (lambda: Solver(solver="ddim", solver_options={"oder": 2}), "unknown option of ddim 'oder'"),
        (lambda: Solver(solver="dpm++", solver_options=[2]), "give a dictionary of order, kind"),
        (lambda: Nodes(kind="sigmas", values=None), "a grid of sigmas is None"),  # type: ignore[arg-type]
        (lambda: CompensationPolynomial("abc"), "are not numbers"),
        (lambda: CompensationPolynomial(np.zeros(36), steps=(10, 5)), "10 to 5 is no range"),
        (lambda: CompensationPolynomial(np.zeros(36)).ratios(6.5, 5.0), "is 6.5: allowed are whole"),  # type: ignore[arg-type]
        (lambda: CompensationPolynomial(np.zeros(36)).ratios(6, NAN), "guidance_scale=nan lies outside"),
        (lambda: CompensationPolynomial.fit({(4, 5.0): [1, 1, NAN, 1]}), "ratio 2 of 4 steps is nan"),
        (lambda: CompensationPolynomial.fit({4: FOUR}), "key 4 of the searched ratios"),  # type: ignore[dict-item]
        (lambda: SolverScheduler().set_timesteps(True), "give a whole number"),
        (lambda: SolverScheduler().set_timesteps(1000), "two of 1000 steps at the same timestep"),
    ],
    ids=range(28),
)
def test_bad_values_are_refused_at_once(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("plugged", "options", "said"),
    [
        (DCSolver(RATIOS), {"num_inference_steps": 5}, "for 6 steps, the pipeline asked for 5"),
        (DCSolver(RATIOS), {}, "for 6 steps, the pipeline asked for 50"),
        (DCSolver(RATIOS), {"timesteps": [900, 500, 20]}, "for 6 steps, the pipeline asked for 3"),
        (
            DCSolver({(6, 5.0): RATIOS}),
            {"timesteps": [900, 500, 20]},
            "for 6 steps, the pipeline asked for 3",
        ),
        (DCSolver(), {"timesteps": [500, 500, 3]}, "decrease strictly"),
        (DCSolver(), {"timesteps": [500, 300, 0]}, "not above the terminal"),
        (DCSolver(), {"sigmas": [0.4, 1, 3]}, "decrease strictly"),
        (DCSolver(), {"sigmas": [9, NAN, 1]}, "not finite"),
        (DCSolver(), {"sigmas": [INF, 2, 1]}, "not finite"),
        (DCSolver(), {"num_inference_steps": 0}, "whole number of at least 1"),
        (Solver(presets.ddim(4)), {"num_inference_steps": 5}, "for 4 steps, the pipeline asked for 5"),
        (Solver(presets.ddim(4)), {"timesteps": [900, 500, 90, 2]}, "grids of their own"),
        (
            Solver(presets.ddim(2, Nodes(kind="timesteps", values=(1200.0, 300.0), final="zero"))),
            {"num_inference_steps": 2},
            "timesteps of this model end at 999, the grid starts at 1200",
        ),
        (
            Solver(replace(presets.ddim(2), deltas=(None, Delta((1e40,))))),
            {"num_inference_steps": 2},
            "step 1: a weight is 1e.40, too large",
        ),
        (
            Solver(replace(presets.ddim(2), skips=(0.5,))),
            {"num_inference_steps": 2},
            "1 skip coefficients, .*4 skip connections: it was made for another model",
        ),
    ],
    ids=range(15),
)
def test_bad_calls_cost_no_evaluation(pipe: Any, plugged: Any, options: dict[str, Any], said: str) -> None:
    old = pipe.scheduler
    with count_network(pipe) as count, pytest.raises(ValueError, match=said) as caught:
        call(pipe, plugged, **options)
    assert count.calls == 0 and "\n" not in str(caught.value)
    assert pipe.scheduler is old and type(pipe).__call__ is not None


@pytest.mark.pipe
def test_what_may_be_meant_is_run_with_a_warning(pipe: Any) -> None:
    """Another guidance, and another grid, than those of the search."""
    searched = replace(
        presets.unipc(4, final="sigma_min", disable_corrector=(0,)), meta={"guidance_scale": 5.0}
    )
    small = {"height": 16, "width": 16, "guidance_scale": 5.0}
    with pytest.warns(UserWarning, match="of guidance 5, not 9"):
        call(pipe, DCSolver({(4, 5.0): FOUR}), num_inference_steps=4, **{**small, "guidance_scale": 9.0})
    with pytest.warns(UserWarning, match="on the method's own grid, this call brings another"):
        call(pipe, DCSolver(searched), timesteps=[900, 500, 300, 20], **small)
    named = Solver(presets.ipndm(4), solver="dpm++")
    call(pipe, named, timesteps=[900, 500, 300, 20], **small)


@pytest.mark.law
def test_a_plug_that_cannot_be_attached_leaves_the_scheduler() -> None:
    class Uncallable:
        scheduler = DCSolverScheduler()
        unet = torch.nn.Linear(1, 1)

    pipe = Uncallable()
    for plugged in (DCSolver({(4, 5.0): FOUR}), Solver(presets.ddim(4))):
        old = pipe.scheduler
        with pytest.raises(ValueError, match="cannot be called"):
            plugged.attach(pipe)
        assert pipe.scheduler is old


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 1, 0.9]", "DC ratios are for 3 steps, the pipeline asked for 4"),
        ("[1, 1, NaN, 1]", "NaN is no JSON number"),
        ("[1, 1, 1e20, 1]", "extrapolates too far"),
        ('{"format": "solver-schedule", "version": 9}', "version 9, this diffplug reads up to 1: update"),
        ('{"format": "compensation-polynomial", "version": 3}', "update diffplug"),
        ('{"format": "solver-sch', "not valid JSON"),
        ("", "not valid JSON"),
        ('{"a": 1}', "'format' has to be"),
    ],
    ids=range(8),
)
def test_the_command_line_says_it_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    path, out = tmp_path / "file.json", tmp_path / "out"
    path.write_text(text)
    words = ["generate", "a red circle", "--sampler", str(path), "--steps", "4", "-o", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "Traceback" not in done.stderr
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
    assert said in line
    assert path.read_text() == text and not list(out.glob("*.png"))
