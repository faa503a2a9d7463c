"""What a pipeline asks of its scheduler, read in the pipeline's source: before the first network call."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["SchedulerCalls", "scheduler_calls"]

_SCHEDULER = "self.scheduler"


@dataclass(frozen=True)
class SchedulerCalls:
    """What the methods of a pipeline class write out.

    step: keywords of `self.scheduler.step(...)`. timesteps: of what sets timesteps, where the pipeline always
    gives them a value. methods: called on the scheduler, unless the pipeline looks for them first.
    """

    step: frozenset[str] = frozenset()
    timesteps: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()


@cache
def scheduler_calls(pipe_class: type) -> SchedulerCalls:
    """Return what a pipeline class asks of its scheduler; nothing where there is no source."""
    main = _tree(inspect.getattr_static(pipe_class, "__call__", None))
    if main is None:
        return SchedulerCalls()
    trees = [tree for tree in map(_tree, _methods(pipe_class)) if tree is not None]
    calls = [call for tree in trees for call in _calls(tree)]
    asked = [name for name, _ in calls if name.startswith(f"{_SCHEDULER}.")]
    looked_for = {
        word.value
        for name, call in calls
        if name in ("hasattr", "getattr") and len(call.args) > 1
        for word in call.args[1:2]
        if isinstance(word, ast.Constant)
    }
    return SchedulerCalls(
        step=_keywords(main, f"{_SCHEDULER}.step"),
        timesteps=_always_given(main),
        methods=frozenset(name.rpartition(".")[2] for name in asked if name.count(".") == 2) - looked_for,
    )


def _methods(pipe_class: type) -> Iterator[Any]:
    for cls in pipe_class.__mro__:
        if ".pipelines." in cls.__module__ and not cls.__module__.endswith("pipeline_utils"):
            yield from (each for each in vars(cls).values() if inspect.isfunction(each))


def _tree(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    found = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
    return [(ast.unparse(call.func), call) for call in found]


def _keywords(tree: ast.AST, name: str) -> frozenset[str]:
    calls = [call for function, call in _calls(tree) if function == name]
    return frozenset(word.arg for call in calls for word in call.keywords if word.arg)


def _always_given(tree: ast.AST) -> frozenset[str]:
    """Sigmas that a pipeline makes itself where nobody gives any, and never drops again; a shift mu."""
    given = _keywords(tree, "retrieve_timesteps") | _keywords(tree, f"{_SCHEDULER}.set_timesteps")
    made, dropped = False, False
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "sigmas" for target in node.targets):
            made |= "linspace" in ast.unparse(node.value)
            dropped |= ast.unparse(node.value) == "None"
    return frozenset(({"sigmas", "mu"} if made and not dropped else {"mu"}) & given)
