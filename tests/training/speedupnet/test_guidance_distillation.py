"""Guidance distilled into an adapter: its target, its states, a whole run, and how an adapter is scored."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffplug import plug
from diffplug.samplers import FewStep
from diffplug.samplers.negative.speedupnet import SpeedUpNet
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import SunAdapter, put_on
from diffplug.samplers.negative.sun_file import load_adapter
from diffplug.seeds import Seeds
from diffplug.testing import tiny
from diffplug.training.conditions import encode
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.job import Job
from diffplug.training.noise_path import NoisePath
from diffplug.training.objective import Rows
from diffplug.training.objectives.guidance_distillation import (
    DistillationSettings,
    GuidanceDistillation,
    weighed_error,
)
from diffplug.training.objectives.multi_step_consistency import MultiStepConsistency, landed
from diffplug.training.speedupnet.adapter_score import gap, score_adapter
from diffplug.training.speedupnet.guidance_states import (
    GuidanceStates,
    States,
    StateSettings,
    TextNetwork,
    collect,
)
from diffplug.training.speedupnet.negatives import NegativeSettings, Pairs, draw_pairs, pool_of
from diffplug.training.speedupnet.run import FILE, train_adapter
from diffplug.training.trainer import Trainer

PAIRS = Pairs(["a red circle", "a cross", "a star", "blue"], ["green", "", "a red circle", "square"])
FEW = StateSettings(rollouts=4, steps=5, fresh=12, rows=3)


def made(name: str = "sd15") -> tuple[Any, TextNetwork, GuidanceStates]:
    pipe = tiny(name)
    form, _ = encode(pipe, ["a"])
    network = TextNetwork(pipe.unet, NoisePath.of(pipe.scheduler), form)
    return pipe, network, collect(network, PAIRS, lambda texts: encode(pipe, texts)[1], FEW)


@pytest.mark.law
def test_the_kept_answers_are_those_of_guidance() -> None:
    pipe, network, states = made()
    assert len(states) == 4 * 5 + 12
    at = states.at(torch.arange(len(states)))
    with torch.no_grad():
        positive = network(at.x, at.index, at.conditions)
    assert (positive - at.positive).abs().max() < 2e-2 * positive.abs().max()
    assert torch.equal(at.empty, torch.tensor([p == 1 for p in states.tensors["pair"]]))
    same = collect(
        network,
        Pairs(PAIRS.positive, PAIRS.positive),
        lambda texts: encode(pipe, texts)[1],
        replace(FEW, fresh=0),
    )
    assert float(same.power.max()) < 1e-5


@pytest.mark.law
def test_the_loss_is_the_missing_share_of_guidance() -> None:
    at = _states()
    offset = at.positive - at.negative
    w = torch.tensor([1.0, 2.0, 5.0, 8.0])
    size = (w - 1)[:, None, None, None]
    for missing in (0.0, 0.5, 1.0):
        said = at.positive + (1 - missing) * size * offset
        error = weighed_error(said, at, w, 1.0, 1.0, 1e-9)
        assert torch.allclose(error, torch.tensor([0.0, *[missing**2] * 3]), atol=1e-5)
    raw = weighed_error(at.positive, at, w, 2.0, 0.0, 0.5)
    power = (size * offset).square().flatten(1).mean(1)
    assert torch.allclose(raw, power / ((w - 1) ** 2 * 2.0 + 0.5 * 2.0), rtol=1e-5)


def _states() -> States:
    g = torch.Generator().manual_seed(0)
    x, positive, negative = (torch.randn(4, 2, 3, 3, generator=g) for _ in range(3))
    nothing: Any = None
    return States(
        x,
        positive,
        negative,
        torch.ones(4),
        torch.zeros(4),
        nothing,
        nothing,
        torch.zeros(4, dtype=torch.bool),
    )


@pytest.mark.pipe
def test_training_brings_the_adapter_nearer_to_guidance(tmp_path: Path) -> None:
    pipe, network, states = made()
    adapter, state = SunAdapter.beside(pipe.unet), NegativeState()
    undo = put_on(adapter, pipe.unet, state)
    objective = GuidanceDistillation(network, adapter, state, states)
    told: list[float] = []
    Trainer(
        objective,
        RunSettings(updates=60, batch=16, save_every=100),
        OptimizerSettings(lr=1e-2),
        folder=tmp_path,
        cpu=True,
        on_update=lambda update, figures: told.append(figures["loss"]),
    ).run()
    undo()
    assert sum(told[-5:]) / 5 < 0.8 * sum(told[:5]) / 5
    everything = torch.ones(len(states), dtype=torch.bool)
    assert gap(network, adapter, states, 5.0, everything) < 0.9
    untrained = SunAdapter.beside(pipe.unet)
    assert gap(network, untrained, states, 5.0, everything) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.law
def test_steps_as_long_as_the_teacher_s_land_where_it_lands() -> None:
    """A student that says what guidance says loses nothing when its steps are the teacher's own."""
    pipe, network, states = made()
    table, index = states.trajectories()
    w = states.tensors["guidance"][:, None, None, None]
    for k in range(4):
        at = states.at(table[:, k])
        guided = at.negative + w * (at.positive - at.negative)
        there = states.tensors["x"][table[:, k + 1]].float()
        found = landed(network.path, guided, at, index[k + 1].expand(4))
        assert float((found - there).abs().max()) < 2e-2 * float(there.abs().max())
    settings = DistillationSettings(consistency=5, blend=0.0, states=FEW)
    adapter, state = SunAdapter.beside(pipe.unet), NegativeState()
    undo = put_on(adapter, pipe.unet, state)
    objective = MultiStepConsistency(network, adapter, state, states, settings)
    loss = objective.loss(Rows(0, 0, 20, range(20)))
    assert loss.errors.shape == (20,) and bool((loss.errors > 0).any())
    loss.sum.backward()
    undo()
    objective.updated(0, loss.totals)
    assert bool((objective.state_dict()["segment_error"] > 0).all())


