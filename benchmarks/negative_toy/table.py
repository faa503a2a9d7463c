"""The tables of the toy with their bars: single evaluations, runs, another base, four evaluations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from benchmarks.negative_toy.grid import (
    HIGH,
    LOW,
    OPEN,
    RANGE,
    Output,
    World,
    cases,
    drawn,
    gap_of,
    guided,
    sampled,
    violations,
)
from benchmarks.negative_toy.methods import (
    blinded,
    distilled,
    exact_guidance,
    fresh_only,
    negative_pairs,
    plain,
    states_of,
    with_adapter,
    with_nag,
)
from benchmarks.negative_toy.model import encoded, trained_base, tuned
from diffplug.samplers.negative.nag import NagOptions
from diffplug.training.speedupnet.guidance_states import TEXT, TextNetwork

Way = Callable[[TextNetwork, Tensor, Tensor, float], AbstractContextManager[Output]]
BINS = 5
FIXED = (HIGH - 1e-3, HIGH + 1e-3)
NAG = NagOptions(scale=3.0, tau=2.5, alpha=0.5)


@dataclass(frozen=True)
class Size:
    """How much is trained and measured; `QUICK` is for tests."""

    base: int = 3000
    adapter: int = 400
    second: int = 400
    rollouts: int = 512
    fresh: int = 4096
    draws: int = 1024
    cases: int = 192


QUICK = Size(base=60, adapter=10, second=8, rollouts=16, fresh=64, draws=64, cases=16)


def way_of(adapter: Any, *, blind: bool = False) -> Way:
    """Return the way of drawing with an adapter; blind: it is shown the empty prompt as the negative."""
    return lambda network, positive, negative, w: with_adapter(
        network, adapter, positive, torch.full_like(negative, OPEN) if blind else negative, w
    )


def nag_way(options: NagOptions) -> Way:
    """Return the way of drawing with NAG, whatever the guidance scale."""
    return lambda network, positive, negative, w: with_nag(network, options, positive, negative)


@torch.no_grad()
def gaps(network: TextNetwork, way: Way, w: float, *, empty: bool, draws: int) -> tuple[float, list[float]]:
    """Return R over all noised data, and in five bins of the noise level."""
    positive, negative = negative_pairs(draws, 99, empty=0.0)
    if empty:
        negative = torch.full_like(negative, OPEN)
    else:  # the word of a negative that would be empty is its first column
        negative[(negative == OPEN).all(1), 0] = 0
    g = torch.Generator().manual_seed(98)
    clean = sampled(positive, torch.rand(draws, generator=g), torch.randn(draws, 2, generator=g), World())
    index = torch.randint(1, 1001, (draws,), generator=g).double()
    zero = torch.zeros(draws, dtype=torch.float64)
    x = network.path.noised(clean, torch.randn(draws, 2, generator=g), zero, index)
    told, text = encoded(positive), encoded(negative).leaves[TEXT]
    free, away = network.pair(x, index, told, text)
    wanted = guided(free, away, w)
    with way(network, positive, negative, w) as output:
        said = output(x, index)
    part = ((index - 1) * BINS // network.path.train_steps).long()
    bins = [gap_of(said[part == k], free[part == k], wanted[part == k]) for k in range(BINS)]
    return gap_of(said, free, wanted), bins


def one_step(network: TextNetwork, ways: dict[str, Way], draws: int) -> list[dict[str, Any]]:
    """Return R of each way at w = 3 with real and with empty negatives, at w = 2 and 5, and in bins."""
    table = []
    for name, way in ways.items():
        real, bins = gaps(network, way, HIGH, empty=False, draws=draws)
        others = {f"R at {w:g}": gaps(network, way, w, empty=False, draws=draws)[0] for w in (LOW, 5.0)}
        null = gaps(network, way, HIGH, empty=True, draws=draws)[0]
        table.append(
            {"method": name, "R": real, "R empty": null, **others, "bins": [round(b, 2) for b in bins]}
        )
    return table


def runs(network: TextNetwork, ways: dict[str, Way], count: int, steps: int = 50) -> list[dict[str, Any]]:
    """Return violations, and distances to guidance relative to the unguided runs', at w = 3 and 2."""
    positive, negative, noise = cases(count)
    free = drawn(plain(network, positive), noise, steps, network.path)
    table = [{"method": "unguided", "w": None, "violation": violations(free, negative), "distance": 1.0}]
    for w in (HIGH, LOW):
        exact = drawn(exact_guidance(network, positive, negative, w), noise, steps, network.path)
        far = (free - exact).square().sum()
        table.append(
            {"method": "guidance", "w": w, "violation": violations(exact, negative), "distance": 0.0}
        )
        nothing = torch.full_like(negative, OPEN)
        ends = drawn(exact_guidance(network, positive, nothing, w), noise, steps, network.path)
        table.append(_run("guidance, empty negative", w, ends, exact, far, negative))
        for name, way in ways.items():
            with way(network, positive, negative, w) as output:
                ends = drawn(output, noise, steps, network.path)
            table.append(_run(name, w, ends, exact, far, negative))
    return table


