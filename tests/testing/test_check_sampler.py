"""The kit of sampler laws: registered and stock samplers pass, broken ones fail the right law."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from diffplug.registry import SAMPLERS
from diffplug.samplers import DCSolverScheduler
from diffplug.scheduler.plug import SchedulerPlug
from diffplug.testing import SAMPLER_LAWS, check_sampler
from diffplug.testing.closed_form.gaussian import GaussianModel, network_levels

RATIOS = {
    1: [1.0],
    2: [1.0, 1.0],
    3: [1, 1, 0.9],
    5: [1, 1, 0.9, 1.1, 1.2],
    6: [1, 1, 0.93, 0.81, 1.22, 1.07],
}
by_name = pytest.mark.parametrize("law", SAMPLER_LAWS, ids=lambda law: law.__name__)


def with_ratios(steps: int, **config: Any) -> DCSolverScheduler:
    return DCSolverScheduler(dc_ratios=RATIOS[steps], **config)


def order_three_in_lambda(steps: int, **config: Any) -> DCSolverScheduler:
    return DCSolverScheduler(dc_ratios=RATIOS[steps], dc_variable="lambda", solver_order=3, **config)


def noise_prediction_to_zero(steps: int, **config: Any) -> DCSolverScheduler:
    options = {"predict_x0": False, "final_sigmas_type": "zero", "disable_corrector": []}
    return DCSolverScheduler(dc_ratios=RATIOS[steps], **options, **config)


def flow(steps: int, **config: Any) -> DCSolverScheduler:
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return DCSolverScheduler(dc_ratios=RATIOS[steps], **{**options, **config})


@pytest.mark.contract
@by_name
@pytest.mark.parametrize("name", SAMPLERS.names())
def test_registered_samplers_hold_every_law(name: str, law: Any) -> None:
    check_sampler(SAMPLERS.get(name), [law])


@pytest.mark.contract
@by_name
@pytest.mark.parametrize("make", [with_ratios, order_three_in_lambda, noise_prediction_to_zero, flow])
def test_dc_solver_with_ratios_holds_every_law(make: Any, law: Any) -> None:
    if law is not SAMPLER_LAWS[-1] or make is flow:  # one pipeline of each kind is enough
        check_sampler(make, [law])


@pytest.mark.contract
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_the_laws_accept_good_samplers_of_every_kind(name: str) -> None:
    check_sampler(getattr(diffusers, name), SAMPLER_LAWS[:-1])


# ---- broken on purpose: each of these must break the law it was made for -------------------------


class ForgetsToForget(diffusers.UniPCMultistepScheduler):
    """set_timesteps keeps the last run's history."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        before = self.model_outputs, self.lower_order_nums, self.last_sample
        super().set_timesteps(*args, **kwargs)
        self.model_outputs, self.lower_order_nums, self.last_sample = before


class UsesTheBatch(DCSolverScheduler):
    """The step depends on the batch's mean."""

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        shifted = model_output + 0.01 * model_output.mean()
        return super().step(shifted, timestep, sample, *args, **kwargs)


class HidesState(DCSolverScheduler):
    """Per-sample state in a place that nobody can find and reorder."""

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = self.__dict__.setdefault("hidden", {"mean": None})
        old = hidden["mean"] if self._step_index else None
        mixed = model_output if old is None else 0.9 * model_output + 0.1 * old
        hidden["mean"] = model_output
        return super().step(mixed, timestep, sample, *args, **kwargs)


class SharesStateWithCopies(HidesState):
    """A deep copy keeps writing into the original's history."""

    def __deepcopy__(self, memo: Any) -> Any:
        copied = type(self).from_config(self.config)
        copied.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name != "_internal_dict"}
        )
        return copied


