"""Pictures drawn with all that training asks of them later: every state on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.network import Network
from diffplug.training.objective import Rows
from diffplug.training.preference.kernel import Kernel

__all__ = ["Paths", "rollout", "starts"]


@dataclass(frozen=True, eq=False)
class Paths:
    """states: [n, N + 1, ...] float32, from the first noise to the picture; x0: [n, N, ...] what each step
    predicted."""

    states: Tensor
    x0: Tensor

    def __len__(self) -> int:
        return len(self.states)

    @property
    def final(self) -> Tensor:
        """The last states [n, ...]."""
        return self.states[:, -1]


@torch.no_grad()
def rollout(
    network: Network, kernel: Kernel, conditions: Conditions, x: Tensor, z: Tensor, *, guidance: float = 1.0
) -> Paths:
    """Return paths from noise x [n, ...] with the steps' noise z [n, N, ...]; N evaluations a path.

    x is standard normal, whatever the scale of the scheduler's states.
    """
    states, said = [x * kernel.start], []
    for i in range(len(kernel)):
        step = torch.full((len(x),), i)
        said.append(kernel.predict(network, states[-1], step, conditions, guidance=guidance))
        states.append(kernel.sample(states[-1], said[-1], step, z[:, i]))
    return Paths(torch.stack(states, dim=1), torch.stack(said, dim=1))


def starts(
    rows: Rows, candidates: int, steps: int, shape: tuple[int, ...], shared: bool
) -> tuple[Tensor, Tensor]:
    """Return first noises [n, K, ...] and those of the steps [n, K, N, ...] of K candidates a row.

    shared: the candidates of a row begin at the same noise. All are functions of seed, update and row.
    """
    drawn = rows.normal(candidates, steps + 1, *shape)
    x, z = drawn[:, :, 0], drawn[:, :, 1:]
    return (x[:, :1].expand_as(x) if shared else x), z
