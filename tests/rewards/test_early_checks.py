"""Weight files of rewards are looked at when the reward is made; preprocessing is that of the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffplug import rewards
from diffplug.rewards.aesthetic import AestheticReward
from diffplug.rewards.hps import HpsReward
from diffplug.rewards.image_reward import ImageRewardReward
from diffplug.rewards.networks.checkpoints import check_weights
from diffplug.rewards.networks.preprocess import Preprocess, resize


@pytest.mark.contract
@pytest.mark.parametrize("make", [HpsReward, ImageRewardReward, AestheticReward])
def test_a_missing_or_damaged_file_is_told_at_construction(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.pt' does not exist"):
        make(tmp_path / "missing.pt")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not a header at all")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        make(damaged)
    evil = tmp_path / "evil.pt"
    torch.save({"weight": Path("x")}, evil)
    with pytest.raises(ValueError, match="holds more than tensors"):
        make(evil)


def test_a_sound_file_passes(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a.pt")
    check_weights(tmp_path / "a.safetensors", "test")
    check_weights(tmp_path / "a.pt", "test")


@pytest.mark.parametrize(("size", "at"), [((9, 6), 1), ((11, 6), 2), ((12, 6), 3)])
def test_pickscore_crops_at_the_lower_pixel(size: tuple[int, int], at: int) -> None:
    """transformers takes (n - side) // 2, open_clip and ImageReward round half to even."""
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    plain = {"size": (6, 6), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    lower = Preprocess(**plain, round_crop=False)(images)  # type: ignore[arg-type]
    torch.testing.assert_close(lower, images[:, :, at : at + 6])


def test_hps_keeps_what_a_bicubic_filter_overshoots() -> None:
    """HPSv2 resizes float tensors and never clamps them: edges of black and white leave [0, 1]."""
    edge = (torch.arange(40) < 20).float().expand(1, 3, 40, 40)
    free = resize(edge, (15, 15), clamp=False)
    theirs = F.interpolate(edge, (15, 15), mode="bicubic", antialias=True)
    torch.testing.assert_close(free, theirs, rtol=0, atol=1e-5)
    assert float(free.min()) < 0 and float(free.max()) > 1
    torch.testing.assert_close(resize(edge, (15, 15)), free.clamp(0, 1))


def test_prompts_of_another_world_are_told_before() -> None:
    reward = rewards.Standardised(rewards.get("shapes"), mean=0.0, std=1.0)
    rewards.check_prompts(reward, ["a red circle"])
    with pytest.raises(ValueError):
        rewards.check_prompts(reward, ["a lighthouse in a storm"])
    rewards.check_prompts(lambda images, prompts: images, ["anything"])
