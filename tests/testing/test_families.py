"""Every family with every kind of plug: it works and leaves no trace, or is refused before the run.

What passes here is a tick of docs/support.md, what is refused its footnote; `python -m benchmarks.support`
runs this file and writes that page.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support import FEATURES, PAGE, WRITING, cell, cells, page
from diffplug import plug
from diffplug.intercept import interceptors, original_class
from diffplug.network.denoiser import count_network, denoisers
from diffplug.noise.stochastic import takes_churn
from diffplug.samplers import DCSolver, Solver
from diffplug.samplers.search import search_compensation
from diffplug.scheduler.pipeline_quirks import lost_arguments
from diffplug.seeds import Seeds
from diffplug.steering import BestOfN, FeynmanKac, Resampling
from diffplug.testing import tiny

pytestmark = pytest.mark.contract

_NOT_INPUTS_OF_A_SEARCH = ("prompt", "num_inference_steps", "output_type")
_JUMPS = r"cannot take the place of .*: no other scheduler runs the model of .*; keep the pipeline's own"
_LCM = r"does not fit LatentConsistencyModelPipeline: .* try a relative of LCMScheduler"
_CONTINUOUS = r"is for continuous noise levels .*: keep the pipeline's own scheduler"
_NO_PROMPT = r"takes no prompt: a search runs on a pipeline that does"
_SAMPLED = ("solver", "dc-solver", "search")

REFUSED: dict[tuple[str, str], str] = {
    **{(name, plug): _JUMPS for name in ("consistency", "sana-sprint") for plug in _SAMPLED},
    **{("lcm", plug): _LCM for plug in _SAMPLED},
    **{("svd", plug): _CONTINUOUS for plug in ("solver", "dc-solver")},
    **{(name, "search"): _NO_PROMPT for name in ("ddim", "ddpm", "dit", "kandinsky22", "svd")},
}
FAULTS: dict[tuple[str, str], str] = {
    ("deepfloyd-if", "search"): "refused after two evaluations, when its first result is no latents",
    ("flux-img2img", "search"): "refused after the reference solution, when strength has left steps out",
}
"""What is refused too late or wrongly, and why: such a case is expected to fail."""


@dataclass
class Trial:
    """A tiny pipeline of a family, what it makes by itself, and the times its network was told for that."""

    name: str
    pipe: Any
    own: Tensor
    told: list[float]

    @classmethod
    def of(cls, name: str) -> Trial:
        pipe, told = tiny(name), list[float]()
        for network in denoisers(pipe):
            network.register_forward_pre_hook(lambda m, a, k: told.append(_time(a, k)), with_kwargs=True)
        own = _call(pipe, name)
        return cls(name, pipe, own, told)

    def run(self, *plugs: Any, **changes: Any) -> Tensor:
        """Return what the pipeline makes with plugs: finite, and of the same shape as without."""
        with plug(self.pipe, *plugs):
            made = _call(self.pipe, self.name, **changes)
        assert made.shape == self.own.shape and made.isfinite().all()
        return made

    def seeded(self, seed: int, **changes: Any) -> Tensor:
        """Return what the pipeline makes with `Seeds`, and no generator of the call's own."""
        with plug(self.pipe, Seeds(seed)):
            return torch.as_tensor(self.pipe(**tiny.inputs(self.name, **changes))[0])


