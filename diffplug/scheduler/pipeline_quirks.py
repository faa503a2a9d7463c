"""Arguments that pipelines of Diffusers accept and lose: by class, what happens to them and when.

Found in the sources by `diffplug.testing.swallowed_arguments`; tests/scheduler/test_pipeline_quirks.py holds
the table against the installed Diffusers and fails where one more appears, or one is mended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from diffplug.intercept import original_class


@dataclass(frozen=True)
class Quirk:
    """What becomes of an argument of a pipeline's call.

    kind: as `diffplug.testing.swallowed_arguments` finds it in the source: unread, overwritten, branch, not
    set, latents. why: what the pipeline does, in words that follow the argument's name. holds: whether it
    does so with a scheduler.
    """

    kind: str
    why: str
    holds: Callable[[Any], bool] = lambda scheduler: True


def lost_arguments(pipe: Any, scheduler: Any = None) -> dict[str, str]:
    """Return argument to what the pipeline does instead of using it, in words that follow its name.

    Empty for most pipelines. scheduler: the one that the pipeline is going to have (its own by default): some
    branches ask for its class or its options. A subclass of a listed class is taken to call as its parent.
    """
    scheduler = getattr(pipe, "scheduler", None) if scheduler is None else scheduler
    known = (QUIRKS[cls.__name__] for cls in original_class(pipe).__mro__ if cls.__name__ in QUIRKS)
    quirks: Mapping[str, Quirk] = next(known, {})
    return {name: quirk.why for name, quirk in quirks.items() if quirk.holds(scheduler)}


def _has_flow_sigmas(scheduler: Any) -> bool:
    return bool(getattr(scheduler.config, "use_flow_sigmas", False))


def _is_a(*names: str) -> Callable[[Any], bool]:
    """Return a test of a scheduler: whether one of its classes has one of these names."""
    return lambda scheduler: any(cls.__name__ in names for cls in type(scheduler).__mro__)


_UNREAD = Quirk("unread", "is read by nothing")
_REPLACED = Quirk("overwritten", "is replaced by the pipeline's own value before anything reads it")
_ONE = Quirk("overwritten", "is set to 1 whatever is given")
_FLOW_SIGMAS = Quirk("branch", "is set to None where the scheduler has use_flow_sigmas", _has_flow_sigmas)
_NOT_TO_UNIPC = Quirk(
    "not set", "is not handed on to a UniPCMultistepScheduler", _is_a("UniPCMultistepScheduler")
)
_NOT_TO_DDIM = Quirk(
    "branch",
    "is not handed on to a DDIMScheduler or EulerAncestralDiscreteScheduler",
    _is_a("DDIMScheduler", "EulerAncestralDiscreteScheduler"),
)
_SET_AGAIN = Quirk("not set", "is lost when the pipeline sets the scheduler's timesteps a second time")
_PROMPTS_ALONE = Quirk("latents", "repeats the prompts but not the start noise, which fails above 1")

_VIDEOS_ONE = {"num_videos_per_prompt": _ONE}
_SIGMAS_NONE = {"sigmas": _FLOW_SIGMAS}
_HELIOS = {"num_videos_per_prompt": _PROMPTS_ALONE, "latents": _REPLACED}

QUIRKS: Mapping[str, Mapping[str, Quirk]] = MappingProxyType(
    {
        "AllegroPipeline": {**_VIDEOS_ONE, "timesteps": _SET_AGAIN},
        "AnimateDiffControlNetPipeline": _VIDEOS_ONE,
        "AnimateDiffPAGPipeline": _VIDEOS_ONE,
        "AnimateDiffPipeline": _VIDEOS_ONE,
        "AnimateDiffSDXLPipeline": _VIDEOS_ONE,
        "AnimateDiffSparseControlNetPipeline": _VIDEOS_ONE,
        "AnimateDiffVideoToVideoControlNetPipeline": _VIDEOS_ONE,
        "AnimateDiffVideoToVideoPipeline": _VIDEOS_ONE,
        "AudioLDM2Pipeline": {"cross_attention_kwargs": _UNREAD},
        "BriaPipeline": {"timesteps": _NOT_TO_DDIM},
        "ChromaInpaintPipeline": {"true_cfg_scale": _UNREAD},
        "CogVideoXFunControlPipeline": _VIDEOS_ONE,
        "CogVideoXImageToVideoPipeline": _VIDEOS_ONE,
        "CogVideoXPipeline": _VIDEOS_ONE,
        "CogVideoXVideoToVideoPipeline": _VIDEOS_ONE,
        "ConsisIDPipeline": _VIDEOS_ONE,
        "Flux2KleinInpaintPipeline": _SIGMAS_NONE,
        "Flux2KleinKVPipeline": _SIGMAS_NONE,
        "Flux2KleinPipeline": _SIGMAS_NONE,
        "Flux2Pipeline": _SIGMAS_NONE,
        "FluxPipeline": _SIGMAS_NONE,
        "HeliosPipeline": _HELIOS,
        "HeliosPyramidPipeline": {**_HELIOS, "sigmas": _UNREAD},
        "HiDreamImagePipeline": {"sigmas": _NOT_TO_UNIPC},
        "HunyuanVideoFramepackPipeline": {"num_videos_per_prompt": _PROMPTS_ALONE},
        "KolorsImg2ImgPipeline": {
            "pooled_prompt_embeds": _REPLACED,
            "negative_pooled_prompt_embeds": _REPLACED,
            "max_sequence_length": _UNREAD,
        },
        "KolorsPAGPipeline": {"max_sequence_length": _UNREAD},
        "KolorsPipeline": {"max_sequence_length": _UNREAD},
        "LEditsPPPipelineStableDiffusionXL": {"target_size": _UNREAD},
        "OnnxStableDiffusionUpscalePipeline": {"latents": _REPLACED},
        "OvisImagePipeline": _SIGMAS_NONE,
        "PIAPipeline": _VIDEOS_ONE,
        "PaintByExamplePipeline": {"height": _REPLACED, "width": _REPLACED, "negative_prompt": _UNREAD},
        "QwenImageEditInpaintPipeline": {"height": _REPLACED, "width": _REPLACED},
        "SanaWMPipeline": {"fps": _UNREAD},
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": {"image_embeds": _UNREAD},
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _VIDEOS_ONE,
        "StableAudioPipeline": {"initial_audio_sampling_rate": _UNREAD},
        "StableCascadePriorPipeline": {"timesteps": _REPLACED},
        "StableDiffusionDiffEditPipeline": {"latents": _REPLACED},
        "StableDiffusionXLControlNetPAGImg2ImgPipeline": {"guess_mode": _UNREAD},
        "StableUnCLIPImg2ImgPipeline": {"clip_skip": _UNREAD},
        "TextToVideoZeroSDXLPipeline": {"guidance_rescale": _UNREAD},
        "VideoToVideoSDPipeline": {"latents": _REPLACED},
        "VisualClozeGenerationPipeline": {"latents": _REPLACED},
        "WanVideoToVideoPipeline": _VIDEOS_ONE,
    }
)
