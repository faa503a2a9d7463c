"""Latents decode to what the pipeline itself makes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from diffplug.latents import decode
from diffplug.testing import tiny

FAMILIES = ["sd15", "sdxl", "sd3", "flux", "wan", "pixart", "lcm", "qwenimage"]


def both(name: str, **changes: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A pipeline, the latents that a run ends with, and the pictures that the pipeline makes of them."""
    pipe = tiny(name)

    def run(output_type: str) -> torch.Tensor:
        inputs = tiny.inputs(name, output_type=output_type, **changes)
        return torch.as_tensor(pipe(**inputs, generator=torch.Generator().manual_seed(0))[0])

    return pipe, run("latent"), run("pt")


@pytest.mark.pipe
@pytest.mark.parametrize("name", FAMILIES)
def test_as_the_pipeline_decodes(name: str) -> None:
    pipe, latents, expected = both(name, prompt=["a red circle", "b"])
    size = {"height": 16, "width": 16}
    pictures = decode(pipe, latents, **size)
    assert pictures.dtype == torch.float32 and pictures.shape == expected.shape
    torch.testing.assert_close(pictures, expected, atol=2e-5, rtol=0)
    assert torch.equal(decode(pipe, latents, **size, batch_size=2), pictures)
    torch.testing.assert_close(decode(pipe, latents, **size, batch_size=1), pictures, atol=2e-5, rtol=0)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_packed_latents_of_wide_pictures(name: str) -> None:
    pipe, latents, expected = both(name, height=16, width=32)
    torch.testing.assert_close(decode(pipe, latents, height=16, width=32), expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"tokens were given with no height and width .*: give the height"):
        decode(pipe, latents)
    with pytest.raises(ValueError, match="with 64x64 pixels"):
        decode(pipe, latents, height=64, width=64)


def test_squares_need_no_size() -> None:
    pipe, latents, expected = both("flux")
    torch.testing.assert_close(decode(pipe, latents), expected, atol=2e-5, rtol=0)


def test_pixel_models_are_only_rescaled() -> None:
    x = torch.linspace(-1.5, 1.5, 2 * 3 * 16).reshape(2, 3, 4, 4)
    assert torch.equal(decode(tiny("ddpm"), x), (x / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="DDPMPipeline has no vae"):
        decode(tiny("ddpm"), torch.zeros(1, 4, 8, 8))


def test_statistics_of_channels_and_the_upcast_of_sdxl() -> None:
    pipe = tiny("sdxl")
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5]
    plain = decode(pipe, z)
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    scale = pipe.vae.config.scaling_factor
    by_hand = z * torch.tensor(std).view(1, 4, 1, 1) / scale + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(decode(pipe, z), (pipe.vae.decode(by_hand)[0] / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(decode(pipe, z), plain)
    pipe.vae.half()
    assert pipe.vae.config.force_upcast
    half = decode(pipe, z.half())
    assert half.dtype == torch.float32 and pipe.vae.dtype == torch.float16  # the pipeline's own is untouched
    exact = copy.deepcopy(pipe)
    exact.vae.float()
    assert torch.equal(half, decode(exact, z.half()))


def test_previews_through_another_decoder() -> None:
    torch.manual_seed(0)
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).eval()
    pipe = tiny("sd15")
    z = torch.randn(3, 4, 8, 8)
    preview = decode(pipe, z, vae=small, batch_size=2)
    assert preview.shape == (3, 3, 16, 16)
    torch.testing.assert_close(preview, (small.decode(z)[0] / 2 + 0.5).clamp(0, 1))
    qwen = tiny("qwenimage")
    assert decode(qwen, torch.randn(2, 4, 16), vae=small).shape == (2, 3, 8, 8)
    video = decode(pipe, torch.randn(2, 4, 5, 8, 8))  # a picture decoder takes videos frame by frame
    assert video.shape == (2, 5, 3, 16, 16)


def test_out_of_memory_halves_the_slices(monkeypatch: Any) -> None:
    pipe, sizes = tiny("sd15"), []
    z = torch.randn(5, 4, 8, 8)
    expected = decode(pipe, z, batch_size=1)
    own = pipe.vae.decode

    def tight(rows: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("full")
        return own(rows, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", tight)
    assert torch.equal(decode(pipe, z, batch_size=4), expected)
    assert sizes == [4, 2, 1, 1, 1, 1, 1]


def test_gradients_flow_only_when_asked() -> None:
    pipe = tiny("sd15")
    z = torch.randn(1, 4, 8, 8)
    assert not decode(pipe, z).requires_grad
    z.requires_grad_()
    decode(pipe, z).sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ((1, 3, 8, 8), {}, r"AutoencoderKL decodes latents of 4 channels, not of shape \(1, 3, 8, 8\)"),
        ((4, 8), {}, "decodes latents of 4 channels"),
        ((0, 4, 8, 8), {}, "no latents to decode"),
        ((1, 4, 8, 8), {"batch_size": 0}, "batch_size is the number of rows"),
    ],
)
def test_bad_latents_are_refused(shape: tuple[int, ...], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(tiny("sd15"), torch.zeros(shape), **settings)
