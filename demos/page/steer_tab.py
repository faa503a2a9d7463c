"""Steer: all particles of a run, what they reached, and who descends from whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from diffplug.demos.page.controls import Controls
from diffplug.demos.page.stopping import stops
from diffplug.demos.page.told import told
from diffplug.demos.studio.form import NO_STEERER
from diffplug.demos.studio.studio import Made, Studio

__all__ = ["steer_tab"]


def steer_tab(studio: Studio, controls: Controls, copies: int) -> None:
    """Draw the tab."""
    gr.Markdown(
        "Steerer, reward, particles and strength are those on the left; without a steerer it is `fk`."
    )
    with gr.Row():
        go = gr.Button("Steer", variant="primary", elem_id="steer_go")
        stop = gr.Button("Stop", variant="stop", elem_id="stop_steer")
    preview = gr.Image(
        label="What the first particle becomes",
        format="jpeg",
        buttons=[],
        interactive=False,
        elem_id="steer_preview",
        height=220,
    )
    particles = gr.Gallery(
        label="Particles",
        format="png",
        columns=4,
        buttons=["download", "fullscreen"],
        elem_id="particles_shown",
        interactive=False,
        object_fit="contain",
    )
    note = gr.Textbox("", label="What came of it", interactive=False, lines=2, elem_id="steer_note")
    plot = gr.Plot(label="Genealogy, rewards, diversity", show_label=False, elem_id="genealogy")

    def steer(*given: Any) -> Iterator[tuple[Any, ...]]:
        values = controls.drawn(given)
        name = values.get("steer")
        form = studio.read(
            {**values, "steer": "fk" if name == NO_STEERER else name, "pictures": 1, "all_particles": True}
        )
        yield gr.skip(), gr.skip(), "waiting for its turn", gr.skip(), *controls.shows_used(form)
        told_already = [gr.skip()] * 3
        for event in studio.make(form):
            if isinstance(event, Made):
                yield event.images[0], _captioned(event), _said(event), _plot(event.report), *told_already
            else:
                frame = gr.skip() if event.preview is None else event.preview
                yield frame, gr.skip(), f"step {event.done} of {event.of}", gr.skip(), *told_already

    started = go.click(
        told(steer),
        controls.asked,
        [preview, particles, note, plot, *controls.used],
        api_name="steer",
        concurrency_id="pipe",
        concurrency_limit=copies,
        show_progress="minimal",
        show_progress_on=note,
        trigger_mode="once",
    )
    stops(stop, started, note, name="stop_steer")


def _captioned(made: Made) -> list[tuple[Any, str]]:
    """Return the particles with their rewards, the best marked."""
    reached = [-1e300 if one is None else one for one in made.rewards]
    best = reached.index(max(reached)) if len(set(reached)) > 1 else None
    captions = ["not scored" if one is None else f"{one:.3f}" for one in made.rewards]
    return [
        (image, caption + (" (best)" if place == best else ""))
        for place, (image, caption) in enumerate(zip(made.images, captions, strict=True))
    ]


def _said(made: Made) -> str:
    """Return the cost, and what log Z says."""
    return f"{made.line()}. {made.report.explain_log_z()}" if made.report is not None else made.line()


def _plot(report: Any) -> Any:
    """Return the plot of a run; a dollar sign in a prompt is no formula."""
    if report is None:
        return None
    try:
        return replace(report, prompts=tuple(text.replace("$", r"\$") for text in report.prompts)).plot()
    except (ImportError, ValueError):  # no matplotlib, or a run without scored calls
        return None
