"""Short names: what they find, what they refuse, and which names they suggest."""

from __future__ import annotations

import importlib.metadata

import pytest

from diffplug import registry
from diffplug.registry import Registry


@pytest.fixture
def things() -> Registry:
    table = Registry("thing", "diffplug.test-things")
    table.register("ordered", "collections:OrderedDict")
    table.register("counter", "collections:Counter")
    return table


def _entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name=name, value=value, group="diffplug.test-things")


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[importlib.metadata.EntryPoint]:
    found: list[importlib.metadata.EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in found if e.group == group])
    return found


def test_get_imports_the_target(things: Registry) -> None:
    from collections import Counter

    assert things.get("counter") is Counter
    assert things.names() == ["counter", "ordered"]
    assert "counter" in things and "chain" not in things


def test_a_class_can_be_registered_as_it_is(things: Registry) -> None:
    things.register("whole", int)
    assert things.get("whole") is int


def test_unknown_names_get_the_nearest(things: Registry) -> None:
    with pytest.raises(
        ValueError, match=r"unknown thing 'countre'\. Did you mean 'counter'\? Known: counter, ordered"
    ):
        things.get("countre")
    with pytest.raises(ValueError, match="unknown thing 'zzz'. Known"):
        things.get("zzz")


@pytest.mark.parametrize("name", ["", "Upper", "two words", " edge"])
def test_malformed_names_are_refused(things: Registry, name: str) -> None:
    with pytest.raises(ValueError, match="lower case without spaces"):
        things.register(name, "collections:deque")


def test_malformed_targets_and_taken_names_are_refused(things: Registry) -> None:
    with pytest.raises(ValueError, match="must read 'module:Class'"):
        things.register("deque", "collections.deque")
    with pytest.raises(ValueError, match="is 'collections:Counter' already"):
        things.register("counter", "collections:deque")
    things.register("counter", "collections:Counter")  # the same again is no conflict


def test_unregister_forgets(things: Registry) -> None:
    things.unregister("counter")
    assert "counter" not in things
    with pytest.raises(ValueError, match="unknown thing 'counter'"):
        things.unregister("counter")


def test_entry_points_add_names(things: Registry, entries: list[importlib.metadata.EntryPoint]) -> None:
    from collections import deque

    entries.append(_entry("queue", "collections:deque"))
    assert things.get("queue") is deque
    assert things.names() == ["counter", "ordered", "queue"]


def test_an_entry_point_cannot_take_a_name_over(
    things: Registry, entries: list[importlib.metadata.EntryPoint]
) -> None:
    from collections import Counter

    entries.append(_entry("counter", "collections:deque"))
    with pytest.warns(
        UserWarning, match="'collections:deque'.*is ignored: the thing name 'counter' is taken"
    ):
        things.names()
    assert things.get("counter") is Counter


@pytest.mark.contract
@pytest.mark.parametrize(
    ("table", "name"),
    [
        (table, name)
        for table in (registry.SAMPLERS, registry.STEERERS, registry.REWARDS, registry.TRAINERS)
        for name in table.names()
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_every_shipped_name_leads_to_something_callable(table: Registry, name: str) -> None:
    assert callable(table.get(name))
