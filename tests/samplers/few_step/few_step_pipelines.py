"""The tiny pipeline of each family that a row of the catalogue is for, and how to call it.

Those that the public kit has come from there. The others are the real classes with random weights and, in
place of their text encoders, random prompt embeddings."""

from __future__ import annotations

import functools
import unittest.mock
from collections.abc import Callable
from typing import Any

import diffusers
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

from diffplug.testing import tiny
from diffplug.testing.encoders import kl_autoencoder
from diffplug.testing.families import sd_parts

_TINY = {
    "sd15": "sd15",
    "lcm": "lcm",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux-dev": "flux",
    "qwen-image": "qwenimage",
    "wan-t2v": "wan",
    "pixart": "pixart",
    "animatediff": "animatediff",  # of the family sd15, with motion modules
}
Built = tuple[Any, dict[str, Any]]
_calls: dict[str, dict[str, Any]] = {}
_SIZE = {"height": 16, "width": 16, "output_type": "latent"}


def pipeline(family: str) -> Any:
    """Return a fresh tiny pipeline of a family, in evaluation mode, float32."""
    if family in _TINY:
        return tiny(_TINY[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, _calls[family] = _BUILT[family]()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                _fill(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(family: str) -> dict[str, Any]:
    """Return arguments with which the pipeline of a family runs quickly."""
    call = tiny.inputs(_TINY[family]) if family in _TINY else _calls[family]
    return {name: value for name, value in call.items() if name != "num_inference_steps"}


@torch.no_grad()
def _fill(module: torch.nn.Module) -> None:
    """Give random numbers to what starts at zero or as memory that nobody wrote."""
    module.eval().requires_grad_(False)
    for weight in module.parameters():
        if weight.ndim > 1 and not (weight.isfinite().all() and weight.any()):
            weight.normal_(std=0.05)


def _flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def _dynamic(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return _flow(use_dynamic_shifting=True, **config)


def _vae(channels: int = 1, blocks: int = 1) -> Any:
    return kl_autoencoder(
        latent_channels=channels, blocks=blocks, quant_convs=False, scaling_factor=0.3611, shift_factor=0.1159
    )


def _sd2() -> Built:
    pipe = diffusers.StableDiffusionPipeline(
        **{**sd_parts(cross_attention_dim=1024), "text_encoder": None, "tokenizer": None},
        scheduler=tiny("sd15").scheduler,
    )
    embeds = torch.randn(1, 7, 1024)
    return pipe, {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "output_type": "latent"}


def _schnell() -> Built:
    pipe = tiny("flux")
    config = {**pipe.transformer.config, "guidance_embeds": False}
    transformer = diffusers.FluxTransformer2DModel.from_config(config)
    parts = {**pipe.components, "transformer": transformer, "scheduler": _flow(shift=1.0)}
    return diffusers.FluxPipeline(**parts), tiny.inputs("flux")


def _flux2(cls: Any, **options: Any) -> Built:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=cls is diffusers.Flux2Pipeline,
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = cls(
        scheduler=_dynamic(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        **options,
    )
    call = {"prompt_embeds": torch.randn(1, 7, 16), **_SIZE}
    if cls is diffusers.Flux2KleinPipeline:
        call["negative_prompt_embeds"] = torch.randn(1, 7, 16)
    return pipe, call


def _chroma() -> Built:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=32,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(
        scheduler=_dynamic(), vae=_vae(), text_encoder=None, tokenizer=None, transformer=transformer
    )
    embeds, mask = torch.randn(1, 7, 32), torch.ones(1, 7)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, **_SIZE}
    return pipe, {**call, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


def _z_image() -> Built:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    pipe = diffusers.ZImagePipeline(
        scheduler=_flow(),
        vae=_vae(4, 2),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    embeds = [torch.randn(7, 16)]
    return pipe, {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, **_SIZE}


def _qwen_edit() -> Built:
    pipe = tiny("qwenimage")
    parts = {**pipe.components, "text_encoder": None, "tokenizer": None, "processor": None}
    embeds, mask = torch.randn(1, 7, 16), torch.ones(1, 7, dtype=torch.long)
    image = PIL.Image.new("RGB", (16, 16), "red")
    call = {"image": image, "prompt_embeds": embeds, "prompt_embeds_mask": mask, **_SIZE}
    negative = {"negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": mask}
    return QwenImageEditSmall(**parts), {**call, **negative}


class QwenImageEditSmall(diffusers.QwenImageEditPipeline):
    """Keeps pictures at 16 x 16, where the pipeline makes them a million pixels."""

    @functools.wraps(diffusers.QwenImageEditPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        small = unittest.mock.patch.object(
            pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (16, 16, None)
        )
        with small:
            return super().__call__(*args, **kwargs)


class _Processor:
    """What pipelines ask of a processor when they are built."""

    tokenizer: Any = None
    image_processor: Any = None

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, messages: Any, **options: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [0]


def _qwen21() -> Built:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = diffusers.QwenImage21Pipeline(
        scheduler=_dynamic(),
        vae=tiny("qwenimage").vae,
        text_encoder=None,
        processor=_Processor(),
        transformer=transformer,
    )
    call = {"prompt_embeds": torch.randn(1, 7, 16), "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.bool)}
    return pipe, {**call, **_SIZE, "height": 64, "width": 64}


def _krea2() -> Built:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.Krea2Pipeline(
        scheduler=_dynamic(),
        vae=tiny("qwenimage").vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        text_encoder_select_layers=(0, 1),
        is_distilled=True,
    )
    embeds, mask = torch.randn(1, 7, 2, 16), torch.ones(1, 7, dtype=torch.bool)
    call = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, **_SIZE}
    return pipe, {**call, "negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": mask}


def _sana_sprint() -> Built:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
    )
    pipe = diffusers.SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.SCMScheduler(prediction_type="trigflow"),
    )
    embeds, mask = torch.randn(1, 7, 16), torch.ones(1, 7)
    call = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "use_resolution_binning": False}
    return pipe, {**call, **_SIZE, "height": 32, "width": 32}


def _cogvideox() -> Built:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=32,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=49,
        max_text_seq_length=7,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_cog_vae(),
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0
        ),
    )
    embeds = torch.randn(1, 7, 32)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "max_sequence_length": 7, **_SIZE}
    return pipe, {**call, "height": 32, "width": 32}


def _cog_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def _wan(cls: Any, second: bool, **config: Any) -> Built:
    pipe = tiny("wan")
    make = diffusers.WanTransformer3DModel
    parts = {**pipe.components, "transformer": make(**{**_WAN, **config}), "text_encoder": None}
    parts |= {"tokenizer": None, "transformer_2": make(**{**_WAN, **config}) if second else None}
    embeds = torch.randn(1, 7, 32)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "num_frames": 5, **_SIZE}
    if cls is diffusers.WanImageToVideoPipeline:
        parts |= {"image_encoder": None, "image_processor": None}
        call["image"] = torch.rand(1, 3, 16, 16)
    built = cls(**parts) if not second else cls(**{**parts, "boundary_ratio": 0.9})
    return built, call


