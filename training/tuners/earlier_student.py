"""The weights that training begins from: those of an earlier run, or of a few-step name with a local file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffplug.samplers.few_step.catalogue import Row

__all__ = ["student_file", "student_row"]


def student_file(pipe: Any, start: str, steps: int) -> Path:
    """Return the weights that student.start names: the folder of an earlier run, or a few-step name.

    steps: evaluations, where a name has weights for several. Raises ValueError for anything else, for a
    student of another model, and for one that is not a single local file.
    """
    row = student_row(pipe, start, steps)
    file = row.weights[0] if len(row.weights) == 1 else None
    if file is None or file.repo or not row.folder:
        raise ValueError(
            f"student.start: {start!r} is no student in a local file: download it into a folder with its "
            "recipe.json, or name a model that is few-step by itself"
        )
    return Path(row.folder) / file.file


def student_row(pipe: Any, start: str, steps: int) -> Row:
    """Return the recipe that student.start names; ValueError for none, and for one of another model."""
    from diffplug.samplers.few_step.families import family_of
    from diffplug.samplers.few_step.lookup import all_rows, knows, row_for, rows_in

    folder = Path(start)
    if folder.is_dir() and (folder / "recipe.json").exists():
        row = rows_in(folder / "recipe.json")[0]
        if row.family != family_of(pipe):
            raise ValueError(
                f"student.start: {start!r} is a student of {row.family}, the model is {family_of(pipe)}: "
                "begin from a student of this model"
            )
        return row
    if knows(start):
        return row_for(start, family_of(pipe), steps, all_rows())
    raise ValueError(
        f"student.start: {start!r} is neither a folder with a recipe.json nor a few-step name; "
        "`diffplug names --few-step` lists these"
    )