def _run(name: str, w: float, ends: Tensor, exact: Tensor, far: Tensor, negative: Tensor) -> dict[str, Any]:
    distance = float((ends - exact).square().sum() / far)
    return {"method": name, "w": w, "violation": violations(ends, negative), "distance": distance}


def in_four(
    network: TextNetwork, first: Any, second: Any, count: int, w: float = HIGH
) -> list[dict[str, Any]]:
    """Return violations and squared distances to guidance in 50 steps, at a few evaluations."""
    positive, negative, noise = cases(count)
    exact_output = exact_guidance(network, positive, negative, w)
    exact = drawn(exact_output, noise, 50, network.path)
    table = []

    def add(name: str, evaluations: int, ends: Tensor) -> None:
        distance = float((ends - exact).square().mean())
        table.append({"sampler": name, "evaluations": evaluations, "distance": distance,
                      "violation": violations(ends, negative)})  # fmt: skip

    for steps in (24, 8, 4, 2):
        add(f"guidance, DDIM {steps}", 2 * steps, drawn(exact_output, noise, steps, network.path))
    add("guidance, DPM-Solver++ 4", 8, multistep(exact_output, noise, 4, network))
    add("unguided, DDIM 4", 4, drawn(plain(network, positive), noise, 4, network.path))
    for name, adapter in (("stage 1", first), ("stage 2", second)):
        with with_adapter(network, adapter, positive, negative, w) as output:
            add(f"{name}, DDIM 4", 4, drawn(output, noise, 4, network.path))
            add(f"{name}, DPM-Solver++ 4", 4, multistep(output, noise, 4, network))
    return table


