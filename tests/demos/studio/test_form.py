"""Whatever a browser or a script sends, a form is in its limits or refused in one line."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffplug.demos.batch.manifest import Row
from diffplug.demos.studio.form import Choices, Form, restored
from diffplug.demos.studio.limits import BUDGET, LIMITS, LONGEST_PROMPT
from diffplug.recipe import Recipe

CHOICES = Choices.of("shapes")
NAMES = ("prompt", "negative_prompt", "sampler", "steer", "reward", "all_particles", *LIMITS)

_anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.characters(categories=["Cs", "Cc", "L"]), max_size=5)
    | st.sampled_from([1e30, 10**400, "x" * 2**20, "\0", "\ud800", [], {}, [1], "../../etc/passwd", "<img>"])
    | st.sampled_from([*CHOICES.samplers, *CHOICES.steerers, *CHOICES.rewards])
    | st.integers(0, 20)
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), _anything, max_size=6), st.booleans())
def test_any_value_is_in_range_or_refused_in_a_line(values: dict[str, Any], prompted: bool) -> None:
    try:
        form = Form.read({"prompt": "a red circle", **values} if prompted else values, CHOICES)
    except ValueError as error:
        assert 0 < len(str(error)) < 1500 and "\n" not in str(error)
        return
    for name, limit in LIMITS.items():
        value = getattr(form, name)
        assert type(value) is (int if limit.whole else float)
        assert limit.low <= value <= limit.high and math.isfinite(value)
    assert form.sampler in CHOICES.samplers and form.steer in CHOICES.steerers
    assert form.prompt.strip() and len(form.prompt) <= LONGEST_PROMPT
    assert form.steps * form.pictures * (form.particles if form.steered else 1) <= BUDGET
    json.loads(form.row())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 101}, "steps must be a whole number from 1 to 100, got 101"),
        ({"steps": True}, "got True"),
        ({"guidance": math.nan}, "guidance must be a number from 0 to 30, got nan"),
        ({"seed": 2**53}, "seed must be"),
        ({"sampler": "dimm"}, "Did you mean 'ddim'"),
        ({"sampler": "/etc/passwd"}, "unknown sampler"),
        ({"prompt": "x" * 501}, "501 characters, and 500 are allowed"),
        ({"steps": 100, "steer": "fk", "particles": 16, "pictures": 8}, "12,800 evaluations, and 6,400"),
        ({"seed": 2**53 - 1, "pictures": 2}, "lower the seed"),
        ({"model": "owner/name"}, "'model' is no setting of the page"),
    ],
)
def test_refusals_say_what_is_allowed(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Form.read({"prompt": "a red circle", **values}, CHOICES)


def test_presets_are_forms() -> None:
    for values in CHOICES.presets.values():
        Form.read({"prompt": "a red circle", **values}, CHOICES)


def test_the_same_elsewhere_is_the_same() -> None:
    values = {"prompt": "it's $HOME; rm -rf", "sampler": "ddim", "steps": 6, "steer": "fk", "seed": 7}
    form = Form.read(values, CHOICES)
    words = shlex.split(form.command("shapes"))
    assert words[:3] == ["diffplug", "generate", values["prompt"]] and "--steer" in words
    row = Row.model_validate(json.loads(form.row()))
    assert (row.prompt, row.seed, row.sampler, row.steer) == (values["prompt"], 7, "ddim", "fk")
    found: dict[str, Any] = {}
    lines = form.python("shapes").splitlines()
    exec(next(line for line in lines if line.startswith("recipe")), {"Recipe": Recipe}, found)  # noqa: S102
    assert found["recipe"] == form.recipe()


def test_settings_of_a_picture_set_the_form_and_what_is_unknown_is_told() -> None:
    form = Form.read({"prompt": "x", "sampler": "ddim", "steps": 6, "seed": 9, "steer": "fk"}, CHOICES)
    settings = {"prompt": "x", "seed": 9, "model": "shapes", **form.recipe().settings()}
    assert restored(settings, CHOICES) == (form, [])
    again, told = restored({**settings, "width": 64, "sampler": "mine.json", "model": "other"}, CHOICES)
    assert again.sampler == "the model's own" and len(told) == 3
    with pytest.raises(ValueError, match="prompt"):
        restored({"steps": 6}, CHOICES)
