"""Plugging and unplugging: the pipeline comes back as it was, and contradictions are named."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AmusedScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from diffplug.intercept import StepInterceptor, intercept_step
from diffplug.plug import plug
from diffplug.scheduler.plug import build
from diffplug.testing import tiny

PIPES = {name: tiny(name) for name in ("sd15", "sdxl", "sd3", "flux", "wan", "pixart", "ddpm", "lcm")}


class Steers:
    """Stands at the scheduler's step and writes down what happens to it."""

    slot = "steering"

    def __init__(self, log: list[str] | None = None) -> None:
        self.log = [] if log is None else log

    def attach(self, pipe: Any) -> Callable[[], None]:
        self.log.append(f"on {type(pipe.scheduler).__name__}")
        undo = intercept_step(pipe.scheduler, StepInterceptor())

        def off() -> None:
            self.log.append("off")
            undo()

        return off


class Fails:
    def __init__(self, when: str) -> None:
        self.when = when

    def attach(self, pipe: Any) -> Callable[[], None]:
        if self.when == "attach":
            raise RuntimeError("no attach")

        def undo() -> None:
            if self.when == "undo":
                raise RuntimeError("no undo")

        return undo


def trace(pipe: Any) -> Any:
    """Everything about a pipeline that plugging might leave changed."""
    weights = {
        f"{name}.{key}": tensor.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }
    keys = {name: value for name, value in vars(pipe).items() if name != "_internal_dict"}
    return type(pipe), type(pipe.scheduler), keys, dict(pipe.config), dict(pipe.scheduler.config), weights


def assert_same(pipe: Any, before: Any) -> None:
    cls, scheduler_cls, keys, config, scheduler_config, weights = trace(pipe)
    assert (cls, scheduler_cls) == before[:2]
    assert keys.keys() == before[2].keys() and all(_same(keys[key], before[2][key]) for key in keys)
    assert (config, scheduler_config) == before[3:5]
    assert all(torch.equal(weights[key], before[5][key]) for key in weights)


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, torch.nn.Module) and a == b)  # a run leaves new empty dicts, for one


def run(pipe: Any, name: str, **changes: Any) -> torch.Tensor:
    out = pipe(**tiny.inputs(name, **changes), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(out[0])


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("sd15", UniPCMultistepScheduler),
        ("sdxl", DPMSolverMultistepScheduler),
        ("sd3", UniPCMultistepScheduler),
        ("flux", UniPCMultistepScheduler),
        ("flux", DPMSolverMultistepScheduler),
        ("wan", FlowMatchEulerDiscreteScheduler),
        ("pixart", DDIMScheduler),
        ("ddpm", DDIMScheduler),
    ],
)
def test_a_scheduler_class_runs_and_the_pipeline_comes_back(name: str, cls: type) -> None:
    pipe = PIPES[name]
    plain = run(pipe, name)
    before, own = trace(pipe), pipe.scheduler
    with plug(pipe, cls, Steers()) as same:
        assert same is pipe and isinstance(pipe.scheduler, cls)
        other = run(pipe, name)
        assert other.isfinite().all()
    assert not torch.equal(plain, other)
    assert pipe.scheduler is own
    assert_same(pipe, before)
    assert torch.equal(plain, run(pipe, name))


@pytest.mark.parametrize("where", ["body", "attach", "call", "undo"])
def test_an_exception_leaves_nothing_behind(where: str) -> None:
    pipe = PIPES["sd15"]
    before = trace(pipe)
    log: list[str] = []
    with pytest.raises((RuntimeError, ValueError, TypeError)):  # noqa: SIM117
        with plug(pipe, Steers(log), DDIMScheduler, Fails(where)):
            if where == "body":
                raise RuntimeError("body")
            if where == "call":
                pipe(prompt=3, num_inference_steps=2)
    assert log == ["on DDIMScheduler", "off"]
    assert_same(pipe, before)


def test_undo_is_a_call_and_twice_is_harmless() -> None:
    pipe = PIPES["sd15"]
    before = trace(pipe)
    undo = plug(pipe, PNDMScheduler)
    assert isinstance(pipe.scheduler, PNDMScheduler)
    undo()
    assert_same(pipe, before)
    with plug(pipe, UniPCMultistepScheduler):
        undo()
        assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
    assert_same(pipe, before)
    with pytest.raises(ValueError, match="taken off already"), undo:
        pass


@pytest.mark.parametrize("first", [0, 1])
def test_attachments_nest_and_undo_in_any_order(first: int) -> None:
    pipe = PIPES["sd15"]
    before = trace(pipe)
    undos = [plug(pipe, UniPCMultistepScheduler), plug(pipe, Steers())]
    undos[first]()
    undos[1 - first]()
    assert_same(pipe, before)
    with plug(pipe, UniPCMultistepScheduler), plug(pipe, Steers()):
        pass
    assert_same(pipe, before)


def test_an_instance_is_used_as_it_is() -> None:
    pipe, mine = PIPES["sd15"], UniPCMultistepScheduler(solver_order=3)
    with plug(pipe, mine):
        assert pipe.scheduler is mine
    assert type(mine) is UniPCMultistepScheduler


def test_schedulers_go_first_whatever_the_order() -> None:
    pipe, log = PIPES["sd15"], []
    with plug(pipe, Steers(log), DPMSolverMultistepScheduler):
        assert log == ["on DPMSolverMultistepScheduler"]
    with plug(pipe, Steers()):
        before = pipe.scheduler
        with pytest.raises(ValueError, match="DDIMScheduler would replace a DDIMScheduler that is steered"):
            plug(pipe, DDIMScheduler)
        assert pipe.scheduler is before


