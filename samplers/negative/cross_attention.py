"""Cross-attention to text, in any denoiser that has layers for it: where it is, and what may be done there.

UNets (Stable Diffusion, SDXL, AnimateDiff), PixArt, Sana, LTX and Wan read the prompt in layers of their own,
called `attn2`. Whatever processor such a layer has, its heads are merged just before `to_out`: that is the
point where attention to two prompts can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffplug.intercept import original_class

__all__ = ["attention_bias", "cross_attentions", "output_projection", "projected_text", "unwrapped"]


def unwrapped(module: Any) -> Any:
    """Return a module without the wrapper of `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def cross_attentions(denoiser: Any) -> dict[str, nn.Module]:
    """Return the layers that attend to the prompt, by name, in the order of the network; empty where none
    do.
    """
    return {
        name: part
        for name, part in unwrapped(denoiser).named_modules()
        if name.rpartition(".")[2] == "attn2"
        and hasattr(part, "to_out")
        and getattr(part, "is_cross_attention", True)
        and "motion_modules" not in name
    }


def output_projection(layer: Any) -> Any:
    """Return the linear layer that the merged heads of an attention layer go through."""
    out = layer.to_out
    return out[0] if isinstance(out, nn.ModuleList) else out


_PROJECTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "PixArtTransformer2DModel": lambda model, text: _if_any(model.caption_projection, text),
    "SanaTransformer2DModel": lambda model, text: model.caption_norm(model.caption_projection(text)),
    "LTXVideoTransformer3DModel": lambda model, text: model.caption_projection(text),
    "WanTransformer3DModel": lambda model, text: model.condition_embedder.text_embedder(text),
    "UNet2DConditionModel": lambda model, text: _unet_text(model, text),
}


def projected_text(denoiser: Any, text: Tensor) -> Tensor:
    """Return prompt embeddings [n, tokens, d] as the denoiser's cross-attention layers get them."""
    model = unwrapped(denoiser)
    projection = _PROJECTIONS.get(original_class(model).__name__)
    return text if projection is None else projection(model, text)


def attention_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return what is added to the logits [n, 1, tokens] for a mask [n, tokens] of ones and zeros."""
    return None if mask is None else ((1 - mask.to(like.dtype)) * -10000.0).unsqueeze(1)


def _if_any(layer: nn.Module | None, text: Tensor) -> Tensor:
    return text if layer is None else layer(text)


def _unet_text(model: Any, text: Tensor) -> Tensor:
    """Return text through the projection of UNets with a foreign text encoder (Kolors)."""
    if getattr(model.config, "encoder_hid_dim_type", None) != "text_proj":
        return text
    projected: Tensor = model.encoder_hid_proj(text)
    return projected
