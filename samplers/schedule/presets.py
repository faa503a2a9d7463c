"""Known samplers as schedules: a function of the number of steps and the grid for each.

    dpmpp(8)                                     DPM-Solver++(2M), evenly spaced timesteps, down to sigma 0
    unipc(6, "karras", order=3, final="sigma_min")
    ipndm(5, Nodes(kind="sigmas", values=(14.6, 5.0, 1.6, 0.5, 0.15, 0.0)))

grid: a name of `grids.GRIDS`, or `Nodes`, which say themselves how they end. final: "zero" or "sigma_min".
lower_order_final: a lower order at the end of runs of fewer than 15 steps, as Diffusers has it (UniPC: of
every length). All raise ValueError for an order that the sampler does not have. Whatever ends at sigma 0 ends
with order 1: lambda is infinite there. begin: the node where a run starts late (img2img); orders ramp up from
there, and what lies before is not meant to be run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from diffplug.registry import unknown
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Derivative, Scale, SolverStep, Update

Preset = Callable[..., SolverSchedule]
PLAIN = Scale()
HALF = Scale("const", 0.5)
SHORT = 15  # Diffusers lowers the order at the end of runs that are shorter than this


def _schedule(steps: list[SolverStep], grid: str | Nodes, final: str) -> SolverSchedule:
    nodes = grid if isinstance(grid, Nodes) else Nodes(kind="name", name=grid, final=final)
    return SolverSchedule(nodes=nodes, steps=tuple(steps))


def _ends_clean(grid: str | Nodes, final: str) -> bool:
    return grid.ends_clean if isinstance(grid, Nodes) else final == "zero"


def _order(name: str, order: Any, allowed: Collection[int]) -> int:
    if order not in allowed:
        raise ValueError(f"order {order!r} of {name}: allowed are {', '.join(map(str, allowed))}")
    return int(order)


def _steps_of(name: str, steps: Any) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} of {steps!r} steps: give a whole number of at least 1")
    return steps


@cache
def _past(order: int, scales: tuple[Scale, ...] = (), variable: str = "lambda") -> Update:
    """An update from the newest state, every derivative from all order - 1 earlier points."""
    points = tuple(range(-1, -order, -1))
    scaled = [*scales, *[PLAIN] * order][: order - 1]
    return Update(
        order=order, derivatives=tuple(Derivative(points, scale) for scale in scaled), variable=variable
    )


@cache
def _corrector(order: int, scale: Scale) -> Update:
    """UniC of a predictor's order: one order more with the new point; only that of order 1 is scaled."""
    points = (1, *range(-1, -order, -1))
    used = scale if order == 1 else PLAIN
    return Update(order=order + 1, derivatives=tuple(Derivative(points, used) for _ in range(order)))


def _history(i: int, begin: int) -> int:
    """How many evaluations a run from `begin` has made up to node i, at least 1."""
    return max(i - begin, 0) + 1


def _multistep_order(i: int, begin: int, steps: int, order: int, lower: bool, clean: bool) -> int:
    """Ramp-up at the start; at the end of short runs ramp-down to 2 and 1; 1 into sigma 0."""
    last = steps - 1 - i
    if last == 0 and (lower or clean):
        return 1
    return min(order, _history(i, begin), 2 if lower and last == 1 else order)


def ddim(
    steps: int, grid: str | Nodes = "linspace", *, final: str = "zero", begin: int = 0
) -> SolverSchedule:
    """First order, without noise (eta 0); data and noise predictions give the same (arXiv 2010.02502)."""
    return _schedule([SolverStep()] * _steps_of("ddim", steps), grid, final)


def dpmpp(
    steps: int,
    grid: str | Nodes = "linspace",
    *,
    order: int = 2,
    kind: str = "midpoint",
    param: str = "data",
    final: str = "zero",
    lower_order_final: bool = True,
    true_third: bool = False,
    begin: int = 0,
) -> SolverSchedule:
    """DPM-Solver++ multistep 1, 2M, 3M (arXiv 2211.01095); param="noise": DPM-Solver (arXiv 2206.00927).

    kind: "midpoint" or "heun", for order 2. Order 3 weighs the second derivative by a half, as Diffusers
    does, and is then not of third order; true_third=True takes the whole one.
    """
    _order("dpmpp", order, (1, 2, 3))
    if kind not in ("midpoint", "heun"):
        raise ValueError(f"kind {kind!r} of dpmpp: allowed are 'midpoint' and 'heun'")
    second = (Scale("bh2") if kind == "midpoint" else PLAIN,)
    third = (PLAIN, PLAIN if true_third else HALF)
    short = lower_order_final and steps < SHORT
    orders = [
        _multistep_order(i, begin, steps, order, short, _ends_clean(grid, final))
        for i in range(_steps_of("dpmpp", steps))
    ]
    return _schedule(
        [SolverStep(param=param, predict=_past(q, second if q == 2 else third)) for q in orders], grid, final
    )


def res_multistep(
    steps: int, grid: str | Nodes = "linspace", *, final: str = "zero", begin: int = 0
) -> SolverSchedule:
    """Second-order exponential Adams-Bashforth on data predictions, with the exact weight ("res_2m")."""
    return dpmpp(steps, grid, kind="heun", final=final, lower_order_final=False, begin=begin)


