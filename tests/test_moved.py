"""Old module names lead to the new modules, with one warning."""

from __future__ import annotations

from importlib import import_module

import pytest

from diffplug.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module(old: str) -> None:
    new = import_module(f"diffplug.{MOVED[old]}")
    with pytest.warns(FutureWarning, match=f"is diffplug.{MOVED[old]} now"):
        module = import_module(f"diffplug.{old}")
    name = next(name for name in vars(new) if not name.startswith("_") and name != "annotations")
    assert getattr(module, name) is getattr(new, name)


def test_nothing_new_uses_an_old_name() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("diffplug.no_such_module")
