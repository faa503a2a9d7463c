"""Policy gradients: the clipped surrogate, and the first gradient as that of REINFORCE."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffplug.registry import TRAINERS
from diffplug.training.objectives.preference.policy_gradient import PolicyGradient, PolicySettings, surrogate
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.selectors import group_advantage
from tests.training.preference.test_pso import DOUBLE, gradient, rightmost, rows, shaken
from tests.training.toy import VP, conditions, network


def made(**settings: Any) -> PolicyGradient:
    told = PolicySettings(**{"candidates": 4, **settings})
    prompts = [f"prompt {i}" for i in range(16)]
    return PolicyGradient(
        network(dtype=DOUBLE),
        Kernel.ddim(VP, 4, 1.0),
        conditions(16, DOUBLE),
        prompts,
        told,
        scorer=rightmost,
    )


@pytest.mark.law
def test_the_surrogate_stops_where_a_ratio_has_gone_far_enough() -> None:
    log_rho = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    for advantage, alive in ((1.0, [True, True, False]), (-1.0, [False, True, True])):
        (g,) = torch.autograd.grad(surrogate(log_rho, torch.tensor(advantage), 0.2).sum(), log_rho)
        assert (g != 0).tolist() == alive


@pytest.mark.law
def test_the_gradient_is_that_of_advantage_times_log_density() -> None:
    objective = made()
    shaken(objective)
    g = gradient(objective, rows(3))  # type: ignore[arg-type]
    drawn = objective.drawn(rows(3))
    found = objective.transitions(drawn, torch.arange(12), anchor=False)
    a = group_advantage(drawn.scores).flatten()[:, None]
    told = torch.autograd.grad((-a * found.ell).mean(1).sum() / 4, list(objective.network.weights.values()))
    assert torch.allclose(g, torch.cat([v.flatten() for v in told]), rtol=1e-9, atol=1e-13)


@pytest.mark.law
def test_a_divergence_pulls_back_to_the_start() -> None:
    free, held = made(), made(kl=100.0)
    shaken(free), shaken(held)
    extra = held.loss(rows(3)).errors - free.loss(rows(3)).errors
    assert bool((extra > 0).all())


@pytest.mark.parametrize("name", ["pso", "d3po", "spo", "ddpo", "dpok", "flow-grpo", "dance-grpo"])
def test_every_online_method_has_its_published_settings(name: str) -> None:
    method = TRAINERS.get(name)
    told = method.Settings()
    assert method.DEFAULTS["tuner"]["rank"] >= 4 and method.DEFAULTS["optimizer"]["lr"] <= 6e-5
    expected = {
        "pso": ("beta", 100.0), "d3po": ("beta", 0.1), "spo": ("threshold", 0.3), "ddpo": ("epsilon", 1e-4),
        "dpok": ("kl", 0.01), "flow-grpo": ("kernel", "flow-sde"), "dance-grpo": ("start", "shared"),
    }  # fmt: skip
    key, value = expected[name]
    assert getattr(told, key) == value
