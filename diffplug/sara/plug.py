"""A sparse delta as a plug: on the pipeline inside a `with` block, off to the bit afterwards."""

from __future__ import annotations

import os
from typing import Any

from diffplug.intercept import Undo
from diffplug.sara.delta import SparseDelta
from diffplug.sara.file import load_delta
from diffplug.sara.loaded import check_scale, load_sara, loaded_sara, unload_sara

__all__ = ["SaRAWeights"]


class SaRAWeights:
    """A `*.sara.safetensors` file on a pipeline; several may be plugged at once, in any order.

        with plug(pipe, SaRAWeights("style.sara.safetensors", scale=0.8)):
            image = pipe("a red circle").images[0]

    source: the file, or a `SparseDelta`. scale: of the differences, 1 as trained. name, any_base: as in
    `load_sara`. Costs nothing at inference: the weights themselves are changed. Raises ValueError for a
    damaged file or scale at once, and for a model that it does not belong to when it is plugged.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | SparseDelta,
        scale: float = 1.0,
        name: str | None = None,
        *,
        any_base: bool = False,
    ) -> None:
        check_scale(scale)
        self.source, self.scale, self.any_base = source, scale, any_base
        self.delta = source if isinstance(source, SparseDelta) else load_delta(source)
        self.name = name

    def attach(self, pipe: Any) -> Undo:
        """Put the delta on the pipeline; return the function that takes it off."""
        source = self.source if isinstance(self.source, SparseDelta) else self.delta
        name = load_sara(pipe, source, self.scale, self._name(pipe), any_base=self.any_base)

        def undo() -> None:
            if name in loaded_sara(pipe):  # unload_sara in the block may have taken it off
                unload_sara(pipe, name)

        return undo

    def _name(self, pipe: Any) -> str:
        """Return the name that was given, or the file's, numbered where that is taken."""
        if self.name is not None:
            return self.name
        stem = "delta" if isinstance(self.source, SparseDelta) else os.path.basename(self.source)
        stem, taken = str(stem).removesuffix(".sara.safetensors"), loaded_sara(pipe)
        return next(name for name in (stem, *(f"{stem}-{i}" for i in range(2, 1000))) if name not in taken)

    def __repr__(self) -> str:
        return f"SaRAWeights({self.source!r}, scale={self.scale:g})"
