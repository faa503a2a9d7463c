"""The fidelity benchmark: its arithmetic, and that it sets every method to the same cost."""

from __future__ import annotations

import pytest

from benchmarks.fidelity import Setting, summary, table


def test_mean_and_standard_error() -> None:
    figures = summary([{"x": 1.0}, {"x": 2.0}, {"x": 6.0}])["x"]
    assert figures["mean"] == 3.0
    assert figures["se"] == pytest.approx((14 / 2) ** 0.5 / 3**0.5)
    assert summary([{"x": 1.0}])["x"] == {"mean": 1.0, "se": 0.0}


def test_methods_cost_the_same() -> None:
    same_steps, same_cost, best, steered = Setting(steps=10, particles=4).recipes()
    assert same_steps.steps == best.steps == steered.steps == 10
    assert (
        same_cost.steps * same_cost.copies == best.steps * best.copies == steered.steps * steered.copies == 40
    )
    assert len({(r.sampler, r.eta, r.guidance) for r in (same_steps, same_cost, best, steered)}) == 1


def test_table_has_a_row_for_each_method() -> None:
    keys = ("strict_best", "score_best", "strict_mean", "score_mean", "evaluations", "seconds")
    figures = {key: {"mean": 0.5, "se": 0.01} for key in keys}
    lines = table({"plain": figures, "FK": figures}).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "50.0 ± 1.0 %" in lines[2] and "0.5000 ± 0.0100" in lines[3]