class KnowsEpsilonOnly(diffusers.UniPCMultistepScheduler):
    """Takes every output for noise."""

    def convert_model_output(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        kind = self.config.prediction_type
        self.register_to_config(prediction_type="epsilon")
        try:
            return super().convert_model_output(model_output, *args, **kwargs)
        finally:
            self.register_to_config(prediction_type=kind)


class Widens(DCSolverScheduler):
    """Returns float32 whatever came in."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(x.float() for x in super().step(*args, **{**kwargs, "return_dict": False}))


class RoundsSigmas(DCSolverScheduler):
    """Uses other sigmas than it was given."""

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **kwargs: Any
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, **kwargs)
        self.sigmas = torch.round(self.sigmas, decimals=2)


class StartsAtTheTop(DCSolverScheduler):
    """Ignores where a run begins."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        super().set_begin_index(0)


class LosesRatios(DCSolverScheduler):
    """Keeps its ratios out of the config."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._table = self.__dict__.setdefault("first_table", self._table)
        self.register_to_config(dc_ratios=None)


class NeedsTwoSteps(DCSolverScheduler):
    """Fails on the shortest run."""

    def set_timesteps(self, num_inference_steps: Any = None, *args: Any, **kwargs: Any) -> None:
        if num_inference_steps == 1:
            raise IndexError("list index out of range")
        super().set_timesteps(num_inference_steps, *args, **kwargs)


BROKEN = {
    ForgetsToForget: {"runs_are_independent", "interrupted_run_leaves_nothing"},
    UsesTheBatch: {"rows_do_not_mix"},
    HidesState: {"permutation_commutes"},
    SharesStateWithCopies: {"deep_copy_continues"},
    KnowsEpsilonOnly: {"prediction_types_agree"},
    Widens: {"dtype_is_kept"},
    RoundsSigmas: {"given_sigmas_are_used"},
    StartsAtTheTop: {"starts_anywhere"},
    NeedsTwoSteps: {"few_steps_work"},
}


@pytest.mark.contract
@pytest.mark.parametrize(("broken", "laws"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_broken_samplers_break_the_right_law(broken: Any, laws: set[str]) -> None:
    untouched = {"config_round_trip", "few_steps_work"}
    for law in SAMPLER_LAWS:
        if law.__name__ in laws:
            with pytest.raises(AssertionError, match=f"{broken.__name__} breaks the law '{law.__name__}'"):
                check_sampler(broken, [law])
        elif law.__name__ in untouched:
            check_sampler(broken, [law])


@pytest.mark.contract
def test_a_config_that_is_not_kept_breaks_the_round_trip() -> None:
    def loses_ratios(steps: int, **config: Any) -> Any:
        scheduler = LosesRatios(dc_ratios=RATIOS[steps], **config)
        scheduler.set_timesteps(steps)
        return scheduler

    with pytest.raises(AssertionError, match="config_round_trip"):
        check_sampler(loses_ratios, SAMPLER_LAWS[:1])


@pytest.mark.contract
def test_all_laws_run_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DCSolverScheduler, "per_sample_state", lambda self: ())
    with pytest.raises(AssertionError, match="with_ratios breaks the law 'permutation_commutes'"):
        check_sampler(with_ratios)


@pytest.mark.pipe
def test_a_plug_that_is_not_undone_breaks_the_last_law(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_it(self: SchedulerPlug, pipe: Any) -> Any:
        pipe.scheduler = self.scheduler
        return lambda: None

    monkeypatch.setattr(SchedulerPlug, "attach", leave_it)
    with pytest.raises(AssertionError, match="another object after undo"):
        check_sampler(DCSolverScheduler, SAMPLER_LAWS[-1:])


@pytest.mark.law
@pytest.mark.parametrize("timestep", [999, 500.5, 3])
def test_the_gaussian_model_is_the_posterior_mean(timestep: float) -> None:
    scheduler = DCSolverScheduler()
    alpha, sigma = network_levels(scheduler, timestep)
    assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-12)
    network = GaussianModel(mean=torch.full((1, 1, 1), 2.0, dtype=torch.float64), variance=0.5)
    generator = torch.Generator().manual_seed(0)
    x0 = 2.0 + 0.5**0.5 * torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    error = x0 - network.x0(x, alpha, sigma)
    assert float(error.mean().abs()) < 0.01
    assert float((error * (x - x.mean())).mean().abs()) < 0.01  # nothing left to learn from x


class WritesItsConfig(diffusers.UniPCMultistepScheduler):
    """Stores what a run was asked for where copies and files see it."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.register_to_config(solver_order=1)


class AsksForARun(diffusers.UniPCMultistepScheduler):
    """Knows nothing before set_timesteps."""

    def scale_model_input(self, sample: Any, *args: Any, **kwargs: Any) -> Any:
        return sample * self._of_the_run


@pytest.mark.contract
def test_the_laws_of_configurations_can_be_broken() -> None:
    def stock_flow(steps: int, **config: Any) -> Any:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        return diffusers.UniPCMultistepScheduler(**{**flow, **config})

    laws = {law.__name__: law for law in SAMPLER_LAWS}
    for broken, name, said in (
        (WritesItsConfig, "configuration_is_left_alone", "changed the config of solver_order"),
        (AsksForARun, "asked_before_a_run", "AttributeError"),
        (stock_flow, "flow_sigmas_end_at_one", "use_exponential_sigmas: sigma"),
    ):
        with pytest.raises(AssertionError, match=f"breaks the law '{name}'.*{said}"):
            check_sampler(broken, [laws[name]])
        check_sampler(diffusers.UniPCMultistepScheduler, [laws[name]])
