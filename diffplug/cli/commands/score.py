"""`diffplug score`: rewards of pictures that exist already."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffplug.cli.console import guarded, print_json, print_table, progress
from diffplug.cli.options import Json

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LARGEST = 8192 * 8192


@guarded
def score(
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="Picture files, and folders of them.")
    ],
    reward: Annotated[
        list[str], typer.Option(help="Reward, as for `generate --reward`; give it once per column.")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of all pictures; else each file's own, from its settings.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Pictures that are judged at once.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json: Json = False,
) -> None:
    """Print what one or more rewards say of existing pictures.

    Example: `diffplug score out --reward shapes --reward jpeg`
    """
    from diffplug import rewards
    from diffplug.cli.asked import ready_reward
    from diffplug.placing import device_of, hush

    for name in reward:
        rewards.get(name)  # refuses unknown ones before any picture is read
    files, prompts = _told(_files(pictures), prompt, named=set(pictures))
    where = device_of(device)
    hush()
    judges = {name: ready_reward(name, prompts) for name in dict.fromkeys(reward)}
    with progress([("pictures", len(files))], disable=json) as advance:
        scores: dict[Path, dict[str, Any]] = {path: {} for path in files}
        for part, tensor in _batches(files, batch):
            words = [prompts[files.index(path)] for path in part]
            for name, judge in judges.items():
                for path, value in zip(part, _judged(judge, tensor.to(where), words), strict=True):
                    scores[path][name] = value
            advance(0, len(part))
    _tell(scores, list(judges), prompts, json=json)


def _files(given: Sequence[Path]) -> list[Path]:
    """Return the pictures that were named, those of folders in the order of their names."""
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise ValueError(f"{str(path)!r} does not exist: give pictures, or folders of them")
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
        )
        if not inside:
            deeper = next((p.parent for p in sorted(path.glob("*/*")) if p.suffix.lower() in _SUFFIXES), None)
            hint = "" if deeper is None else f": give the folders in it that do, such as {str(deeper)!r}"
            raise ValueError(f"{str(path)!r} holds no pictures ({', '.join(_SUFFIXES)}){hint}")
        found += inside
    return list(dict.fromkeys(found))


def _told(files: list[Path], prompt: str | None, *, named: set[Path]) -> tuple[list[Path], list[str]]:
    """Return pictures and prompts; those of folders that say none are passed over, with a warning."""
    found = {path: prompt or _prompt(path) for path in files}
    silent = [path for path in files if not found[path]]
    for path in named & set(silent):
        _opened(path)  # what is no picture is told as that
    if silent and (len(silent) == len(files) or named & set(silent)):
        raise ValueError(f"{str(silent[0])!r} does not say its prompt: give --prompt")
    if silent:
        warnings.warn(f"{len(silent)} pictures do not say their prompt, as {silent[0].name!r}", stacklevel=2)
    kept = [path for path in files if found[path]]
    return kept, [str(found[path]) for path in kept]


def _prompt(path: Path) -> str | None:
    """Return the prompt that a file says it was made of."""
    from diffplug.making.picture_settings import settings_of_picture

    try:
        return str(settings_of_picture(path)["prompt"])
    except (ValueError, KeyError):
        return None


def _batches(files: Sequence[Path], size: int) -> Iterator[tuple[list[Path], Any]]:
    """Yield some files of one size at a time, and their pictures as a tensor."""
    from diffplug.pictures import to_tensor

    part: list[Path] = []
    images: list[Image.Image] = []
    for path in files:
        image = _opened(path)
        if images and (len(part) == size or image.size != images[0].size):
            yield part, to_tensor(images)
            part, images = [], []
        part.append(path)
        images.append(image)
    if images:
        yield part, to_tensor(images)


def _opened(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    from diffplug.pictures import coloured

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > _LARGEST:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            return coloured(image)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture: {error}") from error


def _judged(judge: Any, images: Any, prompts: list[str]) -> list[float | None]:
    from diffplug import rewards
    from diffplug.pictures import score_pictures

    def rated(pictures: Any, words: list[str]) -> Any:
        return rewards.score(judge, pictures, words)

    values = score_pictures(rated, images, prompts, takes_video=False).tolist()
    return [value if math.isfinite(value) else None for value in values]


def _tell(scores: dict[Path, dict[str, Any]], names: list[str], prompts: list[str], *, json: bool) -> None:
    means = {name: _mean([row[name] for row in scores.values()]) for name in names}
    if json:
        rows = [
            {"file": str(path), "prompt": prompt, "scores": row}
            for (path, row), prompt in zip(scores.items(), prompts, strict=True)
        ]
        print_json({"pictures": rows, "means": means})
        return
    table = [[str(path), *(_cell(row[name]) for name in names)] for path, row in scores.items()]
    print_table(["file", *names], [*table, ["mean", *(_cell(means[name]) for name in names)]], right=names)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
