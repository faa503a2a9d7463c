"""SpeedUpNet: negative prompts and guidance in one evaluation a step, by a trained adapter (arXiv
2312.08887).

    with plug(pipe, SpeedUpNet("adapter.safetensors")):
        image = pipe("a circle and a square", negative_prompt="red", guidance_scale=5).images[0]

The network runs on one row a picture and returns about what guidance would have made of two. `diffplug train
speedupnet` trains an adapter; the public one for Stable Diffusion 1.5 is read as it is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffplug.call_arguments import asked_steps, given_grid
from diffplug.checks import finite
from diffplug.intercept import PipelineCall, Undo, intercept_call, interceptors, undo_all
from diffplug.loading import embedded_name, shapes_folder
from diffplug.network.denoiser import denoisers
from diffplug.samplers.few_step.run import FewStepCall
from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.negative.call import (
    NEGATIVES,
    check_readable,
    encoding,
    guidance_argument,
    negative_part,
    unguided,
)
from diffplug.samplers.negative.cross_attention import unwrapped
from diffplug.samplers.negative.nag import refuse_guidance
from diffplug.samplers.negative.network import watch_network
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter, put_on
from diffplug.samplers.negative.sun_file import load_adapter

__all__ = ["SpeedUpNet", "shipped_adapter"]

Source = str | os.PathLike[str] | SunAdapter | None


class SpeedUpNet:
    """A plug with which guidance and `negative_prompt` cost one evaluation a step.

    adapter: a file or a `SunAdapter`; None takes the one that comes with the package for this model.
    guidance_scale: of calls that ask for none; None takes the adapter's. A call's own `guidance_scale` is
    handed to the adapter and kept from the pipeline. strength: of the adapter, 0 (the base, bit for bit) or
    more. norm: of the public form (see `load_adapter`).

    A call without `negative_prompt` is guided away from the empty prompt, as guidance is, or where the
    adapter's figures speak against it (`meta.empty` is "off", as on a few-step student) not at all, with a
    warning if the call asks for guidance. Raises ValueError, before anything is changed, for files that are
    not whole and for adapters of another base; in a call for guidance above 1 with the public adapter, which
    has its own baked in. Warns of other weights than those it was trained on, of guidance scales outside of
    its range, and of other steps than it was made for (the public one: 4, on trailing timesteps).
    """

    slot = "negative prompt"

    def __init__(
        self,
        adapter: Source = None,
        *,
        guidance_scale: float | None = None,
        strength: float = 1.0,
        norm: str = "sample",
    ) -> None:
        self.adapter, self.norm = adapter, norm
        self.guidance_scale = None if guidance_scale is None else finite("guidance_scale", guidance_scale)
        self.strength = finite("strength", strength)
        if self.strength < 0:
            raise ValueError(f"strength is {strength!r}: give 0 (off) or more; 1 is as trained")
        if self.guidance_scale is not None and self.guidance_scale < 1:
            raise ValueError(f"guidance_scale is {guidance_scale!r}: give 1 (none) or more")

    def adapter_for(self, pipe: Any) -> SunAdapter:
        """Return the adapter on a pipeline; ValueError where there is none or it does not fit."""
        check_readable(pipe)
        network = denoisers(pipe)[0]
        source = self.adapter
        if source is None:
            source = shipped_adapter(pipe)
            if source is None:
                raise ValueError(
                    f"there is no SpeedUpNet adapter for this {type(pipe).__name__} in the package: give "
                    "a file, train "
                    "one (diffplug train speedupnet), or take NAG, which needs none"
                )
        adapter = source if isinstance(source, SunAdapter) else load_adapter(source, network, norm=self.norm)
        adapter.check_fits(network)
        meta = adapter.meta
        _check_base(meta, pipe)
        if not adapter.tied and (self.strength != 1 or self.guidance_scale is not None):
            raise ValueError(
                "the public adapter has its guidance scale and strength baked in: leave guidance_scale "
                "and strength out"
            )
        return adapter

    def attach(self, pipe: Any) -> Undo:
        """Put it on a pipeline; return what takes it off."""
        networks = denoisers(pipe)
        if len(networks) > 1:
            raise ValueError(f"{type(pipe).__name__} has {len(networks)} denoisers: an adapter is for one")
        adapter, state = self.adapter_for(pipe), NegativeState()
        weight = next(unwrapped(networks[0]).parameters())
        if weight.device.type != "meta":
            adapter.to(weight.device, weight.dtype)
        undos = [
            put_on(adapter, unwrapped(networks[0]), state, self.strength),
            watch_network(pipe, networks[0], state),
        ]

        def around(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
            return self._run(call, kwargs, state, adapter)

        undos.append(intercept_call(pipe, around, innermost=True, takes=NEGATIVES))
        return undo_all(undos)

    def _run(
        self, call: PipelineCall, kwargs: dict[str, Any], state: NegativeState, adapter: SunAdapter
    ) -> Any:
        told, rest = negative_part(kwargs)
        if adapter.tied:
            state.guidance = w = self._guidance(call, rest, adapter)
        else:
            refuse_guidance(call, "the public SpeedUpNet adapter", "what it was trained with")
            w = None
        rest |= unguided(call.pipe, rest)
        if (w == 1 or self.strength == 0) and told:
            warnings.warn(
                f"guidance_scale={w:g} and strength={self.strength:g} leave the adapter off: the negative "
                "prompt does nothing",
                stacklevel=5,
            )
        if w == 1 or self.strength == 0:
            return call(**rest)
        if _leaves_empty(told, adapter):
            if (name := guidance_argument(call.pipe)) and (call.asked.get(name) or 0) > 1:
                warnings.warn(
                    f"{name}={call.asked[name]:g} does nothing: without a negative prompt the adapter is off",
                    stacklevel=5,
                )
            return call(**rest)
        _check_steps(adapter.meta, call.pipe, rest)
        with encoding(call.pipe, told or {"negative_prompt": ""}, rest, state):
            state.guidance = w
            return call(**rest)

    def _guidance(self, call: PipelineCall, kwargs: Mapping[str, Any], adapter: SunAdapter) -> float:
        """Return w: the call's own, what another plug put into it, this plug's, or the adapter's."""
        name, meta = guidance_argument(call.pipe), adapter.meta
        given = call.asked.get(name) if name else None
        inside = kwargs.get(name) if name else None
        if given is None and inside is not None and inside > 1:
            given = inside
        if given is None:
            given = meta.guidance if self.guidance_scale is None else self.guidance_scale
        w = max(1.0, finite("guidance_scale", given))
        low, high = meta.guidance_range
        if w != 1 and not low <= w <= high:
            warnings.warn(
                f"guidance_scale={w:g}: this SpeedUpNet adapter was trained for {low:g} to {high:g}",
                stacklevel=6,
            )
        return w

    def __repr__(self) -> str:
        usual = {"guidance_scale": None, "strength": 1.0, "norm": "sample"}
        told = [f"{name}={getattr(self, name)!r}" for name in usual if getattr(self, name) != usual[name]]
        return f"SpeedUpNet({', '.join([repr(str(self.adapter)), *told])})"


