"""Pipelines by name: the embedded Shapes model, a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffplug.registry import unknown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["embedded_name", "load", "shapes_folder"]

_HINT = "Or give a folder with a model_index.json, or a hub id such as 'owner/name'."


def load(name_or_path: str | os.PathLike[str] = "shapes", **options: Any) -> DiffusionPipeline:
    """The pipeline of that name, on the CPU: "shapes" and "moving-shapes" (embedded, 64x64), a saved
    folder, or a hub id.

    Only safetensors are read. `options` go to `from_pretrained` (dtype, revision, variant, ...). Raises
    ValueError for an unknown name and for a weight file that is damaged, which it names.
    """
    name = os.fspath(name_or_path)
    if name in _EMBEDDED:
        return _EMBEDDED[name](**options)
    if name and Path(name).is_dir():
        return _from_folder(Path(name), **options)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise unknown("model", name, sorted(_EMBEDDED), _HINT)
    return _from_hub(name, **options)


def shapes_folder() -> Path:
    """The folder of the embedded Shapes pipeline, inside the installed package; it may be missing."""
    return Path(__file__).parent / "shapes" / "weights"


def embedded_name(pipe: Any) -> str | None:
    """The name of the embedded model that a pipeline was loaded from, None for any other pipeline."""
    home = getattr(pipe, "name_or_path", None) or ""
    return "shapes" if home and Path(home) == shapes_folder() else None


def _shapes(**options: Any) -> DiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    folder = shapes_folder()
    _check_folder(folder)
    settings = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True}
    return _loaded(StableDiffusionPipeline, folder, {**settings, **options})


def _moving_shapes(**options: Any) -> DiffusionPipeline:
    """Return the video pipeline: Shapes' autoencoder and text encoder, and a transformer of its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    from diffplug.shapes.moving.pipeline import MovingShapesPipeline

    folder = Path(__file__).parent / "shapes" / "moving" / "weights"
    _check_weights(folder)
    still = _shapes(**options)
    known = {"use_safetensors": True, "local_files_only": True, "dtype": still.unet.dtype}
    network = WanTransformer3DModel.from_pretrained(folder / "transformer", **known).eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    return MovingShapesPipeline(still.vae, still.text_encoder, still.tokenizer, network, scheduler)


_EMBEDDED: dict[str, Callable[..., Any]] = {"shapes": _shapes, "moving-shapes": _moving_shapes}


def _from_folder(folder: Path, **options: Any) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    _check_folder(folder)
    return _loaded(DiffusionPipeline, folder, {"local_files_only": True, **options})


def _from_hub(name: str, **options: Any) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name, **{"use_safetensors": True, **options})
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {name!r} is no folder here and did not come from the hub: {reason}"
        ) from error


def _loaded(cls: Any, folder: Path, options: dict[str, Any]) -> DiffusionPipeline:
    """`cls` from a local folder, in float32 unless the caller chose a dtype."""
    import torch

    if not {"dtype", "torch_dtype"} & options.keys():
        options = {**options, "dtype": torch.float32}
    return cls.from_pretrained(folder, **{"use_safetensors": True, **options})


def _check_folder(folder: Path) -> None:
    """Raises ValueError for a folder without a pipeline, or a weight file of the wrong length or header."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no pipeline: model_index.json is missing. Reinstall or copy it again."
        )
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    """Raise ValueError for a weight file of the wrong length or header, and for a folder without any."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise ValueError(f"{str(folder)!r} holds no weights: reinstall or copy it again.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"weight file {str(file)!r} is damaged ({error}): reinstall or copy it again."
            ) from error
