"""Every registered steerer holds the laws, and the laws notice steerers that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from diffplug.registry import STEERERS
from diffplug.steering import FeynmanKac
from diffplug.steering.engine import history as engine
from diffplug.testing import STEERER_LAWS, check_steerer
from diffplug.testing.check_steerer import (
    Subject,
    best_comes_first,
    constant_reward_changes_nothing,
    copies_keep_their_history,
    groups_do_not_mix,
    plug_and_undo,
    the_dead_do_not_return,
)

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module", params=STEERERS.names())
def subject(request: pytest.FixtureRequest) -> Subject:
    """Return one registered steerer with its tiny pipeline."""
    return Subject(STEERERS.get(request.param), request.param)


@pytest.mark.parametrize("law", STEERER_LAWS, ids=lambda law: law.__name__)
def test_registered_steerers_hold_every_law(subject: Subject, law: Callable[[Subject], None]) -> None:
    law(subject)


def test_check_steerer_runs_the_laws_it_is_given() -> None:
    check_steerer(FeynmanKac, laws=STEERER_LAWS[:2])


@dataclass(frozen=True)
class WorstFirst(FeynmanKac):
    """Hands back the pictures it should have dropped."""

    def attach(self, pipe: Any) -> Callable[[], None]:
        """Return the undo of a steerer with the reward turned round."""
        reward: Any = self.reward
        turned = FeynmanKac(
            lambda images, prompts: -reward(images, prompts), particles=self.particles, returns=self.returns
        )
        return turned.attach(pipe)


@dataclass(frozen=True)
class Leaving(FeynmanKac):
    """Forgets to take itself off."""

    def attach(self, pipe: Any) -> Callable[[], None]:
        """Return an undo that leaves a mark behind."""
        undo = super().attach(pipe)

        def careless() -> None:
            undo()
            pipe.leftover = True

        return careless


@dataclass(frozen=True)
class OneGroup(FeynmanKac):
    """Selects across prompts."""

    def build_filter(self, groups: int) -> Any:
        """Return a filter that ranks all prompts' particles together."""
        built = super().build_filter(groups)
        select = built.select

        def mixed(rewards: torch.Tensor, **options: Any) -> Any:
            return select(
                rewards - rewards.mean() + rewards.reshape(groups, -1).mean(0).repeat(groups), **options
            )

        built.select = mixed  # type: ignore[method-assign]
        return built


@dataclass(frozen=True)
class Restless(FeynmanKac):
    """Shuffles even when all are equal."""

    def build_filter(self, groups: int) -> Any:
        """Return a filter that adds noise to the rewards."""
        built = super().build_filter(groups)
        select = built.select
        built.select = lambda rewards, **options: select(  # type: ignore[method-assign]
            rewards + torch.randn(len(rewards), dtype=torch.float64), **options
        )
        return built


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (WorstFirst, best_comes_first),
        (WorstFirst, the_dead_do_not_return),
        (Leaving, plug_and_undo),
        (OneGroup, groups_do_not_mix),
        (Restless, constant_reward_changes_nothing),
    ],
)
def test_the_kit_bites(broken: type, law: Callable[[Subject], None]) -> None:
    with pytest.raises(AssertionError, match=f"{broken.__name__} breaks the law '{law.__name__}'"):
        check_steerer(broken, laws=[law])


def test_the_kit_notices_a_forgotten_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "reindex_scheduler", lambda *args: None)
    with pytest.raises(AssertionError, match="lost the solver's history"):
        check_steerer(FeynmanKac, laws=[copies_keep_their_history])
