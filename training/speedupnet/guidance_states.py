"""States on which guidance is distilled, with both of the teacher's answers, made once and kept.

`y(c+)` and `y(c-)` are kept apart: the target of any guidance scale is a sum of the two, so training costs no
further evaluation of the teacher. States are those of guided roll-outs (DDIM, or Euler for flows, each row
at a guidance scale of its own), and their last pictures noised afresh.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.files import atomic_path, output_folder
from diffplug.samplers.negative.state import NegativeState
from diffplug.training.conditions import CallForm, Conditions
from diffplug.training.noise_path import NoisePath
from diffplug.training.speedupnet.negatives import Pairs

__all__ = ["GuidanceStates", "StateSettings", "States", "TextNetwork", "collect"]

TEXT = "encoder_hidden_states"


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """How many states there are.

    rollouts: guided ones, of `steps` steps each, at scales from `guidance`. fresh: noised pictures. rows:
    of one evaluation.
    """

    rollouts: int = 576
    steps: int = 25
    guidance: tuple[float, float] = (1.0, 8.0)
    fresh: int = 7680
    rows: int = 64

    def __post_init__(self) -> None:
        for name, least in (("rollouts", 0), ("steps", 1), ("rows", 1), ("fresh", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {getattr(self, name)}"
                )
        if not self.rollouts + self.fresh:
            raise ValueError("rollouts and fresh are both 0: there is nothing to train on")


@dataclass(frozen=True)
class States:
    """Some rows: x, positive, negative [n, ...]; timesteps [n]; conditions of c+, text of c-; whether c- is
    empty.
    """

    x: Tensor
    positive: Tensor
    negative: Tensor
    index: Tensor
    timesteps: Tensor
    conditions: Conditions
    text: Tensor
    empty: Tensor


class TextNetwork:
    """A denoiser that reads its prompt by cross-attention, as its pipeline calls it.

    form: how it is called. path: its noise levels.
    """

    def __init__(self, denoiser: nn.Module, path: NoisePath, form: CallForm) -> None:
        if TEXT not in form.row_leaves:
            raise ValueError(
                f"{type(denoiser).__name__} is not given its prompt as {TEXT}: SpeedUpNet needs that"
            )
        self.denoiser, self.path, self.form = denoiser, path, form

    def __call__(self, x: Tensor, index: Tensor, conditions: Conditions) -> Tensor:
        """Return the raw output, float32, at states x [n, ...] of indices [n]."""
        told = self.path.timesteps(index).to(x.device, torch.float32)
        out = self.denoiser(**self.form.arguments(x, told, conditions.to(x.device, x.dtype)))[0]
        return self.form.sign * out[:, : x.shape[1]].float()

    def guided_at_once(self, state: NegativeState, at: States, w: Tensor) -> Tensor:
        """Return the output for c+ with c- and w told to the adapter; with a graph."""
        state.text, state.guidance = at.text.to(at.x.device, at.x.dtype), w
        state.time = at.timesteps.to(at.x.device, torch.float32) / 1000
        try:
            return self(at.x, at.index, at.conditions)
        finally:
            state.clear()

    def pair(self, x: Tensor, index: Tensor, conditions: Conditions, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return y(c+) and y(c-), in one evaluation of two rows each; only the text differs."""
        negative = Conditions({**conditions.leaves, TEXT: text})
        both = self(torch.cat([x, x]), torch.cat([index, index]), Conditions.cat([conditions, negative]))
        return both[: len(x)], both[len(x) :]


class GuidanceStates:
    """All states: tensors by name, and the prompts that rows point to.

    x, positive, negative [n, ...] float16; index [n]; pair [n] into conditions and text. Of roll-outs: row
    and step [n] (-1 for fresh states), and for each row its guidance and its end, the last state.
    """

    def __init__(self, tensors: dict[str, Tensor], path: NoisePath) -> None:
        self.tensors, self.path = tensors, path
        leaves = {
            name.removeprefix("condition/"): v for name, v in tensors.items() if name.startswith("condition/")
        }
        self.conditions = Conditions(leaves)
        self.power = (tensors["positive"].float() - tensors["negative"].float()).square().flatten(1).mean(1)

    def __len__(self) -> int:
        return len(self.tensors["x"])

    def at(self, item: Tensor, device: Any = "cpu") -> States:
        """Return some rows, float32 on a device."""
        x, positive, negative = (
            self.tensors[name][item].to(device, torch.float32) for name in ("x", "positive", "negative")
        )
        pair, index = self.tensors["pair"][item], self.tensors["index"][item]
        return States(
            x,
            positive,
            negative,
            index,
            self.path.timesteps(index),
            self.conditions[pair].to(device, torch.float32),
            self.tensors["text"][pair].to(device, torch.float32),
            self.tensors["empty"][pair].to(device),
        )

    def trajectories(self) -> tuple[Tensor, Tensor]:
        """Return which state is step k of roll-out r, [rollouts, steps], and the indices [steps] of the
        steps.
        """
        some = torch.nonzero(~self.tensors["fresh"])[:, 0]
        row, step = self.tensors["row"][some], self.tensors["step"][some]
        table = torch.zeros(int(row.max()) + 1, int(step.max()) + 1, dtype=torch.long)
        table[row, step] = some
        return table, self.tensors["index"][table[0]]

    def save(self, file: Path) -> None:
        """Write them as safetensors."""
        from safetensors.torch import save_file

        output_folder(file.parent)
        with atomic_path(file) as temporary:
            save_file({name: value.contiguous() for name, value in self.tensors.items()}, temporary)

    @classmethod
    def load(cls, file: Path, path: NoisePath) -> GuidanceStates:
        """Return what `save` wrote."""
        from safetensors.torch import load_file

        return cls(load_file(file), path)


