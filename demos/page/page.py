"""The page: five tabs around one studio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import gradio as gr
from PIL import Image

from diffplug.demos.page.compare_tab import compare_tab
from diffplug.demos.page.controls import Controls
from diffplug.demos.page.steer_tab import steer_tab
from diffplug.demos.page.stopping import stops
from diffplug.demos.page.told import told
from diffplug.demos.page.vote_tab import vote_tab
from diffplug.demos.studio.form import restored
from diffplug.demos.studio.studio import Made, Studio
from diffplug.demos.studio.votes import Votes
from diffplug.making.picture_settings import settings_of_picture

__all__ = ["LOOK", "build"]

_KEYS = """
<script>
document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(document.activeElement.tagName);
  const button = document.getElementById({1: "left", 2: "right", 3: "tie", 4: "skip"}[event.key]);
  if (!typing && button && button.offsetParent && !event.ctrlKey && !event.metaKey) button.click();
  if (event.key === "Enter" && event.ctrlKey) document.getElementById("make").click();
});
</script>
"""

_STYLE = """
footer { display: none !important }
:root, .dark { --button-primary-background-fill: #c2410c; --button-primary-background-fill-hover: #9a3412;
  --button-cancel-background-fill: #b91c1c; --button-cancel-background-fill-hover: #991b1b }
button.stop { background: #b91c1c; color: white }
.min_value, .max_value, .or { color: #52525b !important }
.dark .min_value, .dark .max_value, .dark .or { color: #d4d4d8 !important }
#cells .grid-wrap, #particles_shown .grid-wrap { min-height: 0 !important; max-height: none !important }
#command .empty, #row .empty, #python .empty { min-height: 3rem !important }
#vote_left img, #vote_right img, #steer_preview img, #preview img
  { width: 100%; height: 100%; object-fit: contain }
.caption-label { white-space: normal !important; max-width: 100% !important; text-align: left }
"""

LOOK = {"head": _KEYS, "css": _STYLE}
"""What `launch` is told of the looks."""


def build(studio: Studio, votes: Votes) -> Any:
    """Return the page. Nothing in it is read from a path or an address that a browser names."""
    copies = studio.pool.copies
    with gr.Blocks(title="diffplug", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        name = PurePath(studio.choices.model).name  # a folder's place is nobody's business
        gr.Markdown(f"# diffplug: `{name}`, faster, steered, compared")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                controls = Controls.draw(studio.choices)
            with gr.Column(scale=3, min_width=420), gr.Tabs():
                with gr.Tab("Make", id="make-tab"):
                    _make_tab(studio, controls, copies)
                with gr.Tab("Compare", id="compare-tab"):
                    compare_tab(studio, controls, copies)
                with gr.Tab("Steer", id="steer-tab"):
                    steer_tab(studio, controls, copies)
                with gr.Tab("Restore", id="restore-tab"):
                    _restore_tab(studio, controls)
                with gr.Tab("Vote", id="vote-tab"):
                    vote_tab(studio, controls, votes, copies)
        controls.recall(page)
    return page


def _make_tab(studio: Studio, controls: Controls, copies: int) -> None:
    with gr.Row():
        go = gr.Button("Make", variant="primary", elem_id="make")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    with gr.Row():
        preview = gr.Image(
            label="What the step sees",
            format="jpeg",
            buttons=[],
            interactive=False,
            elem_id="preview",
            height=340,
        )
        pictures = gr.Gallery(
            label="Pictures",
            format="png",
            buttons=["download", "fullscreen"],
            columns=2,
            elem_id="pictures",
            interactive=False,
            object_fit="contain",
            height=340,
        )
    note = gr.Textbox("", label="Cost", interactive=False, elem_id="note", max_lines=2)
    with gr.Accordion("The same elsewhere", open=True):
        command = gr.Code(
            language="shell",
            wrap_lines=True,
            lines=1,
            label="On the command line",
            elem_id="command",
            interactive=False,
        )
        row = gr.Code(
            language="json",
            wrap_lines=True,
            lines=1,
            label="In a manifest of diffplug batch",
            elem_id="row",
            interactive=False,
        )
        python = gr.Code(
            language="python",
            wrap_lines=True,
            lines=1,
            label="In Python",
            elem_id="python",
            interactive=False,
        )

    def make(*given: Any) -> Iterator[tuple[Any, ...]]:
        form = studio.read(controls.drawn(given))
        model, files = studio.choices.model, studio.choices.files
        said = (form.command(model, files), form.row(), form.python(model, files))
        made: list[tuple[Image.Image, str]] = []
        yield gr.skip(), gr.skip(), "waiting for its turn", *said, *controls.shows_used(form)
        told_already = [gr.skip()] * 6
        for event in studio.make(form):
            if isinstance(event, Made):
                made += [(image, event.line()) for image in event.images]
                yield event.images[-1], list(made), event.line(), *told_already
            else:
                frame = gr.skip() if event.preview is None else event.preview
                yield frame, gr.skip(), f"step {event.done} of {event.of}", *told_already

    started = go.click(
        told(make),
        controls.asked,
        [preview, pictures, note, command, row, python, *controls.used],
        api_name="make",
        concurrency_id="pipe",
        concurrency_limit=copies,
        show_progress="minimal",
        show_progress_on=note,
        trigger_mode="once",
    )
    stops(stop, started, note, name="stop")


def _restore_tab(studio: Studio, controls: Controls) -> None:
    drop = gr.File(
        label="A PNG of diffplug, or of A1111 and its kin",
        file_types=[".png"],
        type="filepath",
        elem_id="drop",
    )
    note = gr.Textbox("", label="What was read", interactive=False, lines=3, elem_id="restored")

    def restore(path: str | None) -> list[Any]:
        if path is None:
            return [*(gr.skip() for _ in controls.inputs), ""]
        try:
            settings = settings_of_picture(Path(path))
        except ValueError as error:
            raise ValueError(str(error).replace(repr(path), "the file").replace(path, "the file")) from None
        except OSError:
            raise ValueError("the file could not be read: give a PNG") from None
        form, said = restored(settings, studio.choices)
        lines = ["every control is set"] if not said else ["set, but:", *said]
        return [*controls.shown(form), "\n".join(lines)]

    drop.upload(told(restore), drop, [*controls.inputs, note], api_name="restore")


def settings_text(image: Image.Image) -> str:
    """Return the settings in a picture, in lines."""
    return json.dumps(json.loads(image.info["diffplug"]), indent=1)
