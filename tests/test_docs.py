"""Every block of the README and the docs runs as pasted.

Python blocks of a page run from top to bottom in one namespace, with the embedded model, whose network is
replaced by a line of arithmetic. Lines that begin with `diffplug` run through the command line; searches,
which take minutes, are parsed only. A block behind the comment `<!-- needs a download -->` or
`<!-- takes minutes -->` is compiled and parsed, and not run.
"""

from __future__ import annotations

import ast
import copy
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import diffplug
from diffplug.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKERS = ("<!-- needs a download -->", "<!-- takes minutes -->")
PARSED_ONLY = {"search", "schedule", "train", "demo", "batch", "votes"}

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]


@dataclass(frozen=True)
class Block:
    """A block of code of a page: where it begins, its language ("" where indented), whether it is run."""

    line: int
    language: str
    text: str
    run: bool

    @property
    def python(self) -> bool:
        """Return whether it is Python; an indented block that assigns or imports, and parses, is."""
        if self.language:
            return self.language == "python"
        try:
            tree = ast.parse(self.text)
        except SyntaxError:
            return False
        return any(isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.With)) for node in tree.body)

    @property
    def commands(self) -> list[list[str]]:
        """Return the words of every line that calls diffplug, a module or printf, without comments."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [
            shlex.split(line, comments=True)
            for line in lines
            if re.match(r"(diffplug|python -m|printf) ", line)
        ]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced and the indented blocks of a page."""
    lines = [*page.read_text("utf-8").splitlines(), ""]
    i, run = 0, True
    while i < len(lines):
        line, start = lines[i], i + 1
        if line.startswith("```"):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
            yield Block(start, line[3:].strip(), "\n".join(lines[i + 1 : end]), run)
            i, run = end, True
        elif line.startswith("    ") and not lines[i - 1].strip() and not _in_a_list(lines, i):
            rest = range(i, len(lines))
            end = next((j for j in rest if lines[j].strip() and lines[j][:4] != "    "), len(lines))
            text = "\n".join(each[4:] for each in lines[i:end]).strip("\n")
            yield Block(start, "", text, run)
            i, run = end - 1, True
        elif line.strip() in MARKERS:
            run = False
        elif line.strip():
            run = True
        i += 1


def _in_a_list(lines: list[str], i: int) -> bool:
    before = next((line for line in reversed(lines[:i]) if line.strip() and not line.startswith("    ")), "")
    return bool(re.match(r"\s*([-*]|\d+\.) ", before))


def _parsed(words: list[str]) -> None:
    """Raise where a command or an option is unknown, or a value out of range."""
    command: Any = typer.main.get_command(cli.app)
    context = None
    while hasattr(command, "commands"):
        name, words = words[0], words[1:]
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    context = command.make_context(name, list(words))
    context.close()


@pytest.fixture(scope="module")
def shapes() -> Any:
    """The embedded model, loaded once."""
    return diffplug.load("shapes")


@pytest.fixture(scope="module")
def moving() -> Any:
    """The embedded video model, loaded once."""
    return diffplug.load("moving-shapes")


@pytest.fixture(autouse=True)
def quick_networks(shapes: Any, moving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages' code is what is tested, not the pictures."""
    from diffusers import AutoencoderKL, UNet2DConditionModel, WanTransformer3DModel

    def forward(self: Any, sample: Any, *_: Any, **__: Any) -> Any:
        return (0.5 * sample,)

    def forward_video(self: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
        return (0.5 * hidden_states[:, :4],)

    def loaded(name: str = "shapes", **_: Any) -> Any:
        return copy.deepcopy(moving if name == "moving-shapes" else shapes)

    def decode(self: Any, z: Any, *_: Any, **__: Any) -> Any:
        return (z[:, :3].repeat_interleave(4, -1).repeat_interleave(4, -2),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    monkeypatch.setattr(WanTransformer3DModel, "forward", forward_video)
    monkeypatch.setattr(diffplug, "load", loaded)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffplug.samplers.schedule.presets import dpmpp

    monkeypatch.chdir(tmp_path)
    for name, steps in (("five", 5), ("six", 6)):  # what the searches of the pages would have written
        dpmpp(steps, final="sigma_min").save(f"{name}.json")
    for block in blocks(page):
        for words in block.commands:
            where = f"{page.name}:{block.line}: {' '.join(words)}"
            if words[0] == "printf":
                subprocess.run(["sh", "-c", shlex.join(words).replace("'>'", ">")], check=True)
            elif words[0] == "python":
                assert find_spec(words[2]) is not None, where
            elif "..." in words:
                continue
            elif not block.run or words[1] in PARSED_ONLY:
                _parsed(words[1:])
            else:
                result = CliRunner().invoke(cli.app, words[1:])
                assert result.exit_code == 0, f"{where}\n{result.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.python:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            if block.run:
                exec(code, names)  # noqa: S102  the page's own code


def test_blocks_are_found() -> None:
    found = {page.name: list(blocks(page)) for page in PAGES}
    python = sum(block.python and block.run for each in found.values() for block in each)
    commands = sum(len(block.commands) for each in found.values() for block in each)
    assert python >= 6 and commands >= 25


def test_a_page_with_a_mistake_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n    import math\n    math.nothing\n\n<!-- takes minutes -->\n\n    x = undefined\n"
    )
    first, second = blocks(page)
    assert first.python and first.run and second.python and not second.run
    with pytest.raises(AttributeError, match="nothing"):
        test_python_of_a_page_runs(page, tmp_path, monkeypatch)
    page.write_text("Text.\n\n    diffplug generate x --nothing\n")
    with pytest.raises(AssertionError, match="No such option|error: "):
        test_commands_of_a_page_run(page, tmp_path, monkeypatch)