@pytest.mark.pipe
def test_gradients_reach_the_adapter_alone() -> None:
    pipe, network, states = made()
    adapter, state = SunAdapter.beside(pipe.unet), NegativeState()
    undo = put_on(adapter, pipe.unet, state)
    GuidanceDistillation(network, adapter, state, states).loss(Rows(0, 0, 4, range(4))).sum.backward()
    undo()
    last = [layer.gate[2].weight.grad for layer in adapter.named_layers().values()]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in last)
    assert all(value.grad is None for value in pipe.unet.parameters())


@pytest.mark.pipe
def test_states_come_back_from_their_file(tmp_path: Path) -> None:
    _, network, states = made()
    states.save(tmp_path / "s.safetensors")
    again = GuidanceStates.load(tmp_path / "s.safetensors", network.path)
    assert again.tensors.keys() == states.tensors.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in states.tensors.items())


def test_pairs_have_the_asked_share_of_empty_negatives_and_vague_prompts() -> None:
    prompts = [
        "a large red circle on a black background",
        "an orange square",
        "a blue star and a red cross",
    ] * 200
    pairs = draw_pairs(prompts, NegativeSettings(empty=0.3, vague=0.2), seed=0)
    assert abs(sum(not text for text in pairs.negative) / 600 - 0.3) < 0.06
    changed = [(a, b) for a, b in zip(prompts, pairs.positive, strict=True) if a != b]
    assert abs(len(changed) / 600 - 0.2) < 0.06
    assert ("a large red circle on a black background", "a circle on a black background") in changed
    assert ("an orange square", "a square") in changed
    assert draw_pairs(prompts, NegativeSettings(empty=0.3, vague=0.2), seed=0) == pairs


