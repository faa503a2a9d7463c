"""The loop: an example objective of a dozen lines, resumed, divided, shared, stopped, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffplug.files import WriteError
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.objective import Group, Loss, Objective, Rows
from diffplug.training.trainer import Result, Trainer


class Halving(Objective):
    """The example: a linear map learns to halve its input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(4, 4)
        self.seen = torch.zeros(())

    def groups(self) -> list[Group]:
        return [Group("weights", dict(self.network.named_parameters()))]

    def loss(self, rows: Rows) -> Loss:
        x = rows.normal(4)
        errors = (self.network(x) - x / 2).square().mean(1)
        return Loss(errors, log={"size": x.abs().mean()}, totals={"rows": torch.tensor(float(len(rows)))})

    def updated(self, update: int, totals: Any) -> None:
        self.seen = self.seen + totals.get("rows", 0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def trainer(folder: Path, objective: Objective | None = None, **changes: Any) -> Trainer:
    run: dict[str, Any] = {"updates": 12, "batch": 8, "save_every": 5}
    options = {
        name: changes.pop(name) for name in ("resume", "minutes", "config", "on_save") if name in changes
    }
    settings = RunSettings(**{**run, **changes})
    return Trainer(
        objective or Halving(),
        settings,
        OptimizerSettings(lr=0.05, warmup=3),
        folder=folder,
        cpu=True,
        **options,
    )


def equal(one: Result, other: Result) -> bool:
    names = one.weights["weights"]
    return all(torch.equal(names[name], other.weights["weights"][name]) for name in names)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.law
def test_an_objective_of_a_dozen_lines_learns(tmp_path: Path) -> None:
    objective = Halving()
    result = trainer(tmp_path, objective, updates=150).run()
    assert not result.stopped and result.updates == 150
    assert losses(tmp_path)[-1] < 0.05 * losses(tmp_path)[0]
    assert float(objective.seen) == 150 * 8
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"update", "loss", "size", "lr", "grad_norm", "rows_per_second", "seconds"} <= line.keys()


@pytest.mark.law
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole").run()
    for _ in range(12):  # every start is stopped after one update
        pieces = trainer(tmp_path / "pieces", minutes=0.0).run()
    assert not pieces.stopped and equal(whole, pieces)
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")


