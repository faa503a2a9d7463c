"""What each objective must hold exactly, on a network of a few hundred weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.objective import Objective, Rows
from diffplug.training.objectives.distribution_matching import (
    DistributionSettings,
    Terms,
    TrajectoryDistribution,
    dmd_loss,
    tdm_loss,
    terms,
)
from diffplug.training.objectives.latents import CleanLatents, StoredSteps
from diffplug.training.objectives.one_step import OneStep, OneStepSettings
from diffplug.training.objectives.preference.reward_feedback import hinge
from diffplug.training.objectives.segmented_consistency import (
    ConsistencySettings,
    SegmentedConsistency,
    distance,
)
from diffplug.training.objectives.trajectory_matching import SegmentScale, TrajectoryMatching
from diffplug.training.trainer import Trainer
from tests.training.toy import conditions, network, trajectories


def eight() -> Rows:
    """Eight rows, with their random numbers at the beginning."""
    return Rows(0, 0, 8, range(8))


def grads(objective: Objective, values: dict[str, Tensor]) -> list[Tensor]:
    for value in values.values():
        value.grad = None
    objective.loss(eight()).sum.backward()
    return [torch.zeros_like(v) if v.grad is None else v.grad.clone() for v in values.values()]


def consistency(net: Any, **changes: Any) -> SegmentedConsistency:
    told = ConsistencySettings(**{"segments": (4,), "guidance": (1.0, 1.0), **changes})
    latents = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    return SegmentedConsistency(net, CleanLatents(latents, conditions(16)), told, segments=4, points=40)


@pytest.mark.law
def test_a_student_that_lands_where_the_teacher_lands_has_no_error() -> None:
    net = network()
    data = trajectories(net, 16, 4)
    objective = TrajectoryMatching(net, data, 4)
    with torch.no_grad():
        for j in range(4):
            x = data.states[:, j].float()
            said = net(x, objective.edges[j].expand(16), data.conditions)
            data.states[:, j + 1] = net.path.jump(said, objective.edges[j + 1].expand(16)).half()
    assert float(objective.loss(eight()).log["mse"]) < 1e-5


@pytest.mark.law
def test_every_segment_comes_equally_often_and_weighs_the_same() -> None:
    net = network()
    objective = TrajectoryMatching(net, trajectories(net, 16, 4), 4)
    loss = objective.loss(eight())
    assert loss.totals["segment_rows"].tolist() == [2, 2, 2, 2]
    objective.updated(0, loss.totals)
    again = objective.loss(eight())
    assert float(again.errors.detach().mean()) == pytest.approx(1.0, abs=1e-5)
    whole = Rows(0, 0, 8, range(8))
    parts = [objective.loss(Rows(0, 0, 8, part)) for part in (range(3), range(3, 8))]
    assert torch.allclose(torch.cat([p.errors for p in parts]), objective.loss(whole).errors)


@pytest.mark.law
def test_a_scale_follows_the_segments_that_were_seen_only() -> None:
    scale = SegmentScale(2)
    assert scale.of(torch.tensor([0, 1]), torch.zeros(1)).tolist() == [1, 1]
    scale.update(scale.totals(torch.tensor([0, 0]), torch.tensor([1.0, 3.0])))
    assert scale.error.tolist() == [2, 0]
    scale.update({})
    assert scale.error.tolist() == [2, 0]


@pytest.mark.law
def test_consistency_with_s_at_the_solvers_step_targets_that_step() -> None:
    """Where the solver's step ends on the edge, the target is its state: no jump of the average network."""
    net = network()
    objective = consistency(net, p_edge=1.0)
    objective.points, objective.stride = 4, 250.0  # a step a segment
    for value in objective.target.values():
        value.fill_(torch.nan)
    assert objective.loss(eight()).errors.isfinite().all()


@pytest.mark.law
def test_one_segment_with_the_edge_as_the_end_is_lcm_and_its_target_has_no_gradient() -> None:
    net = network()
    told = ConsistencySettings(segments=(1,), p_edge=1.0, guidance=(1.0, 1.0))
    latents = CleanLatents(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)), conditions(16))
    objective = SegmentedConsistency(net, latents, told, segments=1, points=50)
    rows = Rows(0, 0, 8, range(8))
    started = latents.draw(rows, objective)
    with torch.no_grad():
        said = net.original(started.x, started.index, started.conditions)
        stepped = net.path.jump(said, started.below)
        target = net(stepped, started.below, started.conditions, objective.target).x0
    own = net(started.x, started.index, started.conditions).x0
    at_clean = started.below == 0
    target[at_clean] = stepped[at_clean]
    expected = (own - target).square().mean(1)
    assert torch.allclose(objective.loss(Rows(0, 0, 8, range(8))).errors, expected, rtol=1e-4)
    before = {name: value.requires_grad for name, value in objective.target.items()}
    assert not any(before.values())


