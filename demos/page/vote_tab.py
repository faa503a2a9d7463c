"""Vote: two pictures of one prompt, which is which hidden until the vote is in."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr

from diffplug.demos.page.controls import Controls
from diffplug.demos.page.told import told
from diffplug.demos.studio import limits
from diffplug.demos.studio.studio import Made, Studio
from diffplug.demos.studio.votes import Pair, Votes

__all__ = ["vote_tab"]


def vote_tab(studio: Studio, controls: Controls, votes: Votes, copies: int) -> None:
    """Draw the tab."""
    presets = list(studio.choices.presets)
    with gr.Row():
        first = gr.Dropdown(presets, value=presets[0], label="One", elem_id="vote_one")
        second = gr.Dropdown(presets, value=presets[-1], label="The other", elem_id="vote_other")
    go = gr.Button("New pair (prompt and seed from the left)", variant="primary", elem_id="new_pair")
    with gr.Row():
        left = gr.Image(
            label="Left", format="png", buttons=[], interactive=False, elem_id="vote_left", height=340
        )
        right = gr.Image(
            label="Right", format="png", buttons=[], interactive=False, elem_id="vote_right", height=340
        )
    with gr.Row():
        buttons = {
            "left": gr.Button("1  Left", elem_id="left"),
            "right": gr.Button("2  Right", elem_id="right"),
            "tie": gr.Button("3  Equal", elem_id="tie"),
        }
        skip = gr.Button("4  Skip", elem_id="skip")
    note = gr.Textbox("", label="Votes", interactive=False, elem_id="vote_note")
    pair, session = gr.State(None), gr.State(lambda: secrets.token_hex(6))

    def new(one: Any, other: Any, *given: Any) -> Iterator[tuple[Any, ...]]:
        values = {**controls.values(given), "pictures": 1}
        names = tuple(limits.choice("preset", name, presets) for name in (one, other))
        if names[0] == names[1]:
            raise ValueError("both are the same preset: choose another for one of them")
        made: list[Made] = []
        for name in names:
            form = studio.read({**values, **studio.choices.presets[name]})
            for event in studio.make(form):
                if isinstance(event, Made):
                    made.append(event)
                else:
                    text = f"picture {len(made) + 1} of 2, step {event.done} of {event.of}"
                    yield gr.skip(), gr.skip(), text, gr.skip()
        found = Pair((made[0], made[1]), (names[0], names[1]), bool(secrets.randbelow(2)))
        sides = [_plain(one) for one in found.sides]
        yield sides[0], sides[1], "which one is better?", found

    def vote(verdict: str, found: Pair | None, who: str) -> tuple[str, Any]:
        if found is None:
            raise ValueError("there is no pair to vote on: press New pair")
        votes.vote(found, verdict, who)
        return f"{verdict}: written. {found.revealed()}", None

    go.click(
        told(new),
        [first, second, *controls.inputs],
        [left, right, note, pair],
        api_name="new_pair",
        concurrency_id="pipe",
        concurrency_limit=copies,
        show_progress="minimal",
        show_progress_on=note,
        trigger_mode="once",
    )
    for verdict, button in buttons.items():

        def voted(found: Pair | None, who: str, verdict: str = verdict) -> tuple[str, Any]:
            return vote(verdict, found, who)

        button.click(_two(told(voted)), [pair, session], [note, pair], api_name=f"vote_{verdict}")
    skip.click(lambda: ("skipped", None), None, [note, pair], api_name="vote_skip")


def _two(function: Any) -> Any:
    """Return a function of exactly two arguments, as Gradio counts them."""

    def wrapper(found: Any, who: Any) -> Any:
        return function(found, who)

    return wrapper


def _plain(made: Made) -> Any:
    """Return the picture without its settings, which would tell which one it is."""
    image = made.images[0].copy()
    image.info.clear()
    return image
