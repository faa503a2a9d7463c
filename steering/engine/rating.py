"""Asking a reward: within its time, with a clock, and with errors that name the particle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from diffplug import rewards
from diffplug.steering.engine.blame import failing_row, limited
from diffplug.steering.engine.slots import Slots


@dataclass
class Seconds:
    """Host seconds of the parts of a run."""

    decode: float = 0.0
    reward: float = 0.0
    total: float = 0.0


class Rater:
    """Asks the reward for the rows of one run; `texts` holds the prompt of each row that is here.

    timeout: seconds that the reward may take for all particles. Raises ValueError where its weights cannot be
    loaded, or it cannot read the prompts.
    """

    def __init__(
        self, reward: Any, prompts: Sequence[Any], slots: Slots, *, timeout: float | None, needed: bool = True
    ) -> None:
        self.reward, self.slots = reward, slots
        ask = partial(rewards.score, reward)
        self.within_time: Callable[..., Tensor] = ask if timeout is None else limited(ask, timeout)
        self.prompts = list(prompts)
        self.texts = [prompt for prompt in self.prompts for _ in slots.own]
        self.seconds = Seconds()
        if needed:
            load_reward(reward, self.prompts)

    def rate(self, items: Any, where: str) -> Tensor:
        """Return the rewards `[n]` float64 of what particles have become, one item for each row.

        ValueError names the call and, if known, the particle.
        """
        start = perf_counter()
        try:
            found = self.asked(items, self.texts)
        except (Exception, SystemExit) as error:
            row = failing_row(lambda rows: self.asked(items[rows], self.texts[rows]), len(items), error)
            raise ValueError(
                f"the reward failed at {where}{self.particle(row)}: {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
        self.seconds.reward += perf_counter() - start
        return found

    def asked(self, items: Any, texts: list[Any]) -> Tensor:
        """Return what the reward gives, within its time."""
        return self.within_time(items, texts)

    def particle(self, row: int | None) -> str:
        """Return which particle a row is, in words; empty where no row is to blame."""
        if row is None:
            return ""
        prompt, place = divmod(row, len(self.slots.own))
        return f", particle {self.slots.own[place]} of prompt {prompt}"


def load_reward(reward: Any, prompts: Sequence[Any]) -> None:
    """Load what a reward needs and show it the prompts, so that neither fails after the work.

    Raises ValueError, in which the reward is to blame and no particle.
    """
    try:
        rewards.prepare(reward)
        rewards.check_prompts(reward, prompts)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the reward cannot be used here: {str(error).partition(chr(10))[0]}") from error
