"""The benchmarks of searches at the smallest size: they run, and go on where they stood."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from benchmarks import search, shapes_s3
from benchmarks.compact import kept_results, thinned, written
from diffplug.samplers import SolverSchedule
from diffplug.samplers.search.decisions.starts import preset_schedules
from diffplug.samplers.search.pipeline_problem import PipelineProblem
from diffplug.testing import tiny

GRIDS = ("linspace",)
SEARCH = search.search_space


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "SIZES", {"mixture": (8, 8, 16)})
    for module in (search, shapes_s3):
        monkeypatch.setattr(module, "search_space", partial(SEARCH, grids=GRIDS))
        monkeypatch.setattr(module, "opened", lambda model, device: quiet())
    monkeypatch.setattr(search, "preset_schedules", partial(preset_schedules, grids=GRIDS))
    monkeypatch.setattr(search, "PipelineProblem", partial(PipelineProblem, fine=4))
    monkeypatch.setattr(search, "shown_strict", lambda problem, final: 0.5)


def quiet() -> Any:
    pipe = tiny("sd15")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.law
def test_histories_keep_their_ends_and_their_largest_steps() -> None:
    history = [(float(i), 100.0 / (1 + i // 2)) for i in range(200)]
    found = thinned(history, 20)
    assert len(found) == 20 and found[0] == [0.0, 100.0] and found[-1] == [199.0, 1.0]
    assert all(tuple(point) in history for point in found) and found == sorted(found)
    assert [2.0, 50.0] in found and [4.0, 100 / 3] in found
    flat = thinned([(float(i), 1.0) for i in range(100)], 20)
    assert flat == [[0.0, 1.0], [99.0, 1.0]] and thinned(history[:5], 20) == [
        list(each) for each in history[:5]
    ]


def test_written_results_are_the_same_and_short(tmp_path: Path) -> None:
    value = {"results": {"a": [{"history": thinned([(i, -i) for i in range(60)], 40), "text": "ä"}] * 3}}
    path = tmp_path / "r.json"
    written(path, value)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == value and kept_results(path) == value["results"]
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 110
    assert kept_results(tmp_path / "none.json") == {}


def test_methods_are_compared_and_what_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.json"
    written(path, {"results": {"other": {"kept": True}}})
    told = ["--models", "mixture", "--steps", "2", "--budget", "60"]
    monkeypatch.setattr(search, "verdicts", lambda results: {"bar": True})
    search.main([*told, "--methods", "random", "s3 + refinement", "--seeds", "1", "--json", str(path)])
    first = json.loads(path.read_text())["results"]
    assert first["other"] == {"kept": True} and "met: bar" in capsys.readouterr().out
    told += ["--methods", "random", "s3 + statistics"]
    search.main([*told, "--seeds", "2", "--json", str(path)])
    second = json.loads(path.read_text())["results"]["mixture"]["methods"]
    assert {name: [run["seed"] for run in runs] for name, runs in second.items()} == {
        "random": [0, 1], "s3 + refinement": [0], "s3 + statistics": [0, 1],
    }  # fmt: skip
    assert second["random"][0] == first["mixture"]["methods"]["random"][0]
    assert "schedule" in second["s3 + refinement"][0] and "schedule" not in second["random"][0]


@pytest.mark.pipe
def test_the_shapes_command_ships_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--pairs", "2", "--fresh", "2", "--trials", "29", "--refinement", "3"]
    places = {"--out": tmp_path / "out", "--studies": tmp_path / "st", "--json": tmp_path / "r.json"}
    told += [str(each) for pair in places.items() for each in pair]
    shapes_s3.main([*told, "--steps", "2", "3"])
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["evaluations"] for row in rows] == [2, 3]
    assert rows == json.loads((tmp_path / "out" / "studies.json").read_text())["results"]
    for row in rows:
        path = tmp_path / "out" / f"solver-{row['evaluations']}.json"
        assert path.exists() == row["shipped"]
        if row["shipped"]:
            assert SolverSchedule.load(path).meta["test"] == row["test"]
    before = (tmp_path / "st").glob("*.log")
    sizes = {path: path.stat().st_size for path in before}
    shapes_s3.main([*told, "--steps", "2"])
    again = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [(row["shipped"], row["test"]) for row in again] == [(rows[0]["shipped"], rows[0]["test"])]
    assert all(path.stat().st_size < 1.2 * size for path, size in sizes.items())  # nothing was searched twice
    assert "| 3 |" in capsys.readouterr().out


@pytest.mark.law
def test_no_prompt_is_in_two_sets() -> None:
    bench = search.shapes(quiet(), 2, 5.0, 40, 30)
    sets = [set(each.prompts) for each in (bench.train, bench.validation, bench.fresh)]
    assert [len(each) for each in sets] == [40, 80, 30]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
