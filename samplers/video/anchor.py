"""Anchors: something of the first clip that every later clip sees too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffplug.samplers.video.replaced import replaced

__all__ = ["ANCHORS", "EMBEDDINGS", "embeds_pictures", "first_embeddings"]

ANCHORS = ("embeds", "frame")
EMBEDDINGS = "embeddings"


def embeds_pictures(pipe: Any) -> bool:
    """Return whether a pipeline's network is told an embedding of the picture; Wan 2.2's is not."""
    if getattr(pipe, "image_encoder", None) is None:
        return False
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    return config.get("image_dim", "unknown") is not None


@contextmanager
def first_embeddings(pipe: Any, carried: dict[str, Tensor]) -> Iterator[None]:
    """A block in which a pipeline embeds the first picture that it is given, and no other.

    It stands at the method that encodes pictures: Wan refuses a picture together with embeddings, and the
    picture is needed for the latents. carried: has the embeddings, once there are any.
    """
    name = "_encode_image" if hasattr(pipe, "_encode_image") else "encode_image"
    encode = getattr(pipe, name)

    def encoded(*args: Any, **kwargs: Any) -> Tensor:
        if EMBEDDINGS not in carried:
            carried[EMBEDDINGS] = encode(*args, **kwargs)
        return carried[EMBEDDINGS].to(pipe._execution_device)

    with replaced(pipe, name, encoded):
        yield
