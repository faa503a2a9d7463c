"""The settings in a picture: what acted is among them, and what diffplug never writes is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from diffplug.demos.studio.form import Choices, restored
from diffplug.making.picture_settings import settings_of_picture

GOOD = {"prompt": "a red circle", "seed": 3, "model": "shapes", "steps": 2, "used": {"guidance": 7.5}}


def saved(path: Path, settings: Any) -> Path:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("diffplug", json.dumps(settings))
    Image.new("RGB", (4, 4)).save(path, pnginfo=texts)
    return path


def test_the_page_restores_the_guidance_that_acted(tmp_path: Path) -> None:
    form, told = restored(settings_of_picture(saved(tmp_path / "a.png", GOOD)), Choices.of("shapes"))
    assert form.guidance == 7.5 and form.steps == 2 and told == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampler": {"a": 1}}, "sampler is {'a': 1}, and a text is expected"),
        ({"model": 5}, "model is 5, and a text is expected"),
        ({"seed": True}, "seed is True, and a whole number is expected"),
        ({"eta": "x"}, "eta is 'x', and a number is expected"),
        ({"call": "../../etc"}, "call is '../../etc', and an object is expected"),
        ({"used": 5}, "used is 5, and an object is expected"),
        ({"vae_tiling": 1}, "vae_tiling is 1, and true or false is expected"),
    ],
)
def test_settings_of_another_kind_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its settings are damaged: ") as caught:
        settings_of_picture(saved(tmp_path / "odd.png", {**GOOD, **change}))
    assert said in str(caught.value) and "odd.png" in str(caught.value)
