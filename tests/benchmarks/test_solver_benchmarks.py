"""The benchmarks of the samplers, at a tiny size: they run, resume, and lose nothing when interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import shapes_schedules, solver_limits, solver_pictures, solver_plot, solvers
from diffplug.files import read_json
from diffplug.samplers import CompensationPolynomial, SolverSchedule
from diffplug.samplers.schedule import presets


@pytest.fixture(autouse=True)
def gradients() -> Any:
    """The commands turn them off for their whole process."""
    with torch.no_grad():
        yield
    torch.set_grad_enabled(True)


# ---------------------------------------------------------------------------------------- shapes_schedules


def search(model: Path, home: Path, *more: str) -> None:
    """The command on a tiny model: three steps, three guidance scales, four pairs."""
    words = ["--model", str(model), "--steps", "3", "--guidances", "3", "5", "7", "--stages", "ratios"]
    words += ["--pairs", "4", "--truth", "4", "--out", str(home / "shipped"), "--work", str(home / "work")]
    words += ["--cache", str(home / "cache"), "--json", str(home / "figures.json"), *more]
    shapes_schedules.main(words)


def shipped(home: Path) -> dict[str, str]:
    """What lies in the shipped folder, by name."""
    return {path.name: path.read_text() for path in sorted((home / "shipped").iterdir())}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A place with shipped files of other weights."""
    (tmp_path / "shipped").mkdir()
    for name in ("ratios-9-5", "ratios-3-5", "solver-3", "solver-9", "polynomial"):
        (tmp_path / "shipped" / f"{name}.json").write_text(json.dumps({"meta": {"model": "older"}}))
    (tmp_path / "shipped" / "studies.json").write_text("[]")
    return tmp_path


