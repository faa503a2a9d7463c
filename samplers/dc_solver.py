"""DC-Solver: UniPC that compensates its stored outputs by one ratio per step (arXiv 2409.03755)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Diffusers loads a saved foreign scheduler only if its module has an attribute named SchedulerMixin.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from diffplug.samplers.compensation import (
    MAX_DC_ORDER,
    check_step_count,
    checked_ratios,
    compensate,
    compensation_weights,
)
from diffplug.samplers.given_grid import (
    FloatArray,
    check_length,
    check_request,
    checked_levels,
    is_pipeline_default,
    vp_sigmas,
    vp_timesteps,
)

CHANGED_DEFAULTS: dict[str, Any] = {
    "solver_order": 2,
    "solver_type": "bh2",
    "final_sigmas_type": "sigma_min",
    "disable_corrector": [0],
}
OWN_DEFAULTS: dict[str, Any] = {"dc_ratios": None, "dc_order": 2, "dc_variable": "timestep"}
DC_VARIABLES = ("timestep", "lambda")
TINIEST_ALPHA = 2.0**-24  # 1 - sigma of a flow model for the float32 sigma just below 1


def _constructor_signature() -> inspect.Signature:
    """UniPC's constructor with other defaults and three more parameters; follows the installed Diffusers."""
    unipc = inspect.signature(UniPCMultistepScheduler.__init__).parameters.values()
    changed = [p.replace(default=CHANGED_DEFAULTS.get(p.name, p.default)) for p in unipc]
    own = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in OWN_DEFAULTS.items()]
    return inspect.Signature([*changed, *own])


CONSTRUCTOR = _constructor_signature()


def _with_constructor_signature(init: Callable[..., None]) -> Callable[..., None]:
    init.__signature__ = CONSTRUCTOR  # type: ignore[attr-defined]
    return init