@pytest.mark.pipe
def test_a_whole_run_leaves_a_file_that_plugs_in(tiny_folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "prompts.txt"
    words.write_text("a red circle\na blue square\na cross\n")
    changes = [
        f'model="{tiny_folder}"',
        f'data.prompts="{words}"',
        "run.updates=3",
        "run.batch=4",
        "run.precision=no",
        'objective.negatives={pool="quality"}',
        "objective.states={rollouts=3, steps=2, fresh=4}",
    ]
    job = Job.read("speedupnet", None, changes, cache=tmp_path / "cache")
    trained = train_adapter(job, tmp_path / "run")
    assert trained.updates == 3
    file = trained.student / FILE
    assert "R " in (trained.student / "README.md").read_text()
    with plug(job.pipe, SpeedUpNet(file)):
        job.pipe("a red circle", negative_prompt="blue", num_inference_steps=2, output_type="latent")
    again = train_adapter(Job.read("speedupnet", None, changes, cache=tmp_path / "cache"), tmp_path / "run")
    assert again.updates == 3  # taken up where it stood: nothing was left to do


@pytest.mark.pipe
def test_an_adapter_is_trained_on_a_few_step_student_whose_teacher_is_the_base(tmp_path: Path) -> None:
    changes = [
        *("run.updates=2", "run.batch=4", "run.precision=no", "optimizer.lr=0.01"),
        *('objective.student="shapes"', 'objective.start="shipped"', "objective.consistency=4"),
        *("objective.blend=0.0", "objective.states={rollouts=2, steps=4, fresh=0}"),
    ]
    job = Job.read("speedupnet", None, changes, cache=tmp_path / "cache")
    before = {name: value.clone() for name, value in job.pipe.unet.state_dict().items()}
    file = train_adapter(job, tmp_path / "run").student / FILE
    after = job.pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(after[name], one) for name, one in before.items()
    )
    meta = load_adapter(file, job.pipe.unet).meta
    assert (meta.steps, meta.empty, meta.figures) == ((4,), "off", {})
    assert 'FewStep("shapes", steps=4), SpeedUpNet(' in (file.parent / "README.md").read_text()

    def drawn(*plugs: Any, **told: Any) -> torch.Tensor:
        with plug(job.pipe, FewStep("shapes", steps=4), *plugs, Seeds(0)):
            return torch.as_tensor(job.pipe("a cross", output_type="latent", **told)[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it knows the student's weights and steps
        inside = drawn(SpeedUpNet(file), negative_prompt="blue")
        alone = drawn()
        assert torch.equal(drawn(SpeedUpNet(file)), alone)
    assert not torch.equal(inside, alone)


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("objective.guidance=[5, 2]", "range of scales"),
        ("objective.layout=huge", "layout"),
        ("objective.negatives={empty=2}", "empty must be from 0 to 1"),
        ("objective.states={rollouts=0, fresh=0}", "nothing to train on"),
        ("tuner.rank=8", r"the table \[tuner\] does nothing"),
        ("objective.evenness=2", "evenness"),
        ("objective.consistency=4", "multiple"),
        ("objective.student=hyper-sd", "is for the second stage: set consistency"),
        ("objective={student='hyper-sd', consistency=5}", "objective: blend=0.25 would make"),
        ("objective={student='shapes', consistency=5, blend=0.0}", "shapes has no 5 steps, only 1, 2, 4"),
        ("objective.start=shipped", "the package has no adapter of this model"),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(
    change: str, words: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        job = Job.read("speedupnet", None, [f'model="{tiny_folder}"', change], cache=tmp_path)
        train_adapter(job, tmp_path / "run")


@pytest.mark.pipe
def test_scores_are_1_for_an_adapter_that_does_nothing() -> None:
    pipe = tiny("sd15")
    idle = SunAdapter.beside(pipe.unet)
    score = score_adapter(pipe, idle, ["a red circle", "a cross"], ["blue", "green"], states=6, steps=3)
    assert [score.real, score.empty, score.trajectory] == pytest.approx([1.0] * 3, abs=2e-3)
    assert score.distance == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ValueError, match="2 prompts and 1 negative"):
        score_adapter(pipe, idle, ["a", "b"], ["c"])


def test_a_pool_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        pool_of(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no line"):
        pool_of(str(tmp_path / "empty.txt"))
