"""Pictures that know how they were made: settings and A1111's text go into the file and come back."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffplug.making.png import read_settings, read_texts, save_picture, save_png
from diffplug.recipe.parameters_text import from_parameters_text, parameters_text

GREY = Image.new("RGB", (4, 4), (128, 128, 128))


def _png(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    GREY.save(path, pnginfo=info)
    return path


def test_settings_come_back(tmp_path: Path) -> None:
    settings = {"prompt": "größe, 大", "seed": 3, "options": {"churn": 1.0}, "none": None}
    path = save_picture(GREY, tmp_path, 3, settings)
    assert read_settings(path) == settings
    assert Image.open(path).tobytes() == GREY.tobytes()


def test_the_text_that_others_read_is_beside_them(tmp_path: Path) -> None:
    path = save_picture(
        GREY, tmp_path, 3, {"prompt": "a cat", "steps": 5, "guidance": 7.5, "sampler": "ddim"}
    )
    assert read_texts(path)["parameters"] == "a cat\nSteps: 5, Sampler: ddim, CFG scale: 7.5, Seed: 3"
    with Image.open(path) as image:  # as Pillow and its friends see it
        assert image.info["parameters"].startswith("a cat\nSteps: 5")


@given(
    st.fixed_dictionaries(
        {
            "prompt": st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1)
            .map(str.strip)
            .filter(lambda t: t and "Negative prompt:" not in t and "Steps:" not in t and t.isprintable()),
            "steps": st.integers(1, 1000),
            "seed": st.integers(0, 2**63 - 1),
            "guidance": st.sampled_from([1.0, 5.0, 7.5]),
            "sampler": st.sampled_from(["ddim", "heun", "unipc"]),
            "width": st.just(64),
            "height": st.just(96),
        }
    )
)
def test_parameters_go_round(settings: dict[str, Any]) -> None:
    assert from_parameters_text(parameters_text(settings)) == settings


def test_a_text_of_another_program_is_read() -> None:
    text = (
        "a lighthouse, (storm:1.2)\nsecond line\nNegative prompt: lowres, bad hands\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1234, Size: 832x1216, Model hash: abc, "
        'Lora hashes: "x: 1, y: 2", Version: v1.9'
    )
    assert from_parameters_text(text) == {
        "prompt": "a lighthouse, (storm:1.2)\nsecond line",
        "negative_prompt": "lowres, bad hands",
        "steps": 28,
        "sampler": "dpm++",
        "guidance": 6.5,
        "seed": 1234,
        "width": 832,
        "height": 1216,
    }
    for bad in ("", "a cat", "a\nSteps: many, Seed: 1"):
        with pytest.raises(ValueError, match="no line 'Steps|a number is expected"):
            from_parameters_text(bad)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "settings are damaged"),
        ('{"a": NaN}', "settings are damaged: NaN"),
        ("[1]", "no JSON object but list"),
        ("{", "settings are damaged"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_settings(_png(tmp_path / "a.png", diffplug=text))


def test_texts_are_read_without_the_pixels_and_with_a_limit(tmp_path: Path) -> None:
    path = _png(tmp_path / "a.png", diffplug="{}")
    data = bytearray(path.read_bytes())
    data[8 + 8 : 8 + 16] = (60_000).to_bytes(4, "big") * 2  # a bomb of 3.6 gigapixels by its header
    path.write_bytes(bytes(data))
    assert read_settings(path) == {}
    info = PngInfo()
    info.add_text("diffplug", " " * 2**21, zip=True)
    GREY.save(tmp_path / "b.png", pnginfo=info)
    with pytest.raises(ValueError, match="a text of more than"):
        read_settings(tmp_path / "b.png")


def test_what_is_no_png_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png' is no readable PNG"):
        read_settings(tmp_path / "a.png")
    with pytest.raises(OSError, match="there is no such file"):
        read_settings(tmp_path / "b.png")
    with pytest.raises(OSError, match="it is a folder: give its pictures"):
        read_settings(tmp_path)


@given(st.integers(0, 400), st.integers(0, 255))
def test_damage_anywhere_is_a_sentence_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    save_png(GREY, path, {"prompt": "a", "steps": 3})
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(bytes(data))
    try:
        assert isinstance(read_settings(path), dict)
    except ValueError as error:
        assert "damaged.png" in str(error)


def test_compressed_and_international_texts(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt("diffplug", json.dumps({"prompt": "ö大"}, ensure_ascii=False), zip=True)
    GREY.save(tmp_path / "a.png", pnginfo=info)
    assert read_settings(tmp_path / "a.png") == {"prompt": "ö大"}
    assert zlib.crc32(b"") == 0
