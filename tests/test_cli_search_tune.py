"""`diffplug search tune`: a file that runs, a table, one-line errors, an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from diffplug.cli import main as cli
from diffplug.samplers import SolverSchedule, tune_schedule

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]
SMALL = ["--prompt-count", "8", "--guidance", "2", "--steps", "2", "--batch", "2", "--check-every", "1"]
SMALL += ["--validation", "2", "--test", "2", "--truth", "6"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPLUG_CACHE", str(tmp_path / "cache"))


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["search", "tune", *map(str, words)], env={"COLUMNS": "200"})


def test_a_preset_is_tuned_into_a_file_that_runs_and_that_can_be_tuned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "two.json", tmp_path / "again.json"
    words = ["ddim", "--evaluations", "2", "--grid", "karras", "--reward", "0.001*colour:red", *SMALL]
    words += ["--ceiling", "1000"]
    first = call(*words, "-o", out)
    assert first.exit_code == 0, first.output
    assert "0.001*colour:red" in first.output and str(out) in first.output
    schedule = SolverSchedule.load(out)
    assert schedule.nfe == 2 and schedule.nodes.name == "karras" and not schedule.nodes.ends_clean
    told = json.loads(call(out, "--reward", "colour:red", *SMALL, "--json", "-o", again).output)
    assert told["schedule"] == str(again) and set(told["start"]) == {"reward", "error", "median"}

    use = ["a red circle", "--sampler", str(again), "--steps", "2", "-o", str(tmp_path / "pictures")]
    made = CliRunner().invoke(cli.app, ["generate", *use])
    assert made.exit_code == 0, made.output

    def interrupted(*_: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffplug.samplers.search.gradient_stage.tune_schedule", interrupted)
    stopped = call(*words, "-o", out)
    assert stopped.exit_code == 130 and "two.tuning.json: repeat the command" in stopped.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unipc", "--reward", "colour:red"], "'unipc' needs --evaluations"),
        (["unicp", "--evaluations", "4", "--reward", "colour:red"], "Did you mean 'unipc'"),
        (["unipc", "--evaluations", "4", "--reward", "shapes"], "'shapes' has no gradient"),
        (["missing.json", "--reward", "colour:red"], "missing.json"),
        (["FILE", "--evaluations", "3", "--reward", "colour:red"], "has 2 evaluations and a grid of its own"),
        (["FILE", "--grid", "karras", "--reward", "colour:red"], "for presets"),
        (["FILE", "--reward", "colour:red", "-o", "."], "'.' is a folder"),
    ],
)
def test_bad_input_is_told_in_a_line(words: list[str], message: str, tmp_path: Path) -> None:
    from diffplug.samplers.schedule.presets import ddim

    path = tmp_path / "two.json"
    ddim(2).save(path)
    given = [str(path) if word == "FILE" else word for word in words]
    result = call(*given, *SMALL, *([] if "-o" in given else ["-o", tmp_path / "o.json"]))
    last = result.output.strip().splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("error: ") and message in last
    assert not (tmp_path / "o.json").exists()


def test_the_command_and_the_function_have_the_same_defaults() -> None:
    import inspect

    from diffplug.cli.search_tune import tune

    ours, theirs = (inspect.signature(each).parameters for each in (tune, tune_schedule))
    shared = {"steps", "batch", "rate", "check_every", "validation", "test", "ceiling", "checkpoints", "seed"}
    for name in shared:
        assert ours[name].default == theirs[name].default
