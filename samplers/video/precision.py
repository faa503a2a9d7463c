"""An autoencoder in a wider dtype than the network's, as long videos want it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from diffplug.samplers.video.replaced import replaced

__all__ = ["own_precision"]


@contextmanager
def own_precision(pipe: Any) -> Iterator[None]:
    """A block in which a pipeline's autoencoder is given everything in its own dtype.

    CogVideoX, Kandinsky 5, LTX and Stable Video Diffusion hand it the network's, and fail beside float32.
    """
    vae = getattr(pipe, "vae", None)
    with ExitStack() as undo:
        for name in ("encode", "decode"):
            if hasattr(vae, name):
                undo.enter_context(replaced(vae, name, _cast(getattr(vae, name), vae)))
        yield


def _cast(method: Callable[..., Any], vae: Any) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        told = {name: _as(value, vae.dtype) for name, value in kwargs.items()}
        return method(*(_as(value, vae.dtype) for value in args), **told)

    return called


def _as(value: Any, dtype: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
