"""Figures of memorisation with known answers, and the search over what to tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy import VP, network
from typer.testing import CliRunner

from diffplug.cli.main import app
from diffplug.testing import tiny
from diffplug.training.choice.choose import Trial, middle_of, pareto, settings_of
from diffplug.training.choice.groups import block_groups
from diffplug.training.conditions import Conditions
from diffplug.training.memorisation import (
    average_minimum_distance,
    condition_norm,
    copied_groups,
    pixel_features,
    tile_distance,
)
from diffplug.training.tuners.by_name import tuner_of
from diffplug.training.tuners.settings import TunerSettings


@pytest.mark.law
def test_average_minimum_distance() -> None:
    eye = torch.eye(8)
    assert average_minimum_distance(eye[:4], eye[:4]) == 0.0
    assert average_minimum_distance(eye[:4], eye[4:]) == 1.0
    one_copy = torch.cat([eye[:3], eye[7:]])
    assert average_minimum_distance(one_copy, eye[4:]) == pytest.approx(1 - 1 / 4)
    torch.manual_seed(0)
    g, r = torch.randn(20, 5), torch.randn(300, 5)
    told = average_minimum_distance(g, r)
    assert average_minimum_distance(3 * g.flip(0), r[torch.randperm(300)] / 7, chunk=7) == pytest.approx(
        told, abs=1e-6
    )
    with pytest.raises(ValueError, match=r"give \[n, d\]"):
        average_minimum_distance(g[:0], r)


@pytest.mark.law
def test_condition_norm() -> None:
    net = network()
    x, told, null = (
        torch.randn(5, 2),
        Conditions({"told": torch.ones(5, 2)}),
        Conditions({"told": torch.zeros(1, 2)}),
    )
    assert condition_norm(net, x, Conditions({"told": torch.zeros(5, 2)}), null).abs().max() == 0
    first = condition_norm(net, x, told, null)
    assert torch.equal(first, condition_norm(net, x, told, null)) and bool((first > 0).all())

    class Linear(torch.nn.Module):
        def forward(self, x: Any, timestep: Any, told: Any, return_dict: bool = True) -> Any:
            return (x + told,)

    net.denoiser = Linear()
    one = condition_norm(net, x, told, null)
    two = condition_norm(net, x, Conditions({"told": 2 * torch.ones(5, 2)}), null)
    assert torch.allclose(two, 2 * one) and torch.allclose(one, torch.ones(5).double(), atol=1e-5)
    assert VP.train_steps == 1000


@pytest.mark.law
def test_tiles_and_groups() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 32)
    assert float(tile_distance(image, image)) == 0
    assert float(tile_distance(image, image.roll(8, -1))) > 0.2
    odd = image.clone()
    odd[..., :8, :8] = 1 - odd[..., :8, :8]
    assert float(tile_distance(image, odd)) > 5 * float((image - odd).square().mean())
    images = torch.cat([image, torch.rand(3, 3, 32, 32), image + 0.01, image - 0.01]).clamp(0, 1)
    assert copied_groups(images) == [[0, 4, 5]] and copied_groups(images, least=4) == []
    assert pixel_features(images).shape == (6, 3 * 16 * 16)


@pytest.mark.law
def test_what_no_other_beats() -> None:
    told = [(1.0, 5.0), (2.0, 2.0), (3.0, 3.0), (4.0, 1.0), (2.0, 2.5), (1.0, 6.0)]
    trials = [Trial(i, {}, a, b) for i, (a, b) in enumerate(told)]
    front = pareto(trials)
    assert [t.number for t in front] == [0, 1, 3]
    dominated = [t for t in trials if any(o.new <= t.new and o.other <= t.other and o != t for o in trials)]
    assert {t.number for t in dominated} == {2, 4, 5}
    assert (
        middle_of(front).number == 1
        and middle_of(front, 1.0).number == 0
        and middle_of(front, 0.0).number == 3
    )


@pytest.mark.contract
@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("kind", ["sara", "lora"])
def test_a_group_that_is_off_keeps_its_bits(name: str, kind: str) -> None:
    pipe = tiny(name)
    denoiser = pipe.unet if name == "sd15" else pipe.transformer
    groups = block_groups(denoiser)
    every = [n for names in groups.values() for n in names]
    assert len(every) == len(set(every)) == sum(p.ndim > 1 for p in denoiser.parameters())
    if len(groups) < 2:
        pytest.skip("one group only")
    off = next(iter(groups))
    choices = {group: group != off for group in groups} | {"density": 0.3, "rank": 2}
    told = settings_of(choices, groups, kind)
    tuner = tuner_of(TunerSettings(**told))
    before = {n: p.detach().clone() for n, p in denoiser.named_parameters()}
    tuner.attach(denoiser)
    touched = {n.split(".lora_")[0].removesuffix(".weight") for n in tuner.parameters}
    assert not touched & {n.removesuffix(".weight") for n in groups[off]}
    with torch.no_grad():
        for value in tuner.parameters.values():
            value.add_(0.1)
    if kind == "sara":
        tuner.sara.write()  # type: ignore[attr-defined]
        now = dict(denoiser.named_parameters())
        assert all(torch.equal(now[n], before[n]) for n in groups[off])
        assert any(not torch.equal(now[n], before[n]) for n in every)


@pytest.mark.pipe
@pytest.mark.slow
def test_choosing_from_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 20, 30)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red circle")
    told = [
        "objective.trials=2",
        "run.updates=1",
        "run.batch=2",
        "objective.against=copying",
        "objective.drawn=1",
    ]
    command = [
        "train",
        "choose",
        str(folder),
        "-o",
        str(tmp_path / "run"),
        "--cache",
        str(tmp_path / "cache"),
    ]
    words = [word for one in told for word in ("--set", one)]
    done = CliRunner().invoke(app, [*command, *words])
    assert done.exit_code == 0, done.output
    choice = json.loads((tmp_path / "run" / "choice.json").read_text())
    assert choice["trials"] and choice["chosen"] in choice["front"]
    from diffplug.training.job import Job

    job = Job.read("finetune", tmp_path / "run" / "choice.toml", [f"data.pictures={str(folder)!r}"])
    assert job.config.tuner.kind == "sara" and job.config.tuner.include
    other = CliRunner().invoke(app, [*command, *words, "--set", "run.updates=3", "--resume"])
    assert other.exit_code == 2 and "another config" in other.output.replace("\n", " ")


@pytest.mark.pipe
def test_a_trial_that_was_killed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    from diffplug.training.choice import choose
    from diffplug.training.job import Job
    from diffplug.training.train import train

    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red circle")
    told = [f"data.pictures={str(tmp_path)!r}", "objective.against=copying", "objective.trials=2"]
    job = Job.read("choose", None, told)
    with pytest.raises(ValueError, match="there is nothing to resume in"):
        train(job, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    choose._study(optuna, job, tmp_path / "run", None).ask()  # killed in its first trial
    monkeypatch.setattr(choose, "_trial", lambda *told: (0.1, 0.2))
    train(job, tmp_path / "run", resume=True)
    assert len(json.loads((tmp_path / "run" / "choice.json").read_text())["trials"]) == 2
    with pytest.raises(ValueError, match=r"tuner\.per_layer would do nothing"):
        train(Job.read("choose", None, [*told, "tuner.per_layer=true"]), tmp_path / "other")


@pytest.mark.pipe
def test_choosing_needs_a_prior_or_copying(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", "choose", str(tmp_path), "-o", str(tmp_path / "run")])
    assert done.exit_code == 2 and "objective.prior" in done.output.replace("\n", " ")
