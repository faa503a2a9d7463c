"""Compare: a grid over two settings, and a slider between two of its cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from diffplug.demos.contact_sheet import Cell as SheetCell
from diffplug.demos.contact_sheet import contact_sheet
from diffplug.demos.page.controls import Controls
from diffplug.demos.page.stopping import stops
from diffplug.demos.page.told import told
from diffplug.demos.studio.form import Form
from diffplug.demos.studio.limits import MOST_CELLS
from diffplug.demos.studio.studio import AXES, Cell, Studio

__all__ = ["compare_tab", "values_of"]

_WHOLE = ("steps", "seed", "particles")


def compare_tab(studio: Studio, controls: Controls, copies: int) -> None:
    """Draw the tab."""
    with gr.Row():
        across = gr.Dropdown(list(AXES), value="steps", label="Across", elem_id="across")
        across_values = gr.Textbox(
            "4, 20", label="Values, with commas (prompts: with |)", elem_id="across_values", max_length=2000
        )
    with gr.Row():
        down = gr.Dropdown(list(AXES), value="sampler", label="Down", elem_id="down")
        down_values = gr.Textbox("ddim, dc-solver", label="Values", elem_id="down_values", max_length=2000)
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare")
        stop = gr.Button("Stop", variant="stop", elem_id="stop_compare")
    note = gr.Textbox("", label="Progress", interactive=False, elem_id="compare_note")
    cells = gr.Gallery(
        label="Cells",
        format="png",
        columns=3,
        buttons=["download", "fullscreen"],
        elem_id="cells",
        interactive=False,
        object_fit="contain",
    )
    sheet = gr.Image(
        label="Sheet", format="png", buttons=["download", "fullscreen"], interactive=False, elem_id="sheet"
    )
    with gr.Row():
        left = gr.Number(1, label="Left cell", precision=0, minimum=1, elem_id="left_cell")
        right = gr.Number(2, label="Right cell", precision=0, minimum=1, elem_id="right_cell")
        show = gr.Button("Slide between them", elem_id="slide")
    slider = gr.ImageSlider(
        label="Left and right",
        format="png",
        type="pil",
        elem_id="slider",
        interactive=False,
        buttons=["download", "fullscreen"],
    )
    kept = gr.State([])

    def compare(*given: Any) -> Iterator[tuple[Any, ...]]:
        names, texts, rest = given[:2], given[2:4], given[4:]
        values = {**controls.values(rest), "pictures": 1}
        form = studio.read(values)
        columns, rows = ((name, values_of(name, text)) for name, text in zip(names, texts, strict=True))
        found: list[Cell] = []
        for event in studio.grid(form, columns, rows):
            if isinstance(event, Cell):
                found.append(event)
                pictures = [one.made.images[0] for one in found]
                yield _gallery(found, len(columns[1])), gr.skip(), f"{len(found)} cells", pictures
            else:
                yield (
                    gr.skip(),
                    gr.skip(),
                    f"cell {len(found) + 1}, step {event.done} of {event.of}",
                    gr.skip(),
                )
        pictures = [cell.made.images[0] for cell in found]
        yield (
            _gallery(found, len(columns[1])),
            _sheet(form, columns, rows, found),
            f"{len(found)} cells, all there",
            pictures,
        )

    started = go.click(
        told(compare),
        [across, down, across_values, down_values, *controls.inputs],
        [cells, sheet, note, kept],
        api_name="compare",
        concurrency_id="pipe",
        concurrency_limit=copies,
        show_progress="minimal",
        show_progress_on=note,
        trigger_mode="once",
    )
    stops(stop, started, note, says="stopped; what is there stays", name="stop_compare")
    show.click(told(_two), [kept, left, right], slider, api_name="slide")


def values_of(name: str, text: Any) -> list[Any]:
    """Return the values of an axis from a text. Raises ValueError of one line."""
    if name not in AXES:
        raise ValueError(f"{str(name)[:80]!r} is no axis: take one of {', '.join(AXES)}")
    if not isinstance(text, str) or len(text) > 2000:
        raise ValueError(f"the values of {name} must be a text of at most 2,000 characters")
    parts = [part.strip() for part in text.split("|" if name == "prompt" else ",") if part.strip()]
    if not 1 <= len(parts) <= MOST_CELLS:
        raise ValueError(f"{name} has {len(parts)} values: give 1 to {MOST_CELLS}")
    if name in ("sampler", "steer", "prompt"):
        return parts
    return [_number(name, part) for part in parts]


def _number(name: str, part: str) -> Any:
    try:
        return int(part) if name in _WHOLE else float(part)
    except ValueError:
        raise ValueError(f"{part[:80]!r} is no value of {name}: a number is expected") from None


def _gallery(found: list[Cell], columns: int) -> Any:
    """Return the cells, as many beside each other as the grid has columns."""
    cells = [(cell.made.images[0], f"{number}: {cell.made.line()}") for number, cell in enumerate(found, 1)]
    return gr.update(value=cells, columns=columns)


def _sheet(form: Form, columns: Any, rows: Any, found: list[Cell]) -> Image.Image:
    """Return the grid as one picture, each cell with its cost below its column."""
    across, down = columns[1], rows[1]
    places = {(cell.row, cell.column): cell.made for cell in found}
    grid = [[SheetCell([places[y, x].images[0]]) for x in range(len(across))] for y in range(len(down))]
    cost = "; ".join(
        f"{n}: {c.made.evaluations:.0f} evaluations, {c.made.seconds:.1f} s" for n, c in enumerate(found, 1)
    )
    sheet = contact_sheet(
        grid,
        row_labels=[f"{rows[0]} {value}" for value in down],
        column_labels=[f"{columns[0]} {value}" for value in across],
        title=form.prompt,
        footer=f"Cells in reading order: {cost}.",
    )
    settings = {
        "prompt": form.prompt,
        "columns": list(columns),
        "rows": list(rows),
        **form.recipe().settings(),
    }
    sheet.info["diffplug_grid"] = json.dumps(settings, allow_nan=False)
    return sheet


def _two(kept: list[Any], left: Any, right: Any) -> tuple[Any, Any]:
    """Return two cells by their numbers."""
    for number in (left, right):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 1 <= number <= len(kept):
            raise ValueError(f"there is no cell {str(number)[:20]}: {len(kept)} were made")
    return kept[int(left) - 1], kept[int(right) - 1]
