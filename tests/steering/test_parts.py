"""Options as parts: every keyword of before still works, says what it is now, and gives the same steerer."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from diffplug.registry import STEERERS
from diffplug.steering import (
    SVDD,
    Adaptive,
    Beam,
    BestOfN,
    Churn,
    FeynmanKac,
    ManySamples,
    Network,
    NoiseSearch,
    Resampling,
    Scoring,
    Twist,
    TwoLevel,
)

pytestmark = pytest.mark.law


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red."""
    return images[:, 0].mean((1, 2))


VALUE = ManySamples(draws=2)
OLD: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (FeynmanKac, {"churn": 0.5}, {"proposal": Churn(0.5)}),
    (FeynmanKac, {"churn": 0.0}, {"proposal": None}),
    (FeynmanKac, {"twist": 3.0, "spread": 0.5}, {"proposal": Twist(3.0, spread=0.5)}),
    (FeynmanKac, {"twist": 0.0}, {}),
    (FeynmanKac, {"score_at": "every"}, {"scoring": Scoring(at="every")}),
    (FeynmanKac, {"value": VALUE}, {"scoring": Scoring(value=VALUE)}),
    (FeynmanKac, {"prompts": ["a"]}, {"scoring": Scoring(prompts=["a"])}),
    (
        FeynmanKac,
        {"resampler": "ssp", "populations": 2, "ess_threshold": None},
        {"selection": Resampling("ssp", ess_threshold=None, islands=2)},
    ),
    (FeynmanKac, {"tilt": "adaptive", "target_ess": 0.3}, {"tilt": Adaptive(0.3)}),
    (FeynmanKac, {"network_batch_size": 3}, {"network": Network(batch_size=3)}),
    (Beam, {"score_at": (0.5,)}, {"scoring": Scoring(at=(0.5,))}),
    (SVDD, {"alpha": 0.25}, {"strength": 4.0}),
    (BestOfN, {"decode_batch_size": 2}, {"scoring": Scoring(decode_batch_size=2)}),
    (NoiseSearch, {"network_batch_size": 2}, {"network": Network(batch_size=2)}),
]


@pytest.mark.parametrize(("steerer", "old", "new"), OLD)
def test_old_keywords_work_with_a_warning(steerer: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(FutureWarning, match=f"^{steerer.__name__}: .* now$") as caught:
        found = steerer(red, **old)
    assert found == steerer(red, **new)
    assert len(caught) == len(old) - ("tilt" in old)
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize(("steerer", "old", "new"), OLD)
def test_recipes_write_them_flat_without_a_warning(
    steerer: Any, old: dict[str, Any], new: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steerer(red, **steerer.current_options(old)) == steerer(red, **new)


def test_what_nobody_knows_stays_unknown() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        FeynmanKac(red, nonsense=1)
    with pytest.raises(TypeError, match="churn"):
        BestOfN(red, churn=1.0)
    with pytest.raises(ValueError, match="give one of them"):
        FeynmanKac(red, churn=1.0, twist=1.0)
    assert TwoLevel(red, ess_threshold=0.3).ess_threshold == 0.3  # its own, not the part's


@pytest.mark.parametrize("name", STEERERS.names())
def test_no_constructor_takes_more_than_twelve(name: str) -> None:
    assert len(inspect.signature(STEERERS.get(name)).parameters) <= 12
