"""The one training loop: any objective, any tuner, on one process or several, resumed bit for bit.

    trainer = Trainer(objective, RunSettings(updates=400), OptimizerSettings(), folder=Path("runs/four"))
    result = trainer.run()                       # goes on from the newest whole checkpoint in the folder

An update adds up the gradients of its rows, a micro-batch at a time, averages them over all processes, clips
them group by group and lets AdamW make a step. Gradients are summed by hand, not by DistributedDataParallel:
so an objective may run its network as often as it likes, with whatever weights, and rows may count unevenly.
Sharded training (FSDP, DeepSpeed) is not supported.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.files import output_folder
from diffplug.training.average import Average
from diffplug.training.checkpoint import Checkpoints, Saved, take_up
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.log import Log
from diffplug.training.objective import Objective, Rows
from diffplug.training.optimizer import Optimizer

__all__ = ["Result", "Trainer"]

OnUpdate = Callable[[int, Mapping[str, float]], None]
OnSave = Callable[[int, Mapping[str, Mapping[str, Tensor]]], None]


@dataclass(frozen=True)
class Result:
    """A run's end: averaged `weights` by group and name, `updates` made, whether it `stopped` early."""

    weights: dict[str, dict[str, Tensor]]
    updates: int
    stopped: bool


class Trainer:
    """Trains what an objective's groups hold.

    objective: what is made small. run, optimizer: the settings. folder: where checkpoints and `log.jsonl`
    live. config: the whole config, kept in checkpoints; a checkpoint of another one is refused. resume: True
    demands a checkpoint, False refuses one, None takes one that is there. minutes: stop, saved, after this
    long. cpu: stay on the processor. on_update: told of every update (progress bars). on_save: told of every
    checkpoint, with the averaged weights (sample sheets); on the first process only.
    Raises ValueError and WriteError before any work where settings, folder and checkpoint do not go together.
    """

    def __init__(
        self,
        objective: Objective,
        run: RunSettings,
        optimizer: OptimizerSettings,
        *,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        resume: bool | None = None,
        minutes: float | None = None,
        cpu: bool = False,
        on_update: OnUpdate | None = None,
        on_save: OnSave | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(
            cpu=cpu, log_with=list(run.trackers) or None, project_dir=str(output_folder(folder))
        )
        self.objective, self.settings, self.folder = objective, run, folder
        self.config = dict(config or {})
        self.on_update, self.on_save = on_update, on_save
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.share = _share(run.batch, self.accelerator.num_processes, self.accelerator.process_index)
        self.micro_batch = min(run.micro_batch or len(self.share), len(self.share))
        self.groups = objective.groups()
        self.average = Average(self.groups, optimizer.ema)
        self.optimizer = Optimizer(self.groups, optimizer, run.updates)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            keep=run.keep,
            rank=self.accelerator.process_index,
            wait=self.accelerator.wait_for_everyone,
        )
        self.saved = self._found(resume)
        self.log = Log(folder / "log.jsonl", self.accelerator, run.trackers, self.config)

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.accelerator.device

    def run(self) -> Result:
        """Train to the last update, or to the deadline, and return the averaged weights."""
        start = self._begin()
        skipped, done = 0, start
        for update in range(start, self.settings.updates):
            if self.objective.finished():  # before the checkpoint that was taken up
                break
            began = time.perf_counter()
            self._seed(update)
            figures, totals = self._update(update)
            skipped = skipped + 1 if "skipped" in figures else 0
            self._give_up_if(skipped, update)
            self.objective.updated(update, totals)
            done = update + 1
            self._tell(update, figures, time.perf_counter() - began)
            late, reason = self._late(), self.objective.finished()
            if reason:
                self.log.event("finished early", reason=reason)
            if done % self.settings.save_every == 0 or done == self.settings.updates or late or reason:
                self._save(done)
            if late or reason:
                break
        self.log.close()
        early = done < self.settings.updates and not self.objective.finished()
        return Result(self.average.weights(), done, early)

    def _update(self, update: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Make one optimiser step. Return the figures to log, and the summed totals of the losses."""
        self.objective.before(update)
        sums = self._summed(self._accumulated(update))
        weight = float(sums["weight"])
        figures = {
            name.removeprefix("log/"): float(v) / max(weight, 1e-12)
            for name, v in sums.items()
            if name == "loss" or name.startswith("log/")
        }
        totals = {name.removeprefix("total/"): v for name, v in sums.items() if name.startswith("total/")}
        if weight == 0:  # no row counted, as when every pair ties
            self.optimizer.clear()
            return {**figures, "weight": 0.0}, totals
        norms = self.optimizer.step(update, weight) if math.isfinite(figures["loss"]) else None
        if norms is None:
            self.optimizer.clear()
            return {**figures, "skipped": 1.0}, {}
        self.average.update(update)
        return {**figures, **norms}, totals

    def _accumulated(self, update: int) -> dict[str, Tensor]:
        """Leave the gradients of this process's rows in the parameters, and return the sums of its losses.

        Out of memory, half as many rows are taken at once and the update begins anew: the same rows, the
        same noise.
        """
        while True:
            self.optimizer.clear()
            try:
                return self._parts(update)
            except torch.OutOfMemoryError as error:
                self._halve(error)

    def _parts(self, update: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for begin in range(self.share.start, self.share.stop, self.micro_batch):
            part = range(begin, min(begin + self.micro_batch, self.share.stop))
            rows = Rows(self.settings.seed, update, self.settings.batch, part, self.device)
            loss = self.objective.loss(rows)
            summed = loss.sum
            if summed.requires_grad:
                self.accelerator.backward(summed)
            self._note_bad(loss.errors, loss.timesteps)
            weight = loss.weight.detach().double()
            found = {"weight": weight, "loss": summed.detach().double()}
            found |= {f"log/{name}": value.detach().double() * weight for name, value in loss.log.items()}
            found |= {f"total/{name}": value.detach() for name, value in loss.totals.items()}
            sums = {name: sums[name] + value if name in sums else value for name, value in found.items()}
        return sums

    def _halve(self, error: Exception) -> None:
        if self.micro_batch == 1 or not self.objective.divisible:
            raise ValueError(
                "memory ran out with one row at a time: turn on run.gradient_checkpointing, take "
                "run.precision=bf16, a smaller picture or a smaller tuner.rank"
            ) from error
        self.micro_batch = -(-self.micro_batch // 2)
        self.log.event("out of memory", micro_batch=self.micro_batch)

    _bad: str = ""

    def _note_bad(self, errors: Tensor, timesteps: Tensor | None) -> None:
        """Remember where a loss was no finite number."""
        bad = ~torch.isfinite(errors.detach())
        if bool(bad.any()):
            at = sorted({float(t) for t in timesteps[bad.cpu()]}) if timesteps is not None else []
            self._bad = f" at the timesteps {', '.join(f'{t:g}' for t in at[:8])}" if at else ""

    def _give_up_if(self, skipped: int, update: int) -> None:
        if skipped < self.settings.patience:
            return
        last = self.checkpoints.all()
        kept = f"the last good checkpoint is {str(last[-1])!r}" if last else "there is no checkpoint yet"
        raise ValueError(
            f"the loss or its gradient was no finite number in {skipped} updates in a row, up to update "
            f"{update}"
            f"{self._bad}: {kept}. Take a lower optimizer.lr, or run.precision=no."
        )

    def _summed(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add up sums and gradients over all processes."""
        if self.accelerator.num_processes == 1:
            return sums
        try:
            self.optimizer.reduce(lambda x: self.accelerator.reduce(x, "sum"))
            return {name: self.accelerator.reduce(value, "sum") for name, value in sorted(sums.items())}
        except RuntimeError as error:
            raise ValueError(
                f"another process of this run has died ({str(error).splitlines()[0]}): start all of them "
                f"again with --resume"
            ) from error

    def _begin(self) -> int:
        """Take up the checkpoint, if there is one, and return the first update to make."""
        for group in self.groups:
            for value in group.parameters.values():
                self._shared(value.data)
        self.optimizer.to(self.device)
        if self.saved is not None:
            self._load(self.saved)
        start = self.saved.update if self.saved else 0
        self.average.restart(self.saved.tensors("average") if self.saved else None)
        self.log.begin(start)
        return start

    def _shared(self, value: Tensor) -> None:
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(value, 0)

    def _found(self, resume: bool | None) -> Saved | None:
        """Return the checkpoint to go on from, once it is sure that it fits."""
        saved = take_up(self.checkpoints, resume, self.config)
        processes = self.accelerator.num_processes
        if saved is not None and self.objective.local_state and saved.state["processes"] != processes:
            raise ValueError(
                f"this run keeps roll-outs in each of its {saved.state['processes']} processes and cannot go "
                f"on with {processes}: start as many"
            )
        return saved

    def _load(self, saved: Saved) -> None:
        weights = saved.tensors("weights")
        with torch.no_grad():
            for group in self.groups:
                for name, value in group.parameters.items():
                    value.copy_(weights[f"{group.name}/{name}"])
        self.optimizer.load(saved.tensors("optimizer"))
        self.objective.load_state_dict(saved.tensors(self._own_file))

    @property
    def _own_file(self) -> str:
        rank = self.accelerator.process_index if self.objective.local_state else 0
        return f"objective-{rank:05d}"

    def _save(self, done: int) -> None:
        weights = {
            f"{group.name}/{name}": value for group in self.groups for name, value in group.parameters.items()
        }
        own = {self._own_file: self.objective.state_dict()}
        main = self.accelerator.is_main_process
        self.checkpoints.save(
            done,
            {
                "weights": weights,
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            own if main or self.objective.local_state else {},
            {"config": self.config, "processes": self.accelerator.num_processes, "torch": torch.__version__},
        )
        if main and self.on_save:
            self.on_save(done, self.average.weights())
        self.accelerator.wait_for_everyone()

    def _seed(self, update: int) -> None:
        """Seed what an objective may draw beside `Rows` (dropout): a function of seed, update and process."""
        rank = self.accelerator.process_index
        state = np.random.SeedSequence([self.settings.seed, update, rank, 11]).generate_state(1)
        word = int(state[0])
        random.seed(word)
        np.random.seed(word)
        torch.manual_seed(word)

    def _late(self) -> bool:
        """Whether the deadline has passed; the first process decides for all."""
        late = torch.tensor([float(time.monotonic() > self.deadline)], device=self.device)
        self._shared(late)
        return bool(late)

    def _tell(self, update: int, figures: Mapping[str, float], seconds: float) -> None:
        speed = self.settings.batch / max(seconds, 1e-9)
        told = {**figures, "lr": self.optimizer.rate(update), "rows_per_second": speed, "seconds": seconds}
        self.log.update(update, told)
        if self.on_update:
            self.on_update(update, told)


def _share(batch: int, processes: int, rank: int) -> range:
    """Return the rows of an update that a process works on."""
    if batch % processes:
        raise ValueError(f"run.batch is {batch}, which {processes} processes cannot share evenly")
    size = batch // processes
    return range(rank * size, (rank + 1) * size)
