"""Where the noise of a steered run comes from, decided once its scheduler is known."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffplug.intercept import original_class
from diffplug.noise.families import known
from diffplug.noise.stochastic import adds_noise, takes_churn
from diffplug.steering.proposals import Churn, Twist

Asked = Churn | Twist | str | None


@dataclass(frozen=True, kw_only=True)
class NoiseChoice:
    """Where the noise comes from: a proposal, arguments added to the call, and both in words."""

    proposal: Churn | Twist | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    words: str


def check_proposal(asked: Any) -> None:
    """Raise ValueError unless it is a proposal, "auto" or None."""
    if not (asked is None or isinstance(asked, (Churn, Twist)) or asked == "auto"):
        raise ValueError(f"proposal={asked!r}: give Churn(1.0), Twist(2.0), 'auto', or None for none")


def choose_noise(asked: Asked, pipe: Any, kwargs: Mapping[str, Any]) -> NoiseChoice:
    """Return where the noise of a call of a pipeline comes from.

    "auto" takes the solver's own noise where it adds some, else churn at the scored calls, else the `eta` of
    the call where the solver's noise is an argument that nobody gave. A twist leans the solver's own noise,
    and gets it the same way. Raises ValueError for a proposal that this scheduler cannot take.
    """
    scheduler, name = pipe.scheduler, original_class(pipe.scheduler).__name__
    parameters = inspect.signature(type(pipe).__call__).parameters
    given = kwargs.get("eta", parameters["eta"].default if "eta" in parameters else None)
    own = adds_noise(scheduler, given)
    if isinstance(asked, (Churn, Twist)):
        asked.check(scheduler)
    if isinstance(asked, Churn):
        return NoiseChoice(proposal=asked, words=f"churn {asked.eta:g} at the scored calls")
    twist = asked if isinstance(asked, Twist) else None
    leant = f", leant by a twist of at most {twist.cap:g}" if twist else ""
    if asked is None or own:
        return NoiseChoice(proposal=twist, words=f"the solver's own{leant}" if own else "none")
    if asked == "auto" and takes_churn(scheduler):
        return NoiseChoice(
            proposal=Churn(), words=f"churn 1 at the scored calls, since {name} adds none by itself"
        )
    row = known(scheduler)
    if row is not None and row.noise == "eta" and "eta" in parameters and "eta" not in kwargs:
        eta = row.eta or 1.0
        return NoiseChoice(
            proposal=twist, call={"eta": eta}, words=f"eta={eta:g}, since {name} adds none by itself{leant}"
        )
    if twist:
        raise ValueError(
            f"{name} adds no noise here that a twist could lean: take a stochastic solver (DDIMScheduler "
            "with eta=1), or proposal=Churn(1.0)"
        )
    return NoiseChoice(words="none" if row is not None else "the solver's own, if any")
