"""The plot of `benchmarks.solvers`: error over evaluations, ours beside the families of Diffusers.

    python -m benchmarks.solver_plot -o docs/solvers.png benchmarks/results/solvers_*.json

A line of a family is its best member at each number of evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.command import command
from diffplug.files import atomic_path, read_json

STOCK = {"DDIM": "o", "LMS": "P", "DEIS": "s", "DPM-Solver++": "^", "UniPC": "D"}
OURS = {
    "given": ("#dc2626", 3.5, "searched"),
    "DC-Solver": ("#2563eb", 1.8, "DC-Solver (ratios)"),
}
TITLES = {
    "mixture": {7.5: "mixture, guidance 7.5", 1.0: "one component, guidance 1", 0.0: "mixture, no guidance"}
}
WORST = 1.0  # errors above are off the plot: those solvers diverge


def curve(document: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    """(evaluations, smallest mean errors) of a family of Diffusers, or of a solver of ours."""
    key = "family" if name in STOCK else "solver"
    steps = sorted(map(int, document["results"]))
    rows = {n: [r for r in document["results"][str(n)]["rows"] if r[key] == name] for n in steps}
    best = {n: min(row["mean"] for row in found) for n, found in rows.items() if found}
    return list(best), list(best.values())


def draw(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each document, in a PNG."""
    figure, panels = plt.subplots(
        1, len(documents), figsize=(3.6 * len(documents) + 1.6, 3.6), squeeze=False, layout="constrained"
    )
    for panel, document in zip(panels[0], documents, strict=True):
        for name, marker in STOCK.items():
            panel.plot(*curve(document, name), color="0.55", marker=marker, markersize=4, lw=1, label=name)
        for name, (colour, width, label) in OURS.items():
            panel.plot(*curve(document, name), color=colour, marker="o", markersize=4, lw=width, label=label)
        _dress(panel, document)
    panels[0][0].set_ylabel("mean squared error of the final sample")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _dress(panel: Any, document: dict[str, Any]) -> None:
    setting = document["setting"]
    known = TITLES.get(setting["model"], {})
    title = known.get(setting["guidance"], f"{setting['model']}, guidance {setting['guidance']:g}")
    panel.set_title(title, fontsize=10)
    panel.set_yscale("log")
    panel.set_ylim(top=min(WORST, panel.get_ylim()[1]))
    panel.set_xticks(sorted(map(int, document["results"])))
    panel.set_xlabel("network evaluations")
    panel.grid(alpha=0.3, which="major")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and draws."""
    parser = command(__name__)
    parser.add_argument(
        "results", nargs="+", type=Path, help="JSON files of benchmarks.solvers, a panel each"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/solvers.png"))
    told = parser.parse_args(arguments)
    documents = [read_json(path) for path in told.results]
    draw(sorted(documents, key=lambda each: -each["setting"]["guidance"]), told.out)
    print(told.out)


if __name__ == "__main__":
    main()
