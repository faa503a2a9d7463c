"""The molecule model without RDKit: jumps, posteriors, equivariance, padding, permutations, training."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from diffplug.demos.molecules import diffusion
from diffplug.demos.molecules.diffusion import Prior, drawn, jump, noised, posterior, signal, step, symmetric
from diffplug.demos.molecules.graphs import Graphs, centred
from diffplug.demos.molecules.network import Card, MoleculeNetwork, load_network, save_network
from diffplug.demos.molecules.objective import train
from diffplug.training.objective import Rows

PRIOR = Prior(torch.tensor([0.6, 0.2, 0.15, 0.05]), torch.tensor([0.63, 0.3, 0.055, 0.015]))


def some(n: int = 5, largest: int = 6, seed: int = 0) -> Graphs:
    """Return random graphs of two to `largest` atoms."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, largest + 1, (n,), generator=g)
    present = torch.arange(largest) < sizes[:, None]
    x = centred(torch.randn(n, largest, 3, generator=g), present)
    atoms = torch.randint(4, (n, largest), generator=g) * present
    bonds = symmetric(torch.randint(4, (n, largest, largest), generator=g))
    return Graphs(x, atoms, bonds * (present[:, :, None] & present[:, None]), present)


@pytest.fixture(scope="module")
def network() -> MoleculeNetwork:
    torch.manual_seed(0)
    made = MoleculeNetwork(Card(width=24, layers=3), PRIOR).eval().requires_grad_(False)
    for p in made.parameters():
        p.copy_(p + 0.1 * torch.randn_like(p))
    return made


@pytest.mark.law
def test_jumps_compose_and_posteriors_are_distributions() -> None:
    prior = PRIOR.atoms.double() / PRIOR.atoms.double().sum()
    for r, s, t in ((0, 20, 60), (3, 4, 5), (0, 1, 100)):
        q = [jump(signal(b) / signal(a), prior) for a, b in ((r, s), (s, t), (r, t))]
        torch.testing.assert_close(q[0] @ q[1], q[2], atol=1e-12, rtol=0)
        torch.testing.assert_close(q[2].sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(jump(1.0, prior), torch.eye(4, dtype=torch.float64))
    chances = torch.rand(7, 4, dtype=torch.float64).softmax(-1)
    found = posterior(chances, torch.arange(7) % 4, 60, 40, PRIOR.atoms)
    torch.testing.assert_close(found.sum(-1), torch.ones(7, dtype=torch.float64), atol=1e-12, rtol=0)
    assert bool((found >= 0).all())


@pytest.mark.law
def test_the_posterior_is_bayes_rule() -> None:
    """Enumerate: c0 from its prior, c_s and c_t by jumps; P(c_s | c_t, c_0) must be `posterior`'s."""
    prior = PRIOR.bonds.double()
    to_s, to_t = jump(signal(30), prior), jump(signal(70) / signal(30), prior)
    for c0 in range(4):
        certain = torch.nn.functional.one_hot(torch.tensor([c0] * 4), 4).float()
        found = posterior(certain, torch.arange(4), 70, 30, PRIOR.bonds)
        joint = (to_s[c0][:, None] * to_t).T  # [c_t, c_s]
        torch.testing.assert_close(found, joint / joint.sum(-1, keepdim=True), atol=1e-7, rtol=0)


@pytest.mark.law
def test_noise_has_its_marginals_and_stays_centred() -> None:
    clean = some(1)[torch.zeros(4000, dtype=torch.long)]
    at = torch.full((4000,), signal(50), dtype=torch.float64)
    found = noised(clean, at, PRIOR, Rows(0, 0, 4000, range(4000)))
    first = clean.atoms[0, 0]
    kept = float((found.atoms[:, 0] == first).double().mean())
    expected = signal(50) + (1 - signal(50)) * float(PRIOR.atoms[first])
    assert abs(kept - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert float((found.x.sum(1)).abs().max()) < 1e-4
    assert torch.equal(found.bonds, found.bonds.transpose(1, 2))
    assert not bool((found.bonds.diagonal(dim1=1, dim2=2) != 0).any())


@pytest.mark.law
def test_categories_follow_their_chances() -> None:
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn(PRIOR.atoms, u), minlength=4) / 20_000
    assert float((counts - PRIOR.atoms).abs().max()) < 4 * 0.5 / 20_000**0.5
    assert drawn(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.999999])).tolist() == [2, 2]


