"""Sparse deltas as files, `*.sara.safetensors`: one file for all components.

For each tensor `<component>.<parameter>.delta` (16 or 32 bit), `.gap` (uint8, see `gaps`) or `.index`
(int32), and `.print` (float32 [16], values of the base). All the rest is JSON under the one
metadata key "sara": a header of one key is written the same every time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffplug.files import atomic_path, output_folder
from diffplug.registry import unknown
from diffplug.sara.delta import Delta, SparseDelta
from diffplug.sara.gaps import decode, encode

__all__ = ["DTYPES", "ENDING", "load_delta", "save_delta"]

ENDING = ".sara.safetensors"
VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def save_delta(
    delta: SparseDelta,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    positions: Literal["gap", "index"] = "gap",
) -> Path:
    """Write a delta whole or not at all, and return where: `.sara.safetensors` is added where it lacks.

    dtype: of the differences; "float32" gives the trained weights back to the bit, "float16" and "bfloat16"
    are half as large. Raises ValueError for a dtype that is none of these, and where float16 overflows.
    """
    from safetensors.torch import save_file

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, list(DTYPES))
    file = Path(path) if str(path).endswith(ENDING) else Path(f"{path}{ENDING}")
    output_folder(file.parent)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for component, name, entry in delta.entries():
        key = f"{component}.{name}"
        shapes[key] = list(entry.shape)
        tensors[f"{key}.delta"] = _narrow(entry.values, DTYPES[dtype], key)
        tensors[f"{key}.{positions}"] = (
            encode(entry.index.cpu()) if positions == "gap" else entry.index.cpu().int()
        )
        if entry.prints is not None:
            tensors[f"{key}.print"] = entry.prints.cpu().float()
    told = {"version": VERSION, "classes": dict(delta.classes), "info": dict(delta.info), "shapes": shapes}
    metadata = {"sara": json.dumps(told, sort_keys=True)}
    with atomic_path(file) as temporary:
        save_file({name: v.contiguous() for name, v in tensors.items()}, temporary, metadata=metadata)
    return file


def _narrow(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    out = values.detach().cpu().to(dtype)
    if not bool(out.isfinite().all()):
        raise ValueError(f"{key} has differences that {dtype} cannot hold: save it with dtype='float32'")
    return out


def load_delta(path: str | os.PathLike[str]) -> SparseDelta:
    """Return the delta in a file.

    Raises ValueError in one line for a file that is missing, cut off, of another kind or inconsistent.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no SaRA file {os.fspath(path)!r}: give the path of a *{ENDING}")
    tensors, told = _opened(file)
    try:
        shapes = {key: tuple(int(n) for n in shape) for key, shape in told["shapes"].items()}
        components: dict[str, dict[str, Delta]] = {}
        for key, shape in shapes.items():
            component, _, name = key.partition(".")
            components.setdefault(component, {})[name] = _delta(tensors, key, shape)
        return SparseDelta(components, dict(told["classes"]), dict(told["info"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no whole SaRA file ({error}): copy it again") from error


def _opened(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(file)!r} is damaged or cut off ({error}): copy it again") from error
    try:
        told = json.loads(metadata["sara"])
        version = int(told["version"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{os.fspath(file)!r} is a safetensors file, but no SaRA delta: give a *{ENDING}, or read a "
            "published checkpoint by read_published"
        ) from error
    if version > VERSION:
        raise ValueError(f"{os.fspath(file)!r} is of version {version}, this package reads up to {VERSION}")
    return tensors, told


def _delta(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Delta:
    """Return one tensor's delta, once it is sure that its parts agree."""
    values, code = tensors[f"{key}.delta"], tensors.get(f"{key}.gap")
    index = decode(code) if code is not None else tensors[f"{key}.index"].long()
    if len(index) != len(values):
        raise ValueError(f"{key} has {len(values)} differences and {len(index)} positions")
    inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < torch.Size(shape).numel())
    if not inside or not bool((index.diff() > 0).all()):
        raise ValueError(f"the positions of {key} do not rise within its shape {shape}")
    return Delta(shape, index.int(), values, tensors.get(f"{key}.print"))
