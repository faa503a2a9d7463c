"""Pictures of a steered run: reward paths along the genealogy, and how diverse the particles stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffplug.steering.report import SteeringReport


def lineages(ancestors: Tensor) -> Tensor:
    """Return, for every finished particle, its slot at each scored call before that call's selection.

    ancestors: `[C, k]`. Result `[C + 1, k]` int64: row c is the slot at scored call c, row C the final one.
    """
    slots = [torch.arange(ancestors.shape[-1])]
    for chosen in ancestors.flip(0):
        slots.insert(0, chosen[slots[0]])
    return torch.stack(slots)


def plot(report: SteeringReport, prompt: int = 0) -> Any:
    """Return a matplotlib Figure of one prompt; `figure.savefig(path)` writes it.

    Above: the rewards that every scored call saw, joined from parent to child; lines of particles with
    descendants among the finished pictures are coloured by their root, the others are grey. Below: effective
    sample size and number of distinct roots. Raises ImportError without matplotlib, and ValueError for a
    prompt that is not in the report.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    if not 0 <= prompt < len(report.prompts):
        raise ValueError(f"prompt={prompt}: the report has prompts 0 to {len(report.prompts) - 1}")
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    times = [*(call + 1 for call in report.calls), max(report.steps, *(c + 2 for c in report.calls), 1)]
    rewards = torch.cat([report.rewards[:, prompt], report.final_rewards[None, prompt]])
    rewards = torch.where(torch.isfinite(rewards), rewards, torch.nan)
    _paths(above, times, rewards, report.ancestors[:, prompt])
    above.set_ylabel("reward")
    above.set_title(f"{report.method}: {report.prompts[prompt][:60]}")
    below.plot(times[:-1], report.ess[:, prompt].tolist(), "o-", label="effective sample size")
    below.plot(times[:-1], report.distinct_roots[:, prompt].tolist(), "s--", label="distinct roots")
    below.set_ylim(0, report.particles + 0.5)
    below.set_xlabel("scheduler step")
    below.legend(loc="lower left", fontsize="small")
    return figure


def _paths(axes: Any, times: list[int], rewards: Tensor, ancestors: Tensor) -> None:
    """Draw every edge of the genealogy once, and the points."""
    slots = lineages(ancestors)
    for c, chosen in enumerate(ancestors):
        living = set(slots[c + 1].tolist())
        for child, parent in enumerate(chosen.tolist()):
            colour = "0.8"
            if child in living:
                finished = slots[c + 1].tolist().index(child)
                colour = f"C{int(slots[0, finished]) % 10}"
            ends = [float(rewards[c, parent]), float(rewards[c + 1, child])]
            axes.plot(times[c : c + 2], ends, color=colour, linewidth=1.0 if colour == "0.8" else 1.8)
    for time, seen in zip(times, rewards, strict=True):
        axes.plot([time] * len(seen), seen.tolist(), ".", color="0.3", markersize=4)
