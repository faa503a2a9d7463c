"""Plans: at which scheduler calls of a run the particles are scored.

A plan goes from the number of steps n to call indices in 0..n-2. The last call is never among them: its clean
prediction is the finished picture, which is scored in any case, and copies made there stay copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from diffplug.checks import check_number
from diffplug.steering.engine.rule import Plan


def scored_calls(fractions: Iterable[float]) -> Plan:
    """Return a plan: from the number of steps n to the call indices at these fractions of the run, in order.

    The last call is left out (see above).
    """
    fractions = tuple(fractions)
    return lambda n: sorted({math.floor(f * n + 0.5) for f in fractions} & set(range(n - 1)))


def every_call(n: int) -> Iterable[int]:
    """Return the plan that scores at every call but the last."""
    return range(n - 1)


def no_call(n: int) -> Iterable[int]:
    """Return the plan that scores nothing before the end."""
    return ()


def every_block(block: int) -> Plan:
    """Return the plan that scores every `block` calls, counted back from the finished pictures (CoDe, arXiv
    2502.00968). Raises ValueError unless block is a whole number of at least 1.
    """
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block={block!r}: it must be a whole number of calls, at least 1")
    return lambda n: sorted(set(range(n - block, -1, -block)) & set(range(n - 1)))


def plan_of(score_at: Sequence[float] | str) -> Plan:
    """Return the plan for fractions of the run in (0, 1], or for "every". Raises ValueError for others."""
    if isinstance(score_at, str):
        if score_at != "every":
            raise ValueError(f"score_at={score_at!r}: give fractions of the run in (0, 1], or 'every'")
        return every_call
    if not isinstance(score_at, Iterable):
        raise ValueError(f"score_at={score_at!r}: give a list of fractions of the run in (0, 1], or 'every'")
    for fraction in score_at:
        check_number("a fraction of score_at", fraction)
        if not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise ValueError(f"score_at contains {fraction}: fractions of the run lie in (0, 1]")
    return scored_calls(score_at)
