"""PNG files that know how they were made: settings as JSON, and the text that other programs read."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffplug.files import ReadError, atomic_write, safe_join, write_new

__all__ = [
    "identity",
    "png_bytes",
    "read_settings",
    "read_texts",
    "save_new_picture",
    "save_picture",
    "save_png",
]

_KEY, _PARAMETERS = "diffplug", "parameters"
_RECORDS = ("used", "rewards")
"""What a picture's settings hold beside what it was asked for: it does not tell pictures apart."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LARGEST_TEXT = 2**20


def png_bytes(image: Image.Image, settings: Mapping[str, Any] | None = None) -> bytes:
    """Return `image` as a PNG file; `settings` go into it as JSON, and as text where they are a picture's.

    The text is what A1111, ComfyUI's readers and model sites show under the key "parameters".
    """
    info = PngInfo()
    if settings:
        info.add_text(_KEY, json.dumps(dict(settings), allow_nan=False))
        if "prompt" in settings:
            from diffplug.recipe.parameters_text import parameters_text

            info.add_text(_PARAMETERS, parameters_text(settings))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write `image` to `path` whole or not at all, with its settings; an older file is replaced."""
    atomic_write(path, png_bytes(image, settings))


def save_picture(image: Image.Image, folder: Path, seed: int, settings: Mapping[str, Any]) -> Path:
    """Return the new file, named by the seed that made it; older pictures of that seed keep their names."""
    path, _ = save_new_picture(image, folder, f"seed-{seed:06d}", {**settings, "seed": seed}, again=True)
    return path


def save_new_picture(
    image: Image.Image, folder: Path, stem: str, settings: Mapping[str, Any], *, again: bool = False
) -> tuple[Path, bool]:
    """Return the picture's file, and whether it was written now.

    The first free name of stem.png, stem-2.png, ... is claimed, so that two processes never take the same.
    A picture of the same identity that is met on the way stands for this one, unless `again`. Raises
    WriteError where the system refuses.
    """
    data, number = png_bytes(image, settings), 1
    while True:
        path = safe_join(folder, f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        if not path.exists() and write_new(path, data):
            return path, True
        if not again and same_picture(path, settings):
            return path, False
        number += 1


def same_picture(path: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the file is a picture that was asked for in just this way."""
    with suppress(ValueError, OSError):
        found = read_settings(path)
        return bool(found) and identity(found) == identity(json.loads(json.dumps(dict(settings))))
    return False


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that say what was asked for, without the records of what came of it."""
    return {key: value for key, value in settings.items() if key not in _RECORDS}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings that diffplug wrote into a file; empty where there are none.

    Raises ValueError for a file that is no PNG, is damaged before its pixels, or whose settings are no JSON
    object; ReadError for one that cannot be read. Pixels are not decoded.
    """
    text = read_texts(path).get(_KEY, "")
    if not text:
        return {}
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: its settings are damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r}: its settings are no JSON object but {type(found).__name__}")
    return found


def read_texts(path: str | Path) -> dict[str, str]:
    """Return the texts of a PNG by their keywords, as far as they stand before its pixels.

    Raises ValueError for a file that is no PNG or damaged, ReadError for one that cannot be read.
    """
    if Path(path).is_dir():
        raise ReadError(path, "it is a folder: give its pictures, as in FOLDER/*.png")
    if not Path(path).is_file():
        raise ReadError(path, "there is no such file")
    try:
        with open(path, "rb") as file:
            if file.read(8) != _SIGNATURE:
                raise ValueError("it does not begin as a PNG does")
            return dict(_text(kind, data) for kind, data in _chunks(file))
    except OSError as error:
        raise ReadError(path, f"{error.strerror or error}") from error
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is no readable PNG: {error}") from error


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and data of the text chunks before the pixels."""
    while True:
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind in (b"IDAT", b"IEND"):
            return
        if kind not in (b"tEXt", b"iTXt", b"zTXt"):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        if length > _LARGEST_TEXT:
            raise ValueError(f"a text of {length} bytes, and {_LARGEST_TEXT} are allowed")
        data = file.read(length)
        (checksum,) = struct.unpack(">I", file.read(4))
        if zlib.crc32(kind + data) != checksum:
            raise ValueError("a text in it is damaged")
        yield kind, data


def _text(kind: bytes, data: bytes) -> tuple[str, str]:
    """Return keyword and text of a chunk."""
    keyword, _, rest = data.partition(b"\0")
    key = keyword.decode("latin-1")
    if kind == b"tEXt":
        return key, rest.decode("latin-1")
    if kind == b"zTXt":
        return key, _inflated(rest[1:]).decode("latin-1")
    packed, rest = rest[:1], rest[2:]
    text = rest.split(b"\0", 2)[-1]
    return key, (_inflated(text) if packed == b"\1" else text).decode("utf-8")


def _inflated(data: bytes) -> bytes:
    machine = zlib.decompressobj()
    text = machine.decompress(data, _LARGEST_TEXT)
    if machine.unconsumed_tail:
        raise ValueError(f"a text of more than {_LARGEST_TEXT} bytes")
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
