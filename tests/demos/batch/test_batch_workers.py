"""Several processes of one machine: one that cannot load the model does not stop the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffplug.demos.batch.drivers import Stopped, run, unfinished
from diffplug.demos.batch.job import Job
from diffplug.demos.batch.manifest import Row
from diffplug.demos.batch.model import Model
from diffplug.demos.batch.plan import Plan, plan

pytestmark = [pytest.mark.pipe, pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Lame(Model):
    """A model that loads on some processes only."""

    good: tuple[int, ...] = (0, 2)

    def load(self, rank: int = 0) -> Any:
        if rank not in self.good:
            raise ValueError(f"device {rank} has no room for the model")
        return super().load(rank)


def _wanted() -> Plan:
    rows = [(i, Row(prompt=f"x {i}", seed=i)) for i in range(1, 13)]
    return plan("manifest", rows, settings={"steps": 1}, shard=2)


def test_one_worker_of_three_that_cannot_load_is_told_and_the_others_finish(
    tmp_path: Path, tiny_folder: Path
) -> None:
    job, wanted = Job(tmp_path, "lame", shard=2), _wanted()
    job.start()
    with pytest.warns(UserWarning, match=r"1 of 3 workers ended early, .*: ValueError: device 1 has no room"):
        outcomes = run(job, Lame(str(tiny_folder)), wanted.shards, wanted.recipes, workers=3)
    assert sum(one.made for one in outcomes) == 12
    assert unfinished(job, wanted.shards)[0] == []


def test_none_that_loads_is_an_error_that_says_why(tmp_path: Path, tiny_folder: Path) -> None:
    job, wanted = Job(tmp_path, "lame", shard=2), _wanted()
    job.start()
    with pytest.raises(Stopped, match="all 2 workers ended early: ValueError: device"):
        run(job, Lame(str(tiny_folder), good=()), wanted.shards, wanted.recipes, workers=2)
