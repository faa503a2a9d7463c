"""A network that is exactly right: the one for Gaussian data, known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler mixes x = (1 - s) x0 + s eps instead of keeping alpha^2 + sigma^2 = 1."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    return bool(scheduler.config.get("use_flow_sigmas")) or any("FlowMatch" in name for name in names)


def network_levels(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """(alpha, sigma) of the network's input at a timestep, after `scale_model_input`; float64.

    Fractional timesteps lie on the straight line between the training values of sigma / alpha.
    """
    t = float(timestep)
    if is_flow(scheduler):
        s = t / scheduler.config.num_train_timesteps
        return 1.0 - s, s
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has neither alphas_cumprod nor flow sigmas: the kit needs one"
        )
    cumprod = scheduler.alphas_cumprod.double().cpu().numpy()
    ratio = float(np.interp(t, np.arange(len(cumprod)), np.sqrt((1 - cumprod) / cumprod)))
    alpha = (1.0 + ratio**2) ** -0.5
    return alpha, ratio * alpha


@dataclass(frozen=True, kw_only=True)
class GaussianModel:
    """The exact network for data N(mean, variance), of the scheduler's prediction type.

    mean: [c, h, w]. variance: a number >= 0; 0 is a point mass, which any consistent solver samples exactly.
    """

    mean: Tensor
    variance: float = 0.25

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The posterior mean of the clean sample given x = alpha x0 + sigma eps."""
        mean = self.mean.to(x)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return mean + gain * (x - alpha * mean)

    def __call__(self, scheduler: Any, x: Tensor, timestep: Any) -> Tensor:
        """The network's output for x: [n, c, h, w], in x's dtype; computed in float64."""
        alpha, sigma = network_levels(scheduler, timestep)
        wide = x.double()
        x0 = self.x0(wide, alpha, sigma)
        eps = (wide - alpha * x0) / sigma
        default = "flow_prediction" if is_flow(scheduler) else "epsilon"
        outputs = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": alpha * eps - sigma * x0,
            "flow_prediction": eps - x0,
        }
        return outputs[scheduler.config.get("prediction_type", default)].to(x.dtype)
