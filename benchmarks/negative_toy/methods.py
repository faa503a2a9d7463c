"""The ways to guide the grid's model: guidance itself, NAG, and trained adapters; as outputs of states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.negative_toy.grid import OPEN, RANGE, SIDE, Output, guided
from benchmarks.negative_toy.model import FORM, encoded, fitted
from diffplug.samplers.negative.nag import NagOptions, nag
from diffplug.samplers.negative.nag_layers import guide_cross
from diffplug.samplers.negative.state import Encoded, NegativeState
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter, put_on
from diffplug.training.conditions import Conditions
from diffplug.training.objectives.guidance_distillation import DistillationSettings, GuidanceDistillation
from diffplug.training.objectives.multi_step_consistency import MultiStepConsistency
from diffplug.training.speedupnet.guidance_states import (
    TEXT,
    GuidanceStates,
    States,
    StateSettings,
    TextNetwork,
    collect,
)
from diffplug.training.speedupnet.negatives import Pairs

assert FORM.row_leaves == (TEXT,)  # noqa: S101 - adapters read the text there


def plain(network: TextNetwork, positive: Tensor) -> Output:
    """Without guidance."""
    told = encoded(positive)
    return lambda x, index: network(x, index, told)


def exact_guidance(network: TextNetwork, positive: Tensor, negative: Tensor, w: float) -> Output:
    """Guidance: two evaluations."""
    told, text = encoded(positive), encoded(negative).leaves[TEXT]
    return lambda x, index: guided(*network.pair(x, index, told, text), w)


@contextmanager
def with_adapter(
    network: TextNetwork, adapter: SunAdapter, positive: Tensor, negative: Tensor, w: float
) -> Iterator[Output]:
    """A block in which an adapter guides in one evaluation."""
    state, told, text = NegativeState(), encoded(positive), encoded(negative).leaves[TEXT]
    undo = put_on(adapter, network.denoiser, state)

    def output(x: Tensor, index: Tensor) -> Tensor:
        at = States(x, x, x, index, network.path.timesteps(index), told, text, text)
        return network.guided_at_once(state, at, torch.full((len(x),), w))

    try:
        yield output
    finally:
        undo()


@contextmanager
def with_nag(
    network: TextNetwork, options: NagOptions, positive: Tensor, negative: Tensor
) -> Iterator[Output]:
    """A block in which NAG guides in one evaluation."""
    state, told = NegativeState(), encoded(positive)
    state.positive, state.negative = Encoded(told.leaves[TEXT]), Encoded(encoded(negative).leaves[TEXT])
    undo = guide_cross(SimpleNamespace(), network.denoiser, state, options, nag)
    try:
        yield lambda x, index: network(x, index, told)
    finally:
        undo()


def negative_pairs(n: int, seed: int, empty: float = 0.35) -> tuple[Tensor, Tensor]:
    """Return prompts and negatives [n, 2]: words left open at times, a share of negatives empty."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(SIDE, (2, n, 2), generator=g)
    left = torch.rand(2, n, 2, generator=g) > torch.tensor([0.7, 0.5]).view(2, 1, 1)
    both = torch.where(left, OPEN, words)
    both[1][torch.rand(n, generator=g) < empty] = OPEN
    return both[0], both[1]


def states_of(
    network: TextNetwork,
    *,
    rollouts: int,
    fresh: int,
    steps: int = 25,
    guidance: tuple[float, float],
    seed: int,
    empty: float = 0.35,
) -> GuidanceStates:
    """Return the teacher's answers on states of guided runs, and on their ends noised afresh."""
    positive, negative = negative_pairs(rollouts, seed, empty)
    names = [",".join(map(str, row)) for row in [*positive.tolist(), *negative.tolist()]]
    wanted = StateSettings(rollouts=rollouts, fresh=fresh, steps=steps, guidance=guidance, rows=512)
    open_ = f"{OPEN},{OPEN}"
    pairs = Pairs(names[:rollouts], ["" if name == open_ else name for name in names[rollouts:]])
    return collect(network, pairs, _encoded, wanted, seed=seed)


def _encoded(names: Any) -> Conditions:
    words = [[int(w) for w in name.split(",")] if name else [OPEN, OPEN] for name in names]
    return encoded(torch.tensor(words))


def blinded(states: GuidanceStates) -> GuidanceStates:
    """Return the states as a student sees them that is never shown the negative prompt."""
    empty = encoded(torch.full((1, 2), OPEN)).leaves[TEXT]
    tensors = dict(states.tensors)
    tensors["text"] = empty.half().expand(len(tensors["text"]), -1, -1).contiguous()
    return GuidanceStates(tensors, states.path)


def fresh_only(states: GuidanceStates) -> GuidanceStates:
    """Return the noised states without those of guided runs."""
    kept, n = states.tensors["fresh"], len(states)
    rows = ("x", "positive", "negative", "index", "pair", "row", "step", "fresh")
    tensors = {name: v[kept] if name in rows else v for name, v in states.tensors.items()}
    assert len(tensors["x"]) < n  # noqa: S101 - there were runs
    return GuidanceStates(tensors, states.path)


def distilled(
    network: TextNetwork, states: GuidanceStates, folder: Path, updates: int, *, layout: str = "large",
    guidance: tuple[float, float] = RANGE, start: SunAdapter | None = None, consistency: int = 0,
) -> SunAdapter:  # fmt: skip
    """Return an adapter trained on states, by stage 1 or, with `consistency` evaluations, by stage 2."""
    torch.manual_seed(1)
    adapter, state = SunAdapter.beside(network.denoiser, AdapterMeta(layout=layout), gate=32), NegativeState()
    if layout == "v1":
        _copy_keys(adapter, network)
    if start is not None:
        adapter.load_state_dict(start.state_dict())
    settings = DistillationSettings(guidance=guidance, evenness=0.5)
    if consistency:
        wanted = StateSettings(steps=int(states.tensors["step"].max()) + 1)
        settings = replace(settings, consistency=consistency, states=wanted)
    make = MultiStepConsistency if consistency else GuidanceDistillation
    undo = put_on(adapter.requires_grad_(True), network.denoiser, state)
    try:
        objective = make(network, adapter, state, states, settings)
        found = fitted(objective, "adapter", folder, updates, 1e-3 if consistency else 3e-3)
    finally:
        undo()
    adapter.load_state_dict(found)
    return adapter.requires_grad_(False)


@torch.no_grad()
def _copy_keys(adapter: SunAdapter, network: TextNetwork) -> None:
    """Start both branches of the released form from the base's keys and values."""
    from diffplug.samplers.negative.cross_attention import cross_attentions

    there: dict[str, Any] = dict(cross_attentions(network.denoiser))
    for name, layer in adapter.named_layers().items():
        for branch in (layer.negative, layer.positive):
            branch.to_k.weight.copy_(there[name].to_k.weight)
            branch.to_v.weight.copy_(there[name].to_v.weight)