@pytest.mark.law
def test_micro_batches_give_the_gradient_of_the_batch(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a").run()
    parts = trainer(tmp_path / "b", micro_batch=3).run()
    for name, value in whole.weights["weights"].items():
        assert torch.allclose(value, parts.weights["weights"][name], atol=1e-6)


class Greedy(Halving):
    """Runs out of memory with more than two rows."""

    def loss(self, rows: Rows) -> Loss:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return super().loss(rows)


@pytest.mark.law
def test_out_of_memory_halves_the_rows_and_changes_nothing_else(tmp_path: Path) -> None:
    halved = trainer(tmp_path / "a", Greedy())
    result = halved.run()
    assert halved.micro_batch == 2
    assert equal(result, trainer(tmp_path / "b", micro_batch=2).run())
    events = [line for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines() if "event" in line]
    assert [json.loads(line)["micro_batch"] for line in events] == [4, 2]


def test_out_of_memory_with_one_row_says_what_helps(tmp_path: Path) -> None:
    class Hopeless(Halving):
        def loss(self, rows: Rows) -> Loss:
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(ValueError, match=r"one row at a time: turn on run\.gradient_checkpointing"):
        trainer(tmp_path, Hopeless()).run()


class Poisoned(Halving):
    """A loss of NaN in some updates."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def loss(self, rows: Rows) -> Loss:
        loss = super().loss(rows)
        if rows.update not in self.bad:
            return loss
        return Loss(loss.errors * torch.nan, timesteps=torch.full((len(rows),), 749.0))


@pytest.mark.law
def test_an_update_whose_loss_is_nan_is_skipped(tmp_path: Path) -> None:
    result = trainer(tmp_path, Poisoned({3, 4, 8})).run()
    assert all(value.isfinite().all() for value in result.weights["weights"].values())
    skipped = [json.loads(line).get("skipped") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [i for i, value in enumerate(skipped) if value] == [3, 4, 8]


def test_nan_in_a_row_stops_with_the_timestep_and_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"3 updates in a row, up to update 8 at the timesteps 749.*00000005"
    ):
        trainer(tmp_path, Poisoned({6, 7, 8})).run()


def test_no_row_that_counts_moves_nothing(tmp_path: Path) -> None:
    class Ties(Halving):
        def loss(self, rows: Rows) -> Loss:
            return Loss(super().loss(rows).errors, weights=torch.zeros(len(rows)))

    before = Halving().network.weight.detach().clone()
    result = trainer(tmp_path, Ties()).run()
    assert torch.equal(result.weights["weights"]["weight"], before)


@pytest.mark.law
def test_a_group_with_a_later_start_waits(tmp_path: Path) -> None:
    class Late(Halving):
        def groups(self) -> list[Group]:
            names = dict(self.network.named_parameters())
            return [
                Group("weights", {"weight": names["weight"]}),
                Group("bias", {"bias": names["bias"]}, start=5),
            ]

    moved: list[bool] = []
    objective = Late()
    first = objective.network.bias.detach().clone()
    objective.before = lambda update: moved.append(not torch.equal(first, objective.network.bias))  # type: ignore[method-assign]
    trainer(tmp_path, objective).run()
    assert moved == [False] * 6 + [True] * 6


@pytest.mark.law
def test_the_newest_whole_checkpoint_is_taken_and_a_damaged_one_named(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole").run()
    trainer(tmp_path / "cut").run()
    newest = tmp_path / "cut" / "checkpoints" / "update-00000012" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"update-00000012' is passed over: weights.safetensors is not what"):
        again = trainer(tmp_path / "cut", resume=True)
    assert again.saved is not None and again.saved.update == 10
    assert equal(whole, again.run())


def test_only_the_last_n_checkpoints_stay(tmp_path: Path) -> None:
    trainer(tmp_path, save_every=1, keep=3).run()
    assert [p.name[-2:] for p in sorted((tmp_path / "checkpoints").iterdir())] == ["10", "11", "12"]


def test_a_save_that_fails_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, updates=5).run()
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffplug.training.checkpoint._write_tensors", full)
    again = trainer(tmp_path, updates=5, resume=True)
    with pytest.raises(WriteError, match="No space left on device"):
        again._save(6)
    assert [p.name for p in again.checkpoints.all()] == ["update-00000005"]
    assert again.checkpoints.newest() is not None


def test_a_checkpoint_of_another_config_says_what_differs(tmp_path: Path) -> None:
    trainer(tmp_path, config={"optimizer": {"lr": 0.05}, "model": "shapes"}).run()
    with pytest.raises(ValueError, match=r"optimizer.lr: 0.05 there, 0.1 here"):
        trainer(tmp_path, config={"optimizer": {"lr": 0.1}, "model": "shapes"})


def test_resume_with_nothing_there_and_beginning_where_something_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        trainer(tmp_path, resume=True)
    trainer(tmp_path).run()
    with pytest.raises(ValueError, match="holds a run at update 12: add --resume"):
        trainer(tmp_path, resume=False)


def test_a_checkpoint_of_a_newer_format_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffplug.training.checkpoint.FORMAT", 2)
    trainer(tmp_path).run()
    monkeypatch.setattr("diffplug.training.checkpoint.FORMAT", 1)
    with (
        pytest.warns(UserWarning, match="its format is 2, this version reads 1"),
        pytest.raises(ValueError, match="every checkpoint in .* is damaged"),
    ):
        trainer(tmp_path)


@pytest.mark.law
def test_rows_depend_on_seed_update_and_row_alone() -> None:
    whole, part = Rows(1, 2, 8, range(8)), Rows(1, 2, 8, range(3, 6))
    assert torch.equal(whole.normal(3)[3:6], part.normal(3))
    assert torch.equal(whole.uniform()[3:6], part.uniform())
    assert not torch.equal(Rows(1, 3, 8, range(8)).normal(3), Rows(1, 2, 8, range(8)).normal(3))
    drawn = Rows(0, 0, 4096, range(4096)).integers(2, 5)
    assert drawn.unique().tolist() == [2, 3, 4] and abs(float(drawn.double().mean()) - 3) < 0.05


@pytest.mark.law
def test_every_item_comes_once_an_epoch() -> None:
    drawn = torch.cat([Rows(0, update, 4, range(4)).items(10) for update in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
