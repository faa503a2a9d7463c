"""Settings in a line: quotes keep commas, options are read as numbers where they are, faults are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffplug.recipe import Recipe
from diffplug.recipe.text import read_options, read_settings

KINDS = {"steps": int, "guidance": float, "negative_prompt": str, "options": dict, "reward": str}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("steps=3, guidance=2", {"steps": 3, "guidance": 2.0}),
        ("negative_prompt='lowres, bad hands',steps=3", {"negative_prompt": "lowres, bad hands", "steps": 3}),
        ('negative_prompt="it\'s, bad"', {"negative_prompt": "it's, bad"}),
        ("negative_prompt=it's bad,steps=3", {"negative_prompt": "it's bad", "steps": 3}),
        ("options='churn=1.0,returns=all'", {"options": {"churn": 1.0, "returns": "all"}}),
        ("options='score_at=[.2, 0.5]'", {"options": {"score_at": "[.2, 0.5]"}}),
        ("options='score_at=[0.2, 0.5]'", {"options": {"score_at": [0.2, 0.5]}}),
        ("reward=standard(clip; .2; .1) + jpeg", {"reward": "standard(clip; .2; .1) + jpeg"}),
        ("reward=aesthetic:'a+b.pth',steps=1", {"reward": "aesthetic:'a+b.pth'", "steps": 1}),
        ("", {}),
    ],
)
def test_lines_are_read(text: str, settings: dict) -> None:
    assert read_settings(text, KINDS) == settings


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("negative_prompt='a, b", "the quote ' is not closed"),
        ("step=3", "unknown setting 'step'. Did you mean 'steps'"),
        ("steps=3,steps=4", "write steps=value, once"),
        ("options='churn'", "write name=value"),
        ("options='a=1,a=2'", "each name once"),
        ("negative_prompt=lowres, bad hands", "a value with a comma in it stands in quotes"),
    ],
)
def test_faults_are_told(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_settings(text, KINDS)


@given(st.text(max_size=60))
def test_any_text_is_settings_or_a_short_sentence(text: str) -> None:
    for read in (lambda: read_settings(text, KINDS), lambda: read_options([text])):
        try:
            read()
        except ValueError as error:
            assert len(str(error)) < 500


def test_what_would_do_nothing_is_refused_in_python_too() -> None:
    for idle in ({"particles": 4}, {"strength": 2.0}, {"options": {"churn": 1.0}}, {"reward": "jpeg"}):
        with pytest.raises(ValueError, match="acts only with a steerer"):
            Recipe(**idle)
    with pytest.raises(ValueError, match="particles acts only with steer"):
        Recipe.parse("steps=3,particles=8")  # although it is the default
    with pytest.raises(ValueError, match="the recipe itself says guidance"):
        Recipe(call={"guidance_scale": 3.0})
