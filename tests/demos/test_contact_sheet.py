"""Contact sheets: nothing overlaps, nothing is cut, every picture and mark is where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from diffplug.demos.contact_sheet import Cell, contact_sheet, wrapped

RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (128, 128, 128)


def _picture(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def _count(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == np.array(color)).all(-1).sum())


def test_every_picture_appears_whole() -> None:
    rows = [[Cell([_picture(RED)]), Cell([_picture(BLUE), _picture(GREY)])] for _ in range(2)]
    sheet = contact_sheet(rows, row_labels=["a", "b"], column_labels=["one", "two"], size=128)
    assert [_count(sheet, color) for color in (RED, BLUE, GREY)] == [2 * 128 * 128] * 3


@pytest.mark.parametrize("word", ["short", "a long label " * 12, "unbreakable" * 12])
def test_labels_make_room_for_themselves(word: str) -> None:
    labels = {"row_labels": [word, word], "column_labels": [word, word], "title": word, "footer": word}
    rows = [[Cell([_picture(RED)], [True]), Cell([_picture(RED)], [False])] for _ in range(2)]
    sheet = contact_sheet(rows, size=96, **labels)
    assert _count(sheet, RED) == 4 * 96 * 96  # no label runs over a picture
    edge = np.asarray(sheet)
    for side in (edge[:4], edge[-4:], edge[:, :4], edge[:, -4:]):
        assert (side == 255).all()  # and none is cut at the border


def test_wrapped_lines_fit_and_lose_nothing() -> None:
    font = ImageFont.load_default(15)
    text = "a small purple circle right of a large yellow square and antidisestablishmentarianism"
    lines = wrapped(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrapped("one\ntwo", font, 500) == ["one", "two"]
    assert wrapped("", font, 120) == []


def test_marks_are_drawn_by_shape_and_color() -> None:
    plain, good, bad = (
        contact_sheet([[Cell([_picture(GREY)], marks)]], row_labels=["r"], column_labels=["c"])
        for marks in ([None], [True], [False])
    )
    assert plain.size == good.size == bad.size
    shapes = [np.abs(np.asarray(sheet, int) - np.asarray(plain, int)).sum(-1) > 0 for sheet in (good, bad)]
    assert shapes[0].any() and shapes[1].any()
    assert (shapes[0] != shapes[1]).any()


def test_tall_and_wide_pictures_keep_their_proportions() -> None:
    sheet = contact_sheet(
        [[Cell([_picture(RED, (32, 64))])]], row_labels=["r"], column_labels=["c"], size=128
    )
    assert _count(sheet, RED) == 64 * 128


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Cell([]), "at least one image"),
        (lambda: Cell([_picture(RED)], [True, False]), "1 images and 2 marks"),
        (lambda: contact_sheet([], row_labels=[], column_labels=[]), "at least one row"),
        (
            lambda: contact_sheet([[Cell([_picture(RED)])]], row_labels=["a", "b"], column_labels=["c"]),
            "2 row labels and 1 column labels do not fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()  # type: ignore[operator]
