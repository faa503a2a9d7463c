"""A reward of the user's own by the place of its code: "module:function" or "path/to/file.py:function"."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from diffplug.registry import REWARDS

__all__ = ["user_function"]


def user_function(place: str, near: str | None = None) -> Any:
    """The function (or an instance of the class) at `place`; importing it runs its module.

    `near` is a known name that may have been meant. Raises ValueError that says which step failed.
    """
    where, _, name = (part.strip() for part in place.rpartition(":"))
    if not where or not name:
        raise ValueError(f"reward {place!r}: write module:function or file.py:function")
    module = _from_file(where, place) if where.endswith(".py") else _from_module(where, place, near)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            close = get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"reward {place!r}: {where!r} has no {part!r}.{meant}")
        found = getattr(found, part)
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:  # whatever the user's class raises
            raise ValueError(f"reward {place!r}: {name}() raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(
            f"reward {place!r} is no function but {type(found).__name__}: give a function "
            "(images, prompts) -> scores"
        )
    return found


def _from_module(where: str, place: str, near: str | None) -> ModuleType:
    try:
        return import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise _failed(where, place, error) from error
        meant = f" Did you mean {near!r}?" if near else ""
        raise ValueError(
            f"unknown reward {place!r}: {where!r} is no known name and no module that Python finds.{meant} "
            f"Known: {', '.join(REWARDS.names())}. A module's folder must be in PYTHONPATH; or give "
            f"file.py:function."
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise _failed(where, place, error) from error


def _from_file(where: str, place: str) -> ModuleType:
    path = Path(where).resolve()
    if not path.is_file():
        raise ValueError(f"reward {place!r}: the file {where!r} does not exist")
    name = f"_diffplug_reward_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward {place!r}: {where!r} is no Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        del sys.modules[name]
        raise _failed(where, place, error) from error
    return module


def _failed(where: str, place: str, error: BaseException) -> ValueError:
    return ValueError(f"reward {place!r}: importing {where!r} raised {type(error).__name__}: {error}")
