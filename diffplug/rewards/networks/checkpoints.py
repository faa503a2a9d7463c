"""Weights from files that other people made: read without running their code, checked before use."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffplug.messages import reason

__all__ = ["check_weights", "hub_file", "load_into", "misfits", "read_weights"]


def read_weights(path: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a weight file by name: safetensors, or what `torch.save` wrote, without running code.

    A checkpoint {"state_dict": ...} is unpacked and a common prefix "module." taken off. Raises ValueError
    that names the file where it is missing, damaged, or holds anything but tensors by name.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"{what}: the file {str(file)!r} does not exist: check the path or download it again."
        )
    found = _read(file, what)
    state = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{what}: the file {str(file)!r} holds {_kind(state)}, expected tensors by name "
            f'(or {{"state_dict": ...}} of them): give the file of the public checkpoint.'
        )
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def check_weights(path: str | Path, what: str) -> None:
    """Look whether a weight file is there and can be read, without loading it where that costs time.

    Raises ValueError that names the file, as `read_weights` does.
    """
    file = Path(path)
    if file.is_file() and file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as header:
                header.keys()
        except (SafetensorError, OSError):
            raise _unreadable(file, what, "its header or its length is wrong") from None
    elif not file.is_file() or zipfile.is_zipfile(file):  # a mapped file is not loaded
        read_weights(file, what)


def _read(file: Path, what: str) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # a mapped file costs no second copy in memory; only the zip format can be mapped
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, OSError):
        raise _unreadable(file, what, "its header or its length is wrong") from None
    except Exception as error:  # unpicklers raise whatever the bytes make them raise
        raise _unreadable(file, what, reason(error)) from None


def _unreadable(file: Path, what: str, why: str) -> ValueError:
    return ValueError(
        f"{what}: the file {str(file)!r} cannot be read as plain weights ({why}): it is damaged, or holds "
        f"more than tensors, which is never loaded. Download it again, or save its tensors as safetensors."
    )


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary with the keys {', '.join(repr(key) for key in list(value)[:4]) or 'none'}"
    return f"a {type(value).__name__}"


def misfits(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], ignored: Iterable[str] = ()) -> str:
    """What is wrong with `state` for a module whose state is `wanted`, in words; empty where it fits."""
    skipped = set(ignored)
    missing = [key for key in wanted if key not in state and key not in skipped]
    strange = [key for key in state if key not in wanted and key not in skipped]
    shapes = [
        f"{key} is {list(state[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    told = [
        f"{len(keys)} {title} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for title, keys in (("missing", missing), ("unexpected", strange), ("of another shape", shapes))
        if keys
    ]
    return "; ".join(told)


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    what: str,
    *,
    ignored: Iterable[str] = (),
) -> None:
    """Fill `module` with `state`, every tensor of it; ValueError names the file and what does not fit.

    `ignored` names tensors of either side that need no counterpart.
    """
    wanted = module.state_dict()
    if trouble := misfits(wanted, state, ignored):
        raise ValueError(
            f"{what}: the file {str(path)!r} holds another layout, tensors {trouble}: give the file of the "
            f"public checkpoint, or the model that this file belongs to."
        )
    module.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)


def hub_file(repository: str, name: str, what: str) -> Path:
    """The path of a file of a hub repository, downloaded once; ValueError says how else to get it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what}: {name!r} of the hub repository {repository!r} is not here and did not come "
            f"({reason(error)}). Run once with a connection, or download it and give its path."
        ) from error
