"""`diffplug votes`: a table that trainers read, counts, and one line for what cannot be exported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffplug.cli import main as cli
from diffplug.demos.studio.vote_files import read_votes
from diffplug.training.preference.pairs import read_pairs


def _call(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, ["votes", *(str(word) for word in words)], env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three votes: one for each recipe, and a tie."""
    home = tmp_path / "page"
    home.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(home / f"{i}.png")
    recipes = {"recipe_0": {"steps": 20}, "recipe_1": {"sampler": "dc-solver", "steps": 6}}
    rows = [
        {"prompt": "x", "image_0": "0.png", "image_1": "1.png", "label_0": 0.0, "label_1": 1.0, **recipes},
        {"prompt": "y", "image_0": "2.png", "image_1": "3.png", "label_0": 0.0, "label_1": 1.0, **recipes},
        {"prompt": "z", "image_0": "0.png", "image_1": "3.png", "label_0": 0.5, "label_1": 0.5, **recipes},
    ]
    (home / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return home


@pytest.mark.parametrize("name", ["votes.parquet", "votes.jsonl"])
def test_what_is_exported_is_what_trainers_read(tmp_path: Path, folder: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    target = tmp_path / "table" / name
    result = _call("export", folder, "-o", target)
    assert result.exit_code == 0 and "3 votes are in" in result.stdout
    pairs = read_pairs(target)
    assert [pair.prompt for pair in pairs] == ["x", "y"]
    better = pairs[0].better
    data = better if isinstance(better, bytes) else better.read_bytes()
    assert data == (folder / "1.png").read_bytes()
    assert _call("export", folder, "-o", target).exit_code == 0  # again, over what is there


def test_recipes_are_counted(folder: Path) -> None:
    found = json.loads(_call("show", folder, "--json").stdout)
    assert found["votes"] == 3
    assert found["recipes"][0] == {"recipe": "sampler dc-solver, steps 6", "won": 2, "lost": 0, "tied": 1}
    assert "steps 20" in _call("show", folder / "votes.jsonl").stdout


@pytest.mark.parametrize(
    ("line", "name", "said"),
    [
        ("", "votes.parquet", "holds no vote yet"),
        ("{", "votes.parquet", "votes.jsonl:1: this is no vote"),
        ('{"prompt": 1, "label_0": 0, "label_1": 1, "image_0": "a", "image_1": "b"}', "v.jsonl", "texts"),
        (
            '{"prompt": "x", "label_0": 0, "label_1": 7, "image_0": "a", "image_1": "b"}',
            "v.jsonl",
            "from 0 to 1",
        ),
        (
            '{"prompt": "x", "label_0": 0, "label_1": 1, "image_0": "a", "image_1": "b"}',
            "v.jsonl",
            "no picture 'a'",
        ),
        (
            '{"prompt": "x", "label_0": 0, "label_1": 1, "image_0": "../a", "image_1": "b"}',
            "v.jsonl",
            "'../a'",
        ),
        (None, "votes.csv", "votes are written as .parquet or .jsonl"),
        (None, "nowhere", "votes are written as"),
    ],
)
def test_what_cannot_be_exported_is_told_in_a_line(
    tmp_path: Path, folder: Path, line: str | None, name: str, said: str
) -> None:
    if line is not None:
        (folder / "votes.jsonl").write_text(line + "\n")
    result = _call("export", folder, "-o", tmp_path / name)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and said in lines[0], result.output
    assert not (tmp_path / name).exists()


def test_a_folder_without_votes_is_told(tmp_path: Path) -> None:
    result = _call("export", tmp_path, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 2 and "votes.jsonl" in result.stderr


def test_labels_that_are_texts_count_as_numbers_and_a_pipe_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "x", "image_0": "a.png", "image_1": "b.png", "label_0": "1", "label_1": 0}
    (tmp_path / "votes.jsonl").write_text(json.dumps(row) + "\n")
    assert read_votes(tmp_path)[0]["label_0"] == 1.0
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(OSError, match="it is no regular file"):
        read_votes(tmp_path / "pipe.jsonl")
