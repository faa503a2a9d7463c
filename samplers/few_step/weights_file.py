"""Weight files: found on disk or in the hub's cache, and read without running anything that lies in them."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.samplers.few_step.catalogue import Row, Weights

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_WRAPPERS = ("state_dict", "ema_state_dict", "ema", "model", "module", "lora")


def located(row: Row, weights: Weights, override: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a row's file: `override`, a file beside the row, or the hub's (cached, else loaded).

    Raises ValueError that says what to download and where to put it when the file is not to be had.
    """
    given = Path(override) if override is not None else row.path(weights)
    if given is not None:
        file = given / Path(weights.file).name if given.is_dir() else given
        if not file.is_file():
            raise ValueError(f"{row.name}: there is no weight file {os.fspath(file)!r}")
        return file
    return _from_hub(row, weights)


def _from_hub(row: Row, weights: Weights) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    revision = weights.revision or None
    with suppress(LocalEntryNotFoundError, OSError):
        return Path(hf_hub_download(weights.repo, weights.file, revision=revision, local_files_only=True))
    try:
        return Path(hf_hub_download(weights.repo, weights.file, revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        pin = f" --revision {weights.revision}" if weights.revision else ""
        raise ValueError(
            f"{row.name} needs {weights.file!r} of https://huggingface.co/{weights.repo}, which is not in "
            "the cache here and could not be loaded: run "
            f"`hf download {weights.repo} {weights.file}{pin}` where there is a network, or pass "
            "weights='path/of/the/file'"
        ) from error


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by key, on the CPU, and the header's metadata (safetensors only).

    `.safetensors` files are mapped; pickles (`.pt`, `.pth`, `.ckpt`, `.bin`) are read with weights_only=True,
    which runs no code of theirs. Raises ValueError for other endings, damaged files and files without
    tensors."""
    file = Path(path)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if file.suffix not in PICKLES:
        raise ValueError(f"{os.fspath(file)!r} is no weight file: give .safetensors or {', '.join(PICKLES)}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(file)!r} cannot be read with weights_only=True (damaged, or it holds more than "
            f"tensors): {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    return _tensors(found, file), {}


def _safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weight file {os.fspath(file)!r} is damaged ({error}): download it again"
        ) from error
    return _tensors(tensors, file), metadata


def _tensors(found: Any, file: Path) -> dict[str, Tensor]:
    """Return the mapping of tensors in what was read, out of the wrappers that trainers put around it."""
    for _ in range(3):
        inner = next((name for name in _WRAPPERS if _holds(found, name)), None)
        if inner is None:
            break
        found = found[inner]
    tensors = (
        {key: value for key, value in found.items() if isinstance(value, Tensor)} if _mapping(found) else {}
    )
    if not tensors:
        raise ValueError(f"{os.fspath(file)!r} holds no tensors by name: it is no checkpoint")
    return tensors


def _mapping(found: Any) -> bool:
    return hasattr(found, "items") and all(isinstance(key, str) for key in found)


def _holds(found: Any, name: str) -> bool:
    return _mapping(found) and name in found and _mapping(found[name])
