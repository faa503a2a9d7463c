"""The report: genealogy by hand, a figure, and log Z in words."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from diffplug.steering import SteeringReport
from diffplug.steering.report import lineages


def report(**changes: Any) -> SteeringReport:
    """Return a report of two scored calls with three particles."""
    values: dict[str, Any] = {
        "method": "FeynmanKac",
        "particles": 3,
        "strength": 2.0,
        "prompts": ("a red circle",),
        "steps": 5,
        "calls": (1, 3),
        "rewards": torch.tensor([[[0.1, 0.5, -math.inf]], [[0.4, 0.7, 0.6]]]),
        "ess": torch.tensor([[1.9], [2.8]]),
        "resampled": torch.tensor([[True], [True]]),
        "ancestors": torch.tensor([[[0, 1, 1]], [[2, 1, 2]]]),
        "distinct_roots": torch.tensor([[2], [1]]),
        "log_z": torch.tensor([1.25], dtype=torch.float64),
        "final_rewards": torch.tensor([[0.8, 0.9, 0.7]]),
        "final_log_weights": torch.zeros(1, 3),
        "returned": ((1,),),
        "invalid_rewards": 0,
        "network_calls": 5,
        "network_rows": 15,
        "network_seconds": 1.0,
        "decode_seconds": 0.5,
        "reward_seconds": 0.25,
        "total_seconds": 2.0,
    }
    return SteeringReport(**{**values, **changes})


@pytest.mark.law
def test_lineages_go_back_to_their_roots() -> None:
    assert lineages(torch.tensor([[0, 1, 1], [2, 1, 2]])).tolist() == [[1, 1, 1], [2, 1, 2], [0, 1, 2]]
    assert lineages(torch.empty(0, 2, dtype=torch.long)).tolist() == [[0, 1]]


def test_a_figure_of_the_genealogy(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    figure = report().plot()
    above, below = figure.axes
    assert len(above.lines) == 2 * 3 + 3, "an edge for each particle and call, and the points"
    assert below.get_xlabel() == "scheduler step"
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
    empty = report(
        calls=(),
        rewards=torch.empty(0, 1, 3),
        ess=torch.empty(0, 1),
        ancestors=torch.empty(0, 1, 3, dtype=torch.long),
        distinct_roots=torch.empty(0, 1),
    )
    assert len(empty.plot().axes) == 2
    with pytest.raises(ValueError, match="prompt=1: the report has prompts 0 to 0"):
        report().plot(1)


def test_log_z_in_words() -> None:
    assert "a" in str(report())
    assert "log Z 1.250" in str(report())
    assert "as one reward of 0.625 for all" in report().explain_log_z()
    maximiser = dataclasses.replace(report(), log_z=torch.tensor([math.nan]))
    assert "no log Z" in maximiser.explain_log_z()
    assert "log Z" not in str(maximiser)
    assert "nothing is tilted" in report(strength=0.0).explain_log_z()
    assert json.loads(maximiser.to_json())["log_z"] == [None]
