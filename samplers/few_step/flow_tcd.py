"""Strategic stochastic sampling for flow models: TCD's step, from deterministic to fully re-noised."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin  # for saved pipelines
from diffusers.utils.torch_utils import randn_tensor

from diffplug.noise.position import host, step_index


class FlowMatchTCDScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow matching with the stochasticity of TCD (arXiv 2402.19159): eta between Euler and LCM.

    A step from sigma to the next one, rho, jumps to rho' = (1 - eta) rho and adds the noise that is missing:

        x_rho' = x + (rho' - sigma) v
        x_rho  = a x_rho' + sqrt(rho^2 - a^2 rho'^2) z,      a = (1 - rho) / (1 - rho')

    so that the noise has standard deviation rho for every eta. eta = 0 is `FlowMatchEulerDiscreteScheduler`,
    eta = 1 `FlowMatchLCMScheduler`, both exactly. Order 1, one evaluation a step, one draw of noise where eta
    > 0. Everything else (shift, custom sigmas, mu) is the parent's.
    """

    _step_index: int | None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        eta: float = 0.3,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, allowed is 0 (deterministic) to 1 (all noise new)")
        if invert_sigmas:
            raise ValueError(
                "invert_sigmas runs from noise to picture the other way: use the stock scheduler"
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **ignored: Any,
    ) -> Any:
        """Return the sample at the next sigma, in the dtype of `model_output`.

        ignored: arguments of the parent's step that only its own stochastic mode reads.
        """
        i = step_index(self, timestep) if self._step_index is None else self._step_index
        self._step_index = i + 1
        x = self._moved(model_output, sample.to(torch.float32), i, generator).to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _moved(self, v: torch.Tensor, x: torch.Tensor, i: int, generator: Any) -> torch.Tensor:
        """Return x of step i one sigma further, in float32."""
        eta = self.config["eta"]
        if eta == 0:
            return x + (self.sigmas[i + 1] - self.sigmas[i]) * v
        lower, lift, noise = renoised(host(self.sigmas, i + 1), eta)
        x = lift * (x + (lower - self.sigmas[i]) * v)
        if noise == 0:
            return x
        return x + noise * randn_tensor(v.shape, generator=generator, device=v.device, dtype=x.dtype)


def renoised(rho: float, eta: float) -> tuple[float, float, float]:
    """Return rho', the factor a and the deviation of the noise of a step that ends at noise level rho."""
    lower = (1.0 - eta) * rho
    if lower == rho:
        return rho, 1.0, 0.0
    lift = (1.0 - rho) / (1.0 - lower)
    return lower, lift, math.sqrt(max(rho * rho - (lift * lower) ** 2, 0.0))
