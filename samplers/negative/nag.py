"""Normalized Attention Guidance: negative prompts without training, in one call of the network a step
(2505.21179).

In every layer that reads the prompt, with the picture's queries the same for both:

    E = Z+ + (scale - 1) (Z+ - Z-)          away from the negative prompt
    Z = Z+ + alpha (E min(1, tau |Z+| / |E|) - Z+)      no token longer than tau times, and only partly

Z+ and Z- are what attention to either prompt gives, heads merged, | | the sum of absolute values over the
channels of a token. With scale 1, with alpha 0 and with equal prompts the picture is that of the prompt
alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffplug.checks import finite
from diffplug.intercept import PipelineCall, Undo, intercept_call, undo_all
from diffplug.network.denoiser import denoisers
from diffplug.samplers.negative.call import (
    NEGATIVES,
    check_readable,
    denoiser_class,
    encoding,
    guidance_argument,
    negative_part,
    unguided,
)
from diffplug.samplers.negative.joint_attention import JOINT, guide_joint
from diffplug.samplers.negative.nag_layers import guide_cross
from diffplug.samplers.negative.state import NegativeState

__all__ = ["NAG", "PRESETS", "NagOptions", "known_families", "nag"]


@dataclass(frozen=True, kw_only=True)
class NagOptions:
    """scale: 1 does nothing. tau: longest a token may become. alpha: how much of it is taken. until: noise
    level (1 at the start, 0 at the end) below which it is off; most of it happens at the start.
    """

    scale: float = 3.0
    tau: float = 2.5
    alpha: float = 0.5
    until: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("scale", 1.0, math.inf),
            ("tau", 1.0, math.inf),
            ("alpha", 0.0, 1.0),
            ("until", 0.0, 1.0),
        ):
            value = getattr(self, name)
            number = value if name == "tau" and value == math.inf else finite(name, value)
            if not low <= number <= high:
                limit = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
                raise ValueError(f"{name} is {value!r}, allowed is {limit}")


_UNET = NagOptions()
_FLUX = NagOptions(scale=5.0, alpha=0.25)
PRESETS: Mapping[str, NagOptions] = {
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "PixArtTransformer2DModel": _UNET,
    "SanaTransformer2DModel": _UNET,
    "LTXVideoTransformer3DModel": _UNET,
    "WanTransformer3DModel": NagOptions(scale=9.0, alpha=0.25),
    "SD3Transformer2DModel": NagOptions(scale=5.0, alpha=0.125),
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": _FLUX,
    "ZImageTransformer2DModel": NagOptions(scale=2.0, alpha=0.25, until=0.8),
}
"""Options by denoiser: the published ones for SDXL, SD 3.5 (tau, alpha), FLUX.1 and Wan, Z-Image's from its
users.
"""


def known_families() -> str:
    """Return the denoisers that NAG knows, in words."""
    return ", ".join(
        name.removesuffix("Model").replace("Transformer2D", "").replace("Transformer3D", "")
        for name in PRESETS
    )


class NAG:
    """A plug with which `negative_prompt` acts at one network call a step, on distilled models too.

        with plug(pipe, FewStep("lcm"), NAG()):
            image = pipe("a circle and a square", negative_prompt="red").images[0]

    scale, tau, alpha, until: as in `NagOptions`; what is left out is the preset of the model's family.
    strength: scale - 1 is multiplied by it, 1 is the preset. A call without `negative_prompt` gets the
    model without guidance. The pipeline's own guidance is off meanwhile (guidance that the network is told
    stays).

    Cost, while it acts: for cross-attention (Stable Diffusion, SDXL, PixArt, Sana, LTX, Wan) the
    cross-attention layers run twice; for joint attention (SD3, FLUX, FLUX.2, Qwen-Image, Z-Image) the
    network runs on two rows a picture, as guidance would: raise `until` there.

    Raises ValueError for a denoiser whose attention is not known, and in a call for guidance above 1 besides.
    """

    slot = "negative prompt"

    def __init__(
        self,
        scale: float | None = None,
        *,
        tau: float | None = None,
        alpha: float | None = None,
        until: float | None = None,
        strength: float = 1.0,
    ) -> None:
        told = {"scale": scale, "tau": tau, "alpha": alpha, "until": until}
        self.told = {name: value for name, value in told.items() if value is not None}
        self.strength = finite("strength", strength)
        NagOptions(**self.told)
        if self.strength < 0:
            raise ValueError(f"strength is {strength!r}: give 0 (off) or more; 1 is the preset")

    def options_for(self, pipe: Any) -> NagOptions:
        """Return the options on a pipeline; ValueError for a family that is not known."""
        name = denoiser_class(pipe)
        if name not in PRESETS:
            way = "method='cfg'" if guidance_argument(pipe) else "a model of another family"
            raise ValueError(
                f"the attention of {name} is not known to NAG: take {way}; known are {known_families()}"
            )
        check_readable(pipe, joint=name in JOINT)
        options = replace(PRESETS[name], **self.told)
        return replace(options, scale=1 + self.strength * (options.scale - 1))

    def attach(self, pipe: Any) -> Undo:
        """Put it on a pipeline; return what takes it off."""
        options, state = self.options_for(pipe), NegativeState()
        guide = guide_joint if denoiser_class(pipe) in JOINT else guide_cross
        undos = [guide(pipe, network, state, options, nag) for network in denoisers(pipe)]

        def around(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
            return self._run(call, kwargs, state, options)

        undos.append(intercept_call(pipe, around, innermost=True, takes=NEGATIVES))
        return undo_all(undos)

    def _run(
        self, call: PipelineCall, kwargs: dict[str, Any], state: NegativeState, options: NagOptions
    ) -> Any:
        told, rest = negative_part(kwargs)
        refuse_guidance(call, "NAG", "its `scale` or `strength`")
        rest |= unguided(call.pipe, rest)
        if told and (options.scale == 1 or options.alpha == 0):
            warnings.warn(
                "NAG is off at this scale, strength or alpha: the negative prompt does nothing", stacklevel=5
            )
        if not told or options.scale == 1 or options.alpha == 0:
            return call(**rest)
        with encoding(call.pipe, told, rest, state):
            out = call(**rest)
            state.check_acted(call.pipe)
        return out

    def __repr__(self) -> str:
        told = {**self.told, **({} if self.strength == 1 else {"strength": self.strength})}
        return f"NAG({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def refuse_guidance(call: PipelineCall, who: str, knob: str) -> None:
    """Raise ValueError for a call that asks for real guidance above 1 besides."""
    name = guidance_argument(call.pipe)
    value = call.asked.get(name) if name else None
    if value is not None and value > 1:
        raise ValueError(
            f"{name}={value:g} together with {who} would guide twice: leave it out; {knob} sets how "
            "strongly the "
            "negative prompt acts"
        )


def nag(positive: Tensor, negative: Tensor, options: NagOptions) -> Tensor:
    """Return guided attention [n, tokens, channels] from attention to the prompt and to the negative
    prompt.
    """
    extended = positive + (options.scale - 1) * (positive - negative)
    if options.tau != math.inf:
        own, longer = (x.float().abs().sum(-1, keepdim=True) for x in (positive, extended))
        extended = extended * (options.tau * own / longer.clamp(min=1e-12)).clamp(max=1).to(extended.dtype)
    return positive + options.alpha * (extended - positive)