@pytest.mark.law
def test_where_guidance_is_kept_pictures_lose_their_captions_now_and_then() -> None:
    null = Conditions({"told": torch.full((1, 2), 9.0)})
    told = ConsistencySettings(segments=(4,), guidance=(1, 1))
    objective = SegmentedConsistency(
        network(), CleanLatents(torch.randn(50, 2), conditions(50), null, 0.2), told, segments=4, points=40
    )
    started = objective.data.draw(Rows(0, 0, 500, range(500)), objective)
    empty = (started.conditions.leaves["told"] == 9).all(1)
    assert 0.14 < float(empty.double().mean()) < 0.26  # 3.4 standard errors
    assert torch.isin(started.conditions.leaves["told"][~empty], conditions(50).leaves["told"]).all()


@pytest.mark.law
def test_the_average_target_follows_the_student() -> None:
    net = network()
    objective = consistency(net, target_decay=0.5)
    first = {name: value.clone() for name, value in objective.target.items()}
    with torch.no_grad():
        for value in net.weights.values():
            value.add_(1)
    objective.updated(0, {})
    assert all(torch.allclose(objective.target[name], first[name] + 0.5) for name in first)
    again = consistency(network())
    again.load_state_dict(objective.state_dict())
    assert all(torch.equal(again.target[name], objective.target[name]) for name in first)


@pytest.mark.law
def test_stored_steps_are_the_teachers() -> None:
    net = network()
    data = trajectories(net, 16, 8)
    told = ConsistencySettings(segments=(4,), p_edge=1.0, source="trajectories")
    source = StoredSteps(data.states, data.index, data.conditions)
    objective = SegmentedConsistency(net, source, told, segments=4, points=8)
    started = source.draw(eight(), objective)
    assert torch.equal(started.index - started.below, torch.full((8,), 125.0).double())
    assert started.next is not None and objective.loss(eight()).errors.isfinite().all()


