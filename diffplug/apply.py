"""`apply(pipe, ...)` and `restore(pipe)`: plugs without a `with` block, for notebooks and servers."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from diffplug.plug import Attachment, plug
from diffplug.registry import sampler

__all__ = ["apply", "restore"]

_applied: WeakKeyDictionary[Any, list[Attachment]] = WeakKeyDictionary()


def apply(pipe: Any, *plugs: Any) -> Any:
    """Return the pipeline with `plugs` on it, until `restore(pipe)` takes them off.

    plugs: what `diffplug.plug` takes, or a sampler's name: "dpm++@karras", "six.json", "lightning-4". Several
    calls add up; a part that is claimed twice is refused, as in `plug`. Raises ValueError for no plugs at
    all, and for everything that `plug` refuses; the pipeline is then as before.

        diffplug.apply(pipe, "dpm++@karras", FeynmanKac(reward, particles=8))
        image = pipe("a red circle", num_inference_steps=20).images[0]
        diffplug.restore(pipe)
    """
    if not plugs:
        raise ValueError("apply(pipe) got nothing to plug: give a plug, a scheduler or a sampler's name")
    found = [sampler(one, pipe) if isinstance(one, str) else one for one in plugs]
    _applied.setdefault(pipe, []).append(plug(pipe, *found))
    return pipe


def restore(pipe: Any) -> Any:
    """Return the pipeline as it was before the first `apply`; harmless where nothing was applied.

    Plugs of `with plug(...)` blocks and of `undo = plug(...)` are not touched: their own end takes them off.
    """
    attachments = _applied.pop(pipe, [])
    while attachments:
        attachments.pop()()
    return pipe
