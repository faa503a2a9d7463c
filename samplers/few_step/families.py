"""Which architecture a pipeline's denoiser has, told by class and configuration, never by a file's name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffplug.intercept import original_class

Test = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Family:
    """One architecture: class of the denoiser, pattern of pipeline classes, test of the configuration."""

    name: str
    denoiser: str
    pipelines: str = "*"
    test: Test = lambda config: True


def _text_time(config: Mapping[str, Any]) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _plain_unet(config: Mapping[str, Any]) -> bool:
    return config.get("addition_embed_type") is None


def _with_text_embedding(config: Mapping[str, Any]) -> bool:
    """Whether the U-Net adds a pooled text embedding to the time, as the embedded Shapes model does."""
    return config.get("addition_embed_type") == "text" and config.get("in_channels") == 4


_WAN = "WanTransformer3DModel"
_QWEN = "QwenImageTransformer2DModel"

# The first that fits is taken. Variants that differ in weights alone (Z-Image and its Turbo, SD3 and SD3.5)
# share a family: the shapes of a checkpoint tell whether it belongs.
FAMILIES: tuple[Family, ...] = (
    Family("kolors", "UNet2DConditionModel", "*Kolors*"),
    Family("sdxl", "UNet2DConditionModel", test=_text_time),
    Family("shapes", "UNet2DConditionModel", test=lambda c: c.get("addition_embed_type") == "text"),
    Family(
        "sd2",
        "UNet2DConditionModel",
        test=lambda c: _plain_unet(c) and c.get("cross_attention_dim") == 1024,
    ),
    Family("shapes", "UNet2DConditionModel", test=_with_text_embedding),
    Family("lcm", "UNet2DConditionModel", test=lambda c: c.get("time_cond_proj_dim") is not None),
    Family("sd15", "UNet2DConditionModel", test=_plain_unet),
    Family("sd15", "UNetMotionModel"),
    Family("sd3", "SD3Transformer2DModel"),
    Family("flux-dev", "FluxTransformer2DModel", test=lambda c: bool(c.get("guidance_embeds"))),
    Family("flux-schnell", "FluxTransformer2DModel"),
    Family("flux2-klein", "Flux2Transformer2DModel", "Flux2Klein*"),
    Family("flux2-dev", "Flux2Transformer2DModel"),
    Family("chroma", "ChromaTransformer2DModel"),
    Family("qwen-edit", _QWEN, "QwenImageEdit*"),
    Family("qwen-image", _QWEN),
    Family("qwen21", "QwenImage21Transformer2DModel"),
    Family("z-image", "ZImageTransformer2DModel"),
    Family("krea2", "Krea2Transformer2DModel"),
    Family("ernie-image", "ErnieImageTransformer2DModel"),
    Family("hunyuanimage21-refiner", "HunyuanImageTransformer2DModel", "*Refiner*"),
    Family("hunyuanimage21", "HunyuanImageTransformer2DModel"),
    Family("dreamlite", "DreamLiteUNetModel"),
    Family("longcat-edit", "LongCatImageTransformer2DModel", "*Edit*"),
    Family("hidream-i1", "HiDreamImageTransformer2DModel"),
    Family("pixart", "PixArtTransformer2DModel"),
    Family("sana-sprint", "SanaTransformer2DModel", "SanaSprint*"),
    Family("chronoedit", "ChronoEditTransformer3DModel"),
    Family("wan-i2v", _WAN, "WanImageToVideo*"),
    Family("wan-t2v", _WAN),
    Family("hunyuanvideo15", "HunyuanVideo15Transformer3DModel"),
    Family("ltx2", "LTX2VideoTransformer3DModel"),
    Family("cogvideox", "CogVideoXTransformer3DModel"),
    Family("kandinsky5", "Kandinsky5Transformer3DModel"),
    Family("ace-step", "AceStepTransformer1DModel"),
    Family("stable-audio-3", "StableAudio3DiTModel"),
    Family("anyflow", "AnyFlowTransformer3DModel"),
    Family("cosmos3", "Cosmos3*"),
    Family("kandinsky6", "Kandinsky6Transformer3DModel"),
    Family("helios", "HeliosTransformer3DModel"),
)


def names() -> list[str]:
    """Return the names of all families."""
    return sorted({family.name for family in FAMILIES})


def denoiser_name(pipe: Any) -> str:
    """Return the name of the component that denoises: "unet" or "transformer"; ValueError without one."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(f"{type(pipe).__name__} has no unet and no transformer: few-step recipes need one")


def unwrapped(module: Any) -> Any:
    """Return a module without `torch.compile`'s wrapper."""
    return getattr(module, "_orig_mod", module)


def family_of(pipe: Any) -> str:
    """Return the family of a pipeline ("sd15", "sdxl", "flux-dev", ...), two transformers ending in "-2".

    Raises ValueError for a denoiser that no few-step recipe is known for.
    """
    denoiser = unwrapped(getattr(pipe, denoiser_name(pipe)))
    cls, pipeline = original_class(denoiser).__name__, original_class(pipe).__name__
    config = getattr(denoiser, "config", {})
    for family in FAMILIES:
        fits = fnmatch.fnmatch(cls, family.denoiser) and fnmatch.fnmatch(pipeline, family.pipelines)
        if fits and family.test(config):
            two = family.denoiser == _WAN and getattr(pipe, "transformer_2", None) is not None
            return f"{family.name}-2" if two else family.name
    raise ValueError(f"no few-step recipe is known for the {cls} of {pipeline}")
