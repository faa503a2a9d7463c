"""Short names for classes: built-in ones, registered ones and those of other packages' entry points.

A third party adds a plug-in without touching this package, in its own pyproject.toml:

    [project.entry-points."diffplug.rewards"]
    sharpness = "my_package.sharpness:Sharpness"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffplug.messages import LONGEST_QUOTE, shown

__all__ = [
    "REWARDS",
    "SAMPLERS",
    "STEERERS",
    "TRAINERS",
    "Registry",
    "name_sampler",
    "sampler",
    "sampler_file",
    "sampler_names",
    "sampler_steps",
    "unknown",
]


def unknown(kind: str, name: str, known: list[str], hint: str = "") -> ValueError:
    """A ready one-line ValueError for an unknown `name`: the nearest known names first, then all of them."""
    near = get_close_matches(str(name)[:LONGEST_QUOTE].lower(), known, n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return ValueError(
        f"unknown {kind} {shown(name)}.{meant} Known: {', '.join(known) or 'none'}.{hint and ' ' + hint}"
    )


class Registry:
    """A table of short names for things of one `kind`, with those that entry points of `group` add.

    Nothing is imported before `get` asks for it. Built-in names win over entry points of the same name.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._targets: dict[str, Any] = {}

    def register(self, name: str, target: str | Callable[..., Any]) -> None:
        """Adds `target` ("module:Class", or the class or function itself) under `name`.

        Raises ValueError where the name is malformed or stands for another target already.
        """
        if not name or name != name.strip().lower() or " " in name:
            raise ValueError(f"a {self.kind} name is lower case without spaces, got {name!r}")
        if isinstance(target, str) and target.count(":") != 1:
            raise ValueError(f"target of {self.kind} {name!r} must read 'module:Class', got {target!r}")
        if self._targets.get(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is {self._targets[name]!r} already: choose another name")
        self._targets[name] = target

    def unregister(self, name: str) -> None:
        """Forgets a registered name; unknown ones raise ValueError."""
        if name not in self._targets:
            raise unknown(self.kind, name, sorted(self._targets))
        del self._targets[name]

    def names(self) -> list[str]:
        """All names in alphabetical order, those of entry points included."""
        return sorted({*self._targets, *self._entries()})

    def get(self, name: str) -> Any:
        """The class or function that `name` stands for, imported now; ValueError with the nearest names."""
        if name in self._targets:
            target = self._targets[name]
            return imported(target) if isinstance(target, str) else target
        entries = self._entries()
        if name not in entries:
            raise unknown(self.kind, name, self.names())
        try:
            return entries[name].load()
        except (Exception, SystemExit) as error:  # whatever the other package raises
            raise ValueError(
                f"{self.kind} {name!r} does not load: entry point {entries[name].value!r} of group "
                f"{self.group!r} raised {type(error).__name__}: {error}"
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._targets or name in self._entries()

    def _entries(self) -> dict[str, Any]:
        found = {entry.name: entry for entry in entry_points(group=self.group)}
        for name in sorted(found.keys() & self._targets.keys()):
            warnings.warn(
                f"entry point {found.pop(name).value!r} of group {self.group!r} is ignored: "
                f"the {self.kind} name {name!r} is taken",
                stacklevel=3,
            )
        return found


def imported(target: str) -> Any:
    """Return what "module:name" stands for, importing the module now."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def sampler_names() -> list[str]:
    """Return every name that `sampler` knows: registered ones, presets and Diffusers' own."""
    return list(imported("diffplug.samplers.by_name:names")())


def sampler(name: str, pipe: Any, steps: int | None = None) -> Any:
    """Return what to plug into `pipe` for a sampler's name or file (see `diffplug.samplers.by_name`)."""
    return imported("diffplug.samplers.by_name:sampler")(name, pipe, steps)


def sampler_steps(name: str) -> int | None:
    """Return the number of steps that a sampler's name says by itself ("hyper-sd@4"), None for most."""
    found: int | None = imported("diffplug.samplers.by_name:told_steps")(name)
    return found


def name_sampler(name: str, path: str) -> None:
    """Let a name stand for a sampler's file (see `diffplug.samplers.named_files`)."""
    imported("diffplug.samplers.named_files:name_file")(name, path)


def sampler_file(name: str) -> str | None:
    """Return the file that a sampler's name stands for, by `--samplers NAME=FILE`; None for most."""
    found: str | None = imported("diffplug.samplers.named_files:file_of")(name)
    return found


SAMPLERS = Registry("sampler", "diffplug.samplers")
SAMPLERS.register("dc-solver", "diffplug.samplers.dc_solver.scheduler:DCSolverScheduler")
SAMPLERS.register("solver", "diffplug.samplers.solver.scheduler:SolverScheduler")

STEERERS = Registry("steerer", "diffplug.steerers")
STEERERS.register("fk", "diffplug.steering.rules.feynman_kac:FeynmanKac")
STEERERS.register("best-of-n", "diffplug.steering.rules.best_of_n:BestOfN")
STEERERS.register("importance", "diffplug.steering.rules.feynman_kac:ImportanceSampling")
STEERERS.register("svdd", "diffplug.steering.rules.svdd:SVDD")
STEERERS.register("code", "diffplug.steering.rules.svdd:CoDe")
STEERERS.register("two-level", "diffplug.steering.rules.svdd:TwoLevel")
STEERERS.register("beam", "diffplug.steering.rules.beam:Beam")
STEERERS.register("noise-search", "diffplug.steering.rules.noise_search:NoiseSearch")
STEERERS.register("auto", "diffplug.steering.rules.auto:Auto")

REWARDS = Registry("reward", "diffplug.rewards")
REWARDS.register("shapes", "diffplug.rewards.shapes:ShapesReward")
REWARDS.register("shapes-clip", "diffplug.rewards.shapes_clip:ShapesClipReward")
REWARDS.register("clip", "diffplug.rewards.clip:ClipReward")
REWARDS.register("hps", "diffplug.rewards.hps:HpsReward")
REWARDS.register("pickscore", "diffplug.rewards.pickscore:PickScoreReward")
REWARDS.register("image-reward", "diffplug.rewards.image_reward:ImageRewardReward")
REWARDS.register("aesthetic", "diffplug.rewards.aesthetic:AestheticReward")
REWARDS.register("jpeg", "diffplug.rewards.jpeg:JpegReward")
REWARDS.register("colour", "diffplug.rewards.colour:ColourReward")
REWARDS.register("sharpness", "diffplug.rewards.sharpness:SharpnessReward")
REWARDS.register("url", "diffplug.rewards.grader_url:GraderReward")
REWARDS.register("vlm", "diffplug.rewards.vlm:VlmReward")
REWARDS.register("steady", "diffplug.rewards.steady:SteadyReward")

TRAINERS = Registry("trainer", "diffplug.trainers")
TRAINERS.register("finetune", "diffplug.training.finetune.objective:Finetune")
TRAINERS.register("choose", "diffplug.training.choice.choose:Choose")
TRAINERS.register("trajectory", "diffplug.training.objectives.trajectory_matching:TrajectoryMatching")
TRAINERS.register("hyper-sd", "diffplug.training.objectives.segmented_consistency:SegmentedConsistency")
TRAINERS.register("tdm", "diffplug.training.objectives.distribution_matching:TrajectoryDistribution")
TRAINERS.register("one-step", "diffplug.training.objectives.one_step:OneStep")
TRAINERS.register("speedupnet", "diffplug.training.speedupnet.run:SpeedUpNetDistillation")
TRAINERS.register("reward", "diffplug.training.objectives.preference.reward_feedback:RewardFeedback")
TRAINERS.register("pso", "diffplug.training.objectives.preference.pso:PSO")
TRAINERS.register("pso-offline", "diffplug.training.objectives.preference.pso_offline:OfflinePSO")
TRAINERS.register("diffusion-dpo", "diffplug.training.objectives.preference.diffusion_dpo:DiffusionDPO")
TRAINERS.register("draft", "diffplug.training.objectives.preference.reward_gradient:RewardGradient")
TRAINERS.register("tilted", "diffplug.training.objectives.preference.tilted_distribution:TiltedDistribution")
TRAINERS.register("spo", "diffplug.training.objectives.preference.spo:SPO")
TRAINERS.register("d3po", "diffplug.training.objectives.preference.d3po:D3PO")
TRAINERS.register("ddpo", "diffplug.training.objectives.preference.ddpo:DDPO")
TRAINERS.register("dpok", "diffplug.training.objectives.preference.dpok:DPOK")
TRAINERS.register("flow-grpo", "diffplug.training.objectives.preference.flow_grpo:FlowGRPO")
TRAINERS.register("dance-grpo", "diffplug.training.objectives.preference.dance_grpo:DanceGRPO")
