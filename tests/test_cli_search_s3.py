"""`diffplug search s3`, `import` and `export`: files, tables, one-line errors, interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from diffplug.cli import main as cli
from diffplug.samplers import SolverSchedule
from diffplug.samplers.schedule import presets

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]
SMALL = ["--trials", "28", "--refinement", "0", "--grids", "linspace", "--pairs", "2", "--validation", "1"]
SMALL += ["--test", "1", "--truth", "6", "--guidance", "2", "--steps", "2"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPLUG_CACHE", str(tmp_path / "cache"))


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["search", *(str(word) for word in words)], env={"COLUMNS": "200"})


def call_generate(sampler: Path, folder: Path) -> Result:
    words = [
        "generate",
        "a red circle",
        "--sampler",
        str(sampler),
        "--steps",
        "5",
        "-o",
        str(folder / "pictures"),
    ]
    return CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})


def test_a_search_writes_a_schedule_and_goes_on_where_it_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffplug.samplers.search import decision_stage

    out = tmp_path / "two.json"
    one = decision_stage._Run._one

    def stopping(run: Any, best: Any) -> None:
        if run.scored == 4:
            raise KeyboardInterrupt
        one(run, best)

    monkeypatch.setattr(decision_stage._Run, "_one", stopping)
    stopped = call("s3", *SMALL, "-o", out)
    assert stopped.exit_code == 130 and "two.study.db: repeat the command" in stopped.stderr
    assert not out.exists()
    monkeypatch.setattr(decision_stage._Run, "_one", one)
    done = call("s3", *SMALL, "-o", out, "--plots", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    row = told["rows"][0]
    assert row["steps"] == 2 and row["spent"] == 28 and row["schedule"] == str(out)
    assert told["pareto"] == [[2, row["test"]["value"]]]
    assert all(Path(path).stat().st_size > 2000 for path in told["pictures"]) and len(told["pictures"]) == 2
    assert SolverSchedule.load(out).meta["guidance_scale"] == 2
    other = call("s3", *SMALL[:-3], "3", *SMALL[-2:], "-o", out)
    assert other.exit_code == 2 and "is one of guidance_scale 2.0, this search has 3.0" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "5,x"], "steps '5,x': give whole numbers from 2 to 100"),
        (["--steps", "1"], "steps '1': give whole numbers from 2 to 100"),
        (["--metric", "lpips"], "metric 'lpips' is unknown: write one of latent-mse"),
        (["--method", "s4"], "unknown search method 's4'. Did you mean 's3'"),
        (["--trials", "50"], "the 48 presets come first and then a batch of 20, give at least 68"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--start", "none.json"], "none.json"),
        (["--model", "owner/none"], "which prompts? Give --prompts FILE"),
    ],
)
def test_bad_requests_are_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    done = call("s3", *words, "-o", tmp_path / "s.json")
    assert done.exit_code == 2 and said in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.json"))


def test_published_schedules_come_in_and_grids_go_out(tmp_path: Path) -> None:
    import sys

    import torch

    sys.path.insert(0, str(Path(__file__).parent / "samplers"))
    try:
        from test_published import document
        from usf_schedules import usf_schedules
    finally:
        sys.path.pop(0)
    schedule, path, out = usf_schedules()["lsun_nfe4"], tmp_path / "lsun.pth", tmp_path / "four.json"
    torch.save(document(schedule, [1, 0.7083439, 0.506711, 0.4368469, 0.1885509, 0.001660492]), path)
    done = call("import", path, "-o", out)
    assert done.exit_code == 0 and "4 evaluations, 5 steps" in done.stdout
    assert SolverSchedule.load(out).steps == schedule.steps
    listed = call("export", out, "--kind", "timesteps")
    numbers = [float(part) for part in listed.stdout.split(",")]
    assert numbers == pytest.approx([707.344, 505.711, 435.847, 187.551], abs=1e-2)
    presets.ddim(4, "karras").save(out)
    assert len(call("export", out).stdout.split(",")) == 5
    refused = call("import", out, "-o", tmp_path / "x.json")
    assert refused.exit_code == 2 and "four.json" in refused.stderr
    v3 = tmp_path / "v3.pth"
    times = [1, 0.7350307, 0.5233757, 0.3162254, 0.2044142, 0.001431784]
    torch.save({**document(usf_schedules()["stable_diffusion_nfe5"], times), "skip_coefficients": None}, v3)
    done = call("import", v3, "-o", out)
    assert done.exit_code == 0 and "steps [1, 3, 4] need the model's statistics" in done.stdout
    assert "names no file" in call_generate(out, tmp_path).stderr
    made = tmp_path / "m.safetensors"
    told = call("statistics", "--pairs", "2", "--points", "8", "--guidance", "2", "-o", made)
    assert told.exit_code == 0 and "7 noise levels, 4 x 1 x 1, guidance 2:" in told.stdout
    assert call("import", v3, "-o", out, "--statistics", made).exit_code == 0
    assert json.loads(out.read_text())["statistics"] == "m.safetensors"
    assert call_generate(out, tmp_path).exit_code == 0
    refused = call("import", v3, "-o", tmp_path / "x.json", "--statistics", tmp_path / "no.safetensors")
    assert refused.exit_code == 2 and "no.safetensors' are not there" in refused.stderr
    assert not (tmp_path / "x.json").exists()
    bad = call("import", path, "--mean", "a,b")
    assert bad.exit_code == 2 and "mean 'a,b': give numbers with commas" in bad.stderr
