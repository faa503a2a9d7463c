"""DDIM on a given list of timesteps: the next time is the next entry of the list."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin  # for saved pipelines
from diffusers.utils.torch_utils import randn_tensor

from diffplug.noise.position import find


class ListedDDIMScheduler(DDIMScheduler):
    """DDIM (arXiv 2010.02502) that takes `timesteps=` and steps from each entry of the list to the next.

    Diffusers' DDIM takes no list, and steps from t to t - 1000 // n: with 3, 6, 7, 9 or 12 trailing steps
    that is a timestep beside the next one, where a distilled model was never trained. On timesteps that are
    evenly spaced the two are equal bit for bit. The last step ends at `final_alpha_cumprod`, as there.

    Order 1, one evaluation a step; `eta` as in DDIM. Takes epsilon, v and x0 predictions.
    """

    _step_index: int | None = None
    _begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step that a run begins with, where a pipeline set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the next run at this entry of the list (image-to-image)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
    ) -> None:
        """Set the list: `timesteps`, falling integers in [0, 1000), or the configured spacing of a number.

        Raises ValueError for lists that do not fall, leave the training range or have another length.
        """
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
        else:
            values = _checked(timesteps, num_inference_steps, self.config.num_train_timesteps)
            self.num_inference_steps = len(values)
            self.timesteps = torch.from_numpy(values).to(device)
        self._list = [*self.timesteps.tolist(), -1]
        self._step_index = self._begin_index = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the sample at the next timestep of the list (equations 12 and 16 of the paper)."""
        if self.num_inference_steps is None:
            raise ValueError("the scheduler has no timesteps yet: call set_timesteps first")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = find(self, timestep) if begin is None else begin
        t, t_next = self._list[self._step_index], self._list[self._step_index + 1]
        self._step_index += 1
        x0, eps = self._predictions(model_output, sample, t, use_clipped_model_output)
        abar_next = self._abar(t_next)
        std = eta * self._get_variance(t, t_next) ** 0.5
        direction = (1 - abar_next - std**2) ** 0.5 * eps
        x = abar_next**0.5 * x0 + direction
        if eta > 0:
            x = x + std * _noise(model_output, generator, variance_noise)
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def _abar(self, t: int) -> torch.Tensor:
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod

    def _predictions(
        self, output: torch.Tensor, x: torch.Tensor, t: int, rederive: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x0, clipped as configured, and eps at timestep t; `rederive`: eps from the clipped x0."""
        abar = self._abar(t)
        alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        kind = self.config.prediction_type
        if kind == "epsilon":
            x0, eps = (x - sigma * output) / alpha, output
        elif kind == "sample":
            x0, eps = output, (x - alpha * output) / sigma
        elif kind == "v_prediction":
            x0, eps = alpha * x - sigma * output, alpha * output + sigma * x
        else:
            raise ValueError(
                f"prediction_type is {kind!r}: set epsilon, sample or v_prediction in the configuration"
            )
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0, (x - alpha * x0) / sigma if rederive else eps


def _checked(timesteps: Any, count: int | None, top: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    raw = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
    if not raw or any(t != int(t) for t in raw):
        raise ValueError(f"timesteps are {raw}: give whole numbers, largest first")
    values = np.asarray(raw, dtype=np.int64)
    if (np.diff(values) >= 0).any() or values[0] >= top or values[-1] < 0:
        raise ValueError(f"timesteps are {raw}: they have to fall, from at most {top - 1} to at least 0")
    if count is not None and count != len(values):
        raise ValueError(f"num_inference_steps={count}, but {len(values)} timesteps: leave one of them out")
    return values


def _noise(output: torch.Tensor, generator: Any, given: torch.Tensor | None) -> torch.Tensor:
    if given is None:
        return randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
    if generator is not None:
        raise ValueError("generator and variance_noise were given: leave one of them out")
    return given
