"""Tiny pipelines of every kind that begins a clip with given frames; random weights, made in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2VPipeline,
    Kandinsky5Transformer3DModel,
    ModelMixin,
    SanaImageToVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from video_pipelines import WAN, picture, wan_parts, wan_vae

from diffplug.testing import tiny
from diffplug.testing.encoders import clip_encoder, gemma_encoder, qwen_vl_encoder, t5_encoder
from diffplug.testing.tokenizers import clip_tokenizer, gemma_tokenizer, qwen_tokenizer, t5_tokenizer

PICTURED: dict[str, Any] = {**WAN, "in_channels": 36}
"""A Wan network that is told a picture in channels."""


def _quiet(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for weight in part.parameters():
                if weight.ndim > 1 and not weight.any():
                    torch.nn.init.normal_(weight, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan22_i2v() -> WanImageToVideoPipeline:
    """Wan 2.2 A14B: one transformer for much noise, another for little; no picture embeddings."""
    return WanImageToVideoPipeline(
        **wan_parts(),
        transformer=WanTransformer3DModel(**PICTURED),
        transformer_2=WanTransformer3DModel(**PICTURED),
        boundary_ratio=0.9,
    )


def skyreels_i2v() -> SkyReelsV2ImageToVideoPipeline:
    network = SkyReelsV2Transformer3DModel(**PICTURED, image_dim=32, added_kv_proj_dim=24)
    return SkyReelsV2ImageToVideoPipeline(
        **wan_parts(),
        image_encoder=CLIPVisionModelWithProjection(_clip_vision(32)),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
        transformer=network,
    )


def _clip_vision(size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=16,
        projection_dim=32,
    )


def hunyuan_i2v(kind: str = "token_replace") -> HunyuanVideoImageToVideoPipeline:
    """HunyuanVideo I2V, whose language model sees the picture: "latent_concat" hides four frames."""
    language = LlavaConfig(
        text_config=_llama(), vision_config=_clip_vision(32), pad_token_id=1, image_token_index=99
    )
    network = _hunyuan_network(
        in_channels=9 if kind == "latent_concat" else 4, image_condition_type=kind, guidance_embeds=False
    )
    return HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(language),
        tokenizer=_llama_tokenizer(),
        transformer=network,
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )


def hunyuan_skyreels_i2v() -> HunyuanSkyreelsImageToVideoPipeline:
    """SkyReels V1 over HunyuanVideo."""
    return HunyuanSkyreelsImageToVideoPipeline(
        text_encoder=LlamaModel(_llama()),
        tokenizer=_llama_tokenizer(),
        transformer=_hunyuan_network(in_channels=8),
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
    )


def _hunyuan_network(**config: Any) -> HunyuanVideoTransformer3DModel:
    settings: dict[str, Any] = {
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 32,
        "rope_axes_dim": (2, 4, 4),
        **config,
    }
    return HunyuanVideoTransformer3DModel(**settings)


def _hunyuan_vae(latent_channels: int = 4) -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def _llama_tokenizer() -> Any:
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    vocab = {word: index for index, word in enumerate(words)}
    return LlamaTokenizer(vocab=vocab, merges=[], **{"pad_token": "<pad>"})


def hunyuan15_i2v() -> HunyuanVideo15ImageToVideoPipeline:
    """HunyuanVideo 1.5: takes PIL pictures alone, and their size is the video's."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    language = Qwen2_5_VLTextConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters=rope,
        bos_token_id=257,
        eos_token_id=258,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    network = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = HunyuanVideo15ImageToVideoPipeline(
        text_encoder=Qwen2_5_VLTextModel(language),
        tokenizer=qwen_tokenizer(),
        transformer=network,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=t5_encoder(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 16
    return pipe


def kandinsky5_i2v() -> Kandinsky5I2VPipeline:
    """Kandinsky 5: its colours of the first four latents follow the next five, so clips have 17 frames."""
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
    )
    network = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=32,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(1, 1, 2),
        visual_cond=True,
    )
    return Kandinsky5I2VPipeline(
        transformer=network,
        vae=_hunyuan_vae(),
        text_encoder=qwen_vl_encoder(),
        tokenizer=processor,
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def sana_i2v() -> SanaImageToVideoPipeline:
    """Sana video: its number of frames is called `frames`."""
    network = SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        rope_max_seq_len=32,
    )
    return SanaImageToVideoPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=wan_vae(),
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def cogvideox_i2v(later: bool = False) -> CogVideoXImageToVideoPipeline:
    """CogVideoX I2V; `later`: 1.5, whose patches span two latent frames."""
    network = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
        **({"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 2} if later else {}),
    )
    return CogVideoXImageToVideoPipeline(**{**tiny("cogvideox").components, "transformer": network})


class Guardrail(ModelMixin):
    """Stands where Cosmos's guardrail is: everything is safe."""

    def __init__(self) -> None:
        super().__init__()
        self._dtype = torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames

    @property
    def device(self) -> Any:
        return torch.device("cpu")

    @property
    def dtype(self) -> Any:
        return self._dtype


def cosmos() -> CosmosVideoToWorldPipeline:
    """Cosmos 1: a latent frame stands for eight frames, as in the weights that people have."""
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )
    scheduler = EDMEulerScheduler(prediction_type="epsilon", final_sigmas_type="sigma_min")
    return CosmosVideoToWorldPipeline(
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=_cosmos_network(4),
        vae=vae,
        scheduler=scheduler,
        safety_checker=Guardrail(),
    )


