"""Picture files as RGB, as they are meant to be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffplug.pictures import coloured

pytestmark = pytest.mark.law


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0x8080, 0xFFFF]], np.uint16)).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        found = np.asarray(coloured(image))
    assert found[0, :, 0].tolist() == [0, 128, 255] and found.shape == (1, 3, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode: str) -> None:
    clear = (10,) * (len(mode) - 1)
    image = Image.new(mode, (2, 1), (*clear, 0))
    image.putpixel((1, 0), (*clear, 255))
    assert np.asarray(coloured(image))[0].tolist() == [[255, 255, 255], [10, 10, 10]]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "1", "P"])
def test_other_pictures_are_as_pil_shows_them(mode: str) -> None:
    image = Image.effect_noise((8, 8), 50).convert(mode)
    assert np.array_equal(np.asarray(coloured(image)), np.asarray(image.convert("RGB")))
