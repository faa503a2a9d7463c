"""Steering, measured.

    python -m benchmarks.steering --parts analytic
    python -m benchmarks.steering --parts pictures --prompts 50 --seeds 1 --budgets 4 16 --draw steering.png
    python -m benchmarks.steering --parts pictures --at-most 9       # a few cells, and how long all will take
    python -m benchmarks.steering --parts overhead

"analytic": every stated figure of chains with known laws, beside traps and the bookkeeping of published code.
"pictures": all rules on hard Shapes prompts at equal numbers of network evaluations; cells are kept in
`--cells` and what is there is not made again. "overhead": where the seconds of a steered run go.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import opened
from benchmarks.steering import analytic_fk, analytic_svdd, overhead, picture_tables, pictures, rows
from benchmarks.steering.clock import Clock
from diffplug.files import output_folder, write_json
from diffplug.shapes.world import KINDS

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("analytic", "pictures", "overhead")


def analytic(given: argparse.Namespace) -> dict[str, Any]:
    """The table of all rows, and how many of the judged ones hold."""
    found = [*analytic_fk.rows(given.groups), *analytic_svdd.rows(given.groups)]
    judged = [row for row in found if not row.shown]
    right = sum(row.good for row in judged)
    print(rows.table(found))
    print(f"{right} of {len(judged)} judged rows hold; {len(found) - len(judged)} are shown only")
    return {
        "groups": given.groups,
        "held": right,
        "judged": len(judged),
        "rows": [row.to_dict() for row in found],
    }


def of_pictures(given: argparse.Namespace) -> dict[str, Any]:
    """Tables and bars of the cells, after those that were missing are made."""
    pipe = opened("shapes", given.device)
    setting = pictures.Setting(
        kind=given.kind,
        steps=given.steps,
        guidance=given.guidance,
        sampler=given.sampler,
        reward=given.reward,
        strength=given.strength,
        chunk=given.chunk,
        weights=pictures.fingerprint(pipe),
    )
    grid = pictures.Grid(
        rules=tuple(given.rules), budgets=tuple(given.budgets), seeds=given.seeds, prompts=given.prompts
    )
    clock = Clock(partial(print, flush=True))
    pictures.run(
        pipe, setting, grid, given.cells, max_rows=given.max_rows, clock=clock, at_most=given.at_most
    )
    results = picture_tables.summary(grid, setting.chunk, given.cells)
    print(picture_tables.table(results))
    bars = picture_tables.bars(results)
    for name, bar in bars.items():
        print(f"{'met' if bar['met'] else 'MISSED'}: {name} ({bar.get('gain', bar.get('lead')):+.3f})")
    if given.draw:
        from benchmarks.steering.drawing import draw

        draw(results, given.draw)
        print(given.draw)
    return {"setting": vars(setting), "grid": vars(grid), "results": results, "bars": bars}


def of_overhead(given: argparse.Namespace) -> dict[str, Any]:
    """Shares of the seconds of a steered run."""
    found = overhead.measure(opened("shapes", given.device), steps=given.steps, repeats=given.repeats)
    for name, share in found["shares"].items():
        print(f"{name}: {100 * share:.1f} %")
    print(f"previews: scoring takes {found['preview scoring / network call']:.2f} network calls")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, runs the parts, prints their tables and writes one JSON document each."""
    given = parser().parse_args(arguments)
    output_folder(given.results)
    made = {"analytic": analytic, "pictures": of_pictures, "overhead": of_overhead}
    for part in given.parts:
        document = made[part](given)
        path = given.results / f"steering_{part}.json"
        write_json(path, document)
        print(path)


def parser() -> argparse.ArgumentParser:
    """The options, each with its default."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.steering",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    found.add_argument("--results", type=Path, default=RESULTS, help="folder for the documents")
    found.add_argument("--groups", type=int, default=20_000, help="analytic: populations of four particles")
    defaults = pictures.Grid()
    found.add_argument("--rules", nargs="+", choices=pictures.RULES, default=list(defaults.rules))
    found.add_argument("--budgets", nargs="+", type=int, default=list(defaults.budgets), help="times --steps")
    found.add_argument("--seeds", type=int, default=defaults.seeds)
    found.add_argument("--prompts", type=int, default=defaults.prompts)
    setting = pictures.Setting()
    found.add_argument("--kind", choices=(*KINDS, "mixed"), default=setting.kind)
    for name in ("steps", "guidance", "sampler", "reward", "strength", "chunk"):
        value = getattr(setting, name)
        found.add_argument(f"--{name}", type=type(value), default=value)
    found.add_argument(
        "--cells", type=Path, default=Path("runs/steering"), help="pictures: folder of the cells"
    )
    found.add_argument("--max-rows", type=int, default=64, help="pictures times particles in one call")
    found.add_argument("--at-most", type=int, metavar="N", help="pictures: stop after N cells; go on later")
    found.add_argument("--device", default="cpu")
    found.add_argument("--draw", type=Path, help="pictures: where to draw reward against evaluations")
    found.add_argument("--repeats", type=int, default=5, help="overhead: runs, after one to warm up")
    return found


if __name__ == "__main__":
    main()
