"""The toy of negative prompts: R where it is known, what wrong formulas look like, a whole small run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.negative_toy import grid
from benchmarks.negative_toy.grid import OPEN, World, allowed, cases, drawn, exact, gap_of, guided, violations
from benchmarks.negative_toy.table import QUICK, measured

PATH = grid.path_of()


def answers(n: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """y(c+) and y(c-) of noised data in closed form, and the indices."""
    positive, negative, _ = cases(n)
    g = torch.Generator().manual_seed(1)
    clean = grid.sampled(positive, torch.rand(n, generator=g), torch.randn(n, 2, generator=g), World())
    index = torch.randint(1, 1001, (n,), generator=g).double()
    x = PATH.noised(clean, torch.randn(n, 2, generator=g), torch.zeros(n, dtype=torch.float64), index)
    return exact(x, index, positive, PATH), exact(x, index, negative, PATH), index


@pytest.mark.law
def test_the_closed_form_is_the_mean_of_its_data() -> None:
    prompt = torch.tensor([[1, OPEN]])
    assert allowed(prompt)[0].nonzero()[:, 0].tolist() == [1, 5, 9, 13]
    n, g = 200_000, torch.Generator().manual_seed(0)
    data = grid.sampled(
        prompt.expand(n, 2), torch.rand(n, generator=g), torch.randn(n, 2, generator=g), World()
    )
    index = torch.tensor([400.0])
    alpha, sigma = (float(v) for v in PATH.levels(index))
    x = torch.tensor([[0.1, -0.3]])
    weight = (-(x - alpha * data).square().sum(1) / (2 * sigma**2)).softmax(0)
    mean = (weight[:, None] * data).sum(0)
    said = PATH.predict(exact(x, index, prompt, PATH), x, index).x0
    assert torch.allclose(said[0], mean, atol=0.02)
    turned = World(0.5, torch.pi / 2, 1.0).centres
    assert torch.allclose(turned[0], torch.tensor([1 + 0.525, 1 - 0.525]), atol=1e-5)


@pytest.mark.law
def test_r_is_1_without_guidance_0_for_guidance_and_known_between() -> None:
    positive, negative, index = answers()
    for w in (2.0, 7.0):
        wanted = guided(positive, negative, w)
        assert gap_of(positive, positive, wanted) == pytest.approx(1.0)
        assert gap_of(wanted, positive, wanted) == 0
        half = positive + 0.5 * (wanted - positive)
        assert gap_of(half, positive, wanted) == pytest.approx(0.25, rel=1e-5)
        for k in range(5):
            part = ((index - 1) // 200) == k
            assert gap_of(half[part], positive[part], wanted[part]) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.law
def test_a_convention_that_is_off_by_one_fails_at_small_scales_alone() -> None:
    positive, negative, _ = answers()
    found = {
        w: gap_of(guided(positive, negative, w + 1), positive, guided(positive, negative, w))
        for w in (2.0, 7.0)
    }
    assert found[2.0] == pytest.approx(1.0, rel=1e-4) and found[7.0] == pytest.approx(1 / 36, rel=1e-3)


@pytest.mark.law
def test_guidance_obeys_and_a_wrong_sign_or_a_withheld_negative_does_not() -> None:
    positive, negative, noise = cases(192)

    def share(formula: Any) -> float:
        return violations(drawn(formula, noise, 50, PATH), negative)

    def away(w: float, other: Tensor = negative) -> Any:
        return lambda x, index: guided(exact(x, index, positive, PATH), exact(x, index, other, PATH), w)

    chance = share(away(1.0))
    assert 0.15 < chance < 0.35
    assert share(away(4.0)) <= 0.02
    assert share(away(-2.0)) > 0.9
    assert abs(share(away(4.0, torch.full_like(negative, OPEN))) - chance) < 0.1


@pytest.mark.law
def test_fewer_steps_of_guidance_end_farther_away() -> None:
    positive, negative, noise = cases(192)

    def output(x: Tensor, index: Tensor) -> Tensor:
        return guided(exact(x, index, positive, PATH), exact(x, index, negative, PATH), grid.HIGH)

    far = drawn(output, noise, 50, PATH)
    gaps = [float((drawn(output, noise, steps, PATH) - far).square().mean()) for steps in (24, 8, 4, 2)]
    assert gaps == sorted(gaps) and gaps[0] < 0.02


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_small_run_fills_every_table(tmp_path: Path) -> None:
    found = measured(tmp_path, QUICK)
    gap = {row["method"]: row for row in found["one step"]}
    assert gap["unguided"]["R"] == pytest.approx(1.0, abs=1e-6)
    assert {"released form", "tied", "tied, small", "blind"} <= gap.keys()
    run = {(row["method"], row["w"]): row for row in found["runs"]}
    assert run["guidance", grid.HIGH]["distance"] == 0 and run["unguided", None]["distance"] == 1
    assert [row["evaluations"] for row in found["four"]] == [48, 16, 8, 4, 8, 4, 4, 4, 4, 4]
    assert found["other bases"][0]["change"] == 0 < found["other bases"][1]["change"]
    assert len(found["bars"]) == 10
