"""Around the call of a pipeline: takes the negative prompt out of it, and has the pipeline encode it as it
would a prompt.

Every pipeline of Diffusers encodes in `encode_prompt`. While a call runs, that method is asked a second time,
with the negative prompt in the prompt's place and everything else as it was: so lengths, `clip_skip`, text
encoders' LoRAs and pictures per prompt are the pipeline's own, and pipelines that have no negative prompt get
one. The network is then shown the positive prompt alone, and so are ControlNets.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffplug.intercept import original_class
from diffplug.network.denoiser import denoisers
from diffplug.samplers.negative.cross_attention import cross_attentions, unwrapped
from diffplug.samplers.negative.state import Encoded, NegativeState

__all__ = [
    "NEGATIVES",
    "check_readable",
    "check_unguided",
    "denoiser_class",
    "encode_now",
    "encoding",
    "guidance_argument",
    "has_embedded_guidance",
    "negative_part",
    "takes",
    "unguided",
]

NEGATIVES = (
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
    "negative_prompt_embeds",
    "negative_prompt_embeds_2",
    "negative_pooled_prompt_embeds",
    "negative_prompt_embeds_mask",
    "negative_prompt_attention_mask",
)
"""What a negative prompt can be called in a call."""

_MASKS = {  # where `encode_prompt` returns the mask of the prompt
    "PixArtTransformer2DModel": 1,
    "SanaTransformer2DModel": 1,
    "LTXVideoTransformer3DModel": 1,
    "QwenImageTransformer2DModel": 1,
}


def denoiser_class(pipe: Any) -> str:
    """Return the class name of a pipeline's (first) denoiser."""
    return original_class(unwrapped(denoisers(pipe)[0])).__name__


def takes(pipe: Any, argument: str) -> bool:
    """Return whether a pipeline's own call has an argument."""
    return argument in inspect.signature(original_class(pipe).__call__).parameters


def has_embedded_guidance(pipe: Any) -> bool:
    """Return whether the network is told a guidance scale (FLUX.1 dev, LCM), so that it runs without a
    second row.
    """
    config = getattr(unwrapped(denoisers(pipe)[0]), "config", {})
    return bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None


def guidance_argument(pipe: Any) -> str | None:
    """Return the argument that sets real guidance, with a second row or call; None where a pipeline has
    none.
    """
    if takes(pipe, "true_cfg_scale"):
        return "true_cfg_scale"
    return "guidance_scale" if takes(pipe, "guidance_scale") and not has_embedded_guidance(pipe) else None


