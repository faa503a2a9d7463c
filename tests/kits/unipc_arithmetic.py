"""UniPC's arithmetic, operation by operation as Diffusers has it, in numbers of any precision.

Diffusers computes every number of a step (alpha, sigma, lambda, h, the weights) in the type of its stored
sigmas, float32, also for float64 samples. Here the type can be chosen: with float32 the results are those of
`UniPCMultistepScheduler` bit for bit, with float64 they are what UniPC means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class UniPCArithmetic:
    """Updates between nodes of a grid; sigmas: [N + 1], in the type that all numbers are to have."""

    sigmas: Tensor
    kind: str = "bh2"
    predict_x0: bool = True

    def level(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, lambda) of a node."""
        alpha = 1 / ((self.sigmas[i] ** 2 + 1) ** 0.5)
        sigma = self.sigmas[i] * alpha
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)

    def convert(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        """What the history holds of a noise prediction."""
        alpha, sigma, _ = self.level(i)
        return (x - sigma * output) / alpha if self.predict_x0 else output

    def update(
        self, s: int, x: Tensor, history: list[Tensor], order: int, new: Tensor | None = None
    ) -> Tensor:
        """From node s to s + 1; history: predictions at s, s - 1, ...; new: at s + 1, for the corrector."""
        (alpha_s, sigma_s, lam_s), (alpha_t, sigma_t, lam_t) = self.level(s), self.level(s + 1)
        h = lam_t - lam_s
        ratios = [(self.level(s - k)[2] - lam_s) / h for k in range(1, order)]
        differences = [(history[k] - history[0]) / ratio for k, ratio in enumerate(ratios, 1)]
        hh = -h if self.predict_x0 else h
        bh = hh if self.kind == "bh1" else torch.expm1(hh)
        weights = self.weights(ratios, hh, bh, order, corrector=new is not None).to(x.dtype)
        rest: Any = 0
        if differences:
            rest = torch.einsum("k,bkc...->bc...", weights[: order - 1], torch.stack(differences, dim=1))
        if new is not None:
            rest = rest + weights[-1] * (new - history[0])
        keep, scale = (sigma_t / sigma_s, alpha_t) if self.predict_x0 else (alpha_t / alpha_s, sigma_t)
        return (keep * x - scale * torch.expm1(hh) * history[0] - scale * bh * rest).to(x.dtype)

    def weights(self, ratios: list[Tensor], hh: Tensor, bh: Tensor, order: int, *, corrector: bool) -> Tensor:
        """The solution of UniPC's linear system, or the one half that stands for it in the lowest case."""
        if order == (1 if corrector else 2):
            return torch.full((1,), 0.5)
        nodes = torch.stack([*ratios, torch.ones_like(hh)])
        phi, factorial, right = torch.expm1(hh) / hh - 1, 1, []
        for k in range(1, order + 1):
            right.append(phi * factorial / bh)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        left = torch.stack([nodes**k for k in range(order)])
        n = order if corrector else order - 1
        return torch.linalg.solve(left[:n, :n], torch.stack(right)[:n])

    def run(
        self, network: Callable[[Tensor, int], Tensor], x: Tensor, order: int, off: tuple[int, ...]
    ) -> Tensor:
        """A whole run with correctors everywhere but after the steps in `off`."""
        steps, history, anchor, used = len(self.sigmas) - 1, [], x, 0
        for i in range(steps):
            raw = self.convert(network(x, i), x, i)
            if i > 0 and i - 1 not in off:
                x = self.update(i - 1, anchor, history, used, new=raw)
            history, anchor = [raw, *history], x
            used = min(order, i + 1, steps - i)
            x = self.update(i, x, history, used)
        return x
