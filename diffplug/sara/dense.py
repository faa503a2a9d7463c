"""A delta and its base as an ordinary checkpoint, for programs that know nothing of deltas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffplug.files import atomic_path, output_folder
from diffplug.sara.delta import SparseDelta
from diffplug.sara.file import load_delta
from diffplug.sara.loaded import load_sara, unload_sara
from diffplug.sara.targets import components_of, plain_name

__all__ = ["sara_to_checkpoint"]


def sara_to_checkpoint(
    target: Any,
    source: str | os.PathLike[str] | SparseDelta,
    folder: str | os.PathLike[str],
    scale: float = 1.0,
) -> list[Path]:
    """Write each changed component whole into `folder/<component>/`, and return the files.

    target: the base, a pipeline or a module; it is left as it was. A component of Diffusers or Transformers
    is written with its config, so that `from_pretrained` loads the folder. Raises ValueError as `load_sara`.
    """
    delta = source if isinstance(source, SparseDelta) else load_delta(source)
    name = load_sara(target, delta, scale, "to-checkpoint")
    try:
        modules = components_of(target)
        if len(modules) == 1:
            modules = {next(iter(delta.components)): next(iter(modules.values()))}
        return [
            _written(modules[component], output_folder(Path(folder) / component))
            for component in delta.components
        ]
    finally:
        unload_sara(target, name)


def _written(module: Any, folder: Path) -> Path:
    from safetensors.torch import save_file

    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder, safe_serialization=True)
        return next(iter(sorted(folder.glob("*.safetensors"))))
    file = folder / "model.safetensors"
    with atomic_path(file) as temporary:
        save_file(
            {plain_name(k): v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, temporary
        )
    return file
