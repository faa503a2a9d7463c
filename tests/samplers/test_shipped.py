"""Searched solvers that come with the package, made here: found for their model, and only for that."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ratio_book import FOUR, gentle, searched
from typer.testing import CliRunner

from diffplug import load
from diffplug.cli.main import app
from diffplug.plug import plug
from diffplug.recipe import Recipe
from diffplug.samplers import DCSolver, DCSolverScheduler, Solver, SolverScheduler
from diffplug.samplers import by_name as stock
from diffplug.samplers import library as shipped
from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.schedule import presets
from diffplug.testing import tiny


@pytest.fixture(scope="module")
def shapes() -> Any:
    return load("shapes")


def origin(pipe: Any, **meta: Any) -> dict[str, Any]:
    return {"model": fingerprint(pipe), "architecture": architecture(pipe), **meta}


def ship(folder: Path, pipe: Any) -> None:
    """Ratios for 4 steps, a schedule for 3, and a polynomial, all made for `pipe` at guidance 5."""
    home = folder / "shapes"
    home.mkdir(parents=True)
    ratios = searched(FOUR, 5.0)
    replace(ratios, meta={**ratios.meta, **origin(pipe, steps=4)}).save(home / "ratios-4-5.json")
    meta = origin(pipe, steps=3, guidance_scale=5.0)
    replace(presets.ipndm(3, final="sigma_min"), meta=meta).save(home / "solver-3.json")
    replace(gentle(), meta=origin(pipe)).save(home / "polynomial.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    return tmp_path / "shipped"


def test_without_files_the_names_are_the_plain_schedulers(folder: Path, shapes: Any) -> None:
    assert stock.sampler("dc-solver", shapes) is DCSolverScheduler
    assert stock.sampler("solver", shapes) is SolverScheduler
    for plug_class in (DCSolver, Solver):
        with pytest.raises(ValueError, match="comes with diffplug for 'shapes': search your own"):
            plug_class("shapes")


@pytest.mark.pipe
def test_the_embedded_model_takes_its_own(folder: Path, shapes: Any) -> None:
    ship(folder, shapes)
    dc, solver = (stock.sampler(name, shapes) for name in ("dc-solver", "solver"))
    assert isinstance(dc, DCSolver) and isinstance(solver, Solver)
    assert dc.book.choose(4, 5.0) == (FOUR, "")
    assert dc.book.choose(6, 6.0)[0] == pytest.approx(gentle().ratios(6, 6.0))
    assert [schedule.nfe for schedule in solver.schedules] == [3]
    other = tiny("sd15")
    assert stock.sampler("dc-solver", other) is DCSolverScheduler
    with plug(shapes, dc), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        shapes("a red circle", num_inference_steps=4, guidance_scale=5.0, output_type="latent")
        assert list(shapes.scheduler.schedule.ratios) == FOUR


@pytest.mark.pipe
def test_the_command_line_picks_them_and_says_what_is_not_exact(folder: Path, shapes: Any) -> None:
    ship(folder, shapes)

    def run(*options: str) -> tuple[dict[str, Any], str]:
        words = ["generate", "a red circle", "--json", "-o", str(folder / "out"), *options]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr

    exact, said = run("--sampler", "dc-solver", "--steps", "4", "--guidance", "5")
    assert exact["evaluations"] == 4 and "guidance" not in said
    assert "of guidance 5, not 7" in run("--sampler", "dc-solver", "--steps", "4", "--guidance", "7")[1]
    assert "run without compensation" in run("--sampler", "dc-solver", "--steps", "2", "--guidance", "5")[1]
    assert "'unipc' is used" in run("--sampler", "solver", "--steps", "2", "--guidance", "5")[1]


@pytest.mark.pipe
def test_other_weights_are_noticed(folder: Path, shapes: Any) -> None:
    """The same architecture after training: a warning that names both; another architecture: an error."""
    ship(folder, shapes)
    plugs = [stock.sampler(name, shapes) for name in ("dc-solver", "solver")]
    first = next(shapes.unet.parameters())
    before, mine = first.detach().clone(), fingerprint(shapes)
    with torch.no_grad():
        first.add_(0.01)
    try:
        said = f"other weights .model {mine[:8]}, this is {fingerprint(shapes)[:8]}.: search again"
        for each in plugs:
            with pytest.warns(UserWarning, match=said), plug(shapes, each):
                pass
    finally:
        first.data.copy_(before)
    other = tiny("sd15")
    old = other.scheduler
    for each, steps in zip(plugs, (4, 3), strict=True):
        with pytest.raises(ValueError, match=f"for {steps} steps belongs? to another model"):
            plug(other, each)
    assert other.scheduler is old


def test_dtypes_and_adapters_keep_the_architecture() -> None:
    pipe = tiny("sd15")
    weights, shape = fingerprint(pipe), architecture(pipe)
    pipe.to(torch.float16)
    assert architecture(pipe) == shape and fingerprint(pipe) != weights
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    assert architecture(pipe) == shape


@pytest.mark.pipe
def test_files_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ratios.json").write_text(json.dumps(FOUR))
    gentle().save(tmp_path / "polynomial.json")
    presets.ipndm(4).save(tmp_path / "schedule.json")
    made = {
        name: stock.sampler(str(tmp_path / f"{name}.json"), None)
        for name in ("ratios", "polynomial", "schedule")
    }
    assert [type(each).__name__ for each in made.values()] == ["DCSolver", "DCSolver", "Solver"]
    assert Recipe(sampler=str(tmp_path / "ratios.json"), steps=4).sampler
    with pytest.raises(ValueError, match="unknown shipped solver 'shape'. Did you mean 'shapes'"):
        shipped.shipped_folder("shape")
