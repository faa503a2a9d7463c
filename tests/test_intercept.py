"""Standing at a scheduler's step and around a pipeline's call, and leaving no trace."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from diffplug.intercept import (
    PipelineCall,
    StepCall,
    StepInterceptor,
    bare_copy,
    intercept_call,
    intercept_step,
    original_class,
)


class Recorder(StepInterceptor):
    """Writes down what it saw, and adds a number to the model output."""

    def __init__(self, log: list[Any], name: str = "it", add: float = 0.0) -> None:
        self.log, self.name, self.add = log, name, add

    def on_set_timesteps(self, scheduler: Any) -> None:
        self.log.append((self.name, "set", len(scheduler.timesteps)))

    def on_step(self, call: StepCall) -> Any:
        self.log.append((self.name, "step", sorted(call.kwargs)))
        call.model_output = call.model_output + self.add
        return call.run()


class Follows(Recorder):
    def follower(self) -> StepInterceptor:
        return Recorder(self.log, "follower")


class Pipe:
    """Something that is called like a pipeline."""

    def __call__(self, prompt: str, num_inference_steps: int = 50, **extra: Any) -> tuple[Any, ...]:
        """Runs."""
        return prompt, num_inference_steps, extra


def tensors(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def ready(cls: type = DDIMScheduler, steps: int = 4) -> Any:
    scheduler = cls()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.law
def test_a_watcher_changes_nothing_and_a_change_arrives() -> None:
    out, x = tensors(2, 4, 3, 3)
    plain = ready().step(out, 750, x)
    scheduler, log = ready(), []
    undo = intercept_step(scheduler, Recorder(log))
    watched = scheduler.step(out, 750, x)
    assert torch.equal(watched.prev_sample, plain.prev_sample)
    assert log == [("it", "step", [])]
    undo()
    undo = intercept_step(scheduler, Recorder(log, add=1.0))
    assert torch.equal(scheduler.step(out, 750, x).prev_sample, ready().step(out + 1, 750, x).prev_sample)
    undo()
    assert torch.equal(scheduler.step(out, 750, x).prev_sample, plain.prev_sample)


@pytest.mark.law
@pytest.mark.parametrize("positional", [0, 1, 2, 3])
def test_positional_and_keyword_calls_look_the_same(positional: int) -> None:
    out, x = tensors(1, 4, 3, 3)
    values = {"model_output": out, "timestep": 750, "sample": x}
    args = list(values.values())[:positional]
    kwargs = dict(list(values.items())[positional:])
    scheduler, log = ready(), []
    intercept_step(scheduler, Recorder(log))
    result = scheduler.step(*args, **kwargs, eta=0.0, return_dict=False)
    assert torch.equal(result[0], ready().step(out, 750, x).prev_sample)
    assert log == [("it", "step", ["eta", "return_dict"])]
    with pytest.raises(TypeError, match="sample"):
        scheduler.step(out, 750)


@pytest.mark.law
def test_extra_positional_arguments_are_kept() -> None:
    out, x = tensors(1, 2, 4, 3, 3)
    seen: list[StepCall] = []

    class Keep(StepInterceptor):
        def on_step(self, call: StepCall) -> Any:
            seen.append(call)
            return call.run()

    def run(scheduler: Any) -> Any:
        g = torch.Generator().manual_seed(1)
        return scheduler.step(out, out, 500, 750, x, generator=g, return_dict=False)

    plain = run(ready(CogVideoXDPMScheduler))
    scheduler = ready(CogVideoXDPMScheduler)
    intercept_step(scheduler, Keep())
    for a, b in zip(run(scheduler), plain, strict=True):
        assert torch.equal(a, b)
    assert seen[0].timestep == 500 and seen[0].kwargs["timestep_back"] == 750
    assert seen[0].kwargs["old_pred_original_sample"] is out and seen[0].sample is x


@pytest.mark.law
def test_the_class_looks_as_before(tmp_path: Any) -> None:
    scheduler = ready(UniPCMultistepScheduler)
    before = dict(vars(scheduler))
    text = scheduler.to_json_string()
    intercept_step(scheduler, StepInterceptor())
    assert isinstance(scheduler, UniPCMultistepScheduler)
    cls = type(scheduler)
    assert cls is not UniPCMultistepScheduler and original_class(scheduler) is UniPCMultistepScheduler
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(cls, name) == getattr(UniPCMultistepScheduler, name)
    for method in ("step", "set_timesteps"):
        bound = inspect.signature(getattr(scheduler, method))
        assert bound == inspect.signature(getattr(ready(UniPCMultistepScheduler), method))
    assert vars(scheduler) == before
    assert scheduler.to_json_string() == text
    scheduler.save_pretrained(tmp_path)
    assert '"UniPCMultistepScheduler"' in (tmp_path / "scheduler_config.json").read_text()


@pytest.mark.law
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_layers_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    scheduler, log = ready(), []
    before = dict(vars(scheduler))
    undos = [intercept_step(scheduler, Recorder(log, name)) for name in "abc"]
    left = ["c", "b", "a"]  # the last attached is the outermost
    out, x = tensors(1, 4, 3, 3)
    for which in order:
        log.clear()
        scheduler.step(out, 750, x)
        assert [entry[0] for entry in log] == left
        undos[which]()
        undos[which]()  # twice is harmless
        left.remove("abc"[which])
    assert type(scheduler) is DDIMScheduler and vars(scheduler) == before


def test_one_interceptor_twice_is_two_layers() -> None:
    scheduler, log = ready(), []
    recorder = Recorder(log)
    first, second = intercept_step(scheduler, recorder), intercept_step(scheduler, recorder)
    first()
    scheduler.step(*tensors(1, 4, 3, 3)[:1], 750, tensors(1, 4, 3, 3)[1])
    assert len(log) == 1
    second()
    assert type(scheduler) is DDIMScheduler


def test_first_stays_outside() -> None:
    scheduler, log = ready(), []
    eager = Recorder(log, "eager")
    eager.first = True
    intercept_step(scheduler, eager)
    intercept_step(scheduler, Recorder(log, "later"))
    out, x = tensors(1, 4, 3, 3)
    scheduler.step(out, 750, x)
    assert [entry[0] for entry in log] == ["eager", "later"]


def test_running_twice_and_changes_inside_stay_inside() -> None:
    out, x = tensors(1, 4, 3, 3)

    class Twice(StepInterceptor):
        def on_step(self, call: StepCall) -> Any:
            first, second = call.run(), call.run()
            assert torch.equal(first.prev_sample, second.prev_sample)
            assert "eta" not in call.kwargs and call.model_output is out
            return second

    class Inside(StepInterceptor):
        def on_step(self, call: StepCall) -> Any:
            call.kwargs["eta"] = 0.0
            call.model_output = call.model_output * 2
            return call.run()

    scheduler = ready()
    intercept_step(scheduler, Inside())
    intercept_step(scheduler, Twice())
    scheduler.step(out, 750, x)


def test_set_timesteps_is_told_after_it_happened() -> None:
    scheduler, log = ready(), []
    intercept_step(scheduler, Recorder(log))
    scheduler.set_timesteps(7)
    scheduler.set_timesteps(num_inference_steps=3, device="cpu")
    assert log == [("it", "set", 7), ("it", "set", 3)]


def test_exceptions_pass_untouched() -> None:
    scheduler = ready()

    class Fails(StepInterceptor):
        def on_step(self, call: StepCall) -> Any:
            raise KeyError("mine")

    undo = intercept_step(scheduler, Fails())
    with pytest.raises(KeyError, match="mine"):
        scheduler.step(*tensors(1, 4, 3, 3)[:1], 750, tensors(1, 4, 3, 3)[1])
    undo()
    assert type(scheduler) is DDIMScheduler


@pytest.mark.law
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_copies_get_the_follower(copier: Any) -> None:
    scheduler, log = ready(), []
    intercept_step(scheduler, Follows(log))
    intercept_step(scheduler, Recorder(log, "other"))
    clone = copier(scheduler)
    assert original_class(clone) is DDIMScheduler
    assert vars(clone).keys() == vars(scheduler).keys()
    assert (clone.timesteps is scheduler.timesteps) == (copier is copy.copy)
    out, x = tensors(1, 4, 3, 3)
    a = clone.step(out, 750, x).prev_sample
    assert [entry[0] for entry in log] == ["follower"]
    assert torch.equal(a, ready().step(out, 750, x).prev_sample)


def test_bare_copies_have_no_interceptor() -> None:
    scheduler = ready(UniPCMultistepScheduler)
    intercept_step(scheduler, Follows([]))
    clone, shallow = bare_copy(scheduler), bare_copy(scheduler, deep=False)
    assert type(clone) is type(shallow) is UniPCMultistepScheduler
    assert clone.timesteps is not scheduler.timesteps and torch.equal(clone.timesteps, scheduler.timesteps)
    assert shallow.timesteps is scheduler.timesteps
    assert clone.config == scheduler.config


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_as_the_original(protocol: int) -> None:
    scheduler = ready(EulerDiscreteScheduler)
    intercept_step(scheduler, Recorder([]))
    text = pickle.dumps(scheduler, protocol)
    assert b"diffplug" not in text
    loaded = pickle.loads(text)  # noqa: S301
    assert type(loaded) is EulerDiscreteScheduler and torch.equal(loaded.timesteps, scheduler.timesteps)


def test_bad_schedulers_are_refused() -> None:
    with pytest.raises(ValueError, match="object has no step"):
        intercept_step(object(), StepInterceptor())
    scheduler = ready()
    scheduler.step = scheduler.step
    with pytest.raises(ValueError, match="del scheduler.step"):
        intercept_step(scheduler, StepInterceptor())
    assert type(scheduler) is DDIMScheduler
    with pytest.raises(ValueError, match="object cannot be called"):
        intercept_call(object(), lambda call, kwargs: None)


def test_a_foreign_change_of_class_is_named() -> None:
    scheduler = ready()
    undo = intercept_step(scheduler, StepInterceptor())
    ours = type(scheduler)
    scheduler.__class__ = type("Foreign", (ours,), {})
    with pytest.raises(RuntimeError, match="changed by something else"):
        undo()
    scheduler.__class__ = ours
    undo()
    assert type(scheduler) is DDIMScheduler


@pytest.mark.law
def test_calls_are_bound_by_name_and_nest() -> None:
    pipe, seen = Pipe(), []
    signature, doc = inspect.signature(pipe.__call__), pipe.__call__.__doc__

    def inner(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
        seen.append(("inner", kwargs, dict(call.asked)))
        return call(**kwargs)

    def outer(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
        seen.append(("outer", dict(kwargs), dict(call.asked)))
        assert call.pipe is pipe
        kwargs["num_inference_steps"] = 3
        return [call(**kwargs), call(**kwargs)]

    undo_outer = intercept_call(pipe, outer)
    undo_inner = intercept_call(pipe, inner, innermost=True)
    assert inspect.signature(pipe.__call__) == signature and pipe.__call__.__doc__ == doc
    assert isinstance(pipe, Pipe) and type(pipe).__name__ == "Pipe"
    assert pipe("a cat", size=2) == [("a cat", 3, {"size": 2})] * 2
    asked = {"prompt": "a cat", "size": 2}
    assert seen[0] == ("outer", asked, asked)  # no defaults
    assert seen[1] == seen[2] == ("inner", {**asked, "num_inference_steps": 3}, asked)
    undo_outer()
    assert pipe("a cat") == ("a cat", 50, {})
    undo_inner()
    assert type(pipe) is Pipe and vars(pipe) == {}


def test_copies_of_a_pipeline_are_plain() -> None:
    pipe = Pipe()
    intercept_call(pipe, lambda call, kwargs: "never")
    for copier in (copy.copy, copy.deepcopy):
        assert copier(pipe)("a") == ("a", 50, {})
