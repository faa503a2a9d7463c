"""Values: what an intermediate state is worth, in reward units.

The weights need r of a picture that does not exist yet. All values stand in for the soft value
log E[exp(strength r(x_0)) | x_t] / strength; a filter is exact with every one of them, a better one wastes
fewer particles. A value is a callable `value(state) -> [n]` numbers; `None` in a steerer is the reward of the
clean prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffplug.checks import check_number, check_whole
from diffplug.steering.engine.rule import State
from diffplug.steering.smc.weights import log_mean_exp


@dataclass(frozen=True, kw_only=True)
class ManySamples:
    """The log-mean-exp of the rewards of several guesses at the finished picture, for `draws` times the cost.

    log(mean_j exp(strength r_j)) / strength, with the strength inside the mean (fk_steering 3.3, after arXiv
    2501.06848). Guesses are drawn around the clean prediction with the variance that a Gaussian prior of
    standard deviation `spread` leaves, spread^2 sigma^2 / (alpha^2 spread^2 + sigma^2); 1 fits the latents of
    an autoencoder. Tokens are drawn from the network's own probabilities, places independently. All particles
    use the same noise (common random numbers), so the noise cannot change their ranking. Raises ValueError
    for draws < 1 and spread <= 0.
    """

    draws: int = 4
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("draws", self.draws)
        check_number("spread", self.spread)
        if not (math.isfinite(self.spread) and self.spread > 0):
            raise ValueError(f"spread={self.spread}: it must be a finite number above 0")

    def __call__(self, state: State) -> Tensor:
        """Return the value of every row, `[n]` float64."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * state.call)
        rated = torch.stack([state.rate(self._guess(state, generator)) for _ in range(self.draws)], -1)
        if state.strength == 0:
            return rated.mean(-1)
        return log_mean_exp(state.strength * rated) / state.strength

    def _guess(self, state: State, generator: torch.Generator) -> Tensor:
        if state.level is None:
            return drawn_tokens(state.x0, state.sample, state.output, generator)
        alpha, sigma = state.level.alpha, state.level.sigma
        width = self.spread * sigma / math.sqrt((alpha * self.spread) ** 2 + sigma**2)
        noise = torch.randn(1, *state.x0.shape[1:], generator=generator).to(state.x0)
        return state.x0 + width * noise


def drawn_tokens(x0: Tensor, sample: Tensor, output: Tensor, generator: torch.Generator) -> Tensor:
    """Return tokens like `x0`, drawn where `x0` fills in a place of `sample`; by the Gumbel maximum.

    output: logits `[n, codes, h, w]` for tokens `[n, h, w]`, or `[n, l, codes]` for `[n, l]`. The places that
    are open but whose most likely token is the mask itself do not exist: networks have no such code.
    """
    logits = output.movedim(1, -1) if sample.ndim == 3 else output
    uniform = torch.rand(1, *logits.shape[1:], generator=generator).clamp(1e-9, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    return torch.where(x0 != sample, (logits.float() + gumbel.to(logits.device)).argmax(-1), x0)
