"""Classifier-free guidance as a plug: the exact way, for the whole run or for a part of it (2404.07724).

Outside of the part the network runs on the positive rows alone, and both halves of the output are that:
whatever the pipeline's formula, guidance of equal predictions is the prediction. So a run with guidance in
half of its steps costs three quarters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffplug.call_arguments import asked
from diffplug.checks import finite
from diffplug.intercept import (
    PipelineCall,
    StepCall,
    StepInterceptor,
    Undo,
    intercept_call,
    intercept_step,
    undo_all,
)
from diffplug.network.call_rows import SHARED, cut_rows, rows_of
from diffplug.network.denoiser import denoisers, wrap_forward
from diffplug.samplers.negative.call import (
    denoiser_class,
    guidance_argument,
    has_embedded_guidance,
    negative_part,
    takes,
)
from diffplug.samplers.negative.state import SameScheduler
from diffplug.scheduler.plug import current_scheduler

__all__ = ["ClassifierFree", "guidance_of", "is_given"]

TWO_CALLS = (  # the prompt's call first, then the negative prompt's
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "ChromaTransformer2DModel",
    "QwenImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "WanTransformer3DModel",
)
TRUE_CFG = 4.0
"""Guidance scale of pipelines whose own default is to have none (FLUX, Qwen-Image)."""


class ClassifierFree:
    """The pipeline's own guidance, seen to: it is on whenever there is a negative prompt, or the call is
    refused.

    strength: w - 1 is multiplied by it. interval: shares of the run (0 begins, 1 ends) in which it guides.
    Raises ValueError for pipelines without guidance of their own, and for networks that are told a guidance
    scale (FLUX.1 dev, LCM): on those it would guide a second time.
    """

    slot = "negative prompt"

    def __init__(self, *, strength: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        self.strength = finite("strength", strength)
        if self.strength < 0:
            raise ValueError(f"strength is {strength!r}: give 0 (off) or more")
        start, end = (finite("interval", value) for value in interval)
        if not 0 <= start < end <= 1:
            raise ValueError(f"interval is {interval!r}: give two shares of the run, 0 <= start < end <= 1")
        self.interval = (start, end)
        self.guides = False
        self.clock: Clock | None = None

    def __repr__(self) -> str:
        return f"ClassifierFree(strength={self.strength!r}, interval={self.interval})"

    def check(self, pipe: Any) -> None:
        """Raise ValueError where guidance is not for a pipeline."""
        if has_embedded_guidance(pipe):
            raise ValueError(
                f"the {denoiser_class(pipe)} of this {type(pipe).__name__} is told its guidance scale, so "
                "method='cfg' "
                "would guide twice: take method='nag'"
            )
        if guidance_argument(pipe) is None or not takes(pipe, "negative_prompt"):
            raise ValueError(
                f"{type(pipe).__name__} has no guidance with a negative prompt: take method='nag' or "
                "method='sun'"
            )
        if self.interval != (0.0, 1.0) and takes(pipe, "image_guidance_scale"):
            raise ValueError(f"{type(pipe).__name__} guides by three rows a picture: take method='cfg'")

    def attach(self, pipe: Any) -> Undo:
        """Put it on a pipeline; return what takes it off."""
        self.check(pipe)
        undos: list[Undo] = []
        if self.interval != (0.0, 1.0):
            self.clock = clock = Clock()
            undos += [wrap_forward(network, _Interval(pipe, self, clock)) for network in denoisers(pipe)]
        undos.append(intercept_call(pipe, self.run, innermost=True))
        return undo_all(undos)

    def run(self, call: PipelineCall, kwargs: dict[str, Any]) -> Any:
        """Run the call with guidance of the right strength."""
        pipe, name, given = call.pipe, guidance_argument(call.pipe), is_given(kwargs)
        w = guidance_of(pipe, kwargs)
        if name == "true_cfg_scale" and kwargs.get(name) is None and given:
            w = max(w, TRUE_CFG)
        if given and w <= 1:
            raise ValueError(
                f"{name}={kwargs.get(str(name))} leaves guidance off, and the negative prompt would be "
                "ignored: give more, "
                "or take method='nag', which needs none"
            )
        if name is None or w <= 1:
            return call(**kwargs)
        self.guides = self.strength > 0
        stop = self.clock.started(pipe) if self.clock is not None else None
        try:
            return call(**{**kwargs, name: 1 + self.strength * (w - 1) - _counts_from(pipe)})
        finally:
            self.guides = False
            if stop is not None:
                stop()


def is_given(kwargs: dict[str, Any]) -> bool:
    """Return whether a call has a negative prompt; the empty one counts."""
    return bool(negative_part(kwargs)[0])


def guidance_of(pipe: Any, kwargs: dict[str, Any]) -> float:
    """Return w of a call, 1 for no guidance: its own, or the pipeline's default where it has none."""
    name = guidance_argument(pipe)
    value = None if name is None else asked(pipe, kwargs, name)
    return 1.0 if value is None else float(value) + _counts_from(pipe)


