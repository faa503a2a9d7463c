"""How near a SpeedUpNet adapter comes to guidance on a model, its own base or another one.

    R = sum |student - y|^2 / sum |y(c+) - y|^2     over states; y: guidance. 1: none, 0: guidance itself

R is of single evaluations; the distance is of whole runs, the mean squared difference of final latents to
those of guidance, relative to that of runs without guidance. Needs prompts, no pictures. An adapter follows
its base through small changes (a style) and loses touch with large ones: measure instead of hoping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from diffplug.plug import plug
from diffplug.samplers.negative.call import guidance_argument, unguided
from diffplug.samplers.negative.classifier_free import ClassifierFree
from diffplug.samplers.negative.speedupnet import SpeedUpNet
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import SunAdapter, put_on
from diffplug.seeds import Seeds
from diffplug.training.conditions import encode, one_denoiser
from diffplug.training.noise_path import NoisePath
from diffplug.training.speedupnet.guidance_states import GuidanceStates, StateSettings, TextNetwork, collect
from diffplug.training.speedupnet.negatives import Pairs
from diffplug.watch import quiet

__all__ = ["AdapterScore", "gap", "rollouts", "score_adapter"]


@dataclass(frozen=True)
class AdapterScore:
    """Figures at one guidance scale.

    real, empty: R on noised pictures, with negative prompts and without. trajectory: R on the states of
    guided runs. distance: of whole runs with negative prompts. states, runs: how many were measured.
    """

    guidance: float
    real: float
    empty: float
    trajectory: float
    distance: float
    states: int
    runs: int

    def to_json(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"guidance {self.guidance:g}: R {self.real:.3f} (empty negative {self.empty:.3f}, on runs "
            f"{self.trajectory:.3f}), distance {self.distance:.3f}; 0 is guidance, 1 is none"
        )


@torch.no_grad()
def score_adapter(
    pipe: Any,
    adapter: Any,
    prompts: Sequence[str],
    negatives: Sequence[str],
    *,
    guidance: float | None = None,
    states: int = 512,
    runs: int | None = None,
    steps: int = 25,
    seed: int = 0,
    clean: Tensor | None = None,
) -> AdapterScore:
    """Return how near an adapter comes to guidance on `pipe`.

    adapter: a file, a `SunAdapter`, or None for the shipped one. prompts, negatives: n each, no negative
    empty; runs are made for the first `runs` pairs (None: for all). guidance: None takes the adapter's.
    states: noised pictures of each kind. clean: latents [m, ...] of pictures of the first m prompts, where
    the runs' own should not be noised. Costs about 5 n steps + 6 states rows of the network. Raises
    ValueError where adapter and pipeline do not fit.
    """
    if len(prompts) != len(negatives) or not prompts:
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(negatives)} negative prompts: give as many of each"
        )
    found = SpeedUpNet(adapter).adapter_for(pipe)
    w = found.meta.guidance if guidance is None else float(guidance)
    form, _ = encode(pipe, list(prompts[:1]))
    network = TextNetwork(one_denoiser(pipe), NoisePath.of(pipe.scheduler), form)
    pairs = Pairs([*prompts, *prompts], [*negatives, *[""] * len(prompts)])
    half = len(prompts)
    device = one_denoiser(pipe).device

    def made(rows: slice, settings: StateSettings) -> GuidanceStates:
        some = Pairs(pairs.positive[rows], pairs.negative[rows])
        return collect(
            network,
            some,
            lambda texts: encode(pipe, texts)[1],
            settings,
            clean=clean,
            seed=seed,
            device=device,
        )

    count = half if runs is None else min(runs, half)
    settings = StateSettings(rollouts=count, steps=steps, guidance=(w, w), fresh=states)
    real, empty = made(slice(0, half), settings), made(slice(half, None), settings)
    fresh, run = (real.tensors["fresh"] == flag for flag in (True, False))
    return AdapterScore(
        w,
        gap(network, found, real, w, fresh),
        gap(network, found, empty, w, empty.tensors["fresh"]),
        gap(network, found, real, w, run),
        distance(pipe, found, prompts[:count], negatives[:count], w, steps, seed),
        states,
        count,
    )


@torch.no_grad()
def gap(network: TextNetwork, adapter: SunAdapter, states: GuidanceStates, w: float, chosen: Tensor) -> float:
    """Return R of an adapter on the chosen states, at one guidance scale; float64 sums."""
    state = NegativeState()
    weight = next(network.denoiser.parameters())
    undo = put_on(adapter.to(weight.device, weight.dtype), network.denoiser, state)
    missed = offset = 0.0
    try:
        for item in torch.nonzero(chosen)[:, 0].split(64):
            at = states.at(item, weight.device)
            said = network.guided_at_once(state, at, torch.full((len(item),), w, device=weight.device))
            wanted = (w - 1) * (at.positive - at.negative)
            missed += float((said - at.positive - wanted).double().square().sum())
            offset += float(wanted.double().square().sum())
    finally:
        undo()
    return missed / offset if offset else 0.0


def distance(
    pipe: Any,
    adapter: SunAdapter,
    prompts: Sequence[str],
    negatives: Sequence[str],
    w: float,
    steps: int,
    seed: int,
) -> float:
    """Return the distance of the adapter's runs to guidance's, relative to that of runs without guidance."""
    name = guidance_argument(pipe)
    told = {"num_inference_steps": steps, "negative_prompt": list(negatives)}
    exact = rollouts(pipe, prompts, seed, [ClassifierFree()], **told, **{str(name): w})
    near = rollouts(
        pipe, prompts, seed, [SpeedUpNet(adapter)], **told, **({"guidance_scale": w} if adapter.tied else {})
    )
    plain = rollouts(pipe, prompts, seed, [], num_inference_steps=steps, **unguided(pipe))
    return float((near - exact).square().sum() / (plain - exact).square().sum())


def rollouts(pipe: Any, prompts: Sequence[str], seed: int, plugs: Sequence[Any], **told: Any) -> Tensor:
    """Return final latents [n, ...], float64, of runs from seeds of their own."""
    parts = []
    for begin in range(0, len(prompts), 64):
        rows = slice(begin, begin + 64)
        some = {k: v[rows] if isinstance(v, list) else v for k, v in told.items()}
        seeds = [seed + begin + i for i in range(len(prompts[rows]))]
        with plug(pipe, *plugs, Seeds(seeds)), quiet(pipe):
            parts.append(pipe(prompt=list(prompts[rows]), output_type="latent", **some)[0])
    return torch.cat(parts).double().cpu()