def _check_steps(meta: AdapterMeta, pipe: Any, kwargs: Mapping[str, Any]) -> None:
    """Warn of other steps than an adapter was trained for, and of other timesteps than the public one's."""
    steps = asked_steps(pipe, kwargs)
    if meta.steps and steps not in meta.steps:
        warnings.warn(
            f"num_inference_steps={steps}: this SpeedUpNet adapter was trained for "
            f"{' or '.join(map(str, meta.steps))}",
            stacklevel=6,
        )
    spacing = getattr(getattr(pipe, "scheduler", None), "config", {}).get("timestep_spacing", "trailing")
    if meta.layout == "v1" and given_grid(kwargs) is None and spacing != "trailing":
        warnings.warn(
            f"the public SpeedUpNet adapter was trained on trailing timesteps, the scheduler's are {spacing}"
            ': plug in one with timestep_spacing="trailing"',
            stacklevel=6,
        )


def _leaves_empty(told: Mapping[str, Any], adapter: SunAdapter) -> bool:
    """Return whether a call has no negative prompt and the adapter is off for those."""
    empty = all(isinstance(value, (str, list)) and not any(value) for value in told.values())
    return empty and adapter.meta.empty == "off"


def _check_base(meta: AdapterMeta, pipe: Any) -> None:
    """Warn of weights that an adapter was not trained on; raise ValueError for another architecture."""
    try:
        here = fingerprint(pipe) if meta.model else None
        shape = architecture(pipe) if meta.architecture else None
    except (NotImplementedError, RuntimeError):  # weights that are elsewhere, as with offloading to disk
        return
    if meta.model == here:
        return
    if meta.architecture != shape:
        raise ValueError(
            f"the SpeedUpNet adapter is for another architecture than this {type(pipe).__name__}: train "
            "one (diffplug "
            "train speedupnet)"
        )
    warnings.warn(
        f"the SpeedUpNet adapter was trained on other weights (model {str(meta.model)[:8]}, this is "
        f"{str(here)[:8]}): "
        "`diffplug score-adapter` says how near it still comes to guidance",
        stacklevel=5,
    )


def shipped_adapter(pipe: Any) -> Path | None:
    """Return the adapter in the package for the embedded model that a pipeline is, None for other models.

    Under the four-step student it is the one that was trained on it.
    """
    if embedded_name(pipe) != "shapes":
        return None
    rows = {each.row.name for each in interceptors(pipe) if isinstance(each, FewStepCall)}
    name = "speedupnet-4" if rows & {"shapes-4", "shapes-4-pso"} else "speedupnet"
    file = shapes_folder().parent / "negative" / f"{name}.safetensors"
    return file if file.is_file() else None
