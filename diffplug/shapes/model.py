"""The parts of the Shapes model, untrained: an ordinary Stable Diffusion pipeline of a hundredth the size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffplug.shapes.captions import VOCABULARY

TOKENS = 32
"""Length that prompts are padded to; the longest caption of the grammar has 26 tokens."""

LATENT_SIZE = 16
"""Height and width of a latent: the autoencoder scales down by 4. At 8, small crosses were lost."""

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def autoencoder() -> AutoencoderKL:
    """64x64 pictures to 16x16 latents of 4 channels and back, 0.7M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows every word of the grammar as one token and spells all others in letters."""
    return tokenizer_of(lambda pieces: [START, END, *pieces])


def tokenizer_of(numbered: Callable[[list[str]], list[str]]) -> CLIPTokenizer:
    """A CLIP tokenizer of the grammar; `numbered` puts START and END among the pieces, in their order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = byte_pair_merges(VOCABULARY)
    pieces = [*letters, *(letter + _WORD_END for letter in letters), *("".join(merge) for merge in merges)]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(dict.fromkeys(numbered(pieces)))},
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )


def byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """The merges after which each word is one piece, commonest pair first, ties in alphabetical order.

    The trainer of `tokenizers` breaks ties differently in every process, and a resumed run needs the numbers
    that its weights were trained with.
    """
    spelled = [[*word[:-1], word[-1] + _WORD_END] for word in sorted(words)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        spelled = [_merged(pieces, merges[-1]) for pieces in spelled]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word after one merge, from left to right."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder, 128 wide, about 0.5M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=128,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def denoiser() -> UNet2DConditionModel:
    """A U-Net over 16x16, 8x8 and 4x4 that reads the prompt, 4.3M parameters.

    It attends to the words at the two coarser levels, and their pooled states join the embedding of the
    timestep, so that every layer knows what the whole prompt asks for. That path starts at zero.
    """
    channels = (32, 64, 128)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=128,
        attention_head_dim=tuple(c // 32 for c in channels),
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        norm_num_groups=16,
    )
    nn.init.zeros_(unet.add_embedding.norm2.weight)
    return unet


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule: epsilon prediction, betas 0.00085..0.012 linear in their square roots."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(
    vae: AutoencoderKL, text: CLIPTextModel, words: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as the pipeline that Diffusers knows."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
