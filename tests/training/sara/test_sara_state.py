"""Stopping and going on, progressive adjustment, averages, and the rank term."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from sara_nets import batches, copied, loss, network
from torch import nn

from diffplug.training import Progressive, RankTerm, SaRA, SaRAAdamW, VectorAverage
from diffplug.training.tuners.sara.rank import newton_schulz, polar

pytestmark = pytest.mark.law


def _step(model: nn.Module, optimizer: Any, x: torch.Tensor) -> None:
    loss(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_progressive_adjustment() -> None:
    model, inputs = network(torch.float32), batches(12, torch.float32)
    optimizer = SaRAAdamW(model, lr=2e-3, density=0.3, progressive=5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    tuner, rates = optimizer.tuner, []
    first = {e.key: e.index.clone() for e in tuner.entries}
    for i, x in enumerate(inputs):
        if i == 5:
            frozen = copied(model)
            live = {e.key: e.index.clone() for e in tuner.entries}
            for e in tuner.entries:
                assert bool(torch.isin(e.index, first[e.key]).all()) and len(e.index) <= len(first[e.key])
                assert bool((e.vector.detach().abs() < e.threshold).all())
                assert int(optimizer.state[e.vector]["step"]) == 5
                assert optimizer.state[e.vector]["exp_avg"].shape == e.vector.shape
        _step(model, optimizer, x)
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    assert sum(map(len, live.values())) < sum(map(len, first.values()))
    for entry in tuner.entries:
        differs = torch.nonzero((entry.weight.detach() != frozen[entry.name]).reshape(-1))[:, 0]
        assert bool(torch.isin(differs, live[entry.key].long()).all())
        assert torch.equal(entry.all()[0], first[entry.key])
    assert all(a > b for a, b in pairwise(rates))


def test_an_adjustment_after_the_end_changes_nothing_and_fresh_moments_are_fresh() -> None:
    ends = []
    for progressive in (None, 100):
        model = network(torch.float32)
        optimizer = SaRAAdamW(model, lr=2e-3, density=0.3, progressive=progressive)
        for x in batches(4, torch.float32):
            _step(model, optimizer, x)
        ends.append(copied(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    model = network(torch.float32)
    optimizer = SaRAAdamW(model, lr=2e-3, density=0.3, progressive=Progressive(2, fresh_moments=True))
    for x in batches(2, torch.float32):
        _step(model, optimizer, x)
    state = optimizer.state[optimizer.tuner.entries[0].vector]
    assert int(state["step"]) == 0 and not state["exp_avg"].any()


@pytest.mark.parametrize("progressive", [None, 3, 6])
def test_a_resumed_run_is_the_whole_run(progressive: int | None) -> None:
    options: dict[str, Any] = {"lr": 2e-3, "density": 0.3, "progressive": progressive}
    inputs = batches(8, torch.float32)
    whole = network(torch.float32)
    optimizer = SaRAAdamW(whole, **options)
    for x in inputs:
        _step(whole, optimizer, x)
    part = network(torch.float32)
    optimizer = SaRAAdamW(part, **options)
    for x in inputs[:4]:
        _step(part, optimizer, x)
    saved = optimizer.state_dict()
    part = network(torch.float32)
    optimizer = SaRAAdamW(part, **options)
    optimizer.load_state_dict(saved)
    for x in inputs[4:]:
        _step(part, optimizer, x)
    assert all(torch.equal(v, copied(whole)[n]) for n, v in part.named_parameters())
    with pytest.raises(ValueError, match="same density"):
        SaRAAdamW(network(torch.float32), density=0.2).load_state_dict(saved)
    with pytest.raises(ValueError, match="another optimiser"):
        SaRAAdamW(network()).load_state_dict({"state": {}, "param_groups": []})


def test_the_average_is_of_the_vectors() -> None:
    model = network(torch.float32)
    optimizer = SaRAAdamW(model, lr=1e-2, density=0.2, progressive=4)
    average = VectorAverage(optimizer.tuner, 0.5)
    kept = {n: v.detach().clone() for n, v in optimizer.tuner.named_parameters().items()}
    for i, x in enumerate(batches(3, torch.float32)):
        _step(model, optimizer, x)
        average.update()
        decay = min(0.5, (1 + i) / (10 + i))
        kept = {
            n: decay * v + (1 - decay) * optimizer.tuner.named_parameters()[n].detach()
            for n, v in kept.items()
        }
    assert all(torch.allclose(average.vectors[n], v, atol=1e-6) for n, v in kept.items())
    own = copied(model)
    with average.applied():
        entry = optimizer.tuner.entries[0]
        assert torch.allclose(
            entry.weight.reshape(-1)[entry.index.long()], average.vectors[entry.key], atol=1e-7
        )
    assert all(torch.equal(v, own[n]) for n, v in model.named_parameters())
    _step(model, optimizer, batches(1, torch.float32)[0])
    average.update()  # after an adjustment
    assert {n: len(v) for n, v in average.vectors.items()} == {
        e.key: len(e.vector) for e in optimizer.tuner.entries
    }


# ------------------------------------------------------------------------------------------------ rank term


def _wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 80, bias=False), nn.Linear(80, 72, bias=False)).double()


def _norm(tuner: SaRA, place: int) -> float:
    entry = tuner.entries[place]
    flat = torch.zeros(entry.weight.numel(), dtype=torch.float64)
    flat[entry.index.long()] = entry.vector.detach()
    return float(torch.linalg.svdvals(flat.view(entry.weight.shape)).sum())


def test_the_pull_is_the_derivative_of_the_nuclear_norm() -> None:
    tuner = SaRA(_wide(), density=0.15)
    term, entry = RankTerm(1.0), tuner.entries[0]
    direction = torch.randn(len(entry.vector), dtype=torch.float64)
    before, slope = _norm(tuner, 0), float(term.pull(entry) @ direction)
    with torch.no_grad():
        entry.vector.add_(direction, alpha=1e-9)
    assert (_norm(tuner, 0) - before) / 1e-9 == pytest.approx(slope, rel=1e-4)


def test_alone_it_lowers_the_norm_at_every_step_and_takes_turns() -> None:
    model = _wide()
    tuner = SaRA(model, density=0.15, rank=RankTerm(1.0, mode="decoupled"))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-4, weight_decay=0)
    tuner.attach(optimizer)
    norms = [[_norm(tuner, 0), _norm(tuner, 1)]]
    for _ in range(6):
        for vector in tuner.parameters():
            vector.grad = torch.zeros_like(vector)
        optimizer.step()
        norms.append([_norm(tuner, 0), _norm(tuner, 1)])
    falls = [[a[i] - b[i] > 1e-9 for i in (0, 1)] for a, b in pairwise(norms)]
    assert falls == [[True, False], [False, True]] * 3


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("of", ["values", "delta"])
def test_it_changes_the_trajectory(mode: Any, of: Any) -> None:
    ends = []
    for rank in (None, RankTerm(0.1, mode=mode, of=of)):
        model = _wide()
        optimizer = SaRAAdamW(model, lr=1e-3, density=0.15, rank=rank)
        for _ in range(3):
            model(torch.ones(2, 96, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model[0].weight.detach().clone())
    assert not torch.equal(*ends)


def test_newton_schulz_is_near_the_polar_factor() -> None:
    torch.manual_seed(0)
    for shape in ((320, 320), (200, 320), (320, 200)):
        matrix = torch.randn(shape) * (torch.rand(shape) < 0.058)
        exact, fast, mask = polar(matrix), newton_schulz(matrix), matrix != 0
        error = float((fast - exact)[mask].norm() / exact[mask].norm())
        assert error < 0.05 and float(torch.linalg.matrix_norm(fast, 2)) < 1.01
        assert float((fast * matrix).sum()) == pytest.approx(
            float(torch.linalg.svdvals(matrix).sum()), rel=2e-3
        )


def test_its_size_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(320, 320, bias=False)
    tuner = SaRA(model, density=0.058)
    size = float(RankTerm(1.0).pull(tuner.entries[0]).square().mean().sqrt())
    assert 0.08 < size < 0.25


def test_small_and_sparse_matrices_are_left_out() -> None:
    tuner = SaRA(nn.Linear(64, 512), density=0.5)
    assert RankTerm(1.0)._turn(tuner.entries, 0) == []
    assert RankTerm(1.0, smallest=32)._turn(tuner.entries, 0) == tuner.entries
    assert RankTerm(1.0, smallest=32, every=2)._turn(tuner.entries, 1) == []
    for options in ({"mode": "cupled"}, {"of": "x"}, {"every": 0}, {"weight": 0.0}):
        with pytest.raises(ValueError, match=r"mode|of|every|weight"):
            RankTerm(**options)