def cosmos2() -> Cosmos2VideoToWorldPipeline:
    return Cosmos2VideoToWorldPipeline(
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=_cosmos_network(16),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Guardrail(),
    )


def cosmos25() -> Cosmos2_5_PredictBasePipeline:
    return Cosmos2_5_PredictBasePipeline(
        text_encoder=qwen_vl_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=_cosmos_network(16, text_embed_dim=16),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        safety_checker=Guardrail(),
    )


def _cosmos_network(channels: int, text_embed_dim: int = 32) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        in_channels=channels + 1,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=text_embed_dim,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
    )


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline: how it is made, called and continued.

    ratio: frames of a latent after the first. size: of the picture. overlap, clip: of the test, in frames.
    """

    build: Callable[[], Any]
    name: str
    overlap: int
    clip: int
    size: int = 16
    ratio: int = 4
    told: dict[str, Any] = field(default_factory=dict)

    def call(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of a long video that begins with a picture made from `seed`."""
        size = {"height": self.size, "width": self.size}
        call = {
            "prompt": "a",
            "num_inference_steps": 2,
            "image": picture(self.size, seed),
            **size,
            **self.told,
        }
        return {key: value for key, value in call.items() if value is not None}


_SHORT = {"max_sequence_length": 16}
_LLAVA = {"crop_start": 0, "image_emb_len": 4, "image_emb_start": 5, "image_emb_end": 9}
_HUNYUAN = {**_SHORT, "prompt_template": {"template": "{}", **_LLAVA}}
_SANA = {**_SHORT, "use_resolution_binning": False, "complex_human_instruction": []}
_COSMOS = {**_SHORT, "negative_prompt": "b", "guidance_scale": 3.0}

KINDS: dict[str, Kind] = {
    "wan22-i2v": Kind(wan22_i2v, "image", 1, 9, told=_SHORT),
    "skyreels-i2v": Kind(skyreels_i2v, "image", 1, 9, told=_SHORT),
    "hunyuan-i2v": Kind(hunyuan_i2v, "image", 1, 9, told=_HUNYUAN),
    "hunyuan-i2v-concat": Kind(lambda: hunyuan_i2v("latent_concat"), "image", 1, 9, told=_HUNYUAN),
    "hunyuan-skyreels-i2v": Kind(
        hunyuan_skyreels_i2v,
        "image",
        1,
        9,
        told={**_SHORT, "prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    "hunyuan15-i2v": Kind(hunyuan15_i2v, "image", 1, 9, told={"height": None, "width": None}),
    "kandinsky5-i2v": Kind(kandinsky5_i2v, "image", 1, 17, told={"max_sequence_length": 1024}),
    "sana-i2v": Kind(sana_i2v, "image", 1, 9, size=32, told=_SANA),
    "cogvideox-i2v": Kind(cogvideox_i2v, "image", 1, 9, told=_SHORT),
    "cogvideox15-i2v": Kind(lambda: cogvideox_i2v(later=True), "image", 1, 9, told=_SHORT),
    "cosmos": Kind(cosmos, "video", 9, 17, size=32, ratio=8, told=_COSMOS),
    "cosmos2": Kind(cosmos2, "video", 5, 9, size=32, told=_COSMOS),
    "cosmos25": Kind(cosmos25, "video", 5, 9, size=32, told=_COSMOS),
}


def built(kind: Kind) -> Any:
    """The pipeline of a kind, ready to run; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _quiet(kind.build())
