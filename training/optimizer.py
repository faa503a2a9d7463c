"""AdamW over groups of parameters, with warm-up, cosine, clipping, and a state that safetensors can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffplug.training.config import OptimizerSettings
from diffplug.training.objective import Group

__all__ = ["Optimizer", "warm_cosine"]


class Optimizer:
    """One AdamW; its learning rates are a function of the update, so that there is no schedule to save."""

    def __init__(self, groups: Sequence[Group], settings: OptimizerSettings, updates: int) -> None:
        self.groups, self.settings, self.updates = list(groups), settings, updates
        if not any(group.parameters for group in groups):
            raise ValueError("nothing learns: every group of the objective is empty")
        self.adam = torch.optim.AdamW(
            [{"params": list(group.parameters.values()), "lr": settings.lr * group.lr} for group in groups],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def rate(self, update: int, group: Group | None = None) -> float:
        """Return the learning rate of an update, of the first group where none is named."""
        group = group or self.groups[0]
        if update < group.start:
            return 0.0
        since, until = update - group.start, self.updates - group.start
        return (
            self.settings.lr * group.lr * warm_cosine(since, until, self.settings.warmup, self.settings.floor)
        )

    def clear(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def reduce(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        values = [value for group in self.groups for value in group.parameters.values()]
        flat = torch.cat(
            [torch.zeros_like(v).flatten() if v.grad is None else v.grad.flatten() for v in values]
        )
        for value, part in zip(values, summed(flat).split([v.numel() for v in values]), strict=True):
            value.grad = part.view_as(value).clone()

    def step(self, update: int, weight: float) -> dict[str, float] | None:
        """Divide the gradients by the batch's weight, clip them, and step. Return the norm before clipping.

        None, and nothing is moved, where a gradient is no finite number. A group that has not started yet
        keeps its weights and its moments.
        """
        norms: dict[str, float] = {}
        for group, entry in zip(self.groups, self.adam.param_groups, strict=True):
            values = list(group.parameters.values())
            entry["lr"] = self.rate(update, group)
            grads = [v.grad for v in values if v.grad is not None]
            if update < group.start or not grads:
                for value in values:
                    value.grad = None
                continue
            norm = float(torch.nn.utils.get_total_norm(grads)) / weight
            if math.isfinite(norm):
                torch._foreach_mul_(grads, min(1.0, self.settings.clip / (norm + 1e-6)) / weight)
            norms["grad_norm" if group is self.groups[0] else f"grad_norm_{group.name}"] = norm
        if not all(math.isfinite(norm) for norm in norms.values()):
            return None
        self.adam.step()
        self.clear()
        return norms

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            (f"{group.name}/{name}", value)
            for group in self.groups
            for name, value in group.parameters.items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments and step counts, "group/name/exp_avg" and so on."""
        return {
            f"{name}/{key}": torch.as_tensor(part)
            for name, value in self._named()
            for key, part in self.adam.state.get(value, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        for name, value in self._named():
            found = {
                key.rpartition("/")[2]: part for key, part in state.items() if key.startswith(f"{name}/")
            }
            if found:
                self.adam.state[value] = {
                    key: part.clone()
                    if key == "step" and value.device.type == "cpu"
                    else part.to(value.device)
                    for key, part in found.items()
                }

    def to(self, device: torch.device) -> None:
        """Check that the parameters lie on the device of the run."""
        for name, value in self._named():
            if value.device.type != device.type:
                raise ValueError(
                    f"{name} lies on {value.device}, the run is on {device}: move the model there"
                )


def warm_cosine(update: int, updates: int, warmup: int, floor: float) -> float:
    """Return the factor of the learning rate: linear over `warmup` updates, then a cosine down to `floor`."""
    rise = min(1.0, (update + 1) / (warmup + 1)) if warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, update / max(1, updates))))
    return rise * (floor + (1 - floor) * fall)
