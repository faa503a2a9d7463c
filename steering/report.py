"""SteeringReport: what a steered run did and what it cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffplug.steering.smc.weights import ess

if TYPE_CHECKING:
    from diffplug.steering.engine.population import Ending
    from diffplug.steering.engine.rule import Filter

SUMS = ("network_calls", "network_rows", "network_seconds", "decode_seconds", "reward_seconds")
"""Fields that add up over several runs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringReport:
    """What a steered run did: P prompts, k particles each, C scored calls before the end.

    steps: scheduler steps of the run. noise: what parts duplicates, in words. calls: indices of the scored
    calls. rewards `[C, P, k]`, ess `[C, P]`, resampled `[C, P]`, ancestors `[C, P, k]`: what each scored call
    saw and decided; a reward of -inf stands for a dead particle. distinct_roots `[C, P]`: how many of the k
    starting points still have descendants (the measure of diversity; ESS is not). log_z `[P]`: estimate of
    log E[exp(strength * reward)] under the unsteered pipeline; exp(log_z) is unbiased (see `explain_log_z`);
    NaN for rules that maximise. final_rewards, final_log_weights `[P, k]`: of the finished pictures; the
    weights make the particles a sample of the tilted law. returned: for each prompt, the slots of the
    pictures handed back. judge_rewards `[P, k]`: what a held-out reward says of the finished pictures, where
    one was named. draws: for each prompt, how many were drawn before an early end, empty where none was asked
    for; rewards of the others are NaN. why: the choice of `steer="auto"`, in words. invalid_rewards: NaN and
    +inf met on the way. network_calls, network_rows: denoiser
    evaluations (rows count guidance twice). Seconds are measured on the host. Tensors are on the CPU; NaN
    rewards in `final_rewards` mean that nothing was scored.
    """

    method: str
    particles: int
    strength: float
    prompts: tuple[str, ...]
    steps: int
    noise: str = ""
    calls: tuple[int, ...]
    rewards: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    distinct_roots: Tensor
    log_z: Tensor
    final_rewards: Tensor
    final_log_weights: Tensor
    returned: tuple[tuple[int, ...], ...]
    judge_rewards: Tensor | None = None
    draws: tuple[int, ...] = ()
    why: str = ""
    invalid_rewards: int
    network_calls: int
    network_rows: int
    network_seconds: float
    decode_seconds: float
    reward_seconds: float
    total_seconds: float

    @property
    def ties(self) -> tuple[int, ...]:
        """Return, for each prompt, how many finished pictures share the highest reward: 1 where one leads."""
        best = torch.where(torch.isfinite(self.final_rewards), self.final_rewards, -torch.inf)
        top = best.amax(-1, keepdim=True)
        return tuple(((best == top) & torch.isfinite(top)).sum(-1).tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, ready for JSON; null stands for a number that is not finite."""
        found = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {**found, "ties": list(self.ties)}

    def to_json(self) -> str:
        """Return the report as one JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def plot(self, prompt: int = 0) -> Any:
        """Return a matplotlib Figure of a prompt's genealogy, rewards and diversity; see `plot`."""
        return plot(self, prompt)

    def explain_log_z(self, prompt: int = 0) -> str:
        """Return what log Z of a prompt says, in a sentence or two."""
        if self.strength == 0:
            return "log Z is 0: with strength 0 nothing is tilted"
        value = float(self.log_z[prompt])
        if not math.isfinite(value):
            return "there is no log Z: this rule maximises, it does not sample a tilted law"
        mean = value / self.strength
        return (
            f"log Z = {value:.3f}: exp({self.strength:g} * reward) averages exp({value:.3f}) over the "
            f"unsteered pipeline's pictures of this prompt, as one reward of {mean:.3f} for all of them "
            "would. The estimate of Z is unbiased; one run of few particles mostly falls short of it"
        )

    def __str__(self) -> str:
        """Return a short table: one line per prompt and scored call, and one with the cost."""
        lines = [f"{self.method}: {self.particles} particles, {self.steps} steps, strength {self.strength:g}"]
        lines += [f"  {self.why}"] if self.why else []
        lines += [f"  noise: {self.noise}"] if self.noise else []
        for g, prompt in enumerate(self.prompts):
            lines += [f"  {_shortened(prompt)!r}", "    step    best    mean    ESS  roots"]
            for c, call in enumerate(self.calls):
                mark = "*" if self.resampled[c, g] else ""
                size, roots = float(self.ess[c, g]), int(self.distinct_roots[c, g])
                lines.append(
                    f"    {call + 1:4d} {_span(self.rewards[c, g])} {size:6.2f} {roots:6d} {mark}".rstrip()
                )
            lines.append(f"     end {_span(self.final_rewards[g])} {_final_ess(self.final_log_weights[g])}")
            if self.strength > 0 and math.isfinite(float(self.log_z[g])):
                lines.append(f"    log Z {float(self.log_z[g]):.3f}")
            lines += self._told_of(g)
        lines.append(
            f"  {self.network_calls} network calls ({self.network_rows} rows, {self.network_seconds:.2f} s), "
            f"decoding {self.decode_seconds:.2f} s, rewards {self.reward_seconds:.2f} s, total "
            f"{self.total_seconds:.2f} s"
        )
        if self.invalid_rewards:
            lines.append(
                f"  {self.invalid_rewards} rewards were NaN or +inf: those particles counted as dead"
            )
        return "\n".join(lines)

    def _told_of(self, g: int) -> list[str]:
        """Return lines on the draws of a prompt, where they ended early, and on its judge."""
        lines = []
        if self.draws:
            shared = f", {self.ties[g]} share the highest reward" if self.ties[g] > 1 else ""
            of = f" of {self.particles}" if self.method != "NoiseSearch" else ""
            lines.append(f"    {self.draws[g]}{of} drawn{shared}")
        if self.judge_rewards is not None and self.returned[g]:
            judged = self.judge_rewards[g]
            chosen, mean = float(judged[self.returned[g][0]]), float(judged[torch.isfinite(judged)].mean())
            lines.append(f"    the judge gives the chosen one {chosen:.3f}, a draw {mean:.3f} on average")
        return lines


def told(particles: Filter | None, ending: Ending) -> dict[str, Any]:
    """Return those fields of a report that the weights, the selections and the end of a run tell."""
    groups, k = ending.rewards.shape
    selections = particles.selections if particles else []

    def stacked(name: str, *shape: int) -> Tensor:
        return torch.stack([getattr(s, name) for s in selections]) if selections else torch.empty(0, *shape)

    return {
        "particles": k,
        "calls": tuple(selection.call for selection in selections),
        "rewards": stacked("rewards", groups, k),
        "ess": stacked("ess", groups),
        "resampled": stacked("resampled", groups),
        "ancestors": stacked("ancestors", groups, k),
        "distinct_roots": stacked("distinct_roots", groups),
        "log_z": ending.log_z,
        "final_rewards": ending.rewards,
        "final_log_weights": ending.log_weights,
        "invalid_rewards": ending.invalid + sum(selection.invalid for selection in selections),
    }


def _plain(value: Any) -> Any:
    """Return tensors and tuples as lists, and numbers that are not finite as None."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _span(rewards: Tensor) -> str:
    """Return best and mean of the finite rewards in two columns."""
    valid = rewards[torch.isfinite(rewards)]
    return f"{float(valid.max()):7.3f} {float(valid.mean()):7.3f}" if len(valid) else "      -       -"


def _final_ess(logw: Tensor) -> str:
    alive = bool(torch.isfinite(logw).any())
    return f"{float(ess(logw)):6.2f}" if alive else "     -"


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."


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
