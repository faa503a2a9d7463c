"""Steps that stand on a model's statistics: the limits, a model for which they are exact, files, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from table_runs import SD, VP_LEVELS, noise_of, ours, start
from torch import Tensor
from usf_schedules import usf_schedules

from diffplug import plug
from diffplug.samplers import Solver, SolverSchedule
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.steps import Derivative, Scale, SolverStep, Update
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.solver.scheduler import SolverScheduler
from diffplug.samplers.solver.statistics import ModelStatistics, load_statistics
from diffplug.testing import tiny

USF = usf_schedules()
LAMBDAS = np.linspace(-6.0, 8.0, 57)
SHAPES: list[tuple[int, ...]] = [(), (3, 1, 1), (3, 4, 4)]


def constant(l: float, s: float, shape: tuple[int, ...] = ()) -> ModelStatistics:  # noqa: E741
    made = {name: np.full((57, *shape), value) for name, value in (("l", l), ("s", s), ("b", 0.0))}
    return ModelStatistics(lambdas=LAMBDAS, **made)


def some(shape: tuple[int, ...] = ()) -> ModelStatistics:
    """Smooth statistics, others for each element."""
    rng = np.random.default_rng(0)
    at = LAMBDAS.reshape(-1, *(1,) * len(shape))
    phase = rng.uniform(0, 3, shape)
    return ModelStatistics(
        lambdas=LAMBDAS,
        l=0.5 + 0.4 * np.tanh(at + phase),
        s=-0.3 + 0.2 * np.sin(at + phase),
        b=0.3 * np.cos(at + 2 * phase),
    )


@pytest.mark.law
@pytest.mark.parametrize("shape", [(), (3, 4, 4)], ids=str)
@pytest.mark.parametrize(("l", "s", "param"), [(1.0, 0.0, "data"), (0.0, -1.0, "noise")])
def test_two_kinds_of_statistics_are_data_and_noise_prediction(
    l: float,  # noqa: E741
    s: float,
    param: str,
    shape: tuple[int, ...],
) -> None:
    """All forty published schedules run, and nothing of them changes beyond the integrals' own error."""
    for schedule in [*USF.values()][:: 5 if shape else 1]:
        steps = tuple(replace(each, param=param) if each.param == "ems" else each for each in schedule.steps)
        plain, found = ours(replace(schedule, steps=steps)), ours(schedule, statistics=constant(l, s, shape))
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=5e-5)


