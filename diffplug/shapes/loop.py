"""One training loop for the parts of the Shapes model: seeded, averaged, logged, resumable at any moment."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

Loss = Callable[[int], tuple[Tensor, Mapping[str, float | Tensor]]]
"""A step's number to its loss and what to log; numbers that are tensors are read once the step is over."""

OnSave = Callable[[int, dict[str, dict[str, Tensor]]], None]


class Loop:
    """Runs steps of AdamW with warm-up, a cosine to a twentieth, clipping at 1 and an average of the weights.

    Args:
        folder: where checkpoints (`state/`) and the log (`log.jsonl`) live; a run that finds a checkpoint
        goes on from it. cpu: stay on the processor even where there is an accelerator. minutes: stop, after
        saving, when this much time has gone by; None runs to the end. on_save: called with (step, averaged
        state dicts) after each checkpoint, for sample grids.
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
        self.folder, self.save_every, self.on_save = folder, save_every, on_save
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.stopped_early = False
        self.accelerator = Accelerator(cpu=cpu)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def device(self) -> torch.device:
        """Where the parts train."""
        return self.accelerator.device

    def run(
        self,
        parts: Mapping[str, nn.Module],
        loss: Loss,
        *,
        steps: int,
        lr: float,
        ema: float,
        weight_decay: float = 0.01,
    ) -> dict[str, dict[str, Tensor]]:
        """Train the parts on `loss(step)` and return the averaged state dict of each."""
        model = nn.ModuleDict(dict(parts)).to(self.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
        model, optimizer = self.accelerator.prepare(model, optimizer)
        average = Average(self.accelerator.unwrap_model(model), ema)
        self.accelerator.register_for_checkpointing(schedule, average)
        start = self._resume()
        for step in range(start, steps):
            torch.manual_seed(1_000_003 * (step + 1))
            began = time.perf_counter()
            value, log = loss(step)
            self.accelerator.backward(value)
            self.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            average.update(step)
            self._log(step, log, time.perf_counter() - began)
            late = time.monotonic() > self.deadline
            if (step + 1) % self.save_every == 0 or step + 1 == steps or late:
                self._save(step + 1)
                if self.on_save:
                    self.on_save(step + 1, average.parts(parts))
            if late:
                self.stopped_early = step + 1 < steps
                break
        return average.parts(parts)

    def _resume(self) -> int:
        """Load the newest complete checkpoint, if any, and return the step to go on from."""
        state = self.folder / "state"
        if not state.exists() and (self.folder / "state.old").exists():
            os.replace(self.folder / "state.old", state)
        if not state.exists():
            return 0
        self.accelerator.load_state(str(state))
        return int(json.loads((state / "step.json").read_text())["step"])

    def _save(self, step: int) -> None:
        """Write a checkpoint beside the last one, then swap them, so that one is complete at every moment."""
        fresh, old, state = (self.folder / name for name in ("state.new", "state.old", "state"))
        shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.save_state(str(fresh))
        (fresh / "step.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(old, ignore_errors=True)
        if state.exists():
            os.replace(state, old)
        os.replace(fresh, state)

    def _log(self, step: int, values: Mapping[str, float | Tensor], seconds: float) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            rounded = {name: round(float(value), 6) for name, value in values.items()}
            file.write(json.dumps({"step": step, **rounded, "seconds": round(seconds, 3)}) + "\n")


class Average:
    """Exponential moving average of a module's parameters, warmed up so that early steps do not linger."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        names, fresh = zip(*self.module.named_parameters(), strict=True)
        kept = [self.values[name] for name in names]
        torch._foreach_lerp_(kept, list(fresh), 1 - decay)

    def parts(self, parts: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
        """The averaged state dict of each part (buffers as they are)."""
        out = {}
        for part, module in parts.items():
            state = {name: value.detach().clone() for name, value in module.state_dict().items()}
            state |= {
                n.removeprefix(f"{part}."): v.clone()
                for n, v in self.values.items()
                if n.startswith(f"{part}.")
            }
            out[part] = state
        return out

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.values[name].copy_(value)


def _warm_cosine(step: int, steps: int, warm: int = 200, floor: float = 0.05) -> float:
    """Learning-rate factor: linear over `warm` steps, then a cosine down to `floor`."""
    rise = min(1.0, (step + 1) / warm)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return rise * (floor + (1 - floor) * fall)
