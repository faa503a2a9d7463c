"""NegativeGuidance: the one plug for negative prompts, whatever the model can do.

with plug(pipe, NegativeGuidance()):
    image = pipe("a portrait", negative_prompt="hat").images[0]

cfg        two evaluations a step    exact; not for models distilled with guidance
interval   one to two                exact where it acts, the first part of the run
sun        one                       near to cfg, by an adapter trained for the model
nag        one, with more attention  any model, nothing to train; not cfg's picture
"""

from __future__ import annotations

import os
from typing import Any

from diffplug.intercept import PipelineCall, Undo, interceptors
from diffplug.samplers.negative.call import (
    denoiser_class,
    guidance_argument,
    has_embedded_guidance,
    takes,
)
from diffplug.samplers.negative.classifier_free import ClassifierFree, guidance_of, is_given
from diffplug.samplers.negative.nag import NAG, PRESETS
from diffplug.samplers.negative.speedupnet import SpeedUpNet, shipped_adapter
from diffplug.samplers.negative.sun_adapter import SunAdapter

__all__ = ["METHODS", "NegativeGuidance"]

METHODS = ("auto", "cfg", "nag", "sun", "interval")


class NegativeGuidance:
    """Makes `negative_prompt` act on any pipeline it knows, or says why it cannot; never ignores it silently.

    method: "cfg", "interval", "sun", "nag", or "auto": an adapter where one is given or comes with the
    package for this model; else in each call the pipeline's own guidance where that is on, and NAG where it
    is off or the model was distilled with it. strength: 1 is the method's preset, 0 is off, more is
    stronger. adapter: a SpeedUpNet file or object. interval: shares of the run in which method "interval"
    guides. options: of NAG (scale, tau, alpha, until).

    After attaching, `method` is what was chosen. Also pipelines that have no `negative_prompt` take one in
    their call. Raises ValueError for methods a pipeline cannot do, with those that work there.
    """

    slot = "negative prompt"

    def __init__(
        self,
        method: str = "auto",
        *,
        strength: float = 1.0,
        adapter: str | os.PathLike[str] | SunAdapter | None = None,
        interval: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, allowed are {', '.join(map(repr, METHODS))}")
        self.method, self.strength, self.adapter, self.options = method, strength, adapter, options
        self.interval = (0.0, 0.5) if interval is None else interval
        idle = {
            "adapter": adapter is not None and method not in ("sun", "auto"),
            "interval": interval is not None and method != "interval",
            ", ".join(options): bool(options) and method not in ("nag", "auto"),
        }
        for name, does_nothing in idle.items():
            if does_nothing:
                raise ValueError(f"{name} does nothing with method={method!r}: leave it out")
        _check_options(options)
        NAG(strength=strength, **options)
        ClassifierFree(strength=strength, interval=self.interval)

    def attach(self, pipe: Any) -> Undo:
        """Put it on a pipeline; return what takes it off."""
        if self.method == "auto" and (self.adapter is not None or self._has_own(pipe)):
            self.method = "sun"
        if self.method == "sun":
            return SpeedUpNet(self.adapter, strength=self.strength).attach(pipe)
        if self.method == "nag" or (self.method == "auto" and not _guides(pipe)):
            self.method = "nag"
            return NAG(strength=self.strength, **self.options).attach(pipe)
        if self.method == "interval":
            return ClassifierFree(strength=self.strength, interval=self.interval).attach(pipe)
        if self.method == "cfg" or denoiser_class(pipe) not in PRESETS:
            self.method = "cfg"
            return ClassifierFree(strength=self.strength).attach(pipe)
        return _Either(self.strength, self.options).attach(pipe)

    def _has_own(self, pipe: Any) -> bool:
        return shipped_adapter(pipe) is not None and not _few_step(pipe)

    def __repr__(self) -> str:
        told: dict[str, Any] = {} if self.adapter is None else {"adapter": str(self.adapter)}
        told |= {"interval": self.interval} if self.method == "interval" else {}
        more = [f", {name}={value!r}" for name, value in {**told, **self.options}.items()]
        return f"NegativeGuidance({self.method!r}, strength={self.strength!r}{''.join(more)})"


class _Either(NAG):
    """The pipeline's own guidance in calls where it is on, NAG in those where it is off."""

    def __init__(self, strength: float, options: dict[str, Any]) -> None:
        super().__init__(strength=strength, **options)
        self.exact = ClassifierFree(strength=strength)

    def _run(self, call: PipelineCall, kwargs: dict[str, Any], *rest: Any) -> Any:
        if guidance_of(call.pipe, kwargs) > 1 or not is_given(kwargs):
            return self.exact.run(call, kwargs)
        return super()._run(call, kwargs, *rest)


def _guides(pipe: Any) -> bool:
    """Return whether a pipeline has guidance of its own with a negative prompt, and was not distilled with
    it.
    """
    able = guidance_argument(pipe) is not None and takes(pipe, "negative_prompt")
    return able and not has_embedded_guidance(pipe) and not _few_step(pipe)


def _few_step(pipe: Any) -> bool:
    """Return whether a few-step checkpoint that needs no guidance is plugged in."""
    rows = (getattr(layer, "row", None) for layer in interceptors(pipe))
    return any(getattr(row, "guidance", None) == "off" for row in rows)


def _check_options(options: dict[str, Any]) -> None:
    from diffplug.registry import unknown

    known = ["scale", "tau", "alpha", "until"]
    for name in options:
        if name not in known:
            raise unknown("option of NegativeGuidance", name, [*known, "adapter", "interval", "strength"])