class DCSolverScheduler(UniPCMultistepScheduler):
    """A Diffusers scheduler that samples with DC-Solver; without ratios it is UniPC, bit for bit.

    Takes every option of `UniPCMultistepScheduler`, and three more:
      dc_ratios: one number per step, searched for one model, step count and guidance scale; 1.0 changes
      nothing, more
        than 1 extrapolates towards less noise. Ratio i belongs to node i of the grid, also when a run
        starts later (img2img). None: no compensation.
      dc_order: K in 1..3; a compensation mixes the last K + 1 outputs, so the first K ratios have to be 1.
      dc_variable: "timestep" (the paper's) or "lambda" (log alpha - log sigma): the variable of the
      interpolation.

    Defaults that differ from UniPC's: disable_corrector=[0], final_sigmas_type="sigma_min" (flow models
    keep "zero": their grid has no smallest sigma, and UniPC would repeat the last one and waste an
    evaluation). Flow models are told their exact, fractional timesteps (UniPC cuts them to integers).
    Raises ValueError for options that contradict each other or would silently do nothing.
    """

    _dc_weights: dict[int, tuple[float, ...]]
    older_outputs: list[torch.Tensor]

    @register_to_config
    @_with_constructor_signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = CONSTRUCTOR.bind(self, *args, **kwargs)
        given_names = set(given.arguments)
        given.apply_defaults()
        options = {name: value for name, value in given.arguments.items() if name != "self"}
        if options["use_flow_sigmas"] and "final_sigmas_type" not in given_names:
            options["final_sigmas_type"] = "zero"
        options["disable_corrector"] = list(options["disable_corrector"])
        _check_options(options)
        ratios = checked_ratios(options["dc_ratios"], options["dc_order"])
        super().__init__(**{name: value for name, value in options.items() if name not in OWN_DEFAULTS})
        self.register_to_config(dc_ratios=ratios)
        self._reset()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Start a run of so many steps, or on a given grid; forgets everything of the run before.

        timesteps, sigmas: lists, arrays or tensors of N numbers, largest first, without the terminal node.
        Given sigmas are used as they are (in float32): sigma / alpha for VP models, sigma in (0, 1] for
        flow models. The exception is the grid 1, 1 - 1/N, ..., 1/N, which flow pipelines send by default
        and expect to be shifted.
        mu: strength of dynamic shifting, for flow models with use_dynamic_shifting; a given grid is not
        shifted. Raises ValueError for a grid that does not decrease, and when the DC ratios are for another
        number of steps.
        """
        check_request(num_inference_steps, timesteps, sigmas)
        grid = None
        if timesteps is not None or sigmas is not None:
            grid = self._given_grid(timesteps, sigmas)
            check_length(num_inference_steps, len(grid[0]))
        if grid is None:
            super().set_timesteps(num_inference_steps, device=device, mu=mu)
        elif sigmas is not None and self.config.use_flow_sigmas and is_pipeline_default(grid[0]):
            super().set_timesteps(device=device, sigmas=grid[0], mu=mu)
            grid = None
        else:
            super().set_timesteps(len(grid[0]), device=device, mu=1.0 if mu is None else mu)
        self._set_nodes(grid, device)
        self._reset()

    def _given_grid(self, timesteps: Any, sigmas: Any) -> tuple[FloatArray, FloatArray]:
        """(sigmas, timesteps) of the N nodes that a person gave as one of the two."""
        train_steps = self.config.num_train_timesteps
        flow, table = self.config.use_flow_sigmas, self._training_sigmas()
        if sigmas is not None:
            levels = checked_levels("sigmas", sigmas, lowest=0.0, highest=1.0 if flow else np.inf)
            return levels, levels * train_steps if flow else vp_timesteps(levels, table)
        lowest = np.finfo(np.float32).tiny if flow else 0.0
        times = checked_levels("timesteps", timesteps, lowest=lowest, highest=train_steps - (not flow))
        return times / train_steps if flow else vp_sigmas(times, table), times

    def _training_sigmas(self) -> FloatArray:
        """sigma / alpha [T] of every training timestep."""
        cumprod = self.alphas_cumprod.cpu()
        levels: FloatArray = (((1 - cumprod) / cumprod) ** 0.5).numpy()
        return levels

    def _set_nodes(
        self, grid: tuple[FloatArray, FloatArray] | None, device: str | torch.device | None
    ) -> None:
        """Put a given grid in the place of UniPC's; give flow models their fractional timesteps."""
        if grid is not None:
            self.sigmas = torch.from_numpy(np.append(grid[0], self._terminal(grid[0])).astype(np.float32))
        if self.config.use_flow_sigmas:
            times = self.sigmas[:-1].double() * self.config.num_train_timesteps
            self.timesteps = times.float().to(device)
        elif grid is not None:
            whole = bool((grid[1] == np.round(grid[1])).all())
            self.timesteps = torch.from_numpy(grid[1].astype(np.int64 if whole else np.float32)).to(device)

    def _terminal(self, sigmas: FloatArray) -> float:
        """The last node's sigma after a given grid. Raises ValueError when the grid already lies below it."""
        if self.config.final_sigmas_type == "zero":
            return 0.0
        end = float(sigmas[-1] if self.config.use_flow_sigmas else self._training_sigmas()[0])
        if np.float32(sigmas[-1]) <= end and not self.config.use_flow_sigmas:
            raise ValueError(
                f"the grid ends at sigma {sigmas[-1]:g}, not above the terminal {end:g} of "
                f"final_sigmas_type='sigma_min': leave out its last node, or set final_sigmas_type='zero'"
            )
        return end

    def _reset(self) -> None:
        """Forget a run, and compile the ratios for the grid that is set now."""
        self.older_outputs = []
        self.timestep_list = [None] * self.config.solver_order
        self.this_order = 0
        self._dc_weights = {}
        self._clean_levels: tuple[float, float] | None = None
        if self.num_inference_steps is None:
            return
        sigmas = self.sigmas.double()
        alphas, noises = self._sigma_to_alpha_sigma_t(sigmas[:-1])
        if sigmas[-1] == 0:
            self._clean_levels = float(alphas[-1]), float(noises[-1])
        if self.config.dc_ratios is not None:
            check_step_count(self.config.dc_ratios, self.num_inference_steps)
            times = self.timesteps if self.config.dc_variable == "timestep" else torch.log(alphas / noises)
            self._dc_weights = compensation_weights(
                times.double().tolist(), self.config.dc_ratios, self.config.dc_order
            )

    def per_sample_state(self) -> tuple[str, ...]:
        """Names of the attributes that hold one row per sample: what particle methods have to reorder."""
        return ("model_outputs", "older_outputs", "last_sample")

    def _sigma_to_alpha_sigma_t(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) of a stored sigma; flow models get no alpha of 0, so that its log exists."""
        alpha, noise = super()._sigma_to_alpha_sigma_t(sigma)
        return (alpha.clamp(min=TINIEST_ALPHA) if self.config.use_flow_sigmas else alpha), noise

    def index_for_timestep(
        self, timestep: int | float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """The first node at this timestep. Raises ValueError when the grid has no such node."""
        nodes = self.timesteps if schedule_timesteps is None else schedule_timesteps
        distance = (nodes - timestep).abs()
        index = int(distance.argmin())
        if float(distance[index]) > 0.5:
            raise ValueError(
                f"timestep {float(timestep):g} is not on the grid {nodes.tolist()}: pass one of its nodes"
            )
        return index

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add_noise` under the name and in the argument order that flow img2img pipelines use."""
        if noise is None:
            raise ValueError("scale_noise got no noise: pass noise= of the sample's shape")
        return self.add_noise(sample, noise, torch.atleast_1d(timestep))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> SchedulerOutput | tuple[torch.Tensor, ...]:
        """The sample at the next node: correct, compensate the new output, predict.

        model_output, sample: [n, ...] of one shape; the result has the sample's dtype. Costs no network
        call and, past the first step, no device synchronisation. generator: not used, the solver adds no
        noise; some pipelines (DDPM) pass one to every scheduler. Raises ValueError after the last node.
        """
        steps = self.num_inference_steps
        if steps is not None and self._step_index is not None and self._step_index >= steps:
            raise ValueError(f"all {steps} steps are done: call set_timesteps before the next run")
        self._keep_oldest_output()
        return super().step(model_output, timestep, sample, return_dict=return_dict)

    def _keep_oldest_output(self) -> None:
        """Save the output that UniPC is about to drop, if a compensation looks further back."""
        kept = self.config.dc_order + 1 - self.config.solver_order
        if self._dc_weights and kept > 0 and self.model_outputs[0] is not None:
            self.older_outputs = [*self.older_outputs, self.model_outputs[0]][-kept:]

    def multistep_uni_p_bh_update(
        self, model_output: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """UniPC's predictor, after the newest output has been replaced by the compensated one."""
        index = self._step_index
        if index in self._dc_weights:
            self._compensate(self._dc_weights[index])
        if self._clean_levels is not None and index + 1 == self.num_inference_steps and not self.solver_p:
            return self._clean_sample(kwargs["sample"], *self._clean_levels)
        return super().multistep_uni_p_bh_update(model_output, *args, **kwargs)

    def _compensate(self, weights: tuple[float, ...]) -> None:
        """Replace the newest output; does nothing while a run (img2img) has too short a history."""
        history = [m for m in (*self.older_outputs, *self.model_outputs) if m is not None][::-1]
        if len(history) < len(weights):
            return
        output = compensate(history[: len(weights)], weights)
        if self.config.thresholding and self.predict_x0:
            output = self._threshold_sample(output)
        self.model_outputs[-1] = output

    def _clean_sample(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """The limit of a predictor step to sigma 0, where UniPC's own formula is 0 times infinity.

        alpha, sigma: levels of `sample`. The limit is the newest clean prediction, of any solver order.
        """
        newest = self.model_outputs[-1]
        if self.predict_x0:
            return newest.to(sample.dtype)
        wide = torch.promote_types(sample.dtype, torch.float32)
        return ((sample.to(wide) - sigma * newest.to(wide)) / alpha).to(sample.dtype)


def _check_options(options: dict[str, Any]) -> None:
    order, variable, predicts = options["dc_order"], options["dc_variable"], options["prediction_type"]
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_DC_ORDER:
        raise ValueError(f"dc_order={order!r}: allowed are 1 to {MAX_DC_ORDER}, the paper uses 2")
    if variable not in DC_VARIABLES:
        raise ValueError(f"dc_variable={variable!r}: allowed are {' and '.join(map(repr, DC_VARIABLES))}")
    if predicts == "flow_prediction" and not options["use_flow_sigmas"]:
        raise ValueError("prediction_type='flow_prediction' needs use_flow_sigmas=True: set both, or neither")
    if predicts == "flow_prediction" and not options["predict_x0"]:
        raise ValueError(
            "prediction_type='flow_prediction' works with predict_x0=True only: leave predict_x0 out"
        )
    if options["dc_ratios"] is not None and options["solver_p"] is not None:
        raise ValueError(
            "dc_ratios do nothing to a solver_p, which keeps its own history: give one of the two"
        )
