"""The steering benchmark: equal cost for every rule, cells that are kept, verdicts that can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import steering_sheet
from benchmarks.steering import picture_tables, pictures
from benchmarks.steering.__main__ import parser
from benchmarks.steering.analytic_fk import LINEAR, every, twists
from benchmarks.steering.analytic_svdd import soft_value, tokens
from benchmarks.steering.clock import Clock
from benchmarks.steering.drawing import draw
from benchmarks.steering.pictures import RULES, Cell, Grid, Setting
from benchmarks.steering.published import PublishedFeynmanKac
from benchmarks.steering.rows import Row, normaliser, table
from diffplug.files import write_json
from diffplug.noise.families import level
from diffplug.plug import plug
from diffplug.recipe import Recipe
from diffplug.steering import Scoring
from diffplug.testing import tiny
from diffplug.testing.closed_form.chain import GAUSSIAN, ddim, denoise


def test_every_rule_costs_the_same() -> None:
    setting = Setting(steps=6)
    pictures.register_published()
    try:
        for rule in RULES:
            for n in (4, 8, 16, 32):
                recipe = pictures.recipe(setting, rule, n)
                rounds = recipe.options.get("rounds", 1)
                assert recipe.steps * recipe.copies * rounds == 6 * n, rule
    finally:
        pictures.STEERERS.unregister("published-fk")


@pytest.mark.parametrize("rule", ["best-of-n", "fk", "svdd", "code", "two-level"])
def test_rules_are_those_that_a_person_gets_by_name(rule: str) -> None:
    mine = pictures.recipe(Setting(strength=10.0, steps=20), rule, 8)
    theirs = Recipe(sampler="ddim", steer=rule, particles=8)
    here, there = mine.steerer([0]), theirs.steerer([0])
    assert replace(here, returns="best") == replace(there, reward=here.reward)
    assert (mine.steps, mine.eta, mine.sampler) == (theirs.steps, theirs.eta, theirs.sampler)


def made_up(cell: Cell, prompts: int) -> dict[str, Any]:
    """Return a cell in which FK's pictures are right, and every fourth of the free ones."""
    n = cell.budget
    right = [cell.rule == "fk" or i % 4 == 3 for i in range(n)]
    costs = ("seconds", "decode_seconds", "reward_seconds")
    return {
        "score": [[0.5 + 0.5 * good for good in right]] * prompts,
        "strict": [right] * prompts,
        "weights": [[1 / n] * n] * prompts,
        "roots": [2] * prompts,
        "evaluations": 20.0 * n,
        **dict.fromkeys(costs, float(n)),
    }


def test_cells_are_kept_and_only_missing_ones_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Cell] = []

    def measure(pipe: Any, setting: Setting, cell: Cell, prompts: list[str], max_rows: int) -> dict[str, Any]:
        made.append(cell)
        return made_up(cell, len(prompts))

    def run(grid: Grid, **options: Any) -> list[str]:
        said: list[str] = []
        pictures.run(None, setting, grid, tmp_path, max_rows=8, clock=Clock(said.append), **options)
        return said

    monkeypatch.setattr(pictures, "measure", measure)
    setting = Setting(chunk=2)
    grid = Grid(rules=("best-of-n", "fk"), budgets=(4, 16), seeds=1, prompts=3)
    said = run(grid, at_most=2)
    assert [cell.budget for cell in made] == [16, 4], "free draws are made once, for the largest budget"
    assert said[0].startswith("6 cells to make, 108 ") and "2/6 fk x4: 0:00:00 gone, 0:00:" in said[2]
    run(grid)
    assert len(made) == 6
    assert run(grid) == ["0 cells to make, 0 pictures' worth of evaluations"]
    run(replace(grid, prompts=5))
    assert len(made) == 6 + 2 * 3  # the half full chunk again, and a new one
    run(replace(grid, prompts=5, budgets=(4, 8)))
    assert [cell.rule for cell in made[12:]] == ["fk"] * 3, "16 free draws hold 8"
    with pytest.raises(ValueError, match="another steps: give another folder"):
        pictures.open_folder(replace(setting, steps=3), tmp_path)