def _call(pipe: Any, name: str, **changes: Any) -> Tensor:
    made = pipe(**tiny.inputs(name, **changes), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(made[0])


def _time(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    told = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return float(torch.as_tensor(told).flatten()[0])


COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(1)


def check_solver(trial: Trial, one: Any = None, **changes: Any) -> None:
    """The network is called as often as by the pipeline's own scheduler, at times of the same kind."""
    own = list(trial.told)
    trial.told.clear()
    trial.run(one or Solver(), **changes)
    if not changes:
        assert len(trial.told) == len(own)
    largest = 1.0 if max(own) <= 1 else 2 * max(own)
    assert min(*own, 0.0) <= min(trial.told) and max(trial.told) <= largest


def check_dc_solver(trial: Trial) -> None:
    check_solver(trial, DCSolver([1.0, 1.0, 0.9, 1.1]), num_inference_steps=4)


def check_search(trial: Trial, folder: Path) -> None:
    """A schedule is found, and runs."""
    given = tiny.inputs(trial.name)
    options = {name: value for name, value in given.items() if name not in _NOT_INPUTS_OF_A_SEARCH}
    steps = given["num_inference_steps"]
    found = search_compensation(
        trial.pipe, ["a red circle", "a dog"], steps, rungs=("ratios",), truth_steps=2 * steps,
        options=options, cache=folder,
    )  # fmt: skip
    assert found.schedule.nfe == steps
    trial.run(Solver(found.schedule))


def check_best_of_n(trial: Trial) -> None:
    """One particle is the picture itself, bit for bit; of three the brightest comes back."""
    assert torch.equal(trial.run(BestOfN(brightness, particles=1)), trial.own)
    steerer = BestOfN(brightness, particles=3)
    made = trial.run(steerer)
    report = steerer.report
    assert report is not None and report.final_rewards.shape == (1, 3)
    assert report.final_rewards.unique().numel() == 3
    assert float(made.mean()) == pytest.approx(float(report.final_rewards.max()), abs=1e-4)


def check_steer(trial: Trial) -> None:
    """Particles are scored on the way, and part where they were copied."""
    steerer = FeynmanKac(brightness, particles=4, strength=100.0, selection=Resampling(islands=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*added no noise")
        trial.run(steerer)
    report = steerer.report
    assert report is not None and len(report.calls) > 0 and report.rewards.isfinite().all()
    assert report.final_rewards.unique().numel() == 4


def check_seeds(trial: Trial) -> None:
    """A picture is the same again, and as the first of two where the family can make two of them."""
    alone = trial.seeded(3)
    assert torch.equal(alone, trial.seeded(3)) and not torch.equal(alone, trial.seeded(4))
    twice = two_of_them(trial)
    if twice:
        two = trial.seeded(3, **twice)
        assert len(two) == 2 and not torch.equal(two[0], two[1])
        assert (two[0] - alone[0]).abs().max() < 1e-4


def two_of_them(trial: Trial) -> dict[str, Any]:
    """Return what to add to a call so that it makes the same thing twice; empty where it cannot."""
    takes = signature(original_class(trial.pipe).__call__).parameters
    usable = takes.keys() - lost_arguments(trial.pipe).keys()
    labels = {"class_labels": [1, 1]} if "class_labels" in takes else {}
    return labels | {name: 2 for name in COUNTS if name in usable}


CHECKS: dict[str, Callable[..., None]] = {
    "solver": check_solver,
    "dc-solver": check_dc_solver,
    "search": check_search,
    "best-of-n": check_best_of_n,
    "steer": check_steer,
    "seeds": check_seeds,
}


def state(pipe: Any) -> Any:
    """What a plug may change: the components, what stands around them, and the names of attributes."""
    parts = {name: (id(part), type(part), set(vars(part))) for name, part in _objects(pipe).items()}
    return type(pipe), set(vars(pipe)), parts, interceptors(pipe), interceptors(pipe.scheduler)


def _objects(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if hasattr(part, "__dict__")}


def refusal(trial: Trial, feature: str, folder: Path) -> str:
    """Return the sentence of a refusal, empty where it works; either leaves the pipeline as it was."""
    before, said = state(trial.pipe), ""
    with count_network(trial.pipe) as count:
        try:
            CHECKS[feature](trial, *([folder] if feature == "search" else []))
        except ValueError as error:
            said = str(error)
            assert count.calls == 0, f"refused after {count.calls} evaluations: {error}"
    assert state(trial.pipe) == before
    assert torch.equal(_call(trial.pipe, trial.name), trial.own)
    return said


def every() -> list[Any]:
    """Every family with every feature; known faults are expected to fail until they are mended."""
    return [
        pytest.param(
            name,
            feature,
            marks=[pytest.mark.xfail(strict=True, reason=FAULTS[name, feature])]
            if (name, feature) in FAULTS
            else [],
        )
        for name in tiny.names()
        for feature in FEATURES
    ]


@pytest.mark.parametrize(
    "name", ["consistency", "ddpm", "deepfloyd-if", "hunyuandit", "kandinsky22", "lcm", "sana-sprint"]
)
def test_churn_that_the_scheduler_does_not_take_is_refused_before_the_run(name: str) -> None:
    trial = Trial.of(name)
    assert not takes_churn(trial.pipe.scheduler)
    with count_network(trial.pipe) as count, pytest.raises(ValueError, match="cannot be churned"):
        trial.run(FeynmanKac(brightness, particles=4, churn=1.0))
    assert count.calls == 0


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "feature"), every())
def test_it_works_or_is_refused_before_the_run(
    name: str, feature: str, tmp_path: Path, request: Any, record_property: Callable[[str, object], None]
) -> None:
    said = refusal(Trial.of(name), feature, tmp_path)
    record_property("refusal", said)
    assert re.search(REFUSED[name, feature], said) if (name, feature) in REFUSED else said == ""
    if not request.config.pluginmanager.hasplugin(WRITING):
        assert cells(PAGE.read_text(encoding="utf-8"))[name, feature] == cell(said)


def test_the_page_is_what_the_command_writes() -> None:
    """Together with the test above, which looks at every cell that is no known fault."""
    text = PAGE.read_text(encoding="utf-8")
    shown = cells(text)
    assert page(shown) == text
    assert shown.keys() == {(name, feature) for name in tiny.names() for feature in FEATURES}
    assert {at: each for at, each in shown.items() if each[0] == "✗"} == {
        at: cell(fault=fault) for at, fault in FAULTS.items()
    }
