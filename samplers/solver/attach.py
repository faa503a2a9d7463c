"""A scheduler of ours for a pipeline's model: built from its configuration, refused where it cannot fit."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffplug.intercept import current_scheduler
from diffplug.scheduler.plug import build, check, check_noise


def fitted(cls: Any, pipe: Any, **options: Any) -> Any:
    """A new scheduler of class `cls` for the pipeline's model, options on top; the pipeline is left alone.

    Raises ValueError for a pipeline without a scheduler, or with one whose noise `cls` cannot express.
    """
    current = current_scheduler(pipe)
    scheduler = build(cls, pipe, **options)
    check(scheduler, current, pipe)
    check_noise(scheduler, current)
    return scheduler


def check_names(who: str, config: Mapping[str, Any], signature: inspect.Signature, taken: str) -> None:
    """Raise ValueError for an option that the constructor does not have, with the nearest one it has.

    taken: the name of the parameter that the plug has for itself.
    """
    known = [name for name in signature.parameters if name not in ("self", taken)]
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{who} has no option {name!r}: {hint}")


def remade(cls: Any, fields: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """A plug as it was pickled or copied; its values were checked when it was made."""
    plug = object.__new__(cls)
    for name, value in {**fields, "config": MappingProxyType(dict(config))}.items():
        object.__setattr__(plug, name, value)
    return plug
