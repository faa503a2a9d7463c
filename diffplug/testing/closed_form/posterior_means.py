"""The mean of the clean sample, exact: of eight Gaussians in 32 dimensions, and of scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float, float], Tensor]
"""(x [n, d], alpha, sigma) -> the mean of the clean sample [n, d], exact."""


def round_mixture() -> tuple[int, Denoiser]:
    """(32, the posterior mean) of a mixture of eight round Gaussians in 32 dimensions."""
    g = torch.Generator().manual_seed(0)
    means = 0.8 * torch.randn(8, 32, generator=g, dtype=torch.float64)
    variances = (0.1 + 0.3 * torch.rand(8, generator=g, dtype=torch.float64)) ** 2
    log_weights = (0.5 * torch.randn(8, generator=g, dtype=torch.float64)).log_softmax(0)

    def x0(x: Tensor, alpha: float, sigma: float) -> Tensor:
        spread = alpha**2 * variances + sigma**2
        off = _square_distances(x, alpha * means)
        share = (log_weights - 16 * spread.log() - 0.5 * off / spread).softmax(-1)
        pull = share * sigma**2 / spread
        return pull @ means + (share * alpha * variances / spread).sum(-1, keepdim=True) * x

    return 32, x0


def digits() -> tuple[int, Denoiser]:
    """(64, the posterior mean) of the 1,797 digits of scikit-learn, each as likely, pixels in [-1, 1].

    Computed in float32: the largest of these models, twice as fast that way.
    """
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data).float() / 8 - 1

    def x0(x: Tensor, alpha: float, sigma: float) -> Tensor:
        off = _square_distances(x.float(), alpha * images)
        return (off.mul_(-0.5 / sigma**2).softmax(-1) @ images).double()

    return 64, x0


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    """[n, m] of [n, d] and [m, d]."""
    return x.square().sum(-1, keepdim=True) - 2 * x @ y.T + y.square().sum(-1)
