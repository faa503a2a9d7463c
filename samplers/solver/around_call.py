"""What our plugs do around every call of a pipeline: tell the scheduler its guidance and its own grid."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffplug.call_arguments import asked, asked_guidance, asked_steps, given_grid
from diffplug.intercept import PipelineCall
from diffplug.samplers.solver.call_request import CallRequest, refuse_ddim_options, requesting
from diffplug.samplers.solver.swallowed_grid import handed_over
from diffplug.samplers.solver.unet_skip_scale import scaled_skips

__all__ = ["AroundCall"]


@dataclass(frozen=True)
class AroundCall:
    """Stands around the calls of a pipeline with a scheduler of ours; copies of the pipeline get it too.

    on_own_grids: "" or what to warn of where a call brings timesteps or sigmas.
    """

    on_own_grids: str = ""

    follows_copies: ClassVar[bool] = True

    def __call__(self, call: PipelineCall, kwargs: dict[str, Any]) -> Any:
        pipe = call.pipe
        scheduler = pipe.scheduler
        if not hasattr(scheduler, "request"):  # somebody put another one in its place
            return call(**kwargs)
        eta = asked(pipe, kwargs, "eta")
        if eta:
            refuse_ddim_options(eta, None)
        guidance = asked_guidance(pipe, kwargs)
        if self.on_own_grids and given_grid(kwargs) is not None:
            warnings.warn(self.on_own_grids, stacklevel=3)
        skips = _skips(scheduler, pipe, kwargs, guidance)
        kwargs, sigmas = handed_over(pipe, kwargs)
        with requesting(scheduler, CallRequest(guidance, sigmas, plugged=True)), scaled_skips(pipe, skips):
            return call(**kwargs)


def _skips(scheduler: Any, pipe: Any, kwargs: Mapping[str, Any], guidance: float | None) -> Any:
    """The skip coefficients of a call's schedule, None for none."""
    if not scheduler.book or given_grid(kwargs) is not None:
        return None
    found = scheduler.book.find(asked_steps(pipe, kwargs), guidance)
    return None if found is None else found.skips
