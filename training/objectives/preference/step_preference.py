"""Trains a step-aware preference model on noised pairs (arXiv 2406.04314, section 4.1).

Better and worse picture are carried to one uniform timestep by the same noise; the diffusion model, frozen,
predicts both clean; the preference model, told the timestep, has to say which is better:

    L = cross-entropy(S(better) - S(worse), 1)

each prompt's pairs weighing together as much as any other's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.network import Network
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.preference.pair_loss import soft_pair_loss
from diffplug.training.preference.pairs import PairLatents
from diffplug.training.preference.step_preference import StepPreference, weighted_by_prompt

__all__ = ["StepPreferenceTraining"]


class StepPreferenceTraining(Objective):
    """model: what learns, all of it. images: latents to pictures in [0, 1], as `PictureScorer.images`.

    guidance: of the predictions, the scale of the roll-outs that the model will judge (5 for `spo` as
    published): predictions look different with another. Needs the network's `null`.
    """

    needs_pipe = True

    def __init__(
        self,
        model: StepPreference,
        network: Network,
        data: PairLatents,
        images: Any,
        *,
        guidance: float = 1.0,
    ) -> None:
        if guidance < 1:
            raise ValueError(f"guidance must be at least 1, which is none, got {guidance}")
        self.model, self.network, self.data, self.images = model, network, data, images
        self.guidance = guidance
        self.share = len(data) * weighted_by_prompt(data.prompts)

    def groups(self) -> list[Group]:
        """The preference model."""
        return [Group("judge", dict(self.model.named_parameters()))]

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of a pair for each row."""
        item = rows.items(len(self.data))
        index = rows.integers(1, self.network.path.train_steps + 1).double()
        images = self.seen(item, index, rows)
        t = self.network.path.timesteps(index).float().to(rows.device)
        texts = self.model.texts([self.data.prompts[i] for i in item.tolist()])
        better, worse = self.model(images, t.repeat(2), texts.repeat(2, 1)).chunk(2)
        errors = soft_pair_loss(better, worse, torch.ones_like(better))
        log = {"accuracy": (better > worse).double().mean().detach()}
        weights = self.share[item].to(errors.device, errors.dtype)
        return Loss(errors, weights, log=log, timesteps=self.network.path.timesteps(index))

    @torch.no_grad()
    def seen(self, item: Tensor, index: Tensor, rows: Rows) -> Tensor:
        """Return the predicted pictures, the better ones first, [2 n, 3, h, w]."""
        clean = self.data.latents[item].to(rows.device).transpose(0, 1).flatten(0, 1)
        told = self.data.conditions[item].to(rows.device)
        noise = rows.normal(*clean.shape[1:]).repeat(2, *(1,) * (clean.ndim - 1))
        both = index.repeat(2)
        x = self.network.path.noised(clean, noise, torch.zeros_like(both), both)
        twice = Conditions.cat([told, told])
        if self.guidance == 1:
            said = self.network.original(x, both, twice)
        else:
            said, _, _ = self.network.guided(x, both, twice, self.guidance)
        images: Tensor = self.images(said.x0)
        return images
