"""Log weights of particle groups: float64, on the host, never exponentiated before they are centred.

Everywhere `logw` is `[..., k]`: unnormalised log weights of the k particles of a group. NaN counts as minus
infinity (a dead particle); a group in which every particle is dead has no weights and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_log_weights(logw: Tensor) -> Tensor:
    """Return `logw` as float64, NaN as -inf. Raises ValueError for +inf and for a group that is all dead."""
    logw = torch.as_tensor(logw, dtype=torch.float64)
    logw = torch.where(torch.isnan(logw), -torch.inf, logw)
    if logw.ndim == 0 or logw.shape[-1] == 0:
        raise ValueError(f"log weights have shape {tuple(logw.shape)}: give [k] or [groups, k] with k >= 1")
    if bool((logw == torch.inf).any()):
        raise ValueError("a log weight is +inf: weights must be finite, -inf or NaN; scale the reward down")
    if bool((logw == -torch.inf).all(-1).any()):
        raise ValueError("every particle of a group has weight zero: nothing is left to choose from")
    return logw


def normalised(logw: Tensor) -> Tensor:
    """Return the weights that sum to 1 in each group, `[..., k]` float64."""
    return torch.softmax(as_log_weights(logw), dim=-1)


def ess(logw: Tensor) -> Tensor:
    """Return the effective sample size 1 / sum W^2 of each group, in [1, k]; `[...]` float64."""
    logw = as_log_weights(logw)
    return (2 * torch.logsumexp(logw, -1) - torch.logsumexp(2 * logw, -1)).exp()


def log_mean_exp(logw: Tensor) -> Tensor:
    """Return log(mean(exp(logw))) of each group; `[...]` float64, -inf where every particle is dead."""
    logw = torch.as_tensor(logw, dtype=torch.float64)
    k = torch.tensor(float(logw.shape[-1]), dtype=torch.float64)
    return torch.logsumexp(torch.where(torch.isnan(logw), -torch.inf, logw), -1) - k.log()
