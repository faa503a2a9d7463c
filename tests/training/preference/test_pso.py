"""PSO on a network of a few hundred weights: start, gradient, symmetry, conventions, reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.noise_path import NoisePath
from diffplug.training.objective import Rows
from diffplug.training.objectives.preference.pso import PSO, PSOSettings
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.pair_loss import clipped, pair_loss
from diffplug.training.preference.selectors import (
    all_pairs,
    best_worst,
    group_advantage,
    score_gap,
    step_best_worst,
)
from diffplug.training.trainer import Trainer
from tests.training.toy import VP, conditions, network

DOUBLE, SINGLE = torch.float64, torch.float32
FLOW = NoisePath.of(FlowMatchEulerDiscreteScheduler(shift=3.0))


def rightmost(latents: Tensor, prompts: list[str]) -> Tensor:
    return latents[:, 0].double().cpu()


def made(
    scorer: Any = rightmost,
    path: NoisePath = VP,
    steps: int = 4,
    dtype: torch.dtype = DOUBLE,
    **settings: Any,
) -> PSO:
    told = PSOSettings(**{"beta": 50.0, "anchor": 0.0, **settings})
    net = network(path, dtype=dtype)
    kernel = Kernel.ddim(path, steps, told.eta)
    prompts = [f"prompt {i}" for i in range(16)]
    return PSO(net, kernel, conditions(16, dtype), prompts, told, scorer=scorer)


class Wide(Rows):
    """Rows whose noise is float64."""

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*shape).double()


def rows(n: int = 8, update: int = 0, first: int = 0, batch: int | None = None) -> Rows:
    return Wide(0, update, batch or n, range(first, first + n))


def plain(n: int) -> Rows:
    return Rows(0, 99, n, range(n))


def gradient(objective: PSO, given: Rows) -> Tensor:
    weights = objective.network.weights
    for value in weights.values():
        value.grad = None
    loss = objective.loss(given)
    if loss.sum.requires_grad:
        loss.sum.backward()
    return torch.cat(
        [torch.zeros_like(v).flatten() if v.grad is None else v.grad.flatten() for v in weights.values()]
    )


def shaken(objective: PSO, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(5)
    for value in objective.network.weights.values():
        value.data += size * torch.randn(value.shape, generator=generator, dtype=DOUBLE)


@pytest.mark.law
@pytest.mark.parametrize("reduce", ["trajectory", "step"])
def test_at_the_start_the_loss_is_log_two_and_the_ratios_are_zero(reduce: str) -> None:
    objective = made(reduce=reduce)
    loss = objective.loss(rows())
    assert torch.equal(loss.errors, torch.full_like(loss.errors, math.log(2)))
    assert float(loss.log["winner"]) == float(loss.log["loser"]) == 0
    assert loss.weights is not None and float(loss.weights.sum()) == 8


@pytest.mark.law
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_first_gradient_is_that_of_reinforce(kind: str) -> None:
    path = FLOW if kind == "flow_prediction" else NoisePath(VP.abar, kind)
    kernel, beta, d = Kernel.ddim(path, 4, 1.0), 50.0, 3 * 2
    generator = torch.Generator().manual_seed(1)
    x, x0, z = (torch.randn(2, 3, 3, 2, generator=generator, dtype=DOUBLE) for _ in range(3))
    steps = torch.tensor([0, 1, 2])
    x0.requires_grad_()
    ells = [
        kernel.log_ratio(x[i], x0[i], x0[i].detach(), kernel.sample(x[i], x0[i].detach(), steps, z[i]), steps)
        for i in (0, 1)
    ]
    pair_loss(ells[0][None], ells[1][None], beta=beta).errors.sum().backward()
    a, s = (
        torch.tensor([getattr(kernel.forms[i], n) for i in (0, 1, 2)], dtype=DOUBLE).view(3, 1, 1)
        for n in ("a", "s")
    )
    told = beta / 2 * a / (s * d)
    assert x0.grad is not None
    assert torch.allclose(x0.grad[0], -told * z[0], rtol=1e-9)
    assert torch.allclose(x0.grad[1], told * z[1], rtol=1e-9)


@pytest.mark.law
def test_one_function_in_every_parameterisation_has_one_loss() -> None:
    index = torch.tensor([1000.0, 750, 500])
    alpha, sigma = (v.view(3, 1) for v in VP.levels(index))
    x, x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    eps = (x - alpha * x0) / sigma
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}
    for kind, output in outputs.items():
        assert torch.allclose(NoisePath(VP.abar, kind).predict(output, x, index).x0, x0, atol=1e-9)


@pytest.mark.law
def test_swapping_the_labels_flips_the_first_gradient() -> None:
    one, other = made(), made(lambda x, p: -rightmost(x, p))
    g, h = gradient(one, rows()), gradient(other, rows())
    assert torch.allclose(g, -h, rtol=1e-9, atol=1e-14) and float(g.norm()) > 0
    assert torch.equal(one.loss(rows()).errors, other.loss(rows()).errors)


@pytest.mark.law
def test_ties_weigh_nothing() -> None:
    objective = made(lambda x, p: torch.zeros(len(x), dtype=DOUBLE))
    loss = objective.loss(rows())
    assert loss.weights is not None and not bool(loss.weights.any())
    assert float(gradient(objective, rows()).norm()) == 0
    half = made(lambda x, p: rightmost(x, p) * torch.arange(len(x)).ge(8))
    weights = half.loss(rows()).weights
    assert weights is not None and weights.tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.law
def test_a_coin_has_no_direction_and_a_reward_has_its_own() -> None:
    kernel, beta, n = Kernel.ddim(VP, 2, 1.0), 10.0, 4000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, n, 3, generator=generator, dtype=DOUBLE)
    x = torch.zeros(n, 3, dtype=DOUBLE)
    step = torch.zeros(n, dtype=torch.long)
    toward = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
    following = [kernel.sample(x, x, step, z[i]) for i in (0, 1)]

    def moves(first: Tensor) -> Tensor:
        x0 = torch.zeros(n, 3, dtype=DOUBLE, requires_grad=True)
        one, two = (kernel.log_ratio(x, x0, x, f, step)[:, None] for f in following)
        better, worse = torch.where(first[:, None], one, two), torch.where(first[:, None], two, one)
        pair_loss(better, worse, beta=beta).errors.sum().backward()
        assert x0.grad is not None
        return -x0.grad

    coin = moves(torch.rand(n, generator=generator) < 0.5)
    z_test = coin.mean(0) / (coin.std(0) / math.sqrt(n))
    assert float(z_test.abs().max()) < 4
    mean = moves((following[0] - following[1]) @ toward > 0).mean(0)
    assert float(torch.nn.functional.cosine_similarity(mean, toward, dim=0)) > 0.99


@pytest.mark.law
def test_step_and_trajectory_are_one_for_two_evaluations() -> None:
    one, other = made(steps=2, reduce="step"), made(steps=2, reduce="trajectory")
    shaken(one), shaken(other)
    assert torch.equal(one.loss(rows()).errors, other.loss(rows()).errors)
    longer = [made(reduce=reduce) for reduce in ("step", "trajectory")]
    shaken(longer[0]), shaken(longer[1])
    assert not torch.allclose(longer[0].loss(rows()).errors, longer[1].loss(rows()).errors)


@pytest.mark.law
def test_clips_act_where_they_say() -> None:
    ell = torch.tensor([-0.3, -0.05, 0.05, 0.3], dtype=DOUBLE, requires_grad=True)
    alive = {
        ("two_sided", True): [0.0, 1, 1, 0], ("two_sided", False): [0.0, 1, 1, 0],
        ("ppo", True): [1.0, 1, 1, 0], ("ppo", False): [0.0, 1, 1, 1], ("none", True): [1.0, 1, 1, 1],
    }  # fmt: skip
    for (clip, wins), told in alive.items():
        (found,) = torch.autograd.grad(clipped(ell, clip, 0.1, wins=wins).sum(), ell)  # type: ignore[arg-type]
        assert found.tolist() == told
    held = clipped(ell.detach(), "two_sided", 0.1, wins=True)
    assert held[[0, 3]].tolist() == pytest.approx([math.log(0.9), math.log(1.1)])


@pytest.mark.law
def test_a_small_beta_leaves_log_two_and_its_gradient_shrinks_with_it() -> None:
    norms = {}
    for beta in (1e-3, 1e-4):
        objective = made(beta=beta)
        shaken(objective)
        norms[beta] = float(gradient(objective, rows()).norm())
        assert float(objective.loss(rows()).errors.detach().mean()) == pytest.approx(math.log(2), abs=1e-3)
    assert norms[1e-3] == pytest.approx(10 * norms[1e-4], rel=1e-2)


@pytest.mark.law
def test_a_beta_for_sums_is_that_for_means_over_the_dimensions() -> None:
    mean, total = made(beta=50.0), made(beta=50.0 / 2, logprob="sum")
    shaken(mean), shaken(total)
    assert torch.allclose(mean.loss(rows()).errors, total.loss(rows()).errors, rtol=1e-12)


@pytest.mark.law
def test_the_anchor_is_a_gradient_at_the_last_step_alone() -> None:
    free, held = made(), made(anchor=10.0)
    shaken(free), shaken(held)
    extra = held.loss(rows()).errors - free.loss(rows()).errors
    assert bool((extra > 0).all())
    assert torch.allclose(extra.mean(), 10.0 * held.loss(rows()).log["anchor"])


@pytest.mark.law
def test_training_prefers_and_leaves_the_reference_alone(tmp_path: Any) -> None:
    objective = made(dtype=SINGLE, beta=20.0, anchor=None)
    before = {name: value.clone() for name, value in objective.network.tuner.before.items()}  # type: ignore[attr-defined]
    start = float(objective.drawn(plain(64)).scores.mean())
    x, index = torch.randn(4, 2), torch.full((4,), 500.0)
    said = objective.network.original(x, index, conditions(4)).x0
    objective.network.put(run(objective, tmp_path, updates=60, lr=3e-3))
    assert float(objective.drawn(plain(64)).scores.mean()) > start + 0.2
    after = objective.network.tuner.before  # type: ignore[attr-defined]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(objective.network.original(x, index, conditions(4)).x0, said)


def run(
    objective: PSO, folder: Any, updates: int = 6, lr: float = 1e-3, **settings: Any
) -> dict[str, Tensor]:
    told = {"updates": updates, "batch": 8, "save_every": 2, **settings}
    minutes = told.pop("minutes", None)
    trainer = Trainer(
        objective, RunSettings(**told), OptimizerSettings(lr=lr, warmup=0, floor=1.0), folder=folder,
        cpu=True, minutes=minutes,
    )  # fmt: skip
    return trainer.run().weights["student"]


@pytest.mark.law
def test_parts_of_a_batch_and_interruptions_change_nothing(tmp_path: Any) -> None:
    whole = run(made(dtype=SINGLE, anchor=10.0), tmp_path / "whole")
    parts = run(made(dtype=SINGLE, anchor=10.0), tmp_path / "parts", micro_batch=3)
    for _ in range(6):
        pieces = run(made(dtype=SINGLE, anchor=10.0), tmp_path / "pieces", minutes=0.0)
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-6)
        assert torch.equal(value, pieces[name])


def test_a_reward_that_prefers_nothing_ends_the_run(tmp_path: Any) -> None:
    objective = made(lambda x, p: torch.ones(len(x), dtype=DOUBLE), dtype=SINGLE, patience=3)
    with pytest.raises(ValueError, match="the same score in 3 updates in a row"):
        run(objective, tmp_path)


def test_deterministic_kernels_and_single_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give objective\.eta above 0"):
        made(eta=0.0)
    with pytest.raises(ValueError, match="take `pso-offline`"):
        made(steps=1)
    with pytest.raises(ValueError, match="one has no rival"):
        made(candidates=1)


@pytest.mark.law
def test_selection() -> None:
    scores = torch.tensor([[1.0, 3, 2], [2, 2, 2], [0, 0.1, 0]])
    pairs = best_worst(scores, 0.5)
    assert (pairs.row.tolist(), pairs.winner.tolist(), pairs.loser.tolist()) == ([0], [1], [0])
    assert len(all_pairs(scores)) == 3 + 2
    advantage = group_advantage(scores)
    assert torch.allclose(advantage.sum(1), torch.zeros(3), atol=1e-6) and not bool(advantage[1].any())
    for threshold in (0.3, 0.4):
        gap = score_gap(threshold)
        p = torch.softmax(torch.tensor([gap, 0.0]), 0)
        assert float(p[0] - p[1]) == pytest.approx(threshold, abs=1e-6)
        assert len(step_best_worst(torch.tensor([[gap + 1e-3, 0], [gap - 1e-3, 0]]), threshold)) == 1
    assert [round(score_gap(t), 3) for t in (0.3, 0.4)] == [0.619, 0.847]
    assert len(step_best_worst(torch.zeros(4, 2), 0.0)) == 0