@pytest.mark.law
def test_a_jump_of_length_zero_stays_and_the_last_is_the_likeliest(network: MoleculeNetwork) -> None:
    state = some()
    out = network(state, torch.full((5,), 50))
    stayed = step(state, out, 50, 50 - 1e-7, PRIOR, Rows(0, 0, 5, range(5)))
    torch.testing.assert_close(stayed.x, state.x, atol=1e-3, rtol=0)
    assert torch.equal(stayed.atoms, state.atoms) and torch.equal(stayed.bonds, state.bonds)
    last = step(state, out, 4, 0, PRIOR, Rows(0, 0, 5, range(5)))
    assert torch.equal(last.atoms, out.atoms.argmax(-1) * state.present)


@pytest.mark.law
@pytest.mark.parametrize("mirror", [1.0, -1.0], ids=["turned", "mirrored"])
def test_the_network_turns_along(network: MoleculeNetwork, mirror: float) -> None:
    state, t = some(), torch.tensor([1, 25, 50, 75, 100])
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    turn = turn * torch.linalg.det(turn).sign() * mirror
    turned = Graphs(state.x @ turn, state.atoms, state.bonds, state.present)
    one, other = network(state, t), network(turned, t)
    torch.testing.assert_close(other.x, one.x @ turn, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.atoms, one.atoms, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.bonds, one.bonds, atol=1e-5, rtol=0)
    assert float((one.x - state.x).abs().max()) > 0.01, "nothing was predicted"


@pytest.mark.law
def test_permutations_go_through_and_padding_changes_nothing(network: MoleculeNetwork) -> None:
    state, t = some(), torch.full((5,), 40)
    order = torch.tensor([1, 0, *range(2, 6)])  # the first two atoms are there in every graph
    swapped = Graphs(
        state.x[:, order], state.atoms[:, order], state.bonds[:, order][:, :, order], state.present
    )
    one, other = network(state, t), network(swapped, t)
    torch.testing.assert_close(other.x, one.x[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(other.bonds, one.bonds[:, order][:, :, order], atol=1e-5, rtol=0)
    wide = Graphs(
        *(
            torch.nn.functional.pad(getattr(state, e.name), pad)
            for e, pad in zip(fields(state), PADS, strict=True)
        )
    )
    padded = network(wide, t)
    torch.testing.assert_close(padded.x[:, :6], one.x, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.bonds[:, :6, :6], one.bonds, atol=1e-5, rtol=0)
    assert bool((padded.x[:, 6:] == 0).all())
    junk = Graphs(
        state.x + 9.0 * ~state.present[:, :, None], state.atoms, state.bonds, state.present
    )  # what stands at padding does not matter
    torch.testing.assert_close(network(junk, t).x, one.x, atol=1e-5, rtol=0)


PADS: list[Any] = [(0, 0, 0, 2), (0, 2), (0, 2, 0, 2), (0, 2)]


@pytest.mark.pipe
def test_training_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = some(64, seed=3)
    card = Card(width=16, layers=2)
    network = train(data, tmp_path, updates=80, batch=32, card=card)
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in (tmp_path / "log.jsonl").open()]
    assert len(losses) == 80 and sum(losses[-20:]) < 0.9 * sum(losses[:20])
    again = train(data, tmp_path, updates=80, batch=32, card=card)
    for one, other in zip(network.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="card.width"):
        train(data, tmp_path, updates=80, batch=32, card=Card(width=8, layers=2))
    save_network(network, tmp_path / "saved")
    loaded = load_network(tmp_path / "saved")
    t = torch.full((64,), 30)
    torch.testing.assert_close(loaded(data, t).atoms, network(data, t).atoms, atol=2e-2, rtol=0)


def test_folders_without_a_network_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model.json and model.safetensors: train one"):
        load_network(tmp_path)
    (tmp_path / "model.json").write_text('{"width": 8, "depth": 3}')
    with pytest.raises(ValueError, match="holds no readable network"):
        load_network(tmp_path)


def test_times_and_signals() -> None:
    assert signal(0) == 1.0 and 0 < signal(100) < 0.001
    assert diffusion.STEPS == 100
