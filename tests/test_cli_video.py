"""`diffplug video`: a folder of frames, an animation and a report, or one line and status 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from diffplug.cli import main as cli

pytestmark = [pytest.mark.pipe]


def call(*words: Any) -> Result:
    return CliRunner().invoke(cli.app, ["video", *(str(word) for word in words)], env={"COLUMNS": "200"})


def refused(*words: Any) -> str:
    result = call(*words)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def test_a_long_video_is_written_and_resumed(tmp_path: Path) -> None:
    words = ("a red circle", "--frames", 20, "--steps", 2, "-o", tmp_path / "v", "--json")
    told = json.loads(call(*words).stdout)
    assert len(list((tmp_path / "v" / "frames").glob("*.png"))) == 20
    assert len(told["report"]["clips"]) == 2
    with Image.open(tmp_path / "v" / "video.webp") as shown:
        assert shown.n_frames > 1
    before = (tmp_path / "v" / "frames" / "000003.png").stat().st_mtime_ns
    assert call(*words).exit_code == 0
    assert (tmp_path / "v" / "frames" / "000003.png").stat().st_mtime_ns == before
    assert "another video" in refused("a blue circle", *words[1:-1])


def test_windows_and_pictures_from_the_command_line(tmp_path: Path) -> None:
    windows = ("--windows", "16/8", "--noise", "free", "--frames", 20, "--steps", 2)
    result = call("a red circle", *windows, "-o", tmp_path / "w")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "w" / "frames").glob("*.png"))) == 20
    (tmp_path / "w" / "report.json").unlink()  # killed between the last frame and the report
    assert call("a red circle", *windows, "-o", tmp_path / "w").exit_code == 0
    assert (tmp_path / "w" / "report.json").exists()
    chained = call(
        *("a red circle", "--picture-model", "shapes", "--pictures", 2, "--reward", "shapes"),
        *("--frames", 16, "--steps", 2, "-o", tmp_path / "c"),
    )
    assert chained.exit_code == 0, chained.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--noise", "free"), "add --windows"),
        (("--windows", "16"), "FRAMES/OVERLAP"),
        (("--windows", "16/8", "--overlap", 4), "--overlap is for clips"),
        (("--windows", "16/16"), "nothing new"),
        (("--pictures", 4, "--reward", "shapes"), "--picture-model"),
        (("--candidates", 2), "add --reward"),
        (("--reward", "shapes"), "chooses nothing"),
        (("--overlap", 3), "continues 1, 4 frames"),
        (("--seam", "kep"), "keep"),
        (("--at", "lake"), "a colon"),
        (("--at", "0:a lake"), "frame 0 has the prompt"),
        (("--at", "8:a lake", "--at", "8:a sea"), "frame 8 has the prompt 'a lake' already"),
        (("--at", "99:lake", "--frames", 20), "99 is no frame"),
        (("--image", "/nowhere.png"), "cannot be read"),
        (("--width", 64), "takes no width"),
        (("--model", "moving"), "moving-shapes"),
        (("--model", "shapes"), "takes no first frames"),
    ],
)
def test_bad_input_is_one_line(words: tuple[Any, ...], told: str, tmp_path: Path) -> None:
    assert told in refused("a red circle", "--steps", 1, "-o", tmp_path / "v", *words)
    assert not (tmp_path / "v" / "frames").exists() or not any((tmp_path / "v" / "frames").iterdir())