def _hidream() -> Built:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    encoders = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")}
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=_flow(), vae=_vae(4, 1), transformer=transformer, **encoders
    )
    pipe.default_sample_size = 16  # it scales every request to this area
    call: dict[str, Any] = {"height": 16, "width": 16, "output_type": "latent", "max_sequence_length": 7}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds_t5"] = torch.randn(1, 7, 32)
        call[f"{prefix}prompt_embeds_llama3"] = torch.randn(2, 1, 7, 16)
        call[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, 64)
    return pipe, call


def _ernie() -> Built:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    vae = _flux2(diffusers.Flux2KleinPipeline)[0].vae
    pipe = diffusers.ErnieImagePipeline(
        transformer=transformer, vae=vae, text_encoder=None, tokenizer=None, scheduler=_flow()
    )
    embeds = [torch.randn(7, 16)]
    return pipe, {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, **_SIZE}


def _hunyuan_image(cls: Any) -> Built:
    refiner = cls is diffusers.HunyuanImageRefinerPipeline
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8 if refiner else 4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1) if refiner else (1, 1),
        guidance_embeds=True,
        text_embed_dim=16,
        text_embed_2_dim=None if refiner else 16,
        rope_axes_dim=(4, 2, 2) if refiner else (4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
    )
    encoders: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if not refiner:
        encoders |= {"text_encoder_2": None, "tokenizer_2": None}
    pipe = cls(scheduler=_flow(), vae=vae, transformer=transformer, **encoders)
    call: dict[str, Any] = {**_SIZE}
    if refiner:
        call["image"] = torch.randn(1, 4, 1, 8, 8)
    for end in ("",) if refiner else ("", "_2"):
        call[f"prompt_embeds{end}"] = torch.randn(1, 7, 16)
        call[f"prompt_embeds_mask{end}"] = torch.ones(1, 7, dtype=torch.long)
    return pipe, call


