"""The page of what works with which family, docs/support.md: every tick on it is a test that has just passed.

Runs tests/testing/test_families.py and writes the page from its results; --check compares instead, and ends
with status 1 where the page is not what it would write.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.command import command

FEATURES = ("solver", "dc-solver", "search", "best-of-n", "steer", "seeds")
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
_TESTS = ROOT / "tests" / "testing" / "test_families.py"
_TEST = "test_it_works_or_is_refused_before_the_run"
WRITING = "page of support"  # the plug-in's name: tests do not compare with a page that is being written
_INTRODUCTION = """\
# What works with which family

Each row is a pipeline of the real classes with random weights (`diffplug.testing.tiny`). Each cell is a test:
it plugs in, runs, takes the plug off, and looks whether the pipeline makes the same picture as before, bit
for bit. `python -m benchmarks.support` runs those tests and writes this page; nothing is written by hand.

- **solver**: `Solver()`, and so every preset and schedule file; **dc-solver**: `DCSolver(ratios)`.
- **search**: `search_compensation`, and its schedule run.
- **best-of-n**: `BestOfN`; **steer**: `FeynmanKac`, which scores particles on the way and copies the best,
  with the noise that `proposal="auto"` chooses.
- **seeds**: `Seeds`, with which a picture is the same alone and as the first of two.

✓ works. – is refused before the first evaluation, with the sentence below. ✗ is a known fault: it fails later
than that, or without a good sentence, or the network is told something wrong.
"""
Cells = Mapping[tuple[str, str], str]


class Results:
    """A plug-in of pytest that keeps what each test of a family and a feature came to."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}
        self.failed: list[str] = []

    def pytest_configure(self, config: Any) -> None:
        config.pluginmanager.register(object(), WRITING)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when != "call" or _TEST not in report.nodeid:
            return
        at = _place(report.nodeid)
        if report.passed:
            self.cells[at] = cell(dict(report.user_properties)["refusal"])
        elif report.skipped:  # an expected failure
            self.cells[at] = cell(fault=report.wasxfail.removeprefix("reason: "))


def cell(refusal: str = "", *, fault: str = "") -> str:
    """Return the cell of a test: a tick, unless there is a sentence of a refusal or of a known fault."""
    if fault:
        return f"✗ {fault}"
    return f"– {refusal}" if refusal else "✓"


def page(cells: Cells) -> str:
    """Return the page of these cells: a table, then what is behind its numbers."""
    notes: list[str] = []
    rows = [_row(["family", *FEATURES]), _row(["---", *(":-:" for _ in FEATURES)])]
    for name in sorted({name for name, _ in cells}):
        rows.append(_row([name, *(_mark(cells[name, feature], notes) for feature in FEATURES)]))
    listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    return "\n".join([_INTRODUCTION, *rows, "", listed]) + "\n"


def cells(text: str) -> dict[tuple[str, str], str]:
    """Return the cells of a page: ✓, or – or ✗ with its sentence."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    table = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return {
        (name, feature): re.sub(r" (\d+)$", lambda number: f" {notes[number[1]]}", cell)
        for name, *row in table[2:]
        for feature, cell in zip(table[0][1:], row, strict=True)
    }


def _place(nodeid: str) -> tuple[str, str]:
    """Return family and feature of a test: `...[sd15-img2img-dc-solver]`."""
    told = nodeid.partition("[")[2].rstrip("]")
    feature = next(feature for feature in sorted(FEATURES, key=len, reverse=True) if told.endswith(feature))
    return told.removesuffix(f"-{feature}"), feature


def _mark(cell: str, notes: list[str]) -> str:
    mark, _, sentence = cell.partition(" ")
    if not sentence:
        return mark
    if sentence not in notes:
        notes.append(sentence)
    return f"{mark} {notes.index(sentence) + 1}"


def _row(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"


def measured() -> Results:
    """Run the tests of all families and return what they came to."""
    import pytest

    results = Results()
    pytest.main([str(_TESTS), "-q", "-k", _TEST, "-p", "no:cacheprovider"], plugins=[results])
    return results


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; status 1 where a test fails, or the page is another one."""
    parser = command(__name__)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    asked = parser.parse_args(arguments)
    results = measured()
    if results.failed:
        print(f"no page: {len(results.failed)} tests failed", file=sys.stderr)
        return 1
    text = page(results.cells)
    if not asked.check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not what this command writes: run it without --check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
