"""Searches on whole pipelines of every family, tiny ones: figures, files, refusals, what runs without."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from diffplug import plug
from diffplug.demos.schedule_plots import plot_history, plot_schedule
from diffplug.samplers import Solver, SolverSchedule, search_front, search_schedule
from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.search.decisions.starts import longer
from diffplug.samplers.search.picture_metrics import RewardScore
from diffplug.samplers.search.result import SearchResult
from diffplug.testing import tiny

pytestmark = pytest.mark.pipe
WORDS = ["a red circle", "a blue square", "a dog", "a green cross"]
SMALL: dict[str, Any] = {
    "trials": 28, "refinement": 4, "tail": 4, "pairs": 2, "validation": 1, "test": 1, "truth_steps": 6,
    "grids": ("linspace",),
}  # fmt: skip


def options(name: str) -> dict[str, Any]:
    left_out = ("prompt", "num_inference_steps", "output_type")
    return {key: value for key, value in tiny.inputs(name).items() if key not in left_out}


def search(name: str, cache: Path, **more: Any) -> tuple[Any, SearchResult]:
    pipe = tiny(name)
    return pipe, search_schedule(pipe, WORDS, 3, cache=cache, options=options(name), **{**SMALL, **more})


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_a_schedule_is_found_for_every_family_and_runs(name: str, tmp_path: Path) -> None:
    pipe, found = search(name, tmp_path)
    assert found.spent <= 32 and found.schedule.nfe == 3
    assert found.validation["value"] <= found.presets[found.baseline]["value"]
    assert found.test is not None and np.isfinite(found.test["mean"])
    path = tmp_path / "three.json"
    found.schedule.save(path)
    with plug(pipe, Solver(str(path))):
        inputs = {**tiny.inputs(name), "num_inference_steps": 3}
        assert pipe(**inputs) is not None
    meta = SolverSchedule.load(path).meta
    assert meta["metric"] == "latent-mse" and meta["pairs"] == {
        "searched": 2,
        "validation": 1,
        "test": 1,
        "tail": 4,
    }
    assert meta["network calls"] > 0 and meta["baseline"]["solver"] == found.baseline


def test_steps_may_stand_on_measured_statistics(tmp_path: Path) -> None:
    place = tmp_path / "s.safetensors"
    pipe, found = search("sd15", tmp_path, statistics=place, trials=31, refinement=3)
    seeds = [t.params for t in found.study.trials if t.user_attrs.get("preset", "").startswith("seed")]
    assert len(seeds) == 2 and all(each["param_1"] == "ems" for each in seeds)
    steps = tuple(replace(step, param="ems") for step in presets.ddim(3, "linspace").steps)
    schedule = replace(presets.ddim(3, "linspace", final="sigma_min"), steps=steps, statistics=str(place))
    with plug(pipe, Solver(schedule)):
        pipe(**{**tiny.inputs("sd15"), "num_inference_steps": 3})
    with pytest.raises(ValueError, match=r"s.safetensors' are of guidance .*: name another file"):
        search_schedule(pipe, WORDS, 3, 9.0, cache=tmp_path, statistics=place, **{**SMALL, "trials": 31})


def test_rewards_stay_below_their_ceiling(tmp_path: Path) -> None:
    metric = RewardScore(reward=lambda images, prompts: images.mean((1, 2, 3)), label="bright", ceiling=1.5)
    _, found = search("sd15", tmp_path, metric=metric, refinement=0)
    limit = found.study.user_attrs["limit"]
    best = [t.user_attrs["error"] for t in found.study.trials if t.value is not None and t.value < 1e5]
    worst = [t.user_attrs["error"] for t in found.study.trials if t.value is not None and t.value >= 1e6]
    assert max(best) <= limit < min(worst)
    assert found.validation["value"] <= found.presets[found.baseline]["value"] < 0


@pytest.mark.parametrize("metric", ["features:pixels", "kid:pixels"])
def test_other_measures_run_on_pipelines(metric: str, tmp_path: Path) -> None:
    if metric.startswith("kid"):
        pytest.importorskip("torchmetrics")
    _, found = search("sd15", tmp_path, metric=metric, refinement=2, validation=2, test=2)
    assert found.metric == metric and np.isfinite(found.validation["value"])


def test_several_lengths_share_what_they_find(tmp_path: Path) -> None:
    pipe, turns = tiny("sd15"), []
    more = {**SMALL, "refinement": 0, "trials": 29}
    found = search_front(
        pipe, WORDS, [3, 2], cache=tmp_path, options=options("sd15"), storage=tmp_path / "s.log",
        on_search=turns.append, **more,
    )  # fmt: skip
    assert turns == [2, 3] and [s.nfe for s in found.schedules] == [2, 3]
    assert any(t.user_attrs.get("preset") == "seed 0" for t in found.searches[3].study.trials)
    steps, values = zip(*found.pareto, strict=True)
    assert list(values) == sorted(values, reverse=True) and list(steps) == sorted(steps)
    plot_history(found.searches[3], tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.law
def test_longer_schedules_cut_the_longest_step() -> None:
    nodes = Nodes(kind="lambda", values=(-2.0, -1.0, 2.0, 3.0))
    schedule = replace(presets.dpmpp(3, "linspace"), nodes=nodes)
    found = longer(schedule, 4)
    assert found.nodes.values == (-2.0, -1.0, 0.5, 2.0, 3.0) and found.nfe == 4
    assert longer(schedule, 3) == schedule
    named = longer(presets.unipc(3, "karras"), 6)
    assert named.nfe == 6 and named.nodes.name == "karras"
    clean = longer(
        replace(presets.ddim(2, "karras"), nodes=Nodes(kind="lambda", values=(0.0, 1.0, np.inf))), 3
    )
    assert clean.nodes.values == (0.0, 0.5, 1.0, np.inf)


def test_a_schedule_is_drawn(tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler

    from diffplug.samplers import NoiseLevels

    levels = NoiseLevels.from_scheduler(UniPCMultistepScheduler())
    for schedule in (presets.unipc(5, "karras"), replace(presets.deis(4, "log-snr"), first="zero_x0")):
        plot_schedule(schedule, levels, tmp_path / "s.png")
        assert (tmp_path / "s.png").stat().st_size > 2000


def test_bad_requests_cost_nothing(tmp_path: Path) -> None:
    pipe = tiny("sd15")

    def ask(*, prompts: Any = WORDS, steps: int = 3, **more: Any) -> None:
        search_schedule(pipe, prompts, steps, cache=tmp_path, **{**SMALL, **more})

    for change, said in (
        ({"prompts": ["a", "a", "b"]}, "2 different prompts: give at least 3"),
        ({"steps": 1}, "num_inference_steps=1: a search needs at least 2"),
        ({"pairs": 0}, "pairs=0: give at least 1 pair"),
        ({"metric": "fid"}, "metric 'fid' is unknown"),
        ({"grid": "kerras"}, "unknown grid 'kerras'"),
        ({"grids": ("kerras",)}, "unknown grid 'kerras'"),
        ({"trials": 20}, "8 presets come first"),
    ):
        with pytest.raises(ValueError, match=said):
            ask(**change)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no numbers of evaluations"):
        search_front(pipe, WORDS, [])
    with pytest.raises(ValueError, match="to begin with has 4 evaluations, the searches are of 3, 5"):
        search_front(pipe, WORDS, [5, 3], seeds=[presets.unipc(4, "karras")])
    flux = tiny("flux")
    with pytest.raises(ValueError, match="flow models have no analytic first step"):
        search_schedule(flux, WORDS, 3, cache=tmp_path, options=options("flux"), **SMALL, analytic=True)


def test_another_number_of_steps_is_refused_and_image_to_image_is_told(tmp_path: Path) -> None:
    schedule = replace(presets.unipc(4, "linspace"), meta={"metric": "latent-mse"})
    pipe = tiny("sd15")
    with plug(pipe, Solver(schedule)), pytest.raises(ValueError, match="4"):
        pipe(**{**tiny.inputs("sd15"), "num_inference_steps": 6})
    pipe = tiny("sd15-img2img")
    with plug(pipe, Solver(schedule)), pytest.warns(UserWarning, match="begins at step 2 here"):
        pipe(**{**tiny.inputs("sd15-img2img"), "num_inference_steps": 4, "strength": 0.5})


WITHOUT = """
import sys
from diffplug import plug
from diffplug.samplers import Solver, SolverSchedule
from diffplug.testing import tiny
pipe = tiny("sd15")
with plug(pipe, Solver(SolverSchedule.load(sys.argv[1]))):
    pipe(**{**tiny.inputs("sd15"), "num_inference_steps": 3})
names = ("optuna", "sklearn", "matplotlib", "torchmetrics", "cmaes", "diffplug.samplers.search")
print([name for name in sys.modules if name.startswith(names)])
"""


def test_running_a_schedule_needs_neither_optuna_nor_the_search(tmp_path: Path) -> None:
    path = tmp_path / "three.json"
    presets.unipc(3, "linspace").save(path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