@torch.no_grad()
def collect(
    network: TextNetwork,
    pairs: Pairs,
    encode: Callable[[Sequence[str]], Conditions],
    settings: StateSettings,
    *,
    clean: Tensor | None = None,
    seed: int = 0,
    device: Any = "cpu",
    on_rows: Callable[[int], None] = lambda n: None,
) -> GuidanceStates:
    """Return states of guided roll-outs and fresh ones, a pair of prompts each.

    pairs: at least `settings.rollouts` of them; fresh states take them again in turn. encode: prompts to
    conditions. clean: latents [m, ...] of pictures of the first m pairs, to be noised in place of the
    roll-outs' last states. Costs 2 (rollouts x steps + fresh) rows of the teacher. on_rows: told how many
    states are done.
    """
    conditions, text = encode(pairs.positive), encode(pairs.negative).leaves[TEXT]
    generator = torch.Generator().manual_seed(seed)
    shape = network.form.shape
    parts: list[dict[str, Tensor]] = []
    ends: list[Tensor] = []
    scales: list[Tensor] = []
    for begin in range(0, settings.rollouts, settings.rows):
        row = torch.arange(min(settings.rows, settings.rollouts - begin))
        pair = (row + begin) % len(pairs.positive)
        x = torch.randn(len(pair), *shape, generator=generator).to(device)
        low, high = settings.guidance
        w = (low + (high - low) * torch.rand(len(pair), generator=generator)).to(device)
        states, end = _rollout(network, x, conditions[pair], text[pair], w, settings.steps)
        parts += [
            {**state, "pair": pair, "row": row + begin, "step": row * 0 + k} for k, state in enumerate(states)
        ]
        scales.append(w.cpu())
        ends.append(end)
        on_rows(len(pair) * settings.steps)
    clean = torch.cat(ends) if clean is None else clean
    for begin in range(0, settings.fresh, settings.rows):
        some = torch.arange(begin, min(begin + settings.rows, settings.fresh)) % len(clean)
        made = _noised(network, clean[some], conditions[some], text[some], generator)
        parts.append({**made, "pair": some, "row": some * 0 - 1, "step": some * 0 - 1})
        on_rows(len(some))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["fresh"] = tensors["row"] < 0
    if ends:
        tensors |= {"end": torch.cat(ends).half(), "guidance": torch.cat(scales)}
    tensors |= {
        f"condition/{name}": value.half() if value.is_floating_point() else value
        for name, value in conditions.leaves.items()
    }
    tensors |= {"text": text.half(), "empty": torch.tensor([not words for words in pairs.negative])}
    return GuidanceStates(tensors, network.path)


def _rollout(
    network: TextNetwork, x: Tensor, conditions: Conditions, text: Tensor, w: Tensor, steps: int
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Return the states of a guided run with both answers, and its last x."""
    path, found = network.path, []
    edges = [path.train_steps * (1 - j / steps) for j in range(steps + 1)]
    grid = edges if path.flow else [float(round(edge)) for edge in edges]
    size = w.view(-1, *(1,) * (x.ndim - 1))
    for here, there in pairwise(grid):
        index, after = (torch.full((len(x),), value, dtype=torch.float64) for value in (here, there))
        positive, negative = network.pair(x, index, conditions, text)
        found.append(_kept(x, positive, negative, index))
        said = path.predict(negative + size * (positive - negative), x, index)
        x = path.jump(said, after)
    return found, x.cpu()


def _noised(
    network: TextNetwork, clean: Tensor, conditions: Conditions, text: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    n, path, device = len(clean), network.path, next(network.denoiser.parameters()).device
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # stratified
    index = (u[torch.randperm(n, generator=generator)] * path.train_steps).double().ceil().clamp(min=1)
    eps = torch.randn(clean.shape, generator=generator)
    x = path.noised(clean, eps, torch.zeros(n, dtype=torch.float64), index).to(device)
    return _kept(x, *network.pair(x, index, conditions, text), index)


def _kept(x: Tensor, positive: Tensor, negative: Tensor, index: Tensor) -> dict[str, Tensor]:
    return {
        "x": x.half().cpu(),
        "positive": positive.half().cpu(),
        "negative": negative.half().cpu(),
        "index": index,
    }


def states_key(pairs: Pairs, settings: StateSettings, told: dict[str, Any]) -> str:
    """Return a short hash of what states depend on, for the name of their file."""
    document = {**told, **asdict(settings), "pairs": [pairs.positive, pairs.negative]}
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()[:12]
