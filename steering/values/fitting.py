"""Fitting a value on a pipeline's own roll-outs (the MC variant of SVDD, arXiv 2408.08252)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffplug.intercept import StepCall, StepInterceptor, intercept_step
from diffplug.noise.families import level
from diffplug.plug import plug
from diffplug.steering.rules.best_of_n import BestOfN
from diffplug.steering.values.learned import LearnedValue, ValueCard, ValueNetwork, planes, scaled


@dataclass(frozen=True, eq=False)
class Rollouts:
    """States `[steps][n, ...]` scaled to unit variance, log-SNR / 2 of each step, and final rewards `[n]`."""

    states: list[Tensor]
    ells: list[float]
    rewards: Tensor


class _Record(StepInterceptor):
    """Keeps what every step begins with."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.ells: list[float] = []

    def on_step(self, call: StepCall) -> Any:
        """Return the step's own result."""
        x, ell = scaled(call.sample.detach().float().cpu(), level(call.scheduler, call.timestep))
        self.states.append(x.clone())
        self.ells.append(ell)
        return call.run()


def collect(
    pipe: Any, reward: Any, prompts: Sequence[str], *, copies: int, seed: int, **call: Any
) -> Rollouts:
    """Return unsteered roll-outs, `copies` for each prompt; costs as many pictures and rewards."""
    takes_text = "prompt" in inspect.signature(type(pipe).__call__).parameters
    parts: list[_Record] = []
    rewards: list[Tensor] = []
    for i, prompt in enumerate(prompts):
        steerer, record = BestOfN(reward, particles=copies, returns="all"), _Record()
        undo = intercept_step(pipe.scheduler, record)
        try:
            with plug(pipe, steerer):
                text = {"prompt": prompt} if takes_text else {}
                pipe(**{**text, "generator": torch.Generator().manual_seed(seed + i), **call})
        finally:
            undo()
        if steerer.report is None:
            raise RuntimeError("the roll-out left no report")
        parts.append(record)
        rewards.append(steerer.report.final_rewards.reshape(-1))
    steps = range(len(parts[0].states))
    states = [torch.cat([part.states[i] for part in parts]) for i in steps]
    return Rollouts(states, parts[0].ells, torch.cat(rewards))


def fit_value(
    pipe: Any,
    reward: Any,
    prompts: Sequence[str],
    *,
    copies: int = 16,
    strength: float = 0.0,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    width: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **call: Any,
) -> LearnedValue:
    """Return a value fitted to the pipeline's own roll-outs.

    Costs `copies` pictures and rewards per prompt, and the training of a small network.

    reward: as for a steerer. prompts: those that the value will serve; it does not read them. strength: 0
    regresses the expected reward (squared error, as published); lambda > 0 regresses the soft value
    log E[exp(lambda r)] / lambda with the loss exp(d) - d - 1, d = lambda (r - f), whose minimum it is.
    steps, batch_size, learning_rate: of Adam. width: of the network. call: further arguments of the pipeline,
    such as num_inference_steps: fit with those that steering will use. A fifth of the roll-outs is held out
    for `card.r2`. Roll-outs whose reward is NaN or infinite are left out. Raises ValueError for no prompts,
    fewer than 10 usable roll-outs, or a constant reward.
    """
    if not prompts or isinstance(prompts, str):
        raise ValueError("prompts must be a list of at least one text")
    data = usable(collect(pipe, reward, prompts, copies=copies, seed=seed, **call))
    states = torch.stack([planes(x) for x in data.states])  # [steps, n, c, h, w]
    card = _card(data, channels=states.shape[2], width=width, strength=strength)
    network = _fresh(card, seed)
    generator = torch.Generator().manual_seed(seed)
    n = len(data.rewards)
    order = torch.randperm(n, generator=generator)
    held, used = order[: max(n // 5, 2)], order[max(n // 5, 2) :]
    targets = ((data.rewards - card.mean) / card.std).float()
    _train(network, states, data.ells, targets, used, strength * card.std, steps, batch_size, learning_rate,
           generator, progress)  # fmt: skip
    r2 = _explained(network, states[:, held], data.ells, targets[held])
    if max(r2) <= 0:
        warnings.warn(
            f"the value explains nothing of held-out rewards at any step (r2 at best {max(r2):.2f}): "
            "selecting by it is no better than chance; raise copies, prompts or steps",
            stacklevel=2,
        )
    return LearnedValue(replace(card, r2=r2), network.eval())


def usable(data: Rollouts) -> Rollouts:
    """Return the roll-outs with a finite reward. Raises ValueError where they are too few or all alike."""
    finite = torch.isfinite(data.rewards)
    found = Rollouts([x[finite] for x in data.states], data.ells, data.rewards[finite])
    n = len(found.rewards)
    if n < 10:
        raise ValueError(f"{n} usable roll-outs are too few to fit and to hold out: raise copies or prompts")
    if float(found.rewards.std()) == 0:
        raise ValueError(
            f"the reward is {float(found.rewards[0]):g} for every roll-out: there is nothing to learn"
        )
    return found


def _card(data: Rollouts, *, channels: int, width: int, strength: float) -> ValueCard:
    return ValueCard(
        channels=channels,
        ndim=data.states[0].ndim,
        width=width,
        mean=float(data.rewards.mean()),
        std=float(data.rewards.std()),
        strength=float(strength),
    )


def _fresh(card: ValueCard, seed: int) -> ValueNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ValueNetwork(card)


def _train(
    network: ValueNetwork,
    states: Tensor,
    ells: list[float],
    targets: Tensor,
    used: Tensor,
    strength: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[int], None] | None,
) -> None:
    """Fit the network to random (step, roll-out) pairs."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    times = torch.tensor(ells)
    with torch.enable_grad():
        for _ in range(steps):
            rows = used[torch.randint(len(used), (batch_size,), generator=generator)]
            at = torch.randint(len(ells), (batch_size,), generator=generator)
            gap = targets[rows] - network(states[at, rows], times[at])
            if strength > 0:
                d = (strength * gap).clamp(max=10.0)  # beyond it the exponential would drown all others
                loss = (d.exp() - d - 1).mean() / strength**2
            else:
                loss = gap.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress(1)


@torch.no_grad()
def _explained(
    network: ValueNetwork, states: Tensor, ells: list[float], targets: Tensor
) -> tuple[float, ...]:
    """Return 1 - residual variance / variance for each step, on held-out roll-outs."""
    total = float(targets.var(correction=0))
    left = [
        float((targets - network(x, torch.full((len(x),), ell))).square().mean())
        for x, ell in zip(states, ells, strict=True)
    ]
    return tuple(1 - error / total if total else 0.0 for error in left)
