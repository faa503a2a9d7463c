"""`diffplug search` and `diffplug schedule`: files, tables, one-line errors, interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from usf_document import document
from usf_schedules import usf_schedules

from diffplug.cli import main as cli
from diffplug.samplers import SolverSchedule
from diffplug.samplers.schedule import presets

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]
SMALL = ["--pairs", "2", "--set", "validation=1", "--set", "test=1", "--set", "tail=2"]
SMALL += ["--set", "truth_steps=6", "--guidance", "2", "--steps", "2"]
DECISIONS = [
    "--stages",
    "decisions",
    "--set",
    "trials=28",
    "--set",
    "refinement=0",
    "--set",
    "grids=linspace",
]
GRADIENT = ["--stages", "gradient", "--set", "steps=2", "--set", "batch=2", "--set", "check_every=1"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPLUG_CACHE", str(tmp_path / "cache"))


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["search", *map(str, words)], env={"COLUMNS": "200"})


def manage(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["schedule", *map(str, words)], env={"COLUMNS": "200"})


def call_generate(sampler: Path, folder: Path) -> Result:
    words = ["generate", "a red circle", "--sampler", str(sampler), "--steps", "5", "-o", str(folder / "out")]
    return CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})


def test_decisions_are_kept_and_continued_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffplug.samplers.search.decisions import stage as decision_stage

    out = tmp_path / "two.json"
    one = decision_stage.DecisionSearch._one

    def stopping(run: Any, best: Any) -> None:
        if run.scored == 4:
            raise KeyboardInterrupt
        one(run, best)

    monkeypatch.setattr(decision_stage.DecisionSearch, "_one", stopping)
    stopped = call(*DECISIONS, *SMALL, "-o", out)
    assert stopped.exit_code == 130 and "the same command continues" in stopped.stderr
    assert not out.exists() and (tmp_path / "two.progress.db").exists()
    monkeypatch.setattr(decision_stage.DecisionSearch, "_one", one)
    done = call(*DECISIONS, *SMALL, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    row = told["rows"][0]
    assert row["steps"] == 2 and row["spent"] == 28 and row["schedule"] == str(out)
    assert told["pareto"] == [[2, row["test"]["value"]]]
    meta = SolverSchedule.load(out).meta
    assert meta["guidance_scale"] == 2 and meta["pairs"]["tail"] == 2
    other = call(*DECISIONS, *SMALL, "--guidance", "3", "-o", out)
    assert other.exit_code == 2 and "is one of guidance_scale 2.0, this search has 3.0" in other.stderr
    drawn = manage("plot", out)
    assert drawn.exit_code == 0 and (tmp_path / "two.png").stat().st_size > 2000


def test_fits_write_a_schedule_and_their_progress_goes_once_it_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "two.json"
    words = [*SMALL, "--stages", "grid", "--budget", "12", "-o", out]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SolverSchedule, "save", full)
        assert call(*words).exit_code == 2
    assert (tmp_path / "two.progress.json").exists() and not out.exists()
    done = call(*words)
    assert done.exit_code == 0 and "grid" in done.stdout and str(out) in done.stdout, done.output
    assert not (tmp_path / "two.progress.json").exists()
    assert SolverSchedule.load(out).nfe == 2


def test_each_number_of_steps_has_a_file_of_progress(tmp_path: Path) -> None:
    words = [
        *SMALL,
        "--steps",
        "2,3",
        "--stages",
        "grid",
        "--budget",
        "12",
        "--progress",
        tmp_path / "p.json",
    ]
    done = call(*words, "-o", tmp_path / "s.json")
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.glob("*.json")} == {"s-2.json", "s-3.json"}


def test_a_preset_is_moved_up_a_reward_and_the_result_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "two.json", tmp_path / "again.json"
    words = [*GRADIENT, *SMALL, "--start", "ddim@karras", "--for", "reward:0.001*colour:red"]
    words += ["--set", "ceiling=1000"]
    first = call(*words, "-o", out)
    assert first.exit_code == 0, first.output
    assert "reward:0.001*colour:red" in first.output and str(out) in first.output
    schedule = SolverSchedule.load(out)
    assert schedule.nfe == 2 and schedule.nodes.name == "karras" and not schedule.nodes.ends_clean
    told = call(*GRADIENT, *SMALL, "--start", out, "--for", "reward:colour:red", "--json", "-o", again)
    assert json.loads(told.stdout)["rows"][0]["baseline"]["solver"] == "start"

    def interrupted(*_: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffplug.samplers.search.search.search", interrupted)
    stopped = call(*words, "-o", out)
    assert stopped.exit_code == 130 and "the same command continues" in stopped.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "5,x"], "steps '5,x': give whole numbers from 2 to 100"),
        (["--steps", "4,4"], "from 2 to 100, each once"),
        (["--progress", "p.txt"], "--progress 'p.txt': without the stage decisions give a .json file"),
        (["--progress", "p.json", "--stages", "decisions", "--budget", "120"], "give a .db or .log file"),
        (["--steps", "1"], "steps '1': give whole numbers from 2 to 100"),
        (["--for", "lpips"], "metric 'lpips' is unknown: write one of error"),
        (["--set", "method=s4", "--stages", "decisions"], "unknown search method 's4'. Did you mean 's3'"),
        (["--stages", "decisions", "--budget", "50"], "48 presets come first and then a batch of 20"),
        (["--stages", "gird"], "unknown stage 'gird'. Did you mean 'grid'"),
        (["--stages", ","], "no stages: give any of"),
        (["--set", "pairz=3"], "unknown setting of a search 'pairz'. Did you mean 'pairs'"),
        (["--set", "pairs"], "write NAME=VALUE"),
        (["--set", "pairs=3"], "it has an option of its own, --pairs 3"),
        (["--set", "tail=3", "--set", "tail=4"], "--set tail is there twice: give it once"),
        (["--set", "truth_steps=-3"], "truth_steps=-3: give at least 1"),
        (["--set", "max_rows=0"], "max_rows=0: give at least 1"),
        (["--set", "fits=-1"], "fits=-1: give a number of runs"),
        (["--set", "rate=0.01"], "rate=0.01 acts only in the stage 'gradient': name it among the stages"),
        (["--set", "grids=karras"], "grids=['karras'] acts only in the stage 'decisions'"),
        (["--stages", "grid,ratios,grid"], "'grid' is there twice"),
        (["--set", "grid=karas"], "Did you mean 'karras'"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--start", "none.json"], "none.json"),
        (["--start", "unicp"], "Did you mean 'unipc'"),
        (["--start", "FILE"], "has 3 evaluations, the searches are of 5"),
        (["--stages", "gradient", "--start", "unipc", "--for", "reward:shapes"], "'shapes' has no gradient"),
        (
            ["--stages", "gradient"],
            "the stage 'gradient' climbs a reward, and this search is for 'latent-mse'",
        ),
        (["--model", "owner/none"], "which prompts? Give --prompts FILE"),
        (["-o", "."], "'.' is a folder"),
        (["-o", "five.txt"], "'five.txt': give a name that ends in .json"),
        (["--set", "validation=x"], "validation='x': give a whole number"),
        (["--set", "seconds=soon"], "seconds='soon': give a number"),
        (["--set", "analytic=maybe", "--stages", "decisions"], "analytic='maybe': give True or False"),
        (["dc"], "`search dc` is one command now"),
        (["s3"], "diffplug search --stages decisions"),
        (["tune"], "--stages gradient"),
        (["import"], "diffplug schedule import"),
        (["--progress", "mysql:/host/db", "--stages", "decisions", "--budget", "120"], "nor the URL of"),
    ],
)
def test_bad_requests_are_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / "three.json"
    path.parent.mkdir()
    presets.ddim(3).save(path)
    given = [str(path) if word == "FILE" else word for word in words]
    done = call(*given, *([] if "-o" in given else ["-o", tmp_path / "s.json"]))
    last = done.stderr.strip().splitlines()[-1]
    assert done.exit_code == 2 and last.startswith("error: ") and said in last
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "cache").exists()


def test_published_schedules_come_in_and_grids_go_out(tmp_path: Path) -> None:
    import torch

    schedule, path, out = usf_schedules()["lsun_nfe4"], tmp_path / "lsun.pth", tmp_path / "four.json"
    torch.save(document(schedule, [1, 0.7083439, 0.506711, 0.4368469, 0.1885509, 0.001660492]), path)
    done = manage("import", path, "-o", out)
    assert done.exit_code == 0 and "4 evaluations, 5 steps" in done.stdout
    assert SolverSchedule.load(out).steps == schedule.steps
    listed = manage("export", out, "--kind", "timesteps")
    numbers = [float(part) for part in listed.stdout.split(",")]
    assert numbers == pytest.approx([707.344, 505.711, 435.847, 187.551], abs=1e-2)
    presets.ddim(4, "karras").save(out)
    assert len(manage("export", out).stdout.split(",")) == 5
    refused = manage("import", out, "-o", tmp_path / "x.json")
    assert refused.exit_code == 2 and "four.json" in refused.stderr
    v3 = tmp_path / "v3.pth"
    times = [1, 0.7350307, 0.5233757, 0.3162254, 0.2044142, 0.001431784]
    torch.save({**document(usf_schedules()["stable_diffusion_nfe5"], times), "skip_coefficients": None}, v3)
    done = manage("import", v3, "-o", out)
    assert done.exit_code == 0 and "steps [1, 3, 4] need the model's statistics" in done.stdout
    assert "names no file" in call_generate(out, tmp_path).stderr
    made = tmp_path / "m.safetensors"
    told = manage("measure", "--pairs", "2", "--points", "8", "--guidance", "2", "-o", made)
    assert told.exit_code == 0 and "7 noise levels, 4 x 1 x 1, guidance 2:" in told.stdout
    assert manage("import", v3, "-o", out, "--statistics", made).exit_code == 0
    assert json.loads(out.read_text())["statistics"] == "m.safetensors"
    assert call_generate(out, tmp_path).exit_code == 0
    refused = manage("import", v3, "-o", tmp_path / "x.json", "--statistics", tmp_path / "no.safetensors")
    assert refused.exit_code == 2 and "no.safetensors' are not there" in refused.stderr
    assert not (tmp_path / "x.json").exists()
    bad = manage("import", path, "--mean", "a,b")
    assert bad.exit_code == 2 and "mean or ends 'a,b': give numbers with commas" in bad.stderr