def unipc(
    steps: int,
    grid: str | Nodes = "linspace",
    *,
    order: int = 2,
    kind: str = "bh2",
    param: str = "data",
    disable_corrector: Collection[int] = (),
    final: str = "zero",
    lower_order_final: bool = True,
    begin: int = 0,
) -> SolverSchedule:
    """UniPC, predictor and corrector (arXiv 2302.04867).

    kind: "bh1" or "bh2". disable_corrector: numbers of the steps whose prediction is not corrected.
    """
    _order("unipc", order, (1, 2, 3, 4, 5))
    if kind not in ("bh1", "bh2"):
        raise ValueError(f"kind {kind!r} of unipc: allowed are 'bh1' and 'bh2'")
    scale, clean = Scale(kind), _ends_clean(grid, final)
    decisions = []
    for i in range(_steps_of("unipc", steps)):
        left = steps - i
        q = min(
            order,
            _history(i, begin),
            left if lower_order_final else order,
            1 if clean and left == 1 else order,
        )
        correct = None if left == 1 or i in disable_corrector else _corrector(q, scale)
        predict = _past(q, (scale,) if q == 2 else ())
        decisions.append(SolverStep(param=param, predict=predict, correct=correct))
    return _schedule(decisions, grid, final)


def deis(
    steps: int,
    grid: str | Nodes = "linspace",
    *,
    order: int = 2,
    final: str = "zero",
    lower_order_final: bool = True,
    begin: int = 0,
) -> SolverSchedule:
    """DEIS: noise predictions interpolated over lambda and integrated exactly (arXiv 2204.13902, tAB-log)."""
    _order("deis", order, (1, 2, 3))
    short, clean = lower_order_final and steps < SHORT, _ends_clean(grid, final)
    orders = [_multistep_order(i, begin, steps, order, short, clean) for i in range(_steps_of("deis", steps))]
    return _schedule([SolverStep(param="noise", predict=_past(q)) for q in orders], grid, final)


def ipndm(
    steps: int, grid: str | Nodes = "linspace", *, order: int = 4, final: str = "zero", begin: int = 0
) -> SolverSchedule:
    """iPNDM: Adams-Bashforth weights of noise predictions, whatever the step sizes (arXiv 2204.13902)."""
    _order("ipndm", order, (1, 2, 3, 4))
    orders = [min(order, _history(i, begin)) for i in range(_steps_of("ipndm", steps))]
    return _schedule(
        [SolverStep(param="noise", predict=_past(q, variable="index")) for q in orders], grid, final
    )


def singlestep(
    steps: int,
    grid: str | Nodes = "linspace",
    *,
    order: int = 2,
    kind: str = "midpoint",
    param: str = "data",
    final: str = "zero",
    begin: int = 0,
) -> SolverSchedule:
    """DPM-Solver(++) singlestep 2 or 3: blocks of as many steps, each from the state at the block's start.

    The states inside a block only serve to estimate derivatives. kind: "midpoint" or "heun". The last block
    shrinks so that every number of steps works; late starts begin a block.
    """
    _order("singlestep", order, (1, 2, 3))
    if kind not in ("midpoint", "heun"):
        raise ValueError(f"kind {kind!r} of singlestep: allowed are 'midpoint' and 'heun'")
    orders = [1] * begin + _blocks(_steps_of("singlestep", steps) - begin, order)
    if _ends_clean(grid, final):
        orders[-1] = 1
    return _schedule([SolverStep(param=param, predict=_from_block(q, kind)) for q in orders], grid, final)


def _blocks(steps: int, order: int) -> list[int]:
    """Orders 1, 2, ..., order again and again; the last block is cut short."""
    full, rest = divmod(steps, order)
    block = list(range(1, order + 1))
    if order == 1 or rest:
        return block * full + block[:rest]
    return block * (full - 1) + block[:-1] + [1]


def _from_block(order: int, kind: str) -> Update:
    """An update over a whole block of steps so far: from its first state, with the evaluations inside it."""
    if order == 3 and kind == "midpoint":  # the newest evaluation alone gives the derivative
        return Update(order=2, derivatives=(Derivative((2,)),), start=-2)
    points = tuple(range(1, order))
    scale = Scale("bh2") if order == 2 and kind == "midpoint" else PLAIN
    derivatives = tuple(Derivative(points, scale) for _ in range(order - 1))
    return Update(order=order, derivatives=derivatives, start=1 - order)


PRESETS: dict[str, Preset] = {
    "ddim": ddim,
    "dpm++": dpmpp,
    "unipc": unipc,
    "deis": deis,
    "ipndm": ipndm,
    "res_multistep": res_multistep,
    "singlestep": singlestep,
}


def preset(name: str) -> Preset:
    """The preset function of a name; ValueError with the nearest names for an unknown one."""
    if name not in PRESETS:
        raise unknown("solver", name, sorted(PRESETS))
    return PRESETS[name]


def check_options(name: str, options: Any) -> None:
    """Raise ValueError for an unknown preset, and for keywords that it does not have or refuses."""
    make = preset(name)
    if not options:
        return
    known = [each for each in inspect.signature(make).parameters if each not in ("steps", "grid", "begin")]
    if not isinstance(options, Mapping):
        raise ValueError(f"options of {name} are {options!r}: give a dictionary of {', '.join(known)}")
    for key in options:
        if key not in known:
            raise unknown(f"option of {name}", str(key), known)
    make(4, **options)  # raises where they do not fit