def _chronoedit() -> Built:
    pipe = tiny("wan")
    config = {**_WAN, "in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24}
    parts = {**pipe.components, "transformer": diffusers.ChronoEditTransformer3DModel(**config)}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "image_encoder", "image_processor"))
    parts.pop("transformer_2", None)
    embeds = torch.randn(1, 7, 32)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "num_frames": 5, **_SIZE}
    call |= {"image": torch.rand(1, 3, 16, 16)}
    return _ChronoEdit(**parts), call


class _ChronoEdit(diffusers.ChronoEditPipeline):
    """Without an image encoder."""

    def encode_image(self, image: Any, device: Any = None) -> torch.Tensor:
        return torch.ones(1, 257, 16)


def _kandinsky5() -> Built:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    )
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=_flow(),
    )
    call: dict[str, Any] = {**_SIZE, "num_frames": 5}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds_qwen"] = torch.randn(1, 7, 16)
        call[f"{prefix}prompt_embeds_clip"] = torch.randn(1, 16)
        call[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 7], dtype=torch.int32)
    return pipe, call


def _hunyuan_video15() -> Built:
    from diffusers.guiders import ClassifierFreeGuidance

    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=_flow(),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    call: dict[str, Any] = {**_SIZE, "num_frames": 1}
    for prefix in ("", "negative_"):
        for end in ("", "_2"):
            call[f"{prefix}prompt_embeds{end}"] = torch.randn(1, 7, 16)
            call[f"{prefix}prompt_embeds_mask{end}"] = torch.ones(1, 7)
    return pipe, call


_BUILT: dict[str, Callable[[], Built]] = {
    "sd2": _sd2,
    "flux-schnell": _schnell,
    "flux2-dev": lambda: _flux2(diffusers.Flux2Pipeline),
    "flux2-klein": lambda: _flux2(diffusers.Flux2KleinPipeline, is_distilled=True),
    "chroma": _chroma,
    "z-image": _z_image,
    "qwen-edit": _qwen_edit,
    "qwen21": _qwen21,
    "krea2": _krea2,
    "sana-sprint": _sana_sprint,
    "cogvideox": _cogvideox,
    "wan-t2v-2": lambda: _wan(diffusers.WanPipeline, True),
    "wan-i2v": lambda: _wan(diffusers.WanImageToVideoPipeline, False, in_channels=36),
    "wan-i2v-2": lambda: _wan(diffusers.WanImageToVideoPipeline, True, in_channels=36),
    "hidream-i1": _hidream,
    "ernie-image": _ernie,
    "chronoedit": _chronoedit,
    "kandinsky5": _kandinsky5,
    "hunyuanvideo15": _hunyuan_video15,
    "hunyuanimage21-refiner": lambda: _hunyuan_image(diffusers.HunyuanImageRefinerPipeline),
    "hunyuanimage21": lambda: _hunyuan_image(diffusers.HunyuanImagePipeline),
}
PIPELINES = tuple(name for name in (*_TINY, *_BUILT) if name != "animatediff")