def _counts_from(pipe: Any) -> float:
    """Return 1 for pipelines whose scale is w - 1 (Z-Image), else 0."""
    return 1.0 if denoiser_class(pipe).startswith("ZImage") else 0.0


class Clock(StepInterceptor):
    """How much of a run is done, in steps of the scheduler.

    kept: what the network made in the step under way, each output beside the sample that it is of.
    """

    def __init__(self) -> None:
        self.done, self.total = 0, 1
        self.kept: list[tuple[Any, Any]] = []
        self.same = SameScheduler()

    def started(self, pipe: Any) -> Undo:
        """Count the steps of the scheduler that a pipeline has now, whenever it got it; return the undo."""
        self.same = SameScheduler()
        return intercept_step(current_scheduler(pipe), self)

    def on_set_timesteps(self, scheduler: Any) -> None:
        """Begin anew."""
        self.done, self.total = 0, max(1, len(scheduler.timesteps))
        self.kept.clear()

    def on_step(self, call: StepCall) -> Any:
        """Count the step."""
        out = call.run()
        self.done += 1
        self.kept.clear()
        return out

    def within(self, interval: tuple[float, float]) -> bool:
        """Return whether the step under way lies in a part of the run."""
        return interval[0] <= self.done / self.total < interval[1]


class _Interval:
    """Around the network: both halves of its output are the positive one's outside of the interval."""

    def __init__(self, pipe: Any, guidance: ClassifierFree, clock: Clock) -> None:
        self.pipe, self.guidance, self.clock = pipe, guidance, clock
        name = denoiser_class(pipe)
        self.two_calls, self.positive_first = name in TWO_CALLS, name.startswith("ZImage")

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.guidance.guides:
            self.clock.same.check(self.pipe)
        if not self.guidance.guides or self.clock.within(self.guidance.interval):
            return forward(*args, **kwargs)
        if self.two_calls:
            return self._once(forward, *args, **kwargs)
        n = rows_of(args, kwargs)
        some = {
            name: value if name in SHARED else self._half(name, value, n) for name, value in kwargs.items()
        }
        return _both(forward(*[self._half("", value, n) for value in args], **some))

    def _once(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the positive call's output for the negative call, which shows the network the same sample.

        Told by where the sample lies, not by counting: windows of a video, or of the batch, are calls too.
        """
        sample = args[0] if args else kwargs["hidden_states"]
        for seen, out in self.clock.kept:
            if _is_same(seen, sample):
                return out
        out = forward(*args, **kwargs)
        self.clock.kept.append((sample, out))
        return out

    def _half(self, name: str, value: Any, n: int) -> Any:
        """Return the positive rows of an argument; AnimateDiff's text has a row for each frame."""
        own = len(value) if name == "encoder_hidden_states" and isinstance(value, Tensor) else n
        return cut_rows(value, slice(0, own // 2) if self.positive_first else slice(own // 2, own), own)


def _is_same(a: Any, b: Any) -> bool:
    """Return whether two tensors, both alive, are views of the same numbers."""
    where = [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    return where[0] == where[1]


def _both(out: Any) -> Any:
    """Return an output twice over, row after row."""
    import torch

    if isinstance(out, Tensor):
        return torch.cat([out, out])
    if isinstance(out, list):
        return [*out, *out]
    if isinstance(out, tuple):
        return (_both(out[0]), *out[1:])
    out.sample = _both(out.sample)
    return out