def unguided(pipe: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the arguments with which a pipeline makes one row for each picture; kwargs: its own."""
    name = guidance_argument(pipe)
    off = {} if name is None else {name: 1.0 if name == "true_cfg_scale" else 0.0}
    return off | ({"guidance_scale_2": 0.0} if "guidance_scale_2" in (kwargs or {}) else {})  # Wan 2.2


def check_unguided(pipe: Any) -> None:
    """Raise ValueError where a pipeline, in the middle of a run, guides after all: that would guide twice."""
    guides = getattr(pipe, "do_classifier_free_guidance", False)
    if guides and guidance_argument(pipe) is not None:
        raise ValueError(
            "the pipeline runs with guidance of its own, which together with the negative prompt's would "
            f"guide twice: leave {guidance_argument(pipe)} out of what is plugged in around it"
        )


def check_readable(pipe: Any, *, joint: bool = False) -> None:
    """Raise ValueError for a pipeline whose prompt cannot be taken apart from its network."""
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"{type(pipe).__name__} has no encode_prompt, so a negative prompt cannot be encoded"
        )
    if not joint and not cross_attentions(denoisers(pipe)[0]):
        raise ValueError(
            f"the {denoiser_class(pipe)} of this {type(pipe).__name__} has no cross-attention layers to "
            "guide: take method='cfg'"
        )


def negative_part(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the negative arguments of a call that are given, and all others."""
    told = {name: value for name, value in kwargs.items() if name in NEGATIVES and value is not None}
    return told, {name: value for name, value in kwargs.items() if name not in NEGATIVES}


@contextmanager
def encoding(
    pipe: Any, told: Mapping[str, Any], kwargs: Mapping[str, Any], state: NegativeState
) -> Iterator[None]:
    """A block in which the pipeline's `encode_prompt` leaves both prompts in `state` when it is first called.

    told, kwargs: the negative arguments of the call, and the others.
    """
    own, inner = vars(pipe).get("encode_prompt"), pipe.encode_prompt
    signature = inspect.signature(inner)
    place = _MASKS.get(denoiser_class(pipe))

    def both(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if state.negative is None:
            bound = signature.bind(*args, **kwargs).arguments
            told_again = _as_prompt(bound, told, signature)
            state.positive = _encoded(out, place)
            state.negative = _encoded(inner(**told_again), place)
        return out

    pipe.encode_prompt = both
    state.late = lambda: encode_now(pipe, told, kwargs, state)
    try:
        yield
    finally:
        state.forget()
        if own is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = own


def encode_now(pipe: Any, told: Mapping[str, Any], kwargs: Mapping[str, Any], state: NegativeState) -> None:
    """Leave the negative prompt in `state` where the pipeline was given embeddings and encodes nothing."""
    given = told.get("negative_prompt_embeds")
    if given is not None:
        state.negative = Encoded(given)
        return
    signature = inspect.signature(type(pipe).encode_prompt)
    negative = told.get("negative_prompt", "")
    prompts = 1 if isinstance(negative, str) else len(negative)
    known = {
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        **{name: value for name, value in kwargs.items() if "prompt" not in name},
    }
    bound = {"prompt": [""] * prompts, **{k: v for k, v in known.items() if k in signature.parameters}}
    pipe.encode_prompt(**_as_prompt(bound, told, signature))
    state.positive = None  # that was the negative prompt again


def _encoded(out: Any, place: int | None) -> Encoded:
    parts = out if isinstance(out, tuple) else (out,)
    return Encoded(parts[0], parts[place] if place is not None and place < len(parts) else None)


def _as_prompt(
    bound: Mapping[str, Any], told: Mapping[str, Any], signature: inspect.Signature
) -> dict[str, Any]:
    """Return the arguments of `encode_prompt` with the negative prompt in the prompt's place."""
    count = _prompts(bound)
    out = {name: value for name, value in bound.items() if not name.startswith("negative_")}
    for name in [name for name in out if name.startswith("prompt") or name.endswith(("_embeds", "_mask"))]:
        out[name] = told.get(f"negative_{name}")
    out["prompt"] = _repeated(told.get("negative_prompt", ""), count)
    for name in ("prompt_2", "prompt_3"):
        if out.get(name) is not None:
            out[name] = _repeated(out[name], count)
    if out.get("prompt_embeds") is not None:
        out["prompt"] = None
    if "do_classifier_free_guidance" in signature.parameters:
        out["do_classifier_free_guidance"] = False
    return out


def _prompts(bound: Mapping[str, Any]) -> int:
    prompt, embeds = bound.get("prompt"), bound.get("prompt_embeds")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    return 1 if prompt is not None or embeds is None else len(embeds)


def _repeated(negative: Any, count: int) -> list[str]:
    """Return one negative prompt for each prompt; copies of prompts get copies."""
    if isinstance(negative, str):
        return [negative] * count
    if not isinstance(negative, (list, tuple)) or not all(isinstance(text, str) for text in negative):
        raise ValueError(f"negative_prompt is {negative!r}: give a text, or a list with one for each prompt")
    if not negative or count % len(negative):
        raise ValueError(
            f"there are {len(negative)} negative prompts for {count} prompts: give one for all, or one "
            "for each"
        )
    return [text for text in negative for _ in range(count // len(negative))]
