"""How the house is built: floors and circles of imports, and how far a call travels. Prints a table.

    python -m benchmarks.house [--json house.json]

A file stands one floor above the highest file it imports when it is loaded; files that import each other in a
circle share a floor. Circles and arrows between the wings count imports inside functions too, and none count
those for type checkers.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("samplers", "steering", "training", "demos")
_OURS = tuple(str(ROOT / top) for top in ("diffplug", *WINGS))
_ASIDE = (
    str(ROOT / "diffplug" / "shapes"),
    str(ROOT / "diffplug" / "rewards"),
)
ROUTES = (
    "diffplug",
    "diffplug.registry",
    "diffplug.moved",
    "diffplug.lazy",
)  # reach other modules by name, on purpose


def sources() -> dict[str, Path]:
    """Return the path of every module of the package by its import name."""
    found = {}
    for top in ("diffplug", *WINGS):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "diffplug" else ("diffplug", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, names: set[str], *, inside_functions: bool = False) -> set[str]:
    """Return the modules among `names` that a file imports."""
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text("utf-8")), inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner if inner in names else node.module} & names
    return found


def _statements(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        yield node
        yield from _statements(node, inside_functions)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            found.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for name in graph:
        if name not in index:
            visit(name)
    return found


def floors(graph: dict[str, set[str]]) -> int:
    """Return the length of the longest chain of imports, a circle counting as one."""
    home = {name: i for i, group in enumerate(circles(graph)) for name in group}
    height: dict[int, int] = {}
    for i, group in enumerate(circles(graph)):  # components come after those they reach
        below = {home[other] for name in group for other in graph[name]} - {i}
        height[i] = 1 + max((height[j] for j in below), default=0)
    return max(height.values())


def structure() -> dict[str, Any]:
    """Return floors, circles, arrows back up, imports by string, the fullest folder, functions' lengths."""
    files = sources()
    names = set(files)
    graph = {name: imports(path, names) for name, path in files.items()}
    deep = {name: imports(path, names, inside_functions=True) for name, path in files.items()}
    lengths, wide = _functions(files)
    return {
        "files": len(files),
        "floors": floors(graph),
        "circles": sum(len(group) > 1 for group in circles(deep)),
        "arrows back up": sum(_back_up(name, other) for name, used in deep.items() for other in used),
        "imports by string": sum(_by_string(path) for name, path in files.items() if name not in ROUTES),
        "fullest folder": max(Counter(p.parent for p in files.values() if p.stem != "__init__").values()),
        "functions: median lines": statistics.median(lengths),
        "functions: p90 lines": statistics.quantiles(lengths, n=10)[-1],
        "functions: longest": max(lengths),
        "functions over 12 arguments": wide,
        "lines of samplers/search": _lines(ROOT / "samplers" / "search"),
        "lines of its command line": sum(
            _lines(path) for path in (ROOT / "diffplug").rglob("*search*.py") if "cli" in str(path)
        ),
    }


def _back_up(name: str, other: str) -> bool:
    """Whether a module imports a wing that it must not know; the command line may know all."""
    here, there = _wing(name), _wing(other)
    if name.startswith("diffplug.cli") or there in ("", here) or here == "demos":
        return False
    return not (here == "training" and there == "samplers")


def _wing(name: str) -> str:
    return next((wing for wing in WINGS if f"{name}.".startswith(f"diffplug.{wing}.")), "")


def _by_string(path: Path) -> int:
    tree = ast.parse(path.read_text("utf-8"))
    return sum(
        isinstance(n, ast.Call) and "import_module" in ast.dump(n.func) and _HANDS_ON not in ast.dump(n)
        for n in ast.walk(tree)
    )


_HANDS_ON = "_HOMES"  # packages that hand names on lazily, by a table of their own


def _functions(files: dict[str, Path]) -> tuple[list[int], int]:
    lengths, wide = [], 0
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths.append(node.end_lineno - node.lineno + 1)  # type: ignore[operator]
                taken = len(node.args.args) + len(node.args.kwonlyargs) - (node.name == "__init__")
                wide += taken > 12 and (not node.name.startswith("_") or node.name == "__init__")
    return lengths, wide


def _lines(place: Path) -> int:
    paths = [place] if place.is_file() else place.rglob("*.py")
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


class Journey:
    """Counts the project's own functions that are entered while it is on."""

    def __init__(self) -> None:
        self.entered: list[tuple[str, str]] = []

    def start(self) -> None:
        sys.setprofile(self._event)

    def stop(self) -> None:
        sys.setprofile(None)

    def _event(self, frame: Any, event: str, arg: object) -> None:
        file = frame.f_code.co_filename
        ours = file.startswith(_OURS) and not file.startswith(_ASIDE)
        if event == "call" and ours and "<" not in frame.f_code.co_name:  # comprehensions are no journey
            self.entered.append((file, f"{frame.f_code.co_name}:{frame.f_code.co_firstlineno}"))

    def summary(self) -> dict[str, int]:
        """Return calls, different functions, different files, and changes of file between calls."""
        files = [file for file, _ in self.entered]
        changes = sum(a != b for a, b in pairwise(files))
        return {
            "calls": len(files),
            "functions": len(set(self.entered)),
            "files": len(set(files)),
            "changes of file": changes,
        }


def scored_step() -> dict[str, int]:
    """Return the journey of one scored Feynman-Kac step of Shapes with 8 particles."""
    from diffplug import load, plug
    from diffplug.steering import FeynmanKac

    pipe, journeys = load("shapes"), [Journey()]
    pipe.set_progress_bar_config(disable=True)

    def after(*_: object) -> None:
        journeys.append(Journey())
        journeys[-1].start()

    def before(*_: object) -> None:
        journeys[-1].stop()

    pipe.unet.register_forward_hook(after)
    pipe.unet.register_forward_pre_hook(before)
    with plug(pipe, FeynmanKac("shapes", particles=8)):
        pipe("a red circle left of a blue square", num_inference_steps=10)
    before()
    between = [
        journey.summary() for journey in journeys[2:-1]
    ]  # between two evaluations, the first not scored
    return max(between, key=lambda summary: summary["calls"])


def second_step() -> dict[str, int]:
    """Return the journey of `Recipe(sampler="dc-solver", steps=6)` until its second step."""
    from diffplug import load
    from diffplug.recipe import Recipe

    pipe, journey, calls = load("shapes"), Journey(), [0]

    def before(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 2:
            journey.stop()

    pipe.unet.register_forward_pre_hook(before)
    journey.start()
    Recipe(sampler="dc-solver", steps=6).run(pipe, ["a red circle"], [0])
    return journey.summary()


def seconds(code: str, repeats: int = 3) -> float:
    """Return the shortest wall time of a fresh interpreter that runs `code`."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    path = parser.parse_args().json
    app = "from diffplug.cli.main import app; import sys; sys.argv = ['diffplug', {!r}]; app()"
    found = structure()
    found |= {f"scored step: {name}": n for name, n in scored_step().items()}
    found |= {f"dc-solver to its second step: {name}": n for name, n in second_step().items()}
    found["seconds of `import diffplug`"] = round(seconds("import diffplug"), 3)
    found["seconds of `diffplug --help`"] = round(seconds(app.format("--help")), 2)
    found["seconds of `diffplug names`"] = round(seconds(app.format("names")), 2)
    for name, value in found.items():
        print(f"{name:45} {value}")
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
