"""Which solvers add noise, which take some in between, and a stochastic one for the same model."""

from __future__ import annotations

from typing import Any

from diffplug.noise.families import FLOW, family, known
from diffplug.noise.position import base_name
from diffplug.noise.prediction import is_continuous

_REMEMBERS_NOISE = frozenset({"IPNDMScheduler"})
_NOISE_TYPES = ("deis", "dpmsolver", "sde-dpmsolver", "noise_prediction")


def adds_noise(scheduler: Any, eta: float | None = None) -> bool:
    """Return whether steps of this scheduler are random, as far as its class and configuration tell.

    eta: the argument of the step, for DDIM (default 0) and TCD (default 0.3). Without noise copied particles
    stay identical.
    """
    if base_name(scheduler, frozenset({"AmusedScheduler"})):  # tokens
        return True
    row = known(scheduler)
    if row is not None and row.noise == "always":
        return True
    if row is not None and row.noise == "eta":
        return (row.eta if eta is None else eta) > 0
    config = getattr(scheduler, "config", {})
    sde = str(config.get("algorithm_type", "")).startswith("sde")
    return sde or bool(config.get("stochastic_sampling", False)) or (config.get("eta") or 0.0) > 0


def takes_churn(scheduler: Any) -> bool:
    """Return whether noise between the steps of this solver stays and does it no harm."""
    row = known(scheduler)
    return row is not None and row.churn


def stochastic(scheduler: Any, order: int = 1) -> Any:
    """Return a stochastic solver with the model, schedule and shift of a deterministic one.

    It is SDE-DPM-Solver++ (arXiv 2211.01095), in its flow form for flow-matching models; a scheduler that
    adds noise already is returned itself. order: 1 or 2. With guidance and few steps the second order goes
    astray: of 48 Shapes relations (20 steps, guidance 5, by hand) it got 52 % right, the first 81 %.

    Pipelines that hand their own `sigmas` to `set_timesteps` without knowing flow sigmas refuse it: steer
    those with `churn`. Flow matching with `stochastic_sampling=True` is no substitute: it is for distilled
    models and halves the variance of others.
    Raises ValueError for another order, and for schedulers whose noise levels are not known.

        pipe.scheduler = stochastic(pipe.scheduler)
    """
    from diffusers import DPMSolverMultistepScheduler

    if order not in (1, 2):
        raise ValueError(f"order={order!r}: SDE-DPM-Solver++ has order 1 or 2")
    if adds_noise(scheduler):
        return scheduler
    options: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": order}
    if is_continuous(scheduler.config):
        raise ValueError(
            "a model with timestep_type='continuous' is told its noise, SDE-DPM-Solver++ does not tell it: "
            "steer with churn"
        )
    if family(scheduler) is not FLOW:
        return DPMSolverMultistepScheduler.from_config(
            scheduler.config, **options, final_sigmas_type="zero", use_karras_sigmas=False
        )
    config = scheduler.config
    shifts = {"use_dynamic_shifting": True, "time_shift_type": config.get("time_shift_type", "exponential")}
    dynamic = bool(config.get("use_dynamic_shifting", False))
    from diffplug.noise.flow_sde import FixedShiftSDEScheduler

    return (DPMSolverMultistepScheduler if dynamic else FixedShiftSDEScheduler)(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.get("shift", 1.0),
        **options,
        **(shifts if dynamic else {}),
    )


def forget(scheduler: Any) -> None:
    """Make a solver forget what fresh noise has made untrue.

    A corrector re-derives the state from the sample of the last call, without the noise. Solvers that
    extrapolate noise predictions take the fresh noise for a slope: on N(1, .25) DEIS of order 2 ended with
    variance .209, of order 3 with .319, where first-order steps after noise give .173. Those that extrapolate
    clean predictions keep their history, which serves them well. A scheduler with a method
    `forget_history()` sees to it itself.
    """
    own = getattr(scheduler, "forget_history", None)
    if callable(own):
        own()
        return
    if getattr(scheduler, "last_sample", None) is not None:
        scheduler.last_sample = None
    if base_name(scheduler, _REMEMBERS_NOISE):
        scheduler.ets = []
    elif _predicts_noise(scheduler.config) and hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0


def _predicts_noise(config: Any) -> bool:
    """Return whether a solver extrapolates the network's noise, not its clean predictions."""
    return config.get("algorithm_type") in _NOISE_TYPES or config.get("predict_x0") is False
