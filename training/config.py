"""Settings of a training run: frozen dataclasses from a TOML file, changed by `--set a.b=c`, checked at once.

    [run]                       RunSettings: what `Trainer` needs
    updates = 400
    [optimizer]                 OptimizerSettings
    lr = 5e-4

The command line is the same tree: `--set optimizer.lr=1e-4`. A key that nobody knows is refused with the
nearest known name; a value of the wrong type is refused with its place in the tree.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from diffplug.files import read_bytes
from diffplug.registry import unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "NoSettings",
    "OptimizerSettings",
    "RunSettings",
    "as_mapping",
    "differences",
    "merged",
    "overridden",
    "read_toml",
    "settings",
]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long a run is, how it is divided, and what it keeps.

    updates: optimiser steps. batch: rows of one update, over all processes. micro_batch: rows that a process
    works on at once, None for its whole share; halved by itself when memory runs out. precision: "bf16" runs
    the network under autocast, weights and losses stay float32. save_every: updates between checkpoints;
    keep: how many of them stay. patience: updates in a row whose loss may be NaN (each is skipped) before
    the run stops. trackers: names that Accelerate knows, as "tensorboard" or "trackio".
    """

    updates: int = 400
    batch: int = 64
    micro_batch: int | None = None
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    save_every: int = 100
    keep: int = 2
    patience: int = 3
    seed: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "save_every", "keep", "patience"):
            _at_least(name, getattr(self, name), 1)
        if self.micro_batch is not None:
            _at_least("micro_batch", self.micro_batch, 1)
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with a linear warm-up, a cosine down to `floor` of the highest rate, and an average of weights.

    clip: the largest gradient norm of a group. ema: decay of the averaged weights, which are the ones that
    are saved; it rises to this value as (1 + n) / (10 + n), so that short runs forget where they began.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 20
    floor: float = 0.05
    clip: float = 1.0
    ema: float = 0.99

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be from 0 to 1, got {self.floor}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        _at_least("warmup", self.warmup, 0)


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """The table [objective] of a method that has no settings of its own."""


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")


_LARGEST = 2**20
"""Bytes that a config file may have."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file; ValueError names the file and the line that is not TOML."""
    file = Path(path)
    if file.is_dir() or not file.exists():
        raise ValueError(f"there is no config file {str(path)!r}: give the path of a .toml file")
    try:
        return tomllib.loads(read_bytes(file, limit=_LARGEST).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid TOML: {error}") from error


def overridden(values: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return `values` with changes such as "optimizer.lr=1e-4", the last of two on one key.

    What is no TOML is taken as a text.
    """
    out = merged(values, {})
    for change in changes:
        key, equals, text = change.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise ValueError(f"--set {change!r}: write it as table.key=value")
        table = out
        for name in names[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"--set {change!r}: {name!r} is a value, it has no keys of its own")
        table[names[-1]] = _value(text.strip())
    return out


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of `below` with those of `above` laid over them, key by key; neither is changed."""
    out = {key: merged(value, {}) if isinstance(value, Mapping) else value for key, value in below.items()}
    for key, value in above.items():
        inner = out.get(key)
        if isinstance(value, Mapping):
            value = merged(inner if isinstance(inner, dict) else {}, value)
        out[key] = value
    return out


def settings(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Return the frozen dataclass `cls` with these values, nested tables included.

    Raises ValueError in one line: an unknown key with the nearest known ones, a value of the wrong type or
    out of range with its place.
    """
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(cls, values, where)
    for name, value in _leaves(values, where):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}: give a finite number")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([*filter(None, [where]), *(str(part) for part in first["loc"])])
        message = str(first["msg"]).removeprefix("Value error, ")
        given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        repeated = given.removeprefix(", ") in message
        raise ValueError(f"{place or 'config'}: {message}{'' if repeated else given}") from None


def _refuse_unknown(cls: Any, values: Mapping[str, Any], where: str) -> None:
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise unknown("setting", path, [f"{where}.{name}" if where else name for name in known])
        inner = hints[key]
        if is_dataclass(inner) and isinstance(value, Mapping):
            _refuse_unknown(inner, value, path)


def as_mapping(config: Any) -> dict[str, Any]:
    """Return a settings dataclass as nested dictionaries of plain JSON values (tuples become lists)."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return what two configs differ in, as "optimizer.lr: 0.0005 there, 0.001 here"."""
    one, other = dict(_leaves(saved)), dict(_leaves(asked))
    return [
        f"{key}: {one.get(key, 'nothing')!r} there, {other.get(key, 'nothing')!r} here"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]


def _leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, value
