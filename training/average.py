"""Exponential moving averages of the parameters that learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffplug.training.objective import Group

__all__ = ["Average"]


class Average:
    """w <- d w + (1 - d) p with d = min(decay, (1 + n) / (10 + n)), so that a short run forgets its start."""

    def __init__(self, groups: Sequence[Group], decay: float) -> None:
        self.groups, self.decay = list(groups), decay
        self.values: dict[str, dict[str, Tensor]] = {}
        self.restart(None)

    def restart(self, saved: Mapping[str, Tensor] | None) -> None:
        """Begin from the parameters as they are, or from what `state_dict` returned."""
        self.values = {
            group.name: {
                name: saved[f"{group.name}/{name}"].to(value.device) if saved else value.detach().clone()
                for name, value in group.parameters.items()
            }
            for group in self.groups
            if group.average
        }

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Take in the parameters after an update."""
        for group in self.groups:
            if not group.average or update < group.start:
                continue
            since = update - group.start
            decay = min(self.decay, (1 + since) / (10 + since))
            kept = [self.values[group.name][name] for name in group.parameters]
            torch._foreach_lerp_(kept, [value.detach() for value in group.parameters.values()], 1 - decay)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the averages, by group and name."""
        return {
            group: {name: value.detach().clone() for name, value in values.items()}
            for group, values in self.values.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages as "group/name"."""
        return {f"{group}/{name}": v for group, values in self.values.items() for name, v in values.items()}