def test_figures_bars_and_the_drawing(tmp_path: Path) -> None:
    grid = Grid(rules=("best-of-n", "best-of-n-noise", "fk"), budgets=(2, 4, 16), seeds=2, prompts=3)
    for cell in grid.cells(2):
        write_json(tmp_path / cell.file, made_up(cell, grid.size(cell, 2)))
    results = picture_tables.summary(grid, 2, tmp_path)
    assert results["plain"]["1"]["strict_best"] == 0 and results["plain"]["1"]["evaluations"] == 20
    free = results["best-of-n"]
    assert [free[n]["strict_best"] for n in ("2", "4", "16")] == [0, 1, 1]
    assert [free[n]["strict_mean"] for n in ("2", "4", "16")] == [0, 0.25, 0.25]
    assert [free[n]["seconds"] for n in ("2", "4", "16")] == [2, 4, 16]
    assert results["fk"]["16"]["pictures"] == 6 and results["fk"]["16"]["roots"] == 2
    bars = picture_tables.bars(results)
    assert [bar["met"] for bar in bars.values()] == [True, True, True, True, True, False]  # no lead at 16
    results["fk"]["4"].update(strict_mean=0.49, strict_best=0.9)
    assert [bar["met"] for name, bar in picture_tables.bars(results).items() if name.startswith("4")] == [
        False,
        False,
    ]
    assert picture_tables.table(results).count("\n") == 2 + 10 - 1
    draw(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert parser().parse_args([]).budgets == [4, 8, 16, 32]


def test_the_mean_picture_is_one_drawn_by_its_weight() -> None:
    cell = made_up(Cell(rule="best-of-n", budget=4, seed=0, chunk=0), 2)
    assert picture_tables.figures(cell, None)["strict_mean"] == [0.25, 0.25]
    cell["weights"] = [[0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.5, 0.0]]
    np.testing.assert_allclose(picture_tables.figures(cell, None)["strict_mean"], [0.7, 0.0])
    np.testing.assert_allclose(picture_tables.figures(cell, 2)["strict_mean"], [0.0, 0.0])


@pytest.mark.pipe
def test_the_first_of_many_free_draws_are_those_of_fewer() -> None:
    pipe = tiny("sd15")
    reward = "colour:red"
    drawn = [
        pictures.recipe(Setting(steps=2, reward=reward), "best-of-n", n).run(pipe, ["a", "b"], [7, 8]).images
        for n in (2, 4)
    ]
    few, many = (np.stack([np.asarray(image, dtype=int) for image in images]) for images in drawn)
    assert abs(few - many[[0, 1, 4, 5]]).max() <= 1


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
        lambda images, prompts: images[:, 0].mean((1, 2)),
        particles=4,
        strength=2000.0,
        scoring=Scoring(at="every"),
    )
    with plug(pipe, steerer) as plugged:
        images = plugged("a red circle", num_inference_steps=5, eta=1.0, output_type="pt").images
    assert len(images) == 1 and steerer.report is not None
    assert steerer.report.calls == (0, 1, 2, 3) and int(steerer.report.distinct_roots[-1]) < 4


@pytest.mark.pipe
def test_the_sheet_shows_every_particle_of_every_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, own, drawn = tmp_path / "sheet.png", steering_sheet.contact_sheet, []

    def sheet(cells: Any, **labels: Any) -> Any:
        drawn.extend(cells)
        return own(cells, **labels)

    monkeypatch.setattr(steering_sheet, "contact_sheet", sheet)
    steering_sheet.main(["--steps", "6", "--particles", "2", "--prompts", "1", "-o", str(place)])
    assert [[len(cell.images) for cell in row] for row in drawn] == [[2]] * len(steering_sheet.ROWS)
    assert all(len(cell.marks) == 2 for row in drawn for cell in row)
    assert Image.open(place).height > len(steering_sheet.ROWS) * 64
