"""A grader that knows the truth: finds the objects of a picture and says which facts of the prompt hold.

How it sees: the background is the palette colour nearest to the border's median. A pixel p between the
background b and a colour c is p = b + a (c - b); the colour that explains it best, and its coverage a, come
from projecting on each line b..c. Connected pixels of one colour are an object, its shape the template of
equal area and centroid that overlaps it most. All of it works on model output as well: pixels that no line
explains belong to nothing, and stray blobs count. Outlines are seen by filling the holes of each patch first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from diffplug.registry import unknown
from diffplug.shapes.captions import Told, parse
from diffplug.shapes.rendering import ALL_SHAPES, coverage
from diffplug.shapes.world import BACKGROUNDS, COLORS, IMAGE_SIZE, LARGE_FROM, holds

Images = Tensor | np.ndarray | Sequence[Image.Image]
Segment = tuple[str, np.ndarray, bool]
"""A patch: its colour, its coverage map, whether it is an outline."""

_COVERED = 0.5  # coverage from which a pixel belongs to an object
_LEAST_AREA = 20  # pixels; smaller blobs are specks
_MARGIN = 2  # pixels around a blob that may still hold its soft border
_SOFTNESS = (0.0, 0.8, 1.4)  # blurs, in pixels, that a template may have: decoders draw soft edges
_WINDOW = 40  # pixels around the centre of a blob that are compared with templates
_LEAST_OVERLAP = 0.75  # intersection over union below which a blob has no shape
_HOLLOW = 0.05  # share of a filled patch that is missing in an outline
STYLES = ("flat", "outline", "any")


@dataclass(frozen=True, kw_only=True)
class Blob:
    """One object found in a picture; `shape` is None where no template fits; `hollow`: drawn in outline."""

    color: str
    shape: str | None
    x: float
    y: float
    radius: float
    overlap: float
    hollow: bool = False

    @property
    def size(self) -> str:
        """ "small" or "large"."""
        return "large" if self.radius >= LARGE_FROM else "small"


@dataclass(frozen=True, kw_only=True)
class Grades:
    """Which facts of each prompt hold in its picture.

    Attributes:
        facts: for each picture, the facts in words ("a red circle", "2 objects", "red circle left of blue
        square"). holds: for each picture, whether each fact holds. score: [n] float64, the share of facts
        that hold. strict: [n] bool, whether all of them hold.
    """

    facts: tuple[tuple[str, ...], ...]
    holds: tuple[tuple[bool, ...], ...]

    @property
    def score(self) -> np.ndarray:
        return np.array([np.mean(row) for row in self.holds], dtype=np.float64)

    @property
    def strict(self) -> np.ndarray:
        return np.array([all(row) for row in self.holds], dtype=bool)


def grade(images: Images, prompts: str | Sequence[str], *, style: str = "flat") -> Grades:
    """The grades of pictures against their prompts; about 5 ms a picture.

    Args:
        images: [n, 3, h, w] in [0, 1], [n, h, w, 3] as array, or PIL pictures; other sizes than 64 are
        resized. prompts: n prompts, or one for all. style: "flat" takes objects as they are drawn; "any"
        fills outlines first; "outline" asks besides that every object is one.

    Raises:
        ValueError: an unknown style, or numbers of pictures and prompts differ, the pictures have another
        layout, or a prompt
        names no object.
    """
    if style not in STYLES:
        raise unknown("style", style, list(STYLES))
    pixels = as_pixels(images)
    texts = [prompts] * len(pixels) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(pixels):
        raise ValueError(
            f"{len(pixels)} pictures and {len(texts)} prompts: give one prompt for each picture."
        )
    found = find(pixels, fill=style != "flat")
    rows = [_judge(told, *seen, style) for told, seen in zip(map(parse, texts), found, strict=True)]
    return Grades(
        facts=tuple(tuple(fact for fact, _ in row) for row in rows),
        holds=tuple(tuple(true for _, true in row) for row in rows),
    )


def find(pixels: np.ndarray, *, fill: bool = False) -> list[tuple[str, list[Blob]]]:
    """The background and the objects of each picture ([n, 64, 64, 3] in [0, 1]); fill: outlines as well."""
    grounds, colored = (
        zip(*(_segments(picture, fill) for picture in pixels), strict=True) if len(pixels) else ((), ())
    )
    blobs = iter(_shaped([segment for segments in colored for segment in segments]))
    return [
        (ground, [next(blobs) for _ in segments]) for ground, segments in zip(grounds, colored, strict=True)
    ]


def as_pixels(images: Images) -> np.ndarray:
    """Pictures in any usual form as [n, 64, 64, 3] float32 in [0, 1]."""
    if not isinstance(images, (Tensor, np.ndarray)):
        images = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
        images = images.movedim(-1, 1) if images.ndim == 4 and images.shape[-1] == 3 else images
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"pictures of shape {tuple(images.shape)}: give [n, 3, h, w] in [0, 1], or PIL pictures."
        )
    images = images.detach().float().cpu()
    if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    return np.nan_to_num(images.clamp(0, 1).movedim(1, -1).numpy())


def _segments(picture: np.ndarray, fill: bool) -> tuple[str, list[Segment]]:
    """The background, and the coverage map of every connected patch of one colour."""
    border = np.concatenate(
        [picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, 0], picture[:, -1]]
    )
    middle = np.median(border, axis=0)
    ground = min(BACKGROUNDS, key=lambda name: float(np.abs(middle - _rgb(BACKGROUNDS[name])).sum()))
    toward = np.stack([_rgb(c) for c in COLORS.values()]) - _rgb(BACKGROUNDS[ground])
    offset = picture - _rgb(BACKGROUNDS[ground])
    along, length = offset @ toward.T, (toward**2).sum(1)  # [h, w, colours], [colours]
    cover = (along / length).clip(0, 1)
    best = (cover * (cover * length - 2 * along)).argmin(-1)  # least |offset - cover * toward|^2
    own = np.take_along_axis(cover, best[..., None], -1)[..., 0]
    segments = []
    for index, color in enumerate(COLORS):
        labels, count = ndimage.label((best == index) & (own > _COVERED))
        for label in range(1, count + 1):
            patch = labels == label
            whole = ndimage.binary_fill_holes(patch) if fill else patch
            if whole.sum() < _LEAST_AREA:
                continue
            near = ndimage.binary_dilation(whole, iterations=_MARGIN)
            covered = np.where(near, cover[..., index], 0)
            inside = ndimage.binary_erosion(whole) if fill else np.zeros_like(whole)
            missing = (1 - covered)[inside].sum()
            segments.append((color, np.where(inside, 1.0, covered), bool(missing > _HOLLOW * whole.sum())))
    return ground, segments


def _shaped(segments: list[Segment]) -> list[Blob]:
    """Segments with the shape, centre and radius of the template that overlaps each most."""
    if not segments:
        return []
    masks = torch.from_numpy(np.stack([mask for _, mask, _ in segments])).float()
    area = masks.sum((1, 2))
    axis = torch.arange(IMAGE_SIZE) + 0.5
    x, y = (masks.sum(1) * axis).sum(1) / area, (masks.sum(2) * axis).sum(1) / area
    windows, local = _windows(masks, x, y)
    radii = torch.stack([(area / _unit_area(shape)).sqrt() for shape in ALL_SHAPES], 1)
    overlaps = torch.stack(
        [
            _overlap(windows, shape, torch.cat([local, radii[:, i, None]], 1))
            for i, shape in enumerate(ALL_SHAPES)
        ],
        1,
    )
    best = overlaps.argmax(1)
    return [
        Blob(
            color=color,
            shape=ALL_SHAPES[i] if overlaps[row, i] >= _LEAST_OVERLAP else None,
            x=float(x[row]),
            y=float(y[row]),
            radius=float(radii[row, i]),
            overlap=float(overlaps[row, i]),
            hollow=hollow,
        )
        for row, ((color, _, hollow), i) in enumerate(zip(segments, best.tolist(), strict=True))
    ]


def _windows(masks: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each mask around its centre, [n, w, w], and where the centre lies in it, [n, 2]."""
    left, top = (x - _WINDOW / 2).round().long(), (y - _WINDOW / 2).round().long()
    padded = F.pad(masks, [_WINDOW // 2] * 4)
    reach = torch.arange(_WINDOW) + _WINDOW // 2
    n = torch.arange(len(masks))[:, None, None]
    windows = padded[n, (top[:, None] + reach)[:, :, None], (left[:, None] + reach)[:, None, :]]
    return windows, torch.stack([x - left, y - top], 1)


def _overlap(masks: Tensor, shape: str, geometry: Tensor) -> Tensor:
    """Soft intersection over union of masks with a shape's template, the best over its softnesses, [n]."""
    template = coverage([shape] * len(masks), geometry, size=_WINDOW)
    return torch.stack([_soft_iou(masks, _blurred(template, sigma)) for sigma in _SOFTNESS]).amax(0)


def _soft_iou(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b).sum((1, 2)) / torch.maximum(a, b).sum((1, 2))


def _blurred(masks: Tensor, sigma: float) -> Tensor:
    """Masks [n, h, w] after a Gaussian blur."""
    if not sigma:
        return masks
    place = torch.arange(masks.shape[-1], dtype=masks.dtype)
    band = torch.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2)
    band = band / band.sum(1, keepdim=True)
    return band @ masks @ band.T


@cache
def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1, measured on a large rendering."""
    radius = 20.0
    return float(coverage([shape], torch.tensor([[32.0, 32.0, radius]])).sum()) / radius**2


def _judge(told: Told, background: str, blobs: list[Blob], style: str) -> list[tuple[str, bool]]:
    """Every fact of a prompt with its truth in a picture."""
    seen = [[b for b in blobs if (b.color, b.shape) == (noun.color, noun.shape)] for noun in told.nouns]
    facts = []
    for i, (noun, matches) in enumerate(zip(told.nouns, seen, strict=True)):
        alike = sum((other.color, other.shape) == (noun.color, noun.shape) for other in told.nouns[: i + 1])
        facts.append((f"a {noun.color} {noun.shape}", len(matches) >= alike))
        if noun.size:
            facts.append(
                (f"the {noun.color} {noun.shape} is {noun.size}", any(b.size == noun.size for b in matches))
            )
    count = len(told.nouns)
    facts.append((f"{count} object{'s' if count > 1 else ''}", len(blobs) == count))
    if told.relation:
        stands = any(
            holds(told.relation, (a.x, a.y), (b.x, b.y)) for a in seen[0] for b in seen[1] if a is not b
        )
        facts.append((f"{told.nouns[0]} {told.relation} {told.nouns[1]}", stands))
    if told.background:
        facts.append((f"on {told.background}", background == told.background))
    if style == "outline":
        facts.append(("drawn in outline", bool(blobs) and all(b.hollow for b in blobs)))
    return facts


def _rgb(color: tuple[int, int, int]) -> np.ndarray:
    return np.asarray(color, dtype=np.float32) / 255
