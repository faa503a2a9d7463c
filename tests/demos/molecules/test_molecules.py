"""Molecules with RDKit: enumeration, validity, rewards, the shipped network steered, the command line."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from diffplug.demos.molecules.chemistry import chemistry
from diffplug.demos.molecules.graphs import Graphs
from diffplug.demos.molecules.rewards import MoleculeReward
from diffplug.steering import SVDD, BestOfN

NO_RDKIT = {"rdkit": None, "rdkit.Chem": None}


def test_without_rdkit_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_RDKIT:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "diffplug\[molecules\]"'):
        chemistry()
    from diffplug.demos.molecules.__main__ import app

    result = CliRunner().invoke(app, ["sample", "--groups", "1"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "diffplug[molecules]" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logd", "unknown property of a molecule 'logd'. Did you mean 'logp'"),
        ("x*qed", "'x' is no number"),
        ("", "a reward needs a property"),
        ("inf*qed", "the weight of qed is inf"),
    ],
)
def test_bad_rewards_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoleculeReward.parse(text)


def test_sums_are_read() -> None:
    assert MoleculeReward.parse("logp + 5*qed").terms == (("logp", 1.0), ("qed", 5.0))
    assert MoleculeReward.parse("-logp - 0.5*valid").terms == (("logp", -1.0), ("valid", -0.5))


class TestWithRDKit:
    """Everything that RDKit is needed for."""

    @pytest.fixture(autouse=True)
    def _rdkit(self) -> None:
        pytest.importorskip("rdkit")

    def test_enumerated_molecules_are_sane_and_different(self) -> None:
        from diffplug.demos.molecules.enumerate import enumerated

        found = enumerated(4)
        assert {size: len(texts) for size, texts in found.items()} == {1: 3, 2: 10, 3: 25, 4: 126}
        chem = chemistry()
        for size, texts in found.items():
            assert len(set(texts)) == len(texts)
            assert all(chem.MolFromSmiles(text).GetNumAtoms() == size for text in texts)
        assert "CCO" in found[3] and "C1CC1" in found[3] and "OO" not in found[2]

    def test_molecules_survive_the_way_through_tensors(self) -> None:
        from diffplug.demos.molecules.graphs import graphs_of, molecules, smiles

        texts = ["CCO", "c1c[nH]cc1", "C#CC=O", "CC(F)N"]
        graphs, kept = graphs_of(texts, 6)
        assert [smiles(m) for m in molecules(graphs)] == [chemistry().CanonSmiles(t) for t in kept]
        apart = (graphs.x[0, 0] - graphs.x[0, 1]).norm()
        assert 1.0 < float(apart) * 1.4 < 2.0  # a bond, in Å

    def test_what_is_no_molecule_is_none(self) -> None:
        from diffplug.demos.molecules.graphs import molecules

        atoms = torch.zeros(3, 3, dtype=torch.long)
        bonds = torch.zeros(3, 3, 3, dtype=torch.long)
        bonds[0, 0, 1] = bonds[0, 1, 0] = 1  # the third carbon lies apart
        for i, j in ((0, 1), (1, 2)):
            bonds[1, i, j] = bonds[1, j, i] = 3  # carbon with six bonds
            bonds[2, i, j] = bonds[2, j, i] = 1
        found = molecules(Graphs(torch.zeros(3, 3, 3), atoms, bonds, torch.ones(3, 3, dtype=torch.bool)))
        assert [one is None for one in found] == [True, True, False]
        rewards = MoleculeReward.parse("valid + logp")(found, [""] * 3)
        assert math.isnan(rewards[0]) and math.isnan(rewards[1])
        assert rewards[2] == pytest.approx(1 + 1.4163, abs=1e-3)  # propane

    @pytest.mark.pipe
    def test_the_shipped_network_draws_molecules_and_steering_raises_logp(self) -> None:
        from diffplug.demos.molecules import load_network, molecule_fk, sample

        network, reward = load_network(), MoleculeReward.parse("logp")
        free = sample(network, BestOfN(reward, particles=8), groups=16, seed=1)
        assert sum(one is not None for one in free.all) >= 0.85 * 128
        steered = sample(network, molecule_fk(reward, 8, 3.0), groups=16, seed=1)
        drawn = steered.rewards.reshape(-1)[steered.sample_rows]
        assert float(drawn.mean()) > float(free.rewards[torch.isfinite(free.rewards)].mean()) + 0.8
        assert float(steered.rewards.amax(1).mean()) > float(free.rewards.amax(1).mean())
        assert all(one is not None for one in steered.best)
        assert steered.report.rewards.min() >= -3.0  # the floor, on the way

    @pytest.mark.pipe
    def test_other_rules_and_sizes_run(self) -> None:
        from diffplug.demos.molecules import load_network, sample

        reward = MoleculeReward.parse("5*qed")
        found = sample(load_network(), SVDD(reward, particles=4, strength=5.0), groups=2, atoms=4, jumps=10)
        assert all(one is None or one.GetNumAtoms() == 4 for one in found.all)
        for options, message in (({"atoms": 9}, "atoms=9"), ({"jumps": 0}, "steps=0")):
            with pytest.raises(ValueError, match=message):
                sample(load_network(), BestOfN(reward, particles=2), groups=1, **options)

    @pytest.mark.pipe
    def test_the_command_line_draws_a_sheet(self, tmp_path: Path) -> None:
        from PIL import Image

        from diffplug.demos.molecules.__main__ import app

        target = tmp_path / "sheet.png"
        result = CliRunner().invoke(
            app,
            ["sample", "--groups", "3", "--particles", "4", "--reward", "logp + 2*qed", "-o", str(target)],
        )
        assert result.exit_code == 0, result.output
        assert "a free draw" in result.output and "FeynmanKac, best" in result.output
        assert Image.open(target).size[0] > 500

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--reward", "logd"], "unknown property"),
            (["--steer", "fkk"], "unknown steerer"),
            (["--steer", "noise-search", "--groups", "1"], "cannot steer a loop"),
            (["--atoms", "99", "--groups", "1"], "atoms=99"),
            (["--model", "nowhere"], "holds no model.json"),
        ],
    )
    def test_bad_input_is_one_line_with_status_2(
        self, arguments: list[str], message: str, tmp_path: Path
    ) -> None:
        from diffplug.demos.molecules.__main__ import app

        result: Any = CliRunner().invoke(app, ["sample", *arguments, "-o", str(tmp_path / "x.png")])
        assert result.exit_code == 2, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1
