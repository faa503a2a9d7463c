"""Which arguments of a pipeline's call never arrive: read from the source of its `__call__`.

It keeps `diffplug.scheduler.pipeline_quirks` true to the installed Diffusers, and reads any pipeline.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHECKS = {"check_inputs", "check_input", "_check_inputs"}
_SETS_GRID = {"retrieve_timesteps", "set_timesteps"}
_GRIDS = {"sigmas", "timesteps"}
_NUMBERS = {"num_inference_steps"}  # counts the nodes of a grid; who has it does not have the grid
_COUNTS = {"num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"}
_NOISE = "prepare_latents"


def swallowed_arguments(call: ast.FunctionDef) -> dict[str, str]:
    """Return argument to how it is lost, for the syntax tree of a pipeline's `__call__`.

    'unread': nothing but a check reads it. 'overwritten': another value takes its place before anything reads
    it. 'branch': another value takes its place where a condition on the scheduler holds. 'not set': some
    `set_timesteps` of the call goes without it. 'latents': prompts are repeated for it, start noise is not.
    """
    lines = [_Line.of(node, guards) for node, guards in _statements(call.body)]
    found = {name: _how(name, lines) for name in _arguments(call)}
    return {name: how for name, how in found.items() if how}


def pipeline_calls(folder: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield class name and `__call__` of every pipeline class in the files of a folder, at any depth."""
    for path in sorted(folder.rglob("pipeline*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "Pipeline" in node.name:
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and part.name == "__call__":
                        yield node.name, part


@dataclass(frozen=True)
class _Line:
    """A simple statement, or the test of a compound one, with the tests that it stands under."""

    node: ast.AST
    guards: tuple[ast.AST, ...]
    guarded_by: frozenset[str]
    reads: frozenset[str]
    stores: frozenset[str]
    calls: tuple[ast.Call, ...]

    @classmethod
    def of(cls, node: ast.AST, guards: tuple[ast.AST, ...]) -> _Line:
        calls = tuple(part for part in ast.walk(node) if isinstance(part, ast.Call))
        checked = calls if isinstance(node, ast.Expr) else ()  # some checks hand the value back, put right
        checks = {id(part) for call in checked if _called(call) in _CHECKS for part in ast.walk(call)}
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        reads = frozenset(
            name.id for name in names if isinstance(name.ctx, ast.Load) and id(name) not in checks
        )
        stores = frozenset(name.id for name in names if isinstance(name.ctx, ast.Store))
        guarded_by = frozenset().union(*(_names(guard) for guard in guards))
        return cls(node, guards, guarded_by, reads, stores, calls)


def _statements(
    body: Sequence[ast.stmt], guards: tuple[ast.AST, ...] = ()
) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Yield simple statements and tests in the order of the source, with the tests around them."""
    for statement in body:
        inner = (*guards, statement.test) if isinstance(statement, ast.If) else guards
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        if not any(blocks):
            yield statement, guards
            continue
        for head in ("test", "iter"):
            if hasattr(statement, head):
                yield getattr(statement, head), guards
        for block in blocks:
            yield from _statements(block, inner)


def _how(name: str, lines: Sequence[_Line]) -> str:
    """Return how an argument is lost, empty where it is not."""
    first = next((line for line in lines if name in line.reads or _replaced(name, line)), None)
    if first is None:
        return "unread"
    if name not in first.reads:
        return "overwritten"
    return _lost_on_the_way(name, lines)


def _replaced(name: str, line: _Line) -> bool:
    """Whether a statement that always runs puts something else in an argument's place."""
    return name in line.stores and not line.guards


def _lost_on_the_way(name: str, lines: Sequence[_Line]) -> str:
    """Return how an argument that is read is lost later: what comes of it is followed from name to name."""
    derived = {name}
    for line in lines:
        comes_of_it = bool(line.reads & derived or line.guarded_by & derived)
        if name in line.stores and not comes_of_it and _asks_scheduler(line.guards):
            return "branch"
        if comes_of_it:
            derived |= line.stores - (_NUMBERS if name in _GRIDS else set())
            continue
        called = {_called(call) for call in line.calls}
        if name in _GRIDS and called & _SETS_GRID:
            return "not set"
        if name in _COUNTS and _NOISE in called:
            return "latents"
    return ""


def _asks_scheduler(guards: Sequence[ast.AST]) -> bool:
    return any(
        isinstance(part, ast.Attribute) and part.attr == "scheduler"
        for guard in guards
        for part in ast.walk(guard)
    )


def _arguments(call: ast.FunctionDef) -> list[str]:
    every = (*call.args.posonlyargs, *call.args.args, *call.args.kwonlyargs)
    return [argument.arg for argument in every[1:]]


def _called(call: ast.Call) -> str:
    """Return the last part of what is called: `set_timesteps` of `self.scheduler.set_timesteps(...)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _names(node: ast.AST) -> frozenset[str]:
    return frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
