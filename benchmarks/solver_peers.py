"""The multistep schedulers of Diffusers as they come, by name: whom `benchmarks.solvers` compares with.

Left out: those for models of another kind (EDM, flow matching, stable audio), and those that add noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Peer:
    """A scheduler of Diffusers and its options.

    clean: whether its last node has no noise at all, instead of the least of training; both kinds are judged
    by a truth that ends where they do. mixture_only: no pipeline can run it.
    """

    family: str
    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    clean: bool = False
    mixture_only: bool = False

    def on_levels(self, levels: NoiseLevels) -> Any:
        """The scheduler for Stable Diffusion's noise levels."""
        if self.scheduler == "IPNDMScheduler":
            return VelocityIPNDM(levels)
        return getattr(diffusers, self.scheduler)(**{**SD, **self.config})

    def for_pipeline(self, pipe: Any) -> Any:
        """The scheduler for a pipeline's model."""
        return getattr(diffusers, self.scheduler).from_config(pipe.scheduler.config, **self.config)


class VelocityIPNDM:
    """Diffusers' IPNDMScheduler for a noise prediction: it takes velocities, and is handed its nodes."""

    init_noise_sigma = 1.0

    def __init__(self, levels: NoiseLevels) -> None:
        self.levels = levels

    def set_timesteps(self, steps: int) -> None:
        nodes = Nodes(kind="name", name="linspace", final="sigma_min").sigmas(self.levels, steps)
        self.at = [self.levels.level(float(sigma)) for sigma in nodes]
        self.inner = diffusers.IPNDMScheduler(trained_betas=[level.sigma for level in self.at])
        self.inner.set_timesteps(steps)
        self.inner.set_begin_index(0)
        self.timesteps = torch.from_numpy(self.levels.time_of_sigma(nodes[:-1]))

    def scale_model_input(self, x: Tensor, _: Any) -> Tensor:
        return x

    def step(self, eps: Tensor, t: Any, x: Tensor) -> Any:
        at = self.at[self.inner.step_index or 0]
        clean = (x - at.sigma * eps) / at.alpha
        return self.inner.step(at.alpha * eps - at.sigma * clean, t, x)


def steps_for(scheduler: Any, evaluations: int) -> int:
    """The most steps that cost no more evaluations; set. (PNDM evaluates once more than it is told.)"""
    for steps in range(evaluations, 0, -1):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) <= evaluations:
            return steps
    raise ValueError(f"{type(scheduler).__name__} has no run of {evaluations} evaluations: leave it out")


_EVEN = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
_SINGLE = {"final_sigmas_type": "sigma_min", "lower_order_final": True}
_TRAILING = {"timestep_spacing": "trailing"}
_OLD = {**_TRAILING, "set_alpha_to_one": False}
_GRIDS: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
_LOG_UNIFORM = {"use_lu_lambdas": True}


def _without_noise_left(config: dict[str, Any]) -> dict[str, Any]:
    """Grids over sigma end at the least sigma already: with sigma_min the last step would have length 0."""
    return {**config, "final_sigmas_type": "zero", "timestep_spacing": "linspace"}


def _peers() -> dict[str, Peer]:
    plus, unipc = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
    single, deis, sa = "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "SASolverScheduler"
    third = {"solver_order": 3}
    found = {
        "DDIM": Peer("DDIM", "DDIMScheduler", {**_OLD, "clip_sample": False}),
        "PNDM": Peer("PNDM", "PNDMScheduler", {**_OLD, "skip_prk_steps": True}),
        "PNDM, leading": Peer("PNDM", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        "LMS": Peer("LMS", "LMSDiscreteScheduler", _TRAILING, clean=True),
        "LMS, Karras": Peer("LMS", "LMSDiscreteScheduler", _GRIDS["Karras"], clean=True),
        "iPNDM": Peer("iPNDM", "IPNDMScheduler", mixture_only=True),
        "DEIS-2": Peer("DEIS", deis),
        "DEIS-3": Peer("DEIS", deis, third),
        "DEIS-2, Karras": Peer("DEIS", deis, _GRIDS["Karras"]),
        "SA-Solver, no noise": Peer("SA-Solver", sa, {"tau_func": _no_noise}),
        "SA-Solver 3, no noise": Peer(
            "SA-Solver", sa, {"tau_func": _no_noise, "predictor_order": 3, "corrector_order": 3}
        ),
        "DPM-Solver++ 2S": Peer("DPM-Solver++", single, _SINGLE),
        "DPM-Solver++ 3S": Peer("DPM-Solver++", single, {**_SINGLE, **third}),
        "DPM-Solver 2M": Peer("DPM-Solver++", plus, {**_EVEN, "algorithm_type": "dpmsolver"}),
        "DPM-Solver++ 2M": Peer("DPM-Solver++", plus, _EVEN),
        "DPM-Solver++ 2M, Heun": Peer("DPM-Solver++", plus, {**_EVEN, "solver_type": "heun"}),
        "DPM-Solver++ 2M, trailing": Peer("DPM-Solver++", plus, {**_EVEN, **_TRAILING}),
        "DPM-Solver++ 3M": Peer("DPM-Solver++", plus, {**_EVEN, **third}),
        "DPM-Solver++ 2M, log-uniform": Peer(
            "DPM-Solver++", plus, _without_noise_left(_LOG_UNIFORM), clean=True
        ),
        "UniPC-2": Peer("UniPC", unipc, _EVEN),
        "UniPC-2, bh1": Peer("UniPC", unipc, {**_EVEN, "solver_type": "bh1"}),
        "UniPC-2, no first corrector": Peer("UniPC", unipc, {**_EVEN, "disable_corrector": [0]}),
        "UniPC-2, trailing": Peer("UniPC", unipc, {**_EVEN, **_TRAILING}),
        "UniPC-3": Peer("UniPC", unipc, {**_EVEN, **third}),
        "UniPC-3, bh1": Peer("UniPC", unipc, {**_EVEN, **third, "solver_type": "bh1"}),
    }
    for name, grid in _GRIDS.items():
        config = _without_noise_left(grid)
        found[f"DPM-Solver++ 2M, {name}"] = Peer("DPM-Solver++", plus, config, clean=True)
        found[f"UniPC-2, {name}"] = Peer("UniPC", unipc, config, clean=True)
    return found


def _no_noise(_: Any) -> int:
    return 0


PEERS = _peers()
