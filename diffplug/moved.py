"""Modules that have moved: their old names work for one release, with a warning."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "batches": "recipe.batches",
    "cli_options": "cli.options",
    "cli_search": "cli.commands.search",
    "cli_search_files": "cli.commands.schedule",
    "console": "cli.console",
    "denoiser": "network.denoiser",
    "doctor": "cli.environment",
    "gradients": "network.gradients",
    "guided_halves": "scheduler.guided_halves",
    "memory": "network.memory",
    "network_cache": "network.cache",
    "noise_index": "noise.position",
    "noise_kernels": "noise.gaussian_step",
    "noise_level": "noise.noise_level",
    "noise_prediction": "noise.prediction",
    "parameters_text": "recipe.parameters_text",
    "pipeline_quirks": "scheduler.pipeline_quirks",
    "png": "making.png",
    "prompt_file": "recipe.prompt_file",
    "recipe_text": "recipe.text",
    "report": "network.denoiser",
    "rewards.blip": "rewards.networks.blip",
    "rewards.checkpoints": "rewards.networks.checkpoints",
    "rewards.clip_network": "rewards.networks.clip_network",
    "rewards.preprocess": "rewards.networks.preprocess",
    "rewards.shapes_clip_model": "rewards.networks.shapes_clip_model",
    "samplers.compensation": "samplers.solver.compensation",
    "samplers.compiler": "samplers.solver.compile",
    "samplers.dc_solver_plug": "samplers.dc_solver.plug",
    "samplers.decisions": "samplers.schedule.steps",
    "samplers.exponential": "samplers.solver.exponential",
    "samplers.fitted": "samplers.solver.attach",
    "samplers.given_grid": "samplers.solver.user_grid",
    "samplers.grids": "samplers.schedule.grids",
    "samplers.node_scheduler": "samplers.solver.image_to_image",
    "samplers.nodes": "samplers.schedule.nodes",
    "samplers.noise_levels": "samplers.model_noise",
    "samplers.origin": "samplers.fingerprint",
    "samplers.polynomial": "samplers.dc_solver.polynomial",
    "samplers.presets": "samplers.schedule.presets",
    "samplers.published": "samplers.usf",
    "samplers.ratio_book": "samplers.dc_solver.ratios",
    "samplers.run_grid": "samplers.solver.run_grid",
    "samplers.schedule_book": "samplers.library",
    "samplers.schedule_json": "samplers.schedule.schedule",
    "samplers.search.climb": "samplers.search.stages",
    "samplers.search.compensation": "samplers.search.search",
    "samplers.search.contest": "samplers.search.comparison",
    "samplers.search.decision_stage": "samplers.search.decisions.stage",
    "samplers.search.descent": "samplers.search.gradient_stage",
    "samplers.search.differentiable": "network.gradients",
    "samplers.search.evolution": "samplers.search.decisions.evolution",
    "samplers.search.fit": "samplers.search.least_squares",
    "samplers.search.loss": "samplers.search.problem",
    "samplers.search.measure": "samplers.search.model_statistics",
    "samplers.search.memo": "network.cache",
    "samplers.search.mutation": "samplers.search.decisions.evolution",
    "samplers.search.plan": "samplers.search.pipeline_problem",
    "samplers.search.plots": "demos.schedule_plots",
    "samplers.search.preset_schedules": "samplers.search.decisions.starts",
    "samplers.search.rungs": "samplers.search.fits",
    "samplers.search.s3": "samplers.search.decisions.evolution",
    "samplers.search.schedule_numbers": "samplers.search.parameters",
    "samplers.search.schedule_search": "samplers.search.search",
    "samplers.search.schedules": "samplers.search.decisions.stage",
    "samplers.search.space": "samplers.search.decisions.space",
    "samplers.search.starts": "samplers.search.decisions.starts",
    "samplers.search.study": "samplers.search.decisions.study",
    "samplers.search.trials": "rollout",
    "samplers.search.truth": "samplers.search.reference",
    "samplers.search.tuning": "samplers.search.search",
    "samplers.skips": "samplers.solver.unet_skip_scale",
    "samplers.solver_plug": "samplers.solver.plug",
    "samplers.statistics": "samplers.solver.statistics",
    "samplers.table": "samplers.solver.table",
    "samplers.unipc_options": "samplers.solver.unipc_options",
    "scheduler_calls": "scheduler.calls",
    "scheduler_options": "scheduler.options",
    "scheduler_plug": "scheduler.plug",
    "shapes.clip_model": "rewards.networks.shapes_clip_model",
    "steering.beam": "steering.rules.beam",
    "steering.best_of_n": "steering.rules.best_of_n",
    "steering.churn": "steering.proposals",
    "steering.clean": "steering.engine.denoised",
    "steering.copies": "steering.engine.step",
    "steering.feynman_kac": "steering.rules.feynman_kac",
    "steering.history": "steering.engine.history",
    "steering.learned_value": "steering.values.learned",
    "steering.masked": "steering.masked_sequences",
    "steering.noise_search": "steering.rules.noise_search",
    "steering.options": "checks",
    "steering.particle_filter": "steering.smc.filter",
    "steering.particles": "steering.engine.step",
    "steering.pictures": "steering.engine.outputs",
    "steering.plans": "steering.engine.score_times",
    "steering.plot": "steering.report",
    "steering.populations": "steering.smc.islands",
    "steering.potentials": "steering.smc.potentials",
    "steering.proposal": "steering.proposals",
    "steering.ranks": "steering.engine.ranks",
    "steering.refusals": "steering.engine.refusals",
    "steering.request": "steering.engine.request",
    "steering.resampling": "steering.smc.resampling",
    "steering.run": "steering.engine.run",
    "steering.scoring": "steering.engine.scoring",
    "steering.selection": "steering.smc.resampling",
    "steering.slices": "steering.engine.row_slices",
    "steering.solvers": "noise.stochastic",
    "steering.svdd": "steering.rules.svdd",
    "steering.tempering": "steering.smc.potentials",
    "steering.tilted": "steering.rules.tilted",
    "steering.twist": "steering.proposals",
    "steering.value_fitting": "steering.values.fitting",
    "steering.weights": "steering.smc.weights",
    "stock": "samplers.by_name",
    "testing.gaussian_model": "testing.closed_form.gaussian",
    "testing.guided_mixture": "testing.closed_form.guided_mixture",
    "training.adapter_score": "training.speedupnet.adapter_score",
    "training.guidance_states": "training.speedupnet.guidance_states",
    "training.negatives": "training.speedupnet.negatives",
    "training.objectives.d3po": "training.objectives.preference.d3po",
    "training.objectives.dance_grpo": "training.objectives.preference.dance_grpo",
    "training.objectives.ddpo": "training.objectives.preference.ddpo",
    "training.objectives.diffusion_dpo": "training.objectives.preference.diffusion_dpo",
    "training.objectives.dpok": "training.objectives.preference.dpok",
    "training.objectives.flow_grpo": "training.objectives.preference.flow_grpo",
    "training.objectives.policy_gradient": "training.objectives.preference.policy_gradient",
    "training.objectives.pso": "training.objectives.preference.pso",
    "training.objectives.pso_offline": "training.objectives.preference.pso_offline",
    "training.objectives.reward_feedback": "training.objectives.preference.reward_feedback",
    "training.objectives.reward_gradient": "training.objectives.preference.reward_gradient",
    "training.objectives.spo": "training.objectives.preference.spo",
    "training.objectives.step_preference": "training.objectives.preference.step_preference",
    "training.objectives.tilted_distribution": "training.objectives.preference.tilted_distribution",
}
"""Old name to new name, both without `diffplug.`."""


class OldNames(MetaPathFinder, Loader):
    """Answers an import of an old module name with the module of the new one; asked after everybody else."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec for a name in `MOVED`, None for all others."""
        old = fullname.removeprefix("diffplug.")
        return ModuleSpec(fullname, self) if old != fullname and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module at its new place, with a FutureWarning."""
        new = f"diffplug.{MOVED[spec.name.removeprefix('diffplug.')]}"
        warnings.warn(f"{spec.name} is {new} now: import that", FutureWarning, stacklevel=2)
        return _Alias(spec.name, import_module(new))

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module has run at its new place."""


class _Alias(ModuleType):
    """A module under its old name; everything in it is the new one's."""

    def __init__(self, name: str, new: ModuleType) -> None:
        super().__init__(name, new.__doc__)
        self.__dict__["_new"] = new

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_new"], name)


def keep_old_names() -> None:
    """Make the old names importable, once in a process."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