@pytest.mark.law
def test_guidance_weighs_prompt_against_null() -> None:
    net = network()
    x, index, told = torch.randn(4, 2), torch.full((4,), 600.0), conditions(4)
    guided, with_prompt, without = net.guided(x, index, told, 1.0)
    assert torch.allclose(guided.eps, with_prompt.eps)
    free = net.original(x, index, net.null.expand(4))  # type: ignore[union-attr]
    assert torch.allclose(without.eps, free.eps)
    guided, _, _ = net.guided(x, index, told, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert torch.allclose(guided.eps[0], without.eps[0])
    assert torch.allclose(
        guided.eps[2], without.eps[2] + 2 * (with_prompt.eps[2] - without.eps[2]), atol=1e-6
    )


@pytest.mark.law
def test_the_terms_vanish_where_the_fake_is_the_teacher_and_nobody_guides() -> None:
    net = network()
    x, tau, told = torch.randn(4, 2), torch.full((4,), 600.0), conditions(4)
    own = net.original(x, tau, told).x0
    plain = terms(net, own, x, tau, told, 1.0)
    assert not plain.dm.any() and not plain.ca.any()
    x0 = torch.randn(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(dmd_loss(x0, plain).sum(), x0)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(tdm_loss(x0, plain).sum(), x0)
    assert not gradient.any()
    guided = terms(net, own, x, tau, told, 4.0)
    assert torch.allclose(guided.dm, torch.zeros(4, 2), atol=1e-5) and guided.ca.abs().sum() > 0
    (gradient,) = torch.autograd.grad(dmd_loss(x0, guided).sum(), x0)
    size = (x0.detach() - guided.real).abs().mean(1, keepdim=True)
    assert torch.allclose(gradient * x0.shape[1], -guided.ca / size, atol=1e-4)


@pytest.mark.law
def test_a_fake_that_is_the_guided_teacher_leaves_the_student_alone() -> None:
    found = Terms(dm=torch.randn(3, 2), ca=torch.zeros(3, 2), real=torch.randn(3, 2))
    found = Terms(found.dm, -found.dm, found.real)
    x0 = torch.randn(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(tdm_loss(x0, found).sum(), x0)
    assert gradient.abs().max() < 1e-6


@pytest.mark.law
@pytest.mark.parametrize("dm", ["step", "full"])
def test_student_and_fake_share_no_gradient(dm: Any) -> None:
    net = network()
    objective = TrajectoryDistribution(net, conditions(16), DistributionSettings(dm=dm), segments=2)
    loss = objective.loss(eight())
    x0_only = float(loss.log["fake"])
    of_fake = grads(objective, objective.fake)
    of_student = grads(objective, dict(net.weights))
    assert all(g.abs().sum() > 0 for g in (of_fake[0], of_student[0])) and x0_only > 0
    with torch.no_grad():
        for value in objective.fake.values():
            value.requires_grad_(False)
    assert all(
        torch.allclose(a, b) for a, b in zip(grads(objective, dict(net.weights)), of_student, strict=True)
    )


@pytest.mark.law
def test_tau_stays_within_the_students_step() -> None:
    net = network()
    objective = TrajectoryDistribution(net, conditions(16), DistributionSettings(), segments=4)
    rows = Rows(0, 0, 4096, range(4096))
    low, high = torch.full((4096,), 250.0).double(), torch.full((4096,), 500.0).double()
    tau = objective._between(rows, low, high)
    assert tau.min() >= 251 and tau.max() <= 490
    assert objective._between(rows, low * 0, high / 2).min() == 20


@pytest.mark.law
def test_a_one_step_anchor_pulls_stored_noise_to_its_stored_end() -> None:
    net = network()
    data = trajectories(net, 16, 1)
    told = OneStepSettings(anchor=0.25, guidance=1.0)
    objective = OneStep(net, conditions(16), told, segments=1, data=data)
    x, _, stored = objective._state(eight(), 0)
    assert stored is not None
    item = Rows(0, 0, 8, range(8)).items(16)
    assert stored[1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.equal(x[:4], data.states[item[:4], 0].float())
    assert torch.equal(stored[0], data.states[item, 1].float())
    assert "anchor" in objective.loss(eight()).log


@pytest.mark.law
def test_the_hinge_pushes_only_below_its_threshold() -> None:
    scores = torch.tensor([0.2, 0.9, 1.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(hinge(scores, 1.0).sum(), scores)
    assert gradient.tolist() == [-1, -1, 0] and hinge(scores, 1.0)[2] == 0


@pytest.mark.law
def test_huber_is_square_near_zero_and_linear_far_off() -> None:
    near = distance(torch.full((1, 4), 1e-5), torch.zeros(1, 4), "huber")
    assert float(near) == pytest.approx(1e-10 / 2e-3, rel=5e-3)
    assert float(distance(torch.full((1, 4), 10.0), torch.zeros(1, 4), "huber")) == pytest.approx(
        10, rel=1e-3
    )


MAKERS: dict[str, Any] = {
    "trajectory": lambda net: TrajectoryMatching(net, trajectories(net, 16, 4), 4),
    "consistency": consistency,
    "tdm": lambda net: TrajectoryDistribution(
        net, conditions(16), DistributionSettings(warmup=2), segments=2
    ),
    "one-step": lambda net: OneStep(
        net, conditions(16), OneStepSettings(warmup=2), segments=1, data=trajectories(net, 16, 1)
    ),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", MAKERS)
def test_every_objective_resumes_bit_for_bit_and_divides_its_batch(name: str, tmp_path: Path) -> None:
    def run(folder: str, *, micro: int | None = None, minutes: float | None = None) -> Any:
        net = network()
        settings = RunSettings(updates=6, batch=8, save_every=2, micro_batch=micro)
        trainer = Trainer(
            MAKERS[name](net),
            settings,
            OptimizerSettings(lr=1e-2),
            folder=tmp_path / folder,
            minutes=minutes,
            cpu=True,
        )
        return trainer.run().weights["student"]

    whole = run("whole")
    for _ in range(6):
        pieces = run("pieces", minutes=0.0)
    assert all(torch.equal(whole[n], pieces[n]) for n in whole)
    divided = run("divided", micro=3)
    assert all(torch.allclose(whole[n], divided[n], atol=2e-5) for n in whole)
    start = dict(network().weights)
    assert any(not torch.equal(whole[n], start[n]) for n in whole)
