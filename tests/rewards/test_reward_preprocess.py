"""Preprocessing on tensors agrees with open_clip's transform of PIL pictures, and has gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_clip import as_pil, pictures
from torch.nn import functional as F

from diffplug.rewards.networks.preprocess import Preprocess, resize

pytest.importorskip("open_clip")


@pytest.mark.contract
@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(5, 90),
    w=st.integers(5, 90),
    size=st.sampled_from([(32, 32), (24, 40)]),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 9),
)
def test_it_is_open_clips_transform(
    h: int, w: int, size: tuple[int, int], mode: str, interpolation: str, seed: int
) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if mode == "shortest" and size[0] != size[1]:
        interpolation = "bicubic"  # open_clip takes it for such sizes whatever is asked for
    config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "resize_mode": mode, "fill_color": 51}
    cfg = PreprocessCfg(size=size, interpolation=interpolation, **config)
    images = (pictures(2, h, w, seed) * 153 + 51).round() / 255  # overshoot is not clipped on the way
    theirs = torch.stack([image_transform_v2(cfg, is_train=False)(x) for x in as_pil(images)])
    ours = Preprocess.from_open_clip(vars(cfg))(images)
    assert ours.shape == theirs.shape == (2, 3, *size)
    levels = (ours - theirs).abs() * torch.tensor(cfg.std)[:, None, None] * 255
    assert levels.max() < 2 and levels.mean() < 0.6  # PIL rounds to 8 bits after each of two passes


@pytest.mark.contract
def test_pictures_with_black_and_white_differ_where_pil_clips_twice() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    images = (pictures(4, 90, 70) > 0.5).float()
    theirs = torch.stack(
        [image_transform_v2(PreprocessCfg(size=32), is_train=False)(x) for x in as_pil(images)]
    )
    error = (Preprocess(size=(32, 32))(images) - theirs).abs() * 0.27 * 255
    assert error.mean() < 0.6 and error.max() < 20


@pytest.mark.law
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (7, 61), (40, 20)])
def test_resizing_has_the_weights_of_the_antialiased_filters(mode: str, size: tuple[int, int]) -> None:
    images = 0.25 + 0.5 * pictures(2, 40, 20)  # away from 0 and 1, so that nothing is clamped
    theirs = F.interpolate(images, size, mode=mode, antialias=True, align_corners=False)
    assert torch.allclose(resize(images, size, mode), theirs, atol=2e-6)


@pytest.mark.law
def test_nothing_changes_at_the_right_size_and_constants_stay() -> None:
    plain = Preprocess(size=(40, 40), mean=(0.0,) * 3, std=(1.0,) * 3)
    images = pictures(2, 40, 40)
    assert torch.equal(plain(images), images)
    assert torch.allclose(plain(torch.full((1, 3, 91, 67), 0.3)), torch.tensor(0.3), atol=1e-6)


@pytest.mark.law
def test_gradients_are_exact() -> None:
    images = (0.25 + 0.5 * pictures(1, 9, 11)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resize(x, (5, 6)), (images,))


def test_half_precision_and_bad_modes() -> None:
    assert Preprocess(size=(8, 8))(pictures(1).bfloat16()).dtype == torch.float32
    wrong: Any = "widest"
    with pytest.raises(ValueError, match="resize_mode is 'widest': take one of shortest, longest, squash"):
        Preprocess(size=(8, 8), resize_mode=wrong)
