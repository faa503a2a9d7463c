"""Options of steerers that mean nothing in a loop of one's own, each with what to do instead."""

from __future__ import annotations

from typing import Any


def refuse_in_a_loop(steerer: Any, scoring_by_default: Any, network_by_default: Any) -> None:
    """Raise ValueError, with the reason, for a steerer that does not fit a loop or would ignore an option."""
    name = type(steerer).__name__
    reason = steerer.no_crowd()
    if reason:
        raise ValueError(f"{name} cannot steer a loop of one's own: {reason}")
    proposal = getattr(steerer, "proposal", None)
    if proposal not in (None, "auto"):
        raise ValueError(
            f"proposal={proposal!r} changes a scheduler's step, and a loop makes its own: leave it out "
            "and let the loop draw noise"
        )
    scoring = steerer.scoring
    for option in ("value", "decode", "preview", "decode_batch_size"):
        if getattr(scoring, option) != getattr(scoring_by_default, option):
            raise ValueError(
                f"scoring.{option} is for pipelines: in a loop clean=... says what a state looks like to the "
                "reward, leave it out"
            )
    if steerer.network != network_by_default:
        raise ValueError(
            "network=... is for pipelines: a loop calls its network itself, on crowd.rows rows; leave it out"
        )
    if steerer.returns != "best":
        raise ValueError(
            f"returns={steerer.returns!r}: a crowd's result has .best, .sample and .all, leave returns out"
        )