@pytest.mark.pipe
def test_shipped_files_are_replaced_at_the_end_and_a_second_run_goes_on(
    home: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in its third search, and again where it ships."""
    before, own, made = shipped(home), shapes_schedules.Workshop.ratios, []

    def ratios(self: Any, steps: int, guidance: float) -> Any:
        made.append((steps, guidance))
        if len(made) == 3:
            raise KeyboardInterrupt
        return own(self, steps, guidance)

    monkeypatch.setattr(shapes_schedules.Workshop, "ratios", ratios)
    with pytest.raises(KeyboardInterrupt):
        search(tiny_folder, home)
    assert shipped(home) == before and not (home / "figures.json").exists()

    publish = shapes_schedules.publish
    monkeypatch.setattr(shapes_schedules, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        search(tiny_folder, home)
    assert made == [(3, 3.0), (3, 5.0), (3, 7.0), (3, 7.0)] and shipped(home) == before

    monkeypatch.setattr(shapes_schedules, "publish", publish)
    search(tiny_folder, home)
    assert len(made) == 4 and not list((home / "work").iterdir())
    names = set(shipped(home)) - {"solver-3.json"}  # there only where it is better
    ratio_files = {f"ratios-3-{guidance}.json" for guidance in (3, 5, 7)}
    assert names == {*ratio_files, "polynomial.json", "studies.json"}
    rows = read_json(home / "figures.json")["results"]
    assert [row["kind"] for row in rows] == ["ratios"] * 3 + ["polynomial"] * 3 + ["solver"]
    check_shipped(home, rows)
    assert "| solver | 3 | 5 |" in capsys.readouterr().out


@pytest.mark.pipe
def test_processes_share_a_search_and_the_last_one_ships(home: Path, tiny_folder: Path) -> None:
    """Searches alone leave the shipped files as they are; who comes last finds all of them finished."""
    before = shipped(home)
    search(tiny_folder, home, "--guidances", "3", "--only-search")
    search(tiny_folder, home, "--guidances", "5", "7", "--only-search", "--stages", "grid")
    assert shipped(home) == before and not (home / "figures.json").exists()
    (work,) = (home / "work").iterdir()
    found = {path.name: path.read_text() for path in work.iterdir()}
    assert set(found) == {"ratios-3-3.json", "ratios-3-5.json", "ratios-3-7.json", "solver-3.json"}
    search(tiny_folder, home)
    assert shipped(home).keys() - before.keys() == {"ratios-3-3.json", "ratios-3-7.json"}
    solver = next(row for row in read_json(home / "figures.json")["results"] if row["kind"] == "solver")
    assert solver["stage"] in ("ratios", "presets")


def check_shipped(home: Path, rows: list[dict[str, Any]]) -> None:
    """Every file can be read, says what the table says, and is never worse than what is stock."""
    folder = home / "shipped"
    for row in rows:
        if row["kind"] == "ratios":
            found = SolverSchedule.load(folder / f"ratios-{row['steps']}-{row['guidance_scale']:g}.json")
            assert found.meta["held out"] == row["held out"] and found.nfe == row["steps"]
        if row["kind"] != "polynomial":
            assert row["held out"]["mean"] <= row["baseline"]["mean"]
            assert row["evaluations"] > 0
        if row["kind"] == "solver":
            better = row["held out"]["mean"] < row["baseline"]["mean"]
            assert (folder / f"solver-{row['steps']}.json").exists() == better
    curve = CompensationPolynomial.load(folder / "polynomial.json")
    assert (curve.steps, curve.guidance) == ((3, 3), (3.0, 7.0)) and curve.meta["model"] != "older"


@pytest.mark.law
def test_a_searched_schedule_of_the_same_weights_is_not_overwritten(home: Path) -> None:
    folder = home / "shipped"
    mine = {"meta": {"model": "newer", "method": "s3"}}
    for name in ("solver-3", "solver-4"):
        (folder / f"{name}.json").write_text(json.dumps(mine))
    (folder / "solver-8.json").write_text("{ damaged")
    document = {"meta": {"model": "newer"}}
    shapes_schedules.publish({"solver-3": document, "ratios-3-5": document}, folder, "newer")
    assert {name: json.loads(text) for name, text in shipped(home).items()} == {
        "ratios-3-5.json": document, "solver-3.json": mine, "solver-4.json": mine, "studies.json": [],
    }  # fmt: skip


# ----------------------------------------------------------------- solvers, solver_plot, solver_pictures


def measure(home: Path, *more: str) -> dict[str, Any]:
    """The figures of the mixture at guidance 7.5, on a few pairs."""
    words = ["--guidance", "7.5", "--pairs", "6", "--held-out", "6", "--fresh", "8", "--truth", "60"]
    words += ["--stages", "ratios", "--results", str(home), "--schedules", str(home / "found")]
    solvers.main([*words, *more])
    document: dict[str, Any] = read_json(home / "solvers_mixture_7.5.json")
    return document


@pytest.mark.law
def test_solvers_are_measured_and_drawn(tmp_path: Path) -> None:
    measured = measure(tmp_path, "--steps", "3", "4")
    assert set(measured["results"]) == {"3", "4"} and measured["setting"]["weights"] == ""
    for steps, found in measured["results"].items():
        rows = found["rows"]
        stock = [row["mean"] for row in rows if row["family"] != "ours"]
        assert len(stock) == len(solvers.PEERS) and min(stock) > measured["floor"]["mean"] > 0
        assert all(row["median"] <= row["p95"] and 0.1 <= row["worst tenth"] <= 1 for row in rows)
        (given,) = (row for row in rows if row["solver"] == "given")
        assert found["of the best stock"]["best stage"] <= given["mean"] / min(stock) + 1e-12
        assert SolverSchedule.load(tmp_path / "found" / f"{steps}-7.5.json").nfe == int(steps)
    solver_plot.main([str(tmp_path / "solvers_mixture_7.5.json"), "-o", str(tmp_path / "plot.png")])
    assert np.asarray(Image.open(tmp_path / "plot.png").convert("L")).std() > 5  # lines, not an empty page


@pytest.mark.law
def test_an_interrupted_measurement_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, asked = solvers.compare, []

    def compare(bench: Any, steps: int, *more: Any) -> Any:
        asked.append(steps)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return own(bench, steps, *more)

    monkeypatch.setattr(solvers, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, "--steps", "2", "3")
    assert set(measure(tmp_path, "--steps", "2", "3", "--resume")["results"]) == {"2", "3"}
    assert asked == [2, 3, 3]
    measure(tmp_path, "--steps", "2", "--resume", "--truth", "20")  # another setting: all over again
    assert asked == [2, 3, 3, 2]


@pytest.mark.law
def test_what_is_shipped_can_be_judged_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffplug.samplers.library.FOLDER", tmp_path)
    (tmp_path / "shapes").mkdir()
    meta = {"guidance_scale": 5.0, "evaluations": 9, "seconds": 2.5}
    for name, schedule in (
        ("ratios-4-5", presets.unipc(4, final="sigma_min", disable_corrector=(0,))),
        ("ratios-6-5", presets.unipc(6, final="sigma_min", disable_corrector=(0,))),
        ("solver-4", presets.ipndm(4, final="sigma_min")),
    ):
        replace(schedule, meta=meta).save(tmp_path / "shapes" / f"{name}.json")
    found = solvers.shipped("shapes", 4, 5.0)
    cost = {"evaluations": 9, "seconds": 2.5}
    assert [(name, each.nfe, paid) for name, each, paid in found] == [
        ("DC-Solver", 4, cost),
        ("given", 4, cost),
    ]
    with pytest.raises(ValueError, match="nothing is shipped for 4 steps at guidance 7.5"):
        solvers.shipped("shapes", 4, 7.5)


@pytest.mark.law
def test_bars_are_told_as_reached_or_missed() -> None:
    stock = {"solver": "UniPC-2", "family": "UniPC", "mean": 1.0, "p95": 2.0}
    ours = [{"solver": name, "family": "ours", "mean": 0.3, "p95": 1.0} for name in ("DC-Solver", "states")]
    told = solvers.verdict("mixture", 7.5, 5, [stock, *ours])
    assert [line.rpartition(": ")[2] for line in told] == ["reached", "MISSED"]
    assert solvers.verdict("shapes", 5.0, 8, [stock, *ours]) == []  # the bars there are at 5 and 6


@pytest.mark.pipe
def test_the_sheet_has_a_row_for_each_number_of_evaluations(tmp_path: Path) -> None:
    words = ["--steps", "1", "2", "--converged", "2", "--prompts", "1", "-o", str(tmp_path / "sheet.png")]
    solver_pictures.main(words)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.height > 3 * 64 and sheet.width > len(solver_pictures.COLUMNS) * 64


@pytest.mark.law
def test_curves_take_the_best_of_a_family() -> None:
    rows = [{"solver": s, "family": f, "mean": m} for s, f, m in
            (("UniPC-2", "UniPC", 3.0), ("UniPC-3", "UniPC", 2.0), ("given", "ours", 1.0))]  # fmt: skip
    document = {"results": {"10": {"rows": rows}, "5": {"rows": rows[:1]}}}
    assert solver_plot.curve(document, "UniPC") == ([5, 10], [3.0, 2.0])
    assert solver_plot.curve(document, "given") == ([10], [1.0])


# --------------------------------------------------------------------------------------------- solver_limits


@pytest.mark.pipe
def test_more_converged_nodes_leave_less_error(
    home: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without converged nodes the error is the solver's own; with all of them that of the last step."""
    words = [
        "--model",
        str(tiny_folder),
        "--steps",
        "3",
        "--fresh",
        "2",
        "--truth",
        "30",
        "--shares",
        "0.25",
        "0",
    ]
    solver_limits.main([*words, "--truths", str(home), "--json", str(home / "limits.json")])
    document = read_json(home / "limits.json")
    rows = [row for row in document["results"]["3"] if row["solver"] == "DDIM"]
    assert [row["converged"] for row in rows] == [1, 2, 3]
    bench = solver_limits.PipelineBench(str(tiny_folder), 5.0, 1, 1, 2, 30, folder=home)
    own = bench.ours(solver_limits.solvers(3)["DDIM"])
    assert rows[0]["mean"] == pytest.approx(own["mean"], rel=1e-6)
    assert rows[2]["mean"] < rows[0]["mean"]
    far, near = document["moved"]
    assert near["mean"] < 1e-8 < far["mean"]
    assert "| DDIM |" in capsys.readouterr().out
