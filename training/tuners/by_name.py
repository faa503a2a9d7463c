"""Tuners by the names of a config."""

from __future__ import annotations

from torch import nn

from diffplug.training.tuner import Tuner
from diffplug.training.tuners.full import FullTuner
from diffplug.training.tuners.lora import LoraTuner, lora_targets
from diffplug.training.tuners.peft_tuner import PeftTuner
from diffplug.training.tuners.sara.tuner import SaraTuner
from diffplug.training.tuners.settings import TunerSettings

__all__ = ["check_tuner", "tuner_of"]


def tuner_of(told: TunerSettings) -> Tuner:
    """Return the tuner of a config, not attached yet."""
    if told.kind == "full":
        return FullTuner(save_dtype=told.save_dtype)
    if told.kind == "lora":
        return LoraTuner(rank=told.rank, alpha=told.alpha, targets=told.targets, save_dtype=told.save_dtype)
    if told.kind == "sara":
        return SaraTuner(told)
    return PeftTuner(
        told.kind, rank=told.rank, alpha=told.alpha, targets=told.targets, save_dtype=told.save_dtype
    )


def check_tuner(told: TunerSettings, denoiser: nn.Module) -> None:
    """Raise ValueError for names that match no layer of a denoiser, before any work."""
    if told.kind == "sara":
        from diffplug.training.tuners.sara.candidates import candidates

        candidates({"unet": denoiser}, told.include, told.exclude, told.include_1d)
    elif told.kind != "full":
        lora_targets(denoiser, told.targets)
