"""The controls of the page that say what is to be made; all tabs read the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffplug.demos.page.told import told
from diffplug.demos.studio import limits
from diffplug.demos.studio.form import NO_STEERER, OWN, Choices, Form
from diffplug.demos.studio.limits import LIMITS, LONGEST_PROMPT

__all__ = ["Controls"]

NAMES = (
    "prompt",
    "negative_prompt",
    "sampler",
    "steps",
    "guidance",
    "seed",
    "pictures",
    "steer",
    "reward",
    "particles",
    "strength",
)


@dataclass(frozen=True)
class Controls:
    """Components by name of a setting, in the order of NAMES.

    fresh: whether every run draws a new seed. again: the button that takes the seed of the last run, `last`.
    store: what the browser remembers of them all.
    """

    choices: Choices
    parts: dict[str, Any]
    preset: Any
    fresh: Any
    again: Any
    last: Any
    store: Any

    @classmethod
    def draw(cls, choices: Choices) -> Controls:
        """Return the controls, drawn where this is called."""
        prompt = "a blue square left of an orange circle" if choices.model == "shapes" else ""
        parts: dict[str, Any] = {
            "prompt": gr.Textbox(
                prompt, label="Prompt", max_length=LONGEST_PROMPT, lines=2, elem_id="prompt", autofocus=True
            )
        }
        preset = gr.Dropdown(
            list(choices.presets),
            value=None,
            label="Preset: sampler, steps, guidance, steering",
            elem_id="preset",
        )
        with gr.Row():
            parts["sampler"] = gr.Dropdown(
                list(choices.samplers), value=OWN, label="Sampler", elem_id="sampler"
            )
            parts["steps"] = _slider("steps", 20, "Steps", 1)
        with gr.Row():
            parts["guidance"] = _slider("guidance", 5.0, "Guidance", 0.1)
            parts["pictures"] = _slider("pictures", 1, "Pictures", 1)
        with gr.Row():
            parts["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            fresh = gr.Checkbox(False, label="A new seed for every run", elem_id="fresh")
        with gr.Row():
            dice = gr.Button("Random seed", size="sm", min_width=100, elem_id="random")
            again = gr.Button(
                "Last seed: none yet", size="sm", min_width=100, elem_id="last", interactive=False
            )
            back = gr.Button("Seed 0", size="sm", min_width=60, elem_id="zero")
        with gr.Accordion("Steering, negative prompt", open=False):
            parts["negative_prompt"] = gr.Textbox(
                "", label="Negative prompt", max_length=LONGEST_PROMPT, elem_id="negative"
            )
            with gr.Row():
                parts["steer"] = gr.Dropdown(
                    list(choices.steerers), value=NO_STEERER, label="Steerer", elem_id="steer"
                )
                parts["reward"] = gr.Dropdown(
                    list(choices.rewards), value=choices.rewards[0], label="Reward", elem_id="reward"
                )
            with gr.Row():
                parts["particles"] = _slider("particles", 4, "Particles", 1)
                parts["strength"] = _slider("strength", 0, "Strength (0: the steerer's own)", 0.5)
        store = gr.BrowserState(None, storage_key="diffplug-controls", secret=_PUBLIC)
        ordered = {name: parts[name] for name in NAMES}
        found = cls(choices, ordered, preset, fresh, again, gr.State(None), store)
        found._wire(dice, back)
        return found

    @property
    def inputs(self) -> list[Any]:
        """Return the components, in the order of NAMES."""
        return [self.parts[name] for name in NAMES]

    @property
    def asked(self) -> list[Any]:
        """Return what a run asks: the components, and whether its seed is to be a new one."""
        return [*self.inputs, self.fresh]

    @property
    def used(self) -> list[Any]:
        """Return the components that show the seed of a run."""
        return [self.parts["seed"], self.again, self.last]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """Return what the components said, by name."""
        return dict(zip(NAMES, given, strict=True))

    def drawn(self, given: Sequence[Any]) -> dict[str, Any]:
        """Return what `asked` said, with a new seed where one is wanted."""
        *parts, fresh = given
        values = self.values(parts)
        return {**values, "seed": _random_seed()} if fresh is True else values

    def shows_used(self, form: Form) -> tuple[Any, ...]:
        """Return the values of `used` for a run of a form."""
        label = f"Last seed: {form.seed}"
        return form.seed, gr.update(value=label, interactive=True), form.seed

    def shown(self, form: Form) -> list[Any]:
        """Return the values that set every component to a form."""
        return [getattr(form, name) for name in NAMES]

    def _wire(self, dice: Any, back: Any) -> None:
        seed = self.parts["seed"]
        dice.click(_random_seed, None, seed, api_name="random_seed", queue=False)
        self.again.click(told(_last_seed), self.last, [seed, self.fresh], api_name="last_seed", queue=False)
        gr.on(
            [part.change for part in self.asked],
            None,
            [self.store, *self.asked],
            self.store,
            js=f"(kept, ...values) => window.{_RECALLED} ? ({{values}}) : kept",
            api_visibility="private",
            queue=False,
            show_progress="hidden",
        )
        back.click(lambda: 0, None, seed, api_name="seed_zero", queue=False)
        chosen = [self.parts[name] for name in _OF_PRESETS]
        self.preset.change(self._preset, self.preset, chosen, api_name="preset", queue=False)

    def recalled(self, kept: Any) -> list[Any]:
        """Return the values of `asked` that a browser remembers, those that this page still takes."""
        values = kept.get("values") if isinstance(kept, dict) else None
        if not isinstance(values, list) or len(values) != len(self.asked):
            return [gr.skip() for _ in self.asked]
        return [self._recalled(name, value) for name, value in zip((*NAMES, "fresh"), values, strict=True)]

    def recall(self, page: Any) -> None:
        """Give back at a page's load what the browser remembers; until that is done, nothing is kept anew.

        Else a control that is set very early is kept, and comes back over what is set right after it.
        """
        loaded = page.load(
            self.recalled, self.store, self.asked, api_name="recall", queue=False, show_progress="hidden"
        )
        loaded.then(None, None, None, js=f"() => {{ window.{_RECALLED} = true }}", queue=False)

    def _recalled(self, name: str, value: Any) -> Any:
        offered = {
            "sampler": self.choices.samplers,
            "steer": self.choices.steerers,
            "reward": self.choices.rewards,
        }
        try:
            if name == "fresh":
                return value is True
            if name in LIMITS:
                return limits.number(name, value)
            return (
                limits.choice(name, value, offered[name])
                if name in offered
                else limits.text(name, value, empty=True)
            )
        except ValueError:
            return gr.skip()

    def _preset(self, name: str | None) -> list[Any]:
        """Return the values of a preset; what it says nothing of stays."""
        values = self.choices.presets.get(name or "", {})
        return [values.get(key, gr.skip()) for key in _OF_PRESETS]


_PUBLIC = "diffplug"
"""What a browser's own memory is scrambled with: nothing in it is secret, and it outlives the page."""

_RECALLED = "diffplugRecalled"
"""What a browser's window says once its memory was given back."""

_OF_PRESETS = ("sampler", "steps", "guidance", "steer", "reward", "particles", "strength")


def _slider(name: str, value: float, label: str, step: float) -> Any:
    limit = LIMITS[name]
    return gr.Slider(limit.low, limit.high, value=value, step=step, label=label, elem_id=name)


def _last_seed(seed: Any) -> tuple[int, bool]:
    """Return the seed of the last run, and that it stays."""
    return limits.number("seed", seed), False


def _random_seed() -> int:
    import secrets

    return secrets.randbelow(2**31)