def exact(statistics: ModelStatistics, lams: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(F at every lambda, x at the last one) for the network (alpha F + l x) / sigma, with F' = s F + b."""

    def change(lam: float, both: np.ndarray) -> np.ndarray:
        y, f = both.reshape(2, *x.shape)
        l, s, b = (statistics.at(name, [lam])[0] for name in ("l", "s", "b"))  # noqa: E741
        return np.stack([-(f + l * y), s * f + b + 0 * f]).ravel()

    alphas = [VP_LEVELS.level(float(np.exp(-lam))).alpha for lam in (lams[0], lams[-1])]
    begin = np.stack([x.numpy() / alphas[0], np.full(x.shape, 0.7)]).ravel()
    solved = solve_ivp(change, (lams[0], lams[-1]), begin, t_eval=lams, rtol=1e-8, atol=1e-9, max_step=0.1)
    y, f = torch.from_numpy(solved.y.T.reshape(len(lams), 2, *x.shape)).unbind(1)
    return f, alphas[1] * y[-1]


STEPS = {
    "first order": SolverStep(param="ems"),
    "second, relaxed": SolverStep(
        param="ems", predict=Update(order=2, derivatives=(Derivative((-1,), Scale("linear", 0.3)),))
    ),
    "third": SolverStep(param="ems", predict=Update(order=3, derivatives=(Derivative((-1, -2)),) * 2)),
    "corrected": SolverStep(param="ems", correct=Update(order=2, derivatives=(Derivative((1,)),))),
}


@pytest.mark.law
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_statistics_foresee_is_integrated_exactly(name: str, shape: tuple[int, ...]) -> None:
    """Where g does not change on the way, coarse steps of any order are as good as fine ones."""
    statistics, step = some(shape), STEPS[name]
    lams = (-2.5, -1.6, -0.4, 0.8, 1.5, 2.6)
    known, wanted = exact(statistics, lams, start())
    steps = (STEPS["first order"], STEPS["second, relaxed"] if name == "third" else step, *[step] * 2)
    last = replace(step, correct=None)
    schedule = SolverSchedule(nodes=Nodes(kind="lambda", values=lams), steps=(*steps, last))

    def error(schedule: SolverSchedule) -> float:
        table = compile_schedule(schedule, VP_LEVELS, statistics=statistics)

        def denoise(x: Tensor, i: int) -> Tensor:
            at = table.levels[i]
            l = torch.from_numpy(np.asarray(statistics.at("l", [at.lam])[0]))  # noqa: E741
            return (x - at.alpha * known[i] - l * x) / at.alpha

        return float((table.run(denoise, start()) - wanted).abs().max())

    assert error(schedule) < 1e-5
    assert error(replace(schedule, steps=tuple(replace(each, param="data") for each in schedule.steps))) > 0.1


@pytest.mark.law
def test_interpolation_is_linear_and_constant_beyond() -> None:
    made = ModelStatistics(lambdas=[0.0, 1.0, 3.0], l=[0.0, 1.0, 5.0], s=[0.0] * 3, b=[0.0] * 3)
    assert made.at("l", [-1.0, 0.25, 1.0, 2.0, 9.0]).tolist() == [0.0, 0.25, 1.0, 3.0, 5.0]
    there, back = made.between(0.2, 2.0), made.between(2.0, 0.2)
    assert there.l[-1] == pytest.approx(0.8 * 0.6 + 2.0, rel=1e-4)
    assert back.l[-1] == pytest.approx(-there.l[-1])


def ems(shape: tuple[int, ...], path: Path, name: str = "cifar10_sde_nfe5") -> SolverSchedule:
    some(shape).save(path)
    mean = None if USF[name].mean is None else (0.1, -0.2, 0.3)
    return replace(USF[name], statistics=str(path), skips=None, mean=mean)


@pytest.mark.law
@pytest.mark.parametrize("name", ["cifar10_sde_nfe5", "cifar10_edm_nfe8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_scheduler_runs_what_the_table_says(shape: tuple[int, ...], name: str, tmp_path: Path) -> None:
    """Analytic first steps included, which scale the noise element by element here."""
    schedule = ems(shape, tmp_path / "s.safetensors", name)
    scheduler = SolverScheduler(**SD, schedules=schedule)
    scheduler.set_timesteps(schedule.nfe)
    hidden = len(schedule.steps) - schedule.nfe
    x = start() * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(noise_of(seen, i + hidden), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, ours(schedule), rtol=1e-5, atol=1e-5)
    assert x.dtype == torch.float64


@pytest.mark.pipe
def test_schedule_and_statistics_lie_side_by_side(tmp_path: Path) -> None:
    pipe, folder = tiny("sd15"), tmp_path / "a"
    folder.mkdir()
    channels = pipe.unet.config.in_channels
    schedule = ems((channels, 1, 1), folder / "s.safetensors", "stable_diffusion_nfe5")
    schedule.save(folder / "five.json")
    moved = folder.rename(tmp_path / "b")
    found = SolverSchedule.load(moved / "five.json")
    assert found.statistics == str(moved / "s.safetensors")
    inputs = {**tiny.inputs("sd15"), "num_inference_steps": 5}
    with plug(pipe, Solver(str(moved / "five.json"))):
        one = pipe(**inputs)[0]
    with plug(pipe, Solver(replace(found, steps=tuple(replace(s, param="data") for s in found.steps)))):
        other = pipe(**inputs)[0]
    assert not np.array_equal(np.asarray(one), np.asarray(other))
    (moved / "s.safetensors").unlink()
    said = r"s.safetensors' are not there: put the file beside the schedule"
    with plug(pipe, Solver(str(moved / "five.json"))), pytest.raises(ValueError, match=said):
        pipe(**inputs)


def test_statistics_of_another_size_or_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    schedule = ems((3, 4, 4), path, "stable_diffusion_nfe5")
    scheduler = SolverScheduler(**SD, schedules=schedule)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"are for latents of shape \[3, 4, 4\], these have \[3, 8, 8\]"):
        scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.zeros(1, 3, 8, 8))
    averaged = load_statistics(path).by_channel()
    assert averaged.shape == (3, 1, 1)
    averaged.check_fits((3, 8, 8))
    averaged.save(path)
    assert load_statistics(path).shape == (3, 1, 1)  # the file has changed: read again
    (tmp_path / "note.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"note.safetensors' holds no statistics of a model"):
        ModelStatistics.load(tmp_path / "note.safetensors")
    for changed, said in (
        ({"l": np.full(57, np.nan)}, "l of the statistics has to hold finite numbers"),
        ({"lambdas": LAMBDAS[::-1]}, "two or more increasing numbers"),
        ({"b": np.zeros((57, 2))}, r"b of the statistics has the shape \(57, 2\)"),
    ):
        told = {"lambdas": LAMBDAS, "l": np.ones(57), "s": np.zeros(57), "b": np.zeros(57), **changed}
        with pytest.raises(ValueError, match=said):
            ModelStatistics(**told)


def test_steps_without_their_statistics_say_so() -> None:
    schedule = USF["stable_diffusion_nfe5"]
    with pytest.raises(ValueError, match=r"step 1: param 'ems' needs the model's statistics .*names no file"):
        compile_schedule(schedule, VP_LEVELS)
    with pytest.raises(ValueError, match="statistics is 3: give the path of a file"):
        replace(schedule, statistics=3)  # type: ignore[arg-type]
    clean = Nodes(kind="lambda", values=(-2.0, 0.0, float("inf")))
    with pytest.raises(ValueError, match="a step to sigma 0 takes param 'data' or 'noise'"):
        SolverSchedule(nodes=clean, steps=(SolverStep(), SolverStep(param="ems")))
