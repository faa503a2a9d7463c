"""Contact sheets: pictures in a labelled grid, each with a drawn tick or cross where it was graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Cell", "contact_sheet", "wrapped"]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_INK, _PALE, _PAPER = (24, 24, 27), (113, 113, 122), (255, 255, 255)
_GOOD, _BAD = (22, 128, 60), (200, 40, 40)
_FRAME = (212, 212, 216)
_GAP, _BADGE = 16, 20  # pixels between cells; room for the mark under a picture


@dataclass(frozen=True)
class Cell:
    """The pictures of one place of the grid, side by side; `marks` has True, False or None for each."""

    images: Sequence[Image.Image]
    marks: Sequence[bool | None] = ()

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("a cell needs at least one image, got none")
        if self.marks and len(self.marks) != len(self.images):
            raise ValueError(
                f"{len(self.images)} images and {len(self.marks)} marks: give one mark for each image"
            )


def contact_sheet(
    rows: Sequence[Sequence[Cell]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    footer: str = "",
    size: int = 128,
    font_size: int = 15,
) -> Image.Image:
    """One RGB picture of the grid, with the longer side of every picture scaled to `size` pixels.

    Labels are wrapped to the room they have, and rows and headers grow with them, so that none is cut or
    overlaps. Raises ValueError where the labels do not fit the grid.
    """
    _check(rows, row_labels, column_labels)
    font, bold = _font(font_size), _font(font_size + 5)
    cells = [[[_scaled(image, size) for image in cell.images] for cell in row] for row in rows]
    label_width = max(150, size + size // 2)
    widths = [max(_cell_width(row[column]) for row in cells) for column in range(len(column_labels))]
    total = label_width + sum(widths) + _GAP * (len(widths) + 2)
    heads = [wrapped(label, font, width) for label, width in zip(column_labels, widths, strict=True)]
    sides = [wrapped(label, font, label_width) for label in row_labels]
    heights = [max(_row_height(row), _height(side, font)) for row, side in zip(cells, sides, strict=True)]
    top, bottom = wrapped(title, bold, total - 2 * _GAP), wrapped(footer, font, total - 2 * _GAP)
    head_height = max(_height(lines, font) for lines in heads)
    blocks = [_height(top, bold), head_height, *heights, _height(bottom, font)]
    sheet = Image.new("RGB", (total, sum(blocks) + _GAP * (len(blocks) + 1)), _PAPER)
    draw = ImageDraw.Draw(sheet)

    y = _GAP
    _write(draw, (_GAP, y), top, bold, _INK)
    y += blocks[0] + _GAP
    lefts = [label_width + 2 * _GAP + sum(widths[:i]) + _GAP * i for i in range(len(widths))]
    for left, lines in zip(lefts, heads, strict=True):
        _write(draw, (left, y + head_height - _height(lines, font)), lines, font, _INK)
    y += head_height + _GAP
    for row, pictures, side, height in zip(rows, cells, sides, heights, strict=True):
        _write(draw, (_GAP, y), side, font, _INK)
        for left, cell, scaled in zip(lefts, row, pictures, strict=True):
            _paste(sheet, draw, (left, y), scaled, cell.marks)
        y += height + _GAP
    _write(draw, (_GAP, y), bottom, font, _PALE)
    return sheet


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """The lines of `text` at most `width` pixels wide, broken at line ends, blanks, or inside long words."""
    return [line for part in text.split("\n") for line in _wrapped_line(part, font, width)]


def _wrapped_line(text: str, font: Font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += _pieces(word, font, width)
    return lines


def _pieces(word: str, font: Font, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _check(rows: Sequence[Sequence[Cell]], row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    if not rows or not column_labels:
        raise ValueError("a contact sheet needs at least one row and one column")
    if len(rows) != len(row_labels) or any(len(row) != len(column_labels) for row in rows):
        raise ValueError(
            f"{len(row_labels)} row labels and {len(column_labels)} column labels do not fit "
            f"{len(rows)} rows of {sorted({len(row) for row in rows})} cells"
        )


def _font(size: int) -> Font:
    try:
        return ImageFont.load_default(size)
    except ImportError:  # a Pillow without FreeType has one small font only
        return ImageFont.load_default()


def _scaled(image: Image.Image, size: int) -> Image.Image:
    """`image` as RGB with its longer side at `size`: whole-number zoom keeps pixels, the rest is Lanczos."""
    factor = size / max(image.size)
    shape = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    method = Image.Resampling.NEAREST if factor >= 1 and factor == int(factor) else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(shape, method)


def _cell_width(pictures: Sequence[Image.Image]) -> int:
    return sum(picture.width for picture in pictures) + 4 * (len(pictures) - 1)


def _row_height(row: Sequence[Sequence[Image.Image]]) -> int:
    return max(picture.height for pictures in row for picture in pictures) + _BADGE


def _line_height(font: Font) -> int:
    box = font.getbbox("Ågjpqy|")
    return int(box[3]) + 3


def _height(lines: Sequence[str], font: Font) -> int:
    return len(lines) * _line_height(font)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: Font, ink: tuple
) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * _line_height(font)), line, font=font, fill=ink)


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    pictures: Sequence[Image.Image],
    marks: Sequence[bool | None],
) -> None:
    x, y = at
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_FRAME)
        if marks and marks[i] is not None:
            _mark(draw, (x, y + picture.height + 3), picture.width, bool(marks[i]))
        x += picture.width + 4


def _mark(draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, good: bool) -> None:
    """A bar with a tick or a cross under a picture: shape and colour both tell."""
    x, y = at
    ink = _GOOD if good else _BAD
    draw.rectangle((x, y, x + width - 1, y + 2), fill=ink)
    x, y = x + 1, y + 6
    if good:
        draw.line([(x, y + 5), (x + 4, y + 9), (x + 11, y)], fill=ink, width=2)
    else:
        draw.line([(x, y), (x + 9, y + 9)], fill=ink, width=2)
        draw.line([(x, y + 9), (x + 9, y)], fill=ink, width=2)
