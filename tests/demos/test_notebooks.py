"""The notebooks run from top to bottom, offline, with no output stored in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "demos" / "notebooks").glob("*.ipynb"))


def test_there_is_one_for_every_wing() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["batches", "samplers", "steering", "training"]


@pytest.mark.slow
@pytest.mark.pipe
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_runs(path: Path) -> None:
    document = json.loads(path.read_text("utf-8"))
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(document["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            source = "".join(cell["source"])
            exec(compile(source, f"{path.name}, cell {number}", "exec"), names)  # noqa: S102
