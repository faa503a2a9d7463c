"""Modules that learn together from a loss of the whole batch of a step, on the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.trainer import Trainer

__all__ = ["Loop", "OnSave", "Parts", "StepLoss"]

StepLoss = Callable[[int], tuple[Tensor, Mapping[str, float | Tensor]]]
"""A step's number to its loss and what to log."""

OnSave = Callable[[int, dict[str, dict[str, Tensor]]], None]


class Parts(Objective):
    """Modules by name, and the loss of a step; a row is a whole batch here."""

    divisible = False

    def __init__(self, parts: Mapping[str, nn.Module], loss: StepLoss, device: torch.device) -> None:
        self.parts, self.step_loss, self.device = dict(parts), loss, device

    def groups(self) -> list[Group]:
        """All parameters in one group, which is clipped as a whole."""
        return [
            Group(
                "parts",
                {
                    f"{part}.{name}": value
                    for part, module in self.parts.items()
                    for name, value in module.named_parameters()
                },
            )
        ]

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of the step."""
        value, log = self.step_loss(rows.update)
        told = {
            name: torch.as_tensor(v, dtype=torch.float64).to(self.device)
            for name, v in log.items()
            if name != "loss"
        }
        return Loss(value[None], log=told)

    def state_dict(self) -> dict[str, Tensor]:
        """The buffers, such as the running means of batch norms."""
        return {
            f"{part}.{name}": value
            for part, module in self.parts.items()
            for name, value in module.named_buffers()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the buffers back."""
        for name, value in self.state_dict().items():
            if name in state:
                value.copy_(state[name])

    def averaged(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the state of each part with its averaged parameters, buffers as they are."""
        return {
            part: {
                name: weights.get(f"{part}.{name}", value).detach().clone()
                for name, value in module.state_dict().items()
            }
            for part, module in self.parts.items()
        }


class Loop:
    """Where and how long the parts of the Shapes world train.

    folder: of checkpoints and log; a run that finds a checkpoint goes on from it. cpu: stay on the processor
    even where there is an accelerator. minutes: stop, saved, after so long; None runs to the end. on_save:
    called with (step, averaged state dicts) after each checkpoint, for sample grids.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cpu: bool = False,
        minutes: float | None = None,
        save_every: int = 250,
        on_save: OnSave | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.folder, self.cpu, self.minutes = folder, cpu, minutes
        self.save_every, self.on_save = save_every, on_save
        self.stopped_early = False
        self.device: torch.device = Accelerator(cpu=cpu).device
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        parts: Mapping[str, nn.Module],
        loss: StepLoss,
        *,
        steps: int,
        lr: float,
        ema: float,
        weight_decay: float = 0.01,
    ) -> dict[str, dict[str, Tensor]]:
        """Train the parts on `loss(step)` and return the averaged state dict of each."""
        for module in parts.values():
            module.to(self.device)
        objective = Parts(parts, loss, self.device)

        def saved(step: int, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
            if self.on_save is not None:
                self.on_save(step, objective.averaged(weights["parts"]))

        trainer = Trainer(
            objective,
            RunSettings(updates=steps, batch=1, save_every=self.save_every),
            OptimizerSettings(lr=lr, weight_decay=weight_decay, warmup=200, ema=ema),
            folder=self.folder,
            cpu=self.cpu,
            minutes=self.minutes,
            on_save=saved,
        )
        result = trainer.run()
        self.stopped_early = result.stopped
        return objective.averaged(result.weights["parts"])
