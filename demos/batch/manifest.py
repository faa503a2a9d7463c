"""Rows of a manifest: JSONL, CSV, parquet or a text of prompts, each checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffplug.demos.batch.manifest_files import FromText, LineError, lines_of
from diffplug.messages import shown
from diffplug.registry import unknown

__all__ = ["ManifestError", "Row", "read_manifest"]

MOST_SHOWN = 20
MOST_PIXELS = 4096 * 4096
_LONGEST_META = 4096


class Row(BaseModel):
    """What one line asks for; everything but the prompt may be left out.

    `images` pictures are made, with seeds counted up from `seed`. `meta` is carried along and changes
    nothing; sizes are in pixels.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    prompt: str = Field(min_length=1, max_length=4000)
    negative_prompt: str | None = Field(None, max_length=4000)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    images: int = Field(1, ge=1, le=10_000)
    sampler: str | None = Field(None, max_length=200)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=1000)
    eta: float | None = Field(None, ge=0, le=1)
    steer: str | None = Field(None, max_length=200)
    particles: int | None = Field(None, ge=1, le=4096)
    reward: str | None = Field(None, max_length=1000)
    strength: float | None = Field(None, ge=0)
    options: dict[str, Any] | None = None
    call: dict[str, Any] | None = None
    width: int | None = Field(None, ge=8, le=16_384)
    height: int | None = Field(None, ge=8, le=16_384)
    meta: dict[str, Any] | None = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is None:
            return None
        if not text.strip():
            raise ValueError("is blank: say what the picture should show")
        if "\0" in text:
            raise ValueError("has a NUL character in it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("is no valid Unicode (a lone surrogate): write it again") from None
        return text

    @field_validator("options", "call", "meta")
    @classmethod
    def _small(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            size = len(json.dumps(value, allow_nan=False).encode())
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"is no JSON: {error}") from None
        if size > _LONGEST_META:
            raise ValueError(f"has {size:,} bytes, and {_LONGEST_META:,} are allowed")
        return value

    @model_validator(mode="after")
    def _within_budget(self) -> Row:
        if self.width and self.height and self.width * self.height > MOST_PIXELS:
            raise ValueError(
                f"width times height is {self.width * self.height:,} pixels, and {MOST_PIXELS:,} are allowed"
            )
        if self.seed is not None and self.seed + self.images - 1 > 2**63 - 1:
            raise ValueError(f"seed {self.seed} and {self.images} images go beyond 2^63-1: lower the seed")
        return self


class ManifestError(ValueError):
    """What is wrong with a manifest: `problems`, one line each with file and line, as far as collected."""

    def __init__(self, problems: list[str], more: int = 0) -> None:
        self.problems, self.more = problems, more
        rest = f" (and {more} more)" if more else ""
        super().__init__("; ".join(problems[:3]) + (rest or (" ..." if len(problems) > 3 else "")))


def read_manifest(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield the number and the row of every line; at the end raise ManifestError where lines were wrong.

    The suffix says what it is: .jsonl (an object, or a prompt, in each line), .csv with a header, .parquet
    (needs pyarrow), anything else a prompt in each line. Blank lines are passed over. Raises ReadError for a
    file that cannot be read.
    """
    problems: list[str] = []
    more = found = 0
    for number, value in lines_of(Path(path)):
        try:
            row = _row(value)
        except LineError as error:
            if len(problems) < MOST_SHOWN:
                problems += [f"{path}:{number}:{text}" for text in error.problems]
            else:
                more += 1
            if error.fatal:
                break
            continue
        found += 1
        if not problems:
            yield number, row
    if problems:
        raise ManifestError(problems[:MOST_SHOWN], more + len(problems[MOST_SHOWN:]))
    if not found:
        raise ManifestError([f"{path}: holds no row: write one in each line"])


def _row(value: Any) -> Row:
    if isinstance(value, LineError):
        raise value
    lax = isinstance(value, FromText)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, Mapping):
        raise LineError(f" an object or a prompt is expected, got {type(value).__name__}")
    try:
        return Row.model_validate(value, strict=not lax)
    except ValidationError as error:
        raise LineError(*(_told(one) for one in error.errors())) from None


def _told(error: Mapping[str, Any]) -> str:
    """Return one error of a row in words."""
    name = str(error["loc"][0])[:80] if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f" {unknown('key', name, list(Row.model_fields))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f" {name} {message}" if name else f" {message}"
    if error["type"] == "missing":
        return f" {name} is missing"
    return f" {name}: {message[0].lower()}{message[1:]}, got {shown(error['input'])}"
