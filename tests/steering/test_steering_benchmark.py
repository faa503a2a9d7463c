"""The steering benchmark: equal cost for every rule, cells that are kept, verdicts that can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steering import pictures
from benchmarks.steering.__main__ import parser
from benchmarks.steering.analytic_fk import LINEAR, every, twists
from benchmarks.steering.analytic_svdd import soft_value, tokens
from benchmarks.steering.chain import GAUSSIAN, ddim, denoise
from benchmarks.steering.drawing import draw
from benchmarks.steering.pictures import RULES, Cell, Grid, Setting
from benchmarks.steering.published import PublishedFeynmanKac
from benchmarks.steering.rows import Row, normaliser, table
from diffplug.noise import level
from diffplug.plug import plug
from diffplug.testing import tiny


def test_every_rule_costs_the_same() -> None:
    setting = Setting(steps=6)
    pictures.STEERERS.register("published-fk", PublishedFeynmanKac)
    try:
        for rule in RULES:
            for n in (4, 8, 16, 32):
                recipe = pictures.recipe(setting, rule, n)
                rounds = recipe.options.get("rounds", 1)
                assert recipe.steps * recipe.copies * rounds == 6 * n, rule
    finally:
        pictures.STEERERS.unregister("published-fk")


def test_cells_are_kept_and_only_missing_ones_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Cell] = []

    def measure(pipe: Any, setting: Setting, cell: Cell, prompts: list[str], max_rows: int) -> dict[str, Any]:
        made.append(cell)
        value = {"fk": 0.5, "best-of-n": 0.25}[cell.rule]
        figures: dict[str, Any] = {name: [value] * len(prompts) for name in pictures.FIGURES}
        costs = ("evaluations", "seconds", "decode_seconds", "reward_seconds")
        return figures | dict.fromkeys(costs, float(cell.budget))

    monkeypatch.setattr(pictures, "measure", measure)
    setting = Setting(chunk=2)
    grid = Grid(rules=("fk", "best-of-n"), budgets=(4, 16), seeds=1, prompts=3)
    pictures.run(None, setting, grid, tmp_path, max_rows=8, track=list)
    assert len(made) == 8
    pictures.run(None, setting, replace(grid, prompts=5), tmp_path, max_rows=8, track=list)
    assert len(made) == 8 + 4 * 2  # the half full chunk again, and a new one
    results = pictures.summary(replace(grid, prompts=5), 2, tmp_path)
    assert results["fk"]["16"]["strict_best"] == 0.5 and results["fk"]["4"]["pictures"] == 5
    bars = pictures.bars(results)
    assert len(bars) == 4 and all(bar["met"] for bar in bars.values())
    results["fk"]["16"].update(strict_mean=0.49, strict_best=0.25)
    bars = pictures.bars(results)
    assert [bar["met"] for name, bar in bars.items() if name.startswith("16")] == [False, False]
    assert pictures.table(results).count("\n") == 5
    draw(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="another steps: give another folder"):
        pictures.open_folder(replace(setting, steps=3), tmp_path)
    assert parser().parse_args([]).budgets == [4, 8, 16, 32]


def test_a_row_that_does_not_hold_is_marked() -> None:
    run = LINEAR.run(500, plan=every)
    good, bad = normaliser("x", "right", run, LINEAR.z), normaliser("x", "wrong", run, 2 * LINEAR.z)
    assert good.good and not bad.good and replace(bad, shown=True).good
    lines = table([good, bad]).splitlines()
    assert lines[-1].endswith("| * |") and lines[-2].endswith("|  |")
    assert not Row(part="x", case="", quantity="", expected=1.0, found=1.2, slack=0.1).good


@pytest.mark.law
def test_tables_hold_in_small() -> None:
    rows = [*twists(1000), *tokens(1500)]
    assert [row for row in rows if not row.good] == []
    assert sum(not row.shown for row in rows) > 20


@pytest.mark.law
def test_the_exact_soft_value_is_the_mean_of_what_comes() -> None:
    """exp(strength v) at the start averages to Z, and equals the mean of exp(strength r) from one state."""
    x = torch.full((40_000, 1), 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    end = denoise(ddim(), GAUSSIAN, x, 20, eta=1.0, generator=generator)[:, 0]
    weights = (4 * -0.5 * (end - 2) ** 2).exp()
    scheduler = ddim()
    scheduler.set_timesteps(20)
    here = level(scheduler, scheduler.timesteps[0])
    value = soft_value(GAUSSIAN.x0hat(x[:1], here.alpha, here.sigma), 0)
    assert abs(float(weights.mean()) - float((4 * value).exp())) < 4 * float(weights.std()) / 200


@pytest.mark.pipe
def test_the_published_rule_runs_in_a_pipeline() -> None:
    pipe = tiny("sd15")
    steerer = PublishedFeynmanKac(
        lambda images, prompts: images[:, 0].mean((1, 2)), particles=4, strength=2000.0, score_at="every"
    )
    with plug(pipe, steerer) as plugged:
        images = plugged("a red circle", num_inference_steps=5, eta=1.0, output_type="pt").images
    assert len(images) == 1 and steerer.report is not None
    assert steerer.report.calls == (0, 1, 2, 3) and int(steerer.report.distinct_roots[-1]) < 4
