"""What a run of a scheduler decides: from its configuration, the steps asked for and what a call tells."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.book import ScheduleBook
from diffplug.samplers.schedule.presets import preset
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.solver.call_request import CallRequest
from diffplug.samplers.solver.idle_options import idle, idle_names, same_method
from diffplug.samplers.solver.image_to_image import NodeScheduler
from diffplug.samplers.solver.unipc_options import defaults_of


class DecidingScheduler(NodeScheduler):
    """The schedules and options of a configuration, and which of them a run gets."""

    has_flow_grids = True
    constructor: ClassVar[inspect.Signature]
    request = CallRequest()
    _parsed: tuple[Any, ScheduleBook]

    @classmethod
    def idle_options(cls, given: Mapping[str, Any]) -> set[str]:
        """What does nothing beside the given options, of all that a pipeline's configuration may tell."""
        return idle_names(given, defaults_of(cls.constructor))

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """As Diffusers has it; what comes along and does nothing stays in the configuration alone."""
        config = dict(config_dict)
        replaced = config.pop("_replaced", config)
        init, unused, hidden = super().extract_init_dict(config, **kwargs)
        init |= same_method(replaced, init)
        options = {**defaults_of(cls.constructor), **init}
        for name in idle(options, init.keys() - kwargs.keys()):
            hidden[name] = init.pop(name)
        return init, unused, hidden

    @property
    def book(self) -> ScheduleBook:
        """The schedules of the configuration, parsed when it changes."""
        told = self.config.get("schedules")
        if self._parsed[0] is not told:
            self._parsed = told, ScheduleBook.of(told)
        return self._parsed[1]

    def _schedule(self, steps: int, *, given: bool, begin: int = 0) -> SolverSchedule:
        """The decisions of a run: the entry for so many evaluations, or the preset."""
        book, name = self.book, self.config.get("solver")
        if book and given and not name:
            raise ValueError(
                "the schedules bring grids of their own: leave out timesteps= and sigmas=, or name a preset "
                "for given grids (solver='unipc')"
            )
        found = book.find(steps, self.request.guidance) if book and not given else None
        if found is not None or (book and not name):
            return found or book.entry(steps)
        options = {"final": self.config.final_sigmas_type, "begin": begin}
        if (name or "unipc") == "unipc":
            options |= self._unipc_options()
        options |= self.config.get("solver_options") or {}
        return preset(name or "unipc")(steps, self.config.grid or "linspace", **options)

    def _tell(self, steps: int) -> None:
        """Warn where a run gets another schedule than a person may think."""
        note = self.book.note(steps, self.request.guidance)
        if self.book and self.book.find(steps) is None:
            others = f"no schedule has {steps} steps (there are {self.book.counts()})"
            note = f"{others}: {self.config.solver!r} is used"
        if note:
            warnings.warn(note, stacklevel=4)
        found = self.book.find(steps, self.request.guidance)
        if found is not None and any(skip != 1 for skip in found.skips or ()) and not self.request.plugged:
            warnings.warn(
                f"the schedule for {steps} steps has skip coefficients, which the plug Solver alone applies",
                stacklevel=4,
            )

    def _unipc_options(self) -> dict[str, Any]:
        """UniPC's own options as keywords of the preset."""
        config = self.config
        return {
            "order": config.solver_order,
            "kind": config.solver_type,
            "param": "data" if config.predict_x0 else "noise",
            "disable_corrector": self.disable_corrector,
            "lower_order_final": config.lower_order_final,
        }

    def _lowest_flow_sigma(self, levels: NoiseLevels, shifted: Any) -> float:
        """Where flow-matching Euler's grids end: it shifts its smallest sigma once more, unless by size."""
        if levels.terminal is not None:
            return levels.terminal
        if shifted is not None:
            return float(levels.shifted(shifted[-1]))
        once = np.asarray(levels.sigma_min)
        return float(once if self.config.use_dynamic_shifting else levels.shifted(once))
