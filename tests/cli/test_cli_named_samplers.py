"""`--samplers NAME=FILE`: searched schedules under names of one's own, in every front end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffplug.cli import main as cli
from diffplug.demos.studio.form import Choices, Form
from diffplug.making.png import read_settings
from diffplug.registry import sampler_names
from diffplug.samplers import SolverSchedule, named_files, presets

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]


def _call(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture
def six(tmp_path: Path) -> Iterator[Path]:
    """A schedule of two steps in a file; names are taken away at the end."""
    path = tmp_path / "schedule.json"
    schedule: SolverSchedule = presets.ddim(2)
    schedule.save(path)
    yield path
    for name in named_files.named():
        named_files.forget(name)


def test_a_named_file_is_a_sampler_of_recipes_and_pictures_say_which(
    tmp_path: Path, tiny_folder: Path, six: Path
) -> None:
    words = ["--model", tiny_folder, "--samplers", f"six={six}", "-o", tmp_path / "out"]
    assert _call("generate", "x", "--sampler", "six", "--steps", 2, *words).exit_code == 0
    (picture,) = (tmp_path / "out").glob("*.png")
    settings = read_settings(picture)
    assert settings["sampler"] == "six" and len(settings["files"]["six"]) == 16
    assert "six" in sampler_names()
    named_files.forget("six")
    result = _call("compare", "x", "--run", "sampler=six,steps=2", "--judge", "jpeg", "-n", 1, *words)
    assert result.exit_code == 0, result.output


def test_a_batch_knows_names_in_its_ids(tmp_path: Path, tiny_folder: Path, six: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"prompt": "x", "seed": 1, "sampler": "six", "steps": 2}) + "\n")
    words = ["batch", manifest, "--model", tiny_folder, "-o", tmp_path / "out", "--samplers", f"six={six}"]
    assert json.loads(_call(*words, "--json").stdout)["made"] == 1
    assert json.loads(_call(*words, "--json").stdout)["made"] == 0
    presets.unipc(2).save(six)  # other content: other pictures
    report = json.loads(_call(*words, "--json").stdout)
    assert (report["made"], report["orphans"]) == (1, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("six", "write NAME=FILE, as six=six.json"),
        ("=six.json", "write NAME=FILE"),
        ("ddim={six}", "the sampler name 'ddim' is taken"),
        ("Six={six}", "a sampler's name is lower case letters"),
        ("six=nowhere.json", "nowhere.json"),
        ("six=six.txt", "is no .json or .npy file of a search"),
    ],
)
def test_a_name_or_file_that_cannot_be_is_one_line(tmp_path: Path, six: Path, text: str, said: str) -> None:
    result = _call("generate", "x", "--samplers", text.format(six=six), "-o", tmp_path / "out")
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and said in lines[0], result.output
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name_are_refused(tmp_path: Path, six: Path) -> None:
    words = ["--samplers", f"six={six}", "--samplers", "six=other.json", "-o", tmp_path / "out"]
    result = _call("generate", "x", *words)
    assert result.exit_code == 2 and "take two names" in result.stderr


def test_the_page_offers_the_name_and_tells_the_file_without_its_place(six: Path) -> None:
    named_files.name_file("six", str(six))
    choices = Choices.of("shapes", {"six": str(six)})
    assert "six" in choices.samplers
    form = Form.read({"prompt": "x", "sampler": "six", "steps": 2}, choices)
    assert form.command("shapes", choices.files).endswith("--samplers six=schedule.json")
    assert "sampler='schedule.json'" in form.python("shapes", choices.files)
    assert str(six.parent) not in form.command("shapes", choices.files) + form.row()