def test_contradictions_name_both() -> None:
    class Other(Steers):
        pass

    pipe = PIPES["sd15"]
    before = trace(pipe)
    with pytest.raises(ValueError, match="Other and Steers both claim the pipeline's steering"):
        plug(pipe, Steers(), Other())
    with pytest.raises(ValueError, match="DDIMScheduler and UniPCMultistepScheduler both claim .* scheduler"):
        plug(pipe, UniPCMultistepScheduler(), DDIMScheduler)
    assert_same(pipe, before)
    with plug(pipe, Steers()), pytest.raises(ValueError, match="Other and Steers"):
        plug(pipe, Other())
    assert_same(pipe, before)


@pytest.mark.parametrize(
    ("name", "scheduler", "words"),
    [
        (
            "flux",
            DDIMScheduler,
            "noise prediction, but the model of FluxPipeline is for flow matching: use one",
        ),
        ("flux", PNDMScheduler, "PNDMScheduler is for noise prediction"),
        ("flux", UniPCMultistepScheduler(), "UniPCMultistepScheduler is for noise prediction"),
        ("flux", FlowMatchHeunDiscreteScheduler, "set_timesteps does not take mu"),
        ("flux", SASolverScheduler, "set_timesteps does not take mu"),
        ("wan", DDIMScheduler, "DDIMScheduler is for noise prediction"),
        ("sd15", FlowMatchEulerDiscreteScheduler, "is for flow matching, but .* noise prediction: use a sch"),
        ("sd15", CogVideoXDPMScheduler, "its step needs old_pred_original_sample, timestep_back"),
        ("sd15", AmusedScheduler, "cannot be built from the configuration of DDIMScheduler .*mask_token_id"),
        ("lcm", DDIMScheduler, "does not take original_inference_steps"),
    ],
)
def test_schedulers_that_cannot_work_are_refused(name: str, scheduler: Any, words: str) -> None:
    pipe = PIPES[name]
    before = trace(pipe)
    with pytest.raises(ValueError, match=words) as caught:
        plug(pipe, scheduler)
    assert "\n" not in str(caught.value)
    assert_same(pipe, before)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Steers, r"Steers is a class: plug an object of it, Steers\(...\)"),
        (3, "3 cannot be plugged: give a Diffusers scheduler"),
        (DDIMScheduler.step, "cannot be plugged"),
        (type("Half", (), {"attach": lambda self, pipe: None})(), r"Half.attach\(\) gave None"),
    ],
)
def test_what_is_no_plug_is_refused(bad: Any, words: str) -> None:
    pipe = PIPES["sd15"]
    before = trace(pipe)
    with pytest.raises(ValueError, match=words):
        plug(pipe, UniPCMultistepScheduler, bad)
    assert_same(pipe, before)


def test_a_pipeline_without_a_scheduler_is_refused() -> None:
    class Bare:
        pass

    with pytest.raises(ValueError, match="Bare has no scheduler"):
        plug(Bare(), DDIMScheduler)


def test_a_translated_configuration_is_no_reason_to_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the new class does not know is left out, and what pipelines read is kept."""
    logger = logging.getLogger("diffusers.configuration_utils")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.addHandler(caplog.handler)
    for name in PIPES.keys() - {"lcm"}:
        build(UniPCMultistepScheduler, PIPES[name])
    logger.removeHandler(caplog.handler)
    assert not caplog.messages
    assert build(UniPCMultistepScheduler, PIPES["flux"]).config.max_shift == 1.15


def test_flow_configurations_are_translated() -> None:
    made = build(UniPCMultistepScheduler, PIPES["sd3"]).config
    assert made.use_flow_sigmas and made.prediction_type == "flow_prediction" and made.flow_shift == 3.0
    made = build(UniPCMultistepScheduler, PIPES["flux"]).config
    assert made.use_dynamic_shifting and made.use_flow_sigmas
    qwen = tiny("qwenimage")
    made = build(UniPCMultistepScheduler, qwen).config
    assert made.max_image_seq_len == 8192 and made.max_shift == 0.9 and made.shift_terminal == 0.02
    assert build(FlowMatchEulerDiscreteScheduler, PIPES["wan"]).config.shift == 3.0
    assert build(UniPCMultistepScheduler, PIPES["sd15"], solver_order=3).config.solver_order == 3
    assert build(EulerAncestralDiscreteScheduler, PIPES["sd15"]).config.beta_start == 0.00085
    assert build(LCMScheduler, PIPES["sd15"]).config.beta_schedule == "scaled_linear"


def test_two_threads_cannot_share_a_with_block() -> None:
    pipe, found = PIPES["sd15"], []

    def other() -> None:
        try:
            plug(pipe, UniPCMultistepScheduler)()
        except ValueError as error:
            found.append(str(error))

    def in_thread() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    before = trace(pipe)
    with plug(pipe, Steers()):
        in_thread()
    assert len(found) == 1 and "give every thread its own pipeline" in found[0]
    in_thread()
    assert len(found) == 1
    assert_same(pipe, before)


def test_a_copy_of_a_plugged_pipeline_can_be_plugged() -> None:
    pipe = PIPES["ddpm"]
    with plug(pipe, DDIMScheduler):
        clone = copy.deepcopy(pipe)
    with plug(clone, DPMSolverMultistepScheduler):
        assert isinstance(clone.scheduler, DPMSolverMultistepScheduler)


def test_a_plugged_pipeline_saves_plainly(tmp_path: Any) -> None:
    pipe = tiny("sd15")
    with plug(pipe, Steers()):
        pipe.save_pretrained(tmp_path)
    assert "diffplug" not in (tmp_path / "model_index.json").read_text()
    assert type(type(pipe).from_pretrained(tmp_path).scheduler) is DDIMScheduler
