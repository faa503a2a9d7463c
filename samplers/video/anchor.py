"""Anchors: something of the first clip that every later clip sees too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ANCHORS", "first_embeddings"]

ANCHORS = ("embeds", "frame")


@contextmanager
def first_embeddings(pipe: Any) -> Iterator[None]:
    """A block in which a pipeline embeds the first picture that it is given, and no other.

    It stands at the method that encodes pictures: Wan refuses a picture together with embeddings, and the
    picture is needed for the latents.
    """
    name = "_encode_image" if hasattr(pipe, "_encode_image") else "encode_image"
    own, encode = vars(pipe).get(name), getattr(pipe, name)
    kept: list[Any] = []

    def encoded(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(encode(*args, **kwargs))
        return kept[0]

    vars(pipe)[name] = encoded
    try:
        yield
    finally:
        vars(pipe).pop(name, None)
        if own is not None:
            vars(pipe)[name] = own