@torch.no_grad()
def multistep(output: Output, x: Tensor, steps: int, network: TextNetwork) -> Tensor:
    """Return the ends of DPM-Solver++ 2M runs on the trailing grid."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        index = torch.full((len(x),), float(t) + 1, dtype=torch.float64)
        x = scheduler.step(output(x, index), t, x).prev_sample
    return x


def measured(folder: Path, size: Size | None = None) -> dict[str, Any]:
    """Return all tables of the toy, and its bars; trains what it needs in `folder`, and takes it up there."""
    size = size or Size()
    base = trained_base(folder, size.base)
    told = {"rollouts": size.rollouts, "fresh": size.fresh}
    mixed = states_of(base, guidance=RANGE, seed=1, **told)
    fixed = states_of(base, guidance=FIXED, seed=2, **told)
    only_empty = states_of(base, guidance=RANGE, seed=3, empty=1.0, **told)
    at_4 = {"layout": "v1", "guidance": FIXED}
    adapters = {
        "released form": distilled(base, fixed, folder / "released", size.adapter, **at_4),
        "tied, small": distilled(base, mixed, folder / "small", size.adapter, layout="small"),
        "tied": distilled(base, mixed, folder / "tied", size.adapter),
        "tied, noised data alone": distilled(base, fresh_only(mixed), folder / "data", size.adapter),
        "blind": distilled(base, blinded(only_empty), folder / "blind", size.adapter),
    }
    ways = {name: way_of(adapter, blind=name == "blind") for name, adapter in adapters.items()}
    ways = {"unguided": _unguided, "NAG 3, 2.5, 0.5": nag_way(NAG), **ways}
    steps = states_of(base, rollouts=size.rollouts, fresh=size.fresh, steps=24, guidance=FIXED, seed=4)
    second = distilled(
        base, steps, folder / "second", size.second, guidance=FIXED, start=adapters["tied"], consistency=4
    )
    found: dict[str, Any] = {
        "one step": one_step(base, ways, size.draws),
        "runs": runs(base, {name: way for name, way in ways.items() if name != "unguided"}, size.cases),
        "other bases": other_bases(base, ways, folder, size),
        "four": in_four(base, adapters["tied"], second, size.cases),
    }
    return {**found, "bars": bars(found)}


def _unguided(network: TextNetwork, positive: Tensor, negative: Tensor, w: float) -> Any:
    return nullcontext(plain(network, positive))


def other_bases(base: TextNetwork, ways: dict[str, Way], folder: Path, size: Size) -> list[dict[str, Any]]:
    """Return R of adapters, untouched, on fine-tunes of their base."""
    worlds = {
        "its own": (None, 0, 0.0),
        "0.95 as large, moved": (World(0.95, 0.0, 0.05), 120, 2e-4),
        "turned by 0.3": (World(1.0, 0.3, 0.0), 400, 7e-4),
    }
    table = []
    for name, (world, updates, lr) in worlds.items():
        updates = min(updates, size.base)
        network = base if world is None else tuned(base, world, folder / name.replace(" ", "-"), updates, lr)
        rows = {
            way: gaps(network, ways[way], HIGH, empty=False, draws=size.draws)[0]
            for way in ("released form", "tied, small", "tied")
        }
        table.append({"base": name, "change": _change(base, network, size.draws), **rows})
    return table


@torch.no_grad()
def _change(one: TextNetwork, other: TextNetwork, draws: int) -> float:
    """Return the squared change of predictions, relative to their power."""
    positive, _ = negative_pairs(draws, 99)
    g = torch.Generator().manual_seed(98)
    x, index = torch.randn(draws, 2, generator=g), torch.randint(1, 1001, (draws,), generator=g).double()
    a, b = (network(x, index, encoded(positive)) for network in (one, other))
    return float((a - b).square().sum() / a.square().sum())


def bars(found: dict[str, Any]) -> dict[str, bool]:
    """Return what is wanted of the tables, and whether it is so."""
    gap = {row["method"]: row for row in found["one step"]}
    run = {(row["method"], row["w"]): row for row in found["runs"]}
    own, near, _ = found["other bases"]
    four = {row["sampler"]: row for row in found["four"]}
    obeys = [
        (m, w) for m, w in run if m in ("released form", "tied", "tied, small") and (w == HIGH or "tied" in m)
    ]
    second = four["stage 2, DDIM 4"]["distance"]
    return {
        "released form: R <= .53": gap["released form"]["R"] <= 0.53,
        "tied: R <= .46": gap["tied"]["R"] <= 0.46,
        "both: R with empty negatives < .75": all(
            gap[m]["R empty"] < 0.75 for m in ("released form", "tied")
        ),
        "blind control: R > .85": gap["blind"]["R"] > 0.85,
        "violation <= .03 wherever guidance has <= .02": all(
            run[m, w]["violation"] <= 0.03 for m, w in obeys if run["guidance", w]["violation"] <= 0.02
        ),
        "blind control violates": run["blind", HIGH]["violation"] > 0.15,
        "tied: distance <= .43 at 3, <= .3 at 2": run["tied", HIGH]["distance"] <= 0.43
        and run["tied", LOW]["distance"] <= 0.3,
        "another base, changed little: R within .06": all(
            near[m] <= own[m] + 0.06 for m in ("released form", "tied")
        ),
        "stage 2 at 4 evaluations beats guidance at 8": second < four["guidance, DDIM 4"]["distance"],
        "and guidance at 4 more than three times": 3 * second < four["guidance, DDIM 2"]["distance"],
    }
