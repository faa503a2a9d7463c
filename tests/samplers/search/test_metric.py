"""What a search minimises: aggregates of known numbers, distances that are 0 for the truth, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from planted import Planted

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.search.metric import AGGREGATES, LatentError, check_metric
from diffplug.samplers.search.picture_metrics import (
    FeatureDistance,
    Frechet,
    Kernel,
    OwnDistance,
    RewardScore,
    parse_metric,
    pixels,
)

LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler())
PROBLEM = Planted(lambda _: np.linspace(0, 0.4, 128), LEVELS)
FAR = np.linspace(0.01, 0.4, 128)[:, None] * np.ones((1, 12))


@pytest.mark.law
def test_aggregates_of_known_numbers() -> None:
    marks = np.array([1.0] * 19 + [100.0])
    found = {name: float(aggregate(marks)) for name, aggregate in AGGREGATES.items()}
    assert found["mean"] == pytest.approx(5.95) and found["trimmed"] == 1.0 and found["median"] == 1.0
    assert found["log"] == pytest.approx(np.log(100) / 20) and found["p95"] == pytest.approx(5.95)
    for aggregate in AGGREGATES.values():
        np.testing.assert_allclose(aggregate(np.stack([marks, 2 * marks]))[0], aggregate(marks))


@pytest.mark.law
def test_distances_of_the_truth_are_zero_and_grow() -> None:
    rng = np.random.default_rng(0)
    for metric in (LatentError(), FeatureDistance(extract=lambda x: x), OwnDistance()):
        near, far = (scale * rng.normal(size=(128, 12)) for scale in (0.05, 0.3))
        values = [metric.value(PROBLEM, metric.marks(PROBLEM, x)) for x in (PROBLEM.reference, near, far)]
        assert values[0] == 0 < values[1] < values[2]
        check_metric(metric, PROBLEM, far)


@pytest.mark.law
def test_feature_distance_is_the_cosine_of_two_layers() -> None:
    """|a / |a| - b / |b||^2 = 2 - 2 cos, averaged over places and summed over layers."""
    metric = FeatureDistance(extract=lambda x: [x, x.mean((2, 3))])
    final = np.random.default_rng(1).normal(size=(128, 12))
    one, two = (PROBLEM.pictures(x).double() for x in (final, PROBLEM.reference))
    cosines = [
        torch.cosine_similarity(a, b, 1) for a, b in ((one, two), (one.mean((2, 3)), two.mean((2, 3))))
    ]
    wanted = (2 - 2 * cosines[0]).mean((1, 2)) + (2 - 2 * cosines[1])
    np.testing.assert_allclose(metric.marks(PROBLEM, final), wanted, atol=1e-5)


@pytest.mark.law
def test_frechet_and_kernel_distances_of_shifted_features() -> None:
    """A shift of all features by d adds |d|^2 to the Fréchet distance, and to nothing else of it."""
    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(2)
    start = Planted(lambda _: np.zeros(128), LEVELS)
    sample = 0.1 * rng.normal(size=(128, 12))
    kept = type("Kept", (Planted,), {"reference": property(lambda self: sample)})(start.off, LEVELS)
    for metric, least in ((Frechet(extract=lambda x: x.flatten(1)), 0.0), (Kernel(), -1.0)):
        values = [metric.value(kept, metric.marks(kept, sample + shift)) for shift in (0.0, 0.1, 0.2)]
        assert least - 1e-6 < values[0] < values[1] < values[2]
        if isinstance(metric, Frechet):
            np.testing.assert_allclose(np.diff(values), [12 * 0.01, 12 * 0.03], rtol=1e-3)
        assert not metric.paired
    with pytest.raises(ValueError, match="compares sets: give at least 2 pairs"):
        Frechet().value(kept, np.zeros((1, 4)))


@pytest.mark.law
def test_rewards_are_turned_over_and_have_a_ceiling() -> None:
    metric = RewardScore(reward=lambda images, prompts: images.mean((1, 2, 3)), label="bright")
    np.testing.assert_allclose(metric.marks(PROBLEM, FAR), -(FAR[:, 0] + 0.5), atol=1e-6)
    assert metric.ceiling == 1.0 and metric.name == "reward:bright"
    check_metric(metric, PROBLEM, FAR)  # it may like what is no truth
    with pytest.raises(ValueError, match="ceiling=0: give how many times"):
        RewardScore(reward=None, ceiling=0)


def test_what_gives_no_numbers_or_grows_with_quality_is_refused() -> None:
    holes = OwnDistance(
        function=lambda a, b: torch.where(torch.arange(len(a)) < 5, torch.nan, 1.0), label="h"
    )
    with pytest.raises(ValueError, match="metric 'h' gives 5 of 128 numbers that are not finite"):
        check_metric(holes, PROBLEM, FAR)
    likeness = OwnDistance(function=lambda a, b: -(a - b).abs().flatten(1).mean(1) + 1, label="likeness")
    with pytest.raises(
        ValueError, match=r"'likeness' gives 1 for the converged samples and 0.795 .*lower has"
    ):
        check_metric(likeness, PROBLEM, FAR)
    short = OwnDistance(function=lambda a, b: torch.zeros(3), label="short")
    with pytest.raises(ValueError, match=r"gives \(3,\) for 128 pairs"):
        check_metric(short, PROBLEM, FAR)


@pytest.mark.parametrize(
    "spec",
    ["latent-mse", "latent-mse:median", "features:pixels", "features-p95:pixels", "fid:pixels", "kid:pixels"],
)
def test_specs_and_names_are_the_same(spec: str) -> None:
    assert parse_metric(spec).name == spec


def test_specs_of_functions_and_rewards(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def far(a, b):\n    return (a - b).abs().flatten(1).mean(1)\ndef eyes(a):\n    return a\n"
    )
    metric: Any = parse_metric(f"{own}:far")
    np.testing.assert_allclose(metric.marks(PROBLEM, FAR), FAR[:, 0], atol=1e-6)
    assert parse_metric(f"features:{own}:eyes").extract(torch.ones(1)) == 1  # type: ignore[attr-defined]
    assert parse_metric("reward:jpeg").name == "reward:jpeg"
    assert parse_metric("median") == LatentError("median")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lpips", "metric 'lpips' is unknown: write one of error"),
        ("latent-mse:mad", "unknown aggregate 'mad'"),
        (
            "fid:inception",
            "extractor 'inception' is unknown: take pixels, clip, shapes-clip, or file.py:function",
        ),
        ("reward:nice", "unknown reward 'nice'"),
        ("none.py:f", "the file 'none.py' does not exist"),
    ],
)
def test_unknown_specs_say_what_is_allowed(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_metric(spec)


def test_models_in_closed_form_have_no_pictures() -> None:
    from test_schedules import mixture

    with pytest.raises(ValueError, match="closed form has no pictures"):
        FeatureDistance(extract=pixels).marks(mixture(2, 0), np.zeros((2, 16)))


def test_functions_of_the_user_s_own_that_go_wrong_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def broken(images, wanted): return images.nothing\n"
        "def text(images, wanted): return 'good'\n"
        "def blind(images, wanted): return [1.0] * len(images)\n"
        "def likeness(images, wanted): return 1 / (1 + (images - wanted).flatten(1).norm(dim=1))\n"
        "def holes(images, wanted): return (images - wanted).flatten(1).norm(dim=1) * float('nan')\n"
        "def one(images, wanted): return 3.0\n"
    )
    for name, said in (
        ("broken", "own.py:broken' raised AttributeError: 'Tensor' object has no attribute 'nothing'"),
        ("text", "own.py:text' gives a str: return a number for each picture"),
        ("blind", "own.py:blind' gives 1 for the converged samples and for those of a few steps alike"),
        ("likeness", "own.py:likeness' gives 1 for the converged samples .* lower has to be better"),
        ("holes", "own.py:holes' gives 128 of 128 numbers that are not finite"),
        ("one", r"own.py:one' gives \(\) for 128 pairs"),
    ):
        with pytest.raises(ValueError, match=said):
            check_metric(parse_metric(f"{tmp_path / 'own.py'}:{name}"), PROBLEM, FAR)
    with pytest.raises(ValueError, match=r"metric 'none.py:f': the file 'none.py' does not exist"):
        parse_metric("none.py:f")
    with pytest.raises(ValueError, match=r"extractor 'none.py:f': the file"):
        parse_metric("features:none.py:f")
