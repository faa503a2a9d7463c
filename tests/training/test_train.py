"""Whole runs by config, to a folder that FewStep runs; every bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import diffplug
from diffplug.cli import app
from diffplug.samplers.few_step.plug import FewStep
from diffplug.shapes import sample_prompts
from diffplug.training import trajectories
from diffplug.training.job import Job
from diffplug.training.objectives.latents import CleanLatents, source_of
from diffplug.training.train import train

SMALL = [
    "teacher.trajectories=8", "teacher.steps=4", "teacher.sampler=ddim", "data.count=16", "tuner.rank=4",
    "run.updates=2", "run.batch=4", "run.save_every=1", "run.precision=no", "validation.count=2",
    "validation.sheet=2", "validation.reward=shapes",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "PART", 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def job(method: str, cache: Path, *changes: str) -> Job:
    return Job.read(method, None, [*SMALL, *changes], cache=cache)


@pytest.mark.pipe
@pytest.mark.parametrize("extra", [(), ("tuner.kind=full", "tuner.extract=4"), ("tuner.kind=full",)])
def test_a_run_ends_in_a_folder_that_few_step_runs(
    extra: tuple[str, ...], tmp_path: Path, cache: Path
) -> None:
    done = train(job("trajectory", cache, *extra), tmp_path)
    folder = tmp_path / "student"
    assert done.student == folder and done.figures is not None and done.figures.n == 2
    assert {"README.md", "recipe.json", "figures.json", "sheet.png"} <= {p.name for p in folder.iterdir()}
    Image.open(folder / "sheet.png").verify()
    pipe = diffplug.load("shapes")
    pipe.set_progress_bar_config(disable=True)
    plug = FewStep(folder)
    with diffplug.plug(pipe, plug):
        made = pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert made.isfinite().all() and plug.installed[0].strength == 1.0
    card = (folder / "README.md").read_text()
    assert f"mean {done.figures.mean:.3f}" in card and (
        "load_lora_weights" in card or "load_state_dict" in card
    )


@pytest.mark.pipe
def test_the_plain_code_of_the_card_draws_what_few_step_draws(tmp_path: Path, cache: Path) -> None:
    train(job("trajectory", cache, "validation.reward=shapes"), tmp_path)
    card = (tmp_path / "student" / "README.md").read_text()
    code = card.split("In plain Diffusers:\n\n```python\n")[1].split("```")[0]
    code = code.replace('"..."', "'a red circle'").replace(
        ").images[0]", ", generator=seed, output_type='pt').images"
    )
    names: dict[str, Any] = {"seed": torch.Generator().manual_seed(3)}
    exec(code, names)  # noqa: S102 - our own lines
    pipe = diffplug.load("shapes")
    with diffplug.plug(pipe, FewStep(tmp_path / "student")):
        ours = pipe("a red circle", generator=torch.Generator().manual_seed(3), output_type="pt").images
    assert torch.allclose(names["image"], ours, atol=2e-3)


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("hyper-sd", ("objective.segments=[2, 1]", "student.steps=1", "objective.points=4")),
        ("hyper-sd", ("objective.segments=[4]", "objective.source=trajectories")),
        ("tdm", ("student.steps=2",)),
        ("one-step", ("run.batch=4",)),
        ("reward", ("objective.reward=shapes-clip", "student.steps=2")),
        ("trajectory", ("student.guidance=5.0",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_method_trains_the_shapes_model(
    method: str, extra: tuple[str, ...], tmp_path: Path, cache: Path
) -> None:
    if "reward" in method:
        pytest.importorskip("open_clip")
    done = train(job(method, cache, *extra), tmp_path)
    assert done.student is not None and done.recipe is not None
    stage = tmp_path / "stage-2" if method == "hyper-sd" and "[2" in extra[0] else tmp_path
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["loss"] is not None for line in lines)
    assert done.recipe.guidance == ("cfg" if "student.guidance=5.0" in extra else "off")
    if stage != tmp_path:
        assert done.recipe.steps == (1, 2, 4, 5, 8)
        assert (tmp_path / "stage-1" / "student" / "recipe.json").exists()


@pytest.mark.pipe
def test_a_run_that_is_stopped_goes_on_to_the_same_student(tmp_path: Path, cache: Path) -> None:
    train(job("trajectory", cache), tmp_path / "whole")
    for _ in range(4):
        done = train(job("trajectory", cache), tmp_path / "pieces", minutes=0.0)
        if done.student is not None:
            break
    assert done.student is not None
    one, other = (tmp_path / name / "student" / "adapter.safetensors" for name in ("whole", "pieces"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.pipe
def test_an_earlier_student_is_where_the_next_begins(tmp_path: Path, cache: Path) -> None:
    train(job("trajectory", cache), tmp_path / "four")
    other = job("trajectory", cache, f"student.start={tmp_path / 'four' / 'student'}", "student.steps=2")
    assert any(bool(v.any()) for n, v in other.tuner.parameters.items() if "lora_B" in n)


@pytest.mark.pipe
def test_a_few_step_name_is_where_a_student_begins(cache: Path) -> None:
    changes = ("student.start=shapes", "student.steps=4", "tuner.kind=full", "teacher.steps=4")
    begun, new = job("tdm", cache, *changes), job("tdm", cache, *changes[1:])
    before, after = new.tuner.parameters, begun.tuner.parameters
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 3
    with begun.tuner.original():
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.pipe
def test_pictures_with_captions_are_encoded_once(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, prompt in enumerate(sample_prompts(3, split="train")):
        Image.new("RGB", (80, 64), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(prompt)
    changes = (f"data.pictures={folder}", "objective.segments=[2]", "student.steps=2", "objective.points=4")
    one = job("hyper-sd", cache, *changes)
    assert one.pictures is not None and one.pictures.latents.shape == (3, 4, 16, 16)
    made = list((cache / "latents").glob("*.safetensors"))
    assert len(made) == 1 and 0.1 < float(one.pictures.latents.std()) < 3
    again = job("hyper-sd", cache, *changes).pictures
    assert again is not None and torch.equal(again.latents, one.pictures.latents)
    train(one, tmp_path / "run")
    source = source_of(job("hyper-sd", cache, *changes, "student.guidance=5.0", "data.drop=0.3"))
    assert isinstance(source, CleanLatents) and source.null is not None and source.drop == 0.3
    other = job("hyper-sd", cache, *changes, "teacher.call={height=64}").pictures  # may embed otherwise
    assert other is not None and len(list((cache / "latents").glob("*.safetensors"))) == 2
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="1.png' cannot be read as a picture"):
        _ = job("hyper-sd", cache, *changes).pictures


def run(*words: str, cache: Path, out: Path) -> Any:
    changes = [word for change in SMALL for word in ("--set", change)]
    return CliRunner().invoke(
        app, ["train", *words, *changes, "--device", "cpu", "-o", str(out), "--cache", str(cache)]
    )


@pytest.mark.pipe
def test_the_command_trains_and_prints_code(tmp_path: Path, cache: Path, as_loud_as_before: None) -> None:
    file = tmp_path / "four.toml"
    file.write_text('[student]\nname = "mine"\n[optimizer]\nlr = 1e-3\n')
    result = run("trajectory", str(file), cache=cache, out=tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "pipe.load_lora_weights" in result.output and "shapes: mean" in result.output
    assert json.loads((tmp_path / "run" / "student" / "recipe.json").read_text())["name"] == "mine"
    again = run("trajectory", str(file), cache=cache, out=tmp_path / "run")
    assert again.exit_code == 2 and "holds a run at update 2: add --resume" in again.output
    other = run(
        "trajectory", str(file), "--resume", "--set", "optimizer.lr=2e-3", cache=cache, out=tmp_path / "run"
    )
    assert other.exit_code == 2 and "optimizer.lr: 0.001 there, 0.002 here" in " ".join(other.output.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trajectry"], "unknown trainer 'trajectry'. Did you mean 'trajectory'"),
        (["trajectory", "gone.toml"], "no config file 'gone.toml'"),
        (["trajectory", "--set", "optimzer.lr=1"], "Did you mean 'optimizer'"),
        (["trajectory", "--set", "objective.x=1"], "unknown setting 'objective.x'"),
        (["trajectory", "--set", "student.steps=3"], "3 steps do not divide the 1000 timesteps"),
        (
            ["trajectory", "--set", "student.steps=8"],
            "teacher.steps is 4, which student.steps 8 does not divide",
        ),
        (["trajectory", "--set", "model=nowhere"], "unknown model 'nowhere'"),
        (["trajectory", "--resume"], "nothing to resume"),
        (["trajectory", "--set", "data.prompts=gone.txt"], "there is no file 'gone.txt'"),
        (
            ["trajectory", "--set", "student.start=gone"],
            "neither a folder with a recipe.json nor a few-step name",
        ),
        (["trajectory", "--set", "tuner.extract=4"], "extract is for tuner.kind=full"),
        (
            ["trajectory", "--set", "tuner.targets=['to_w']"],
            "no layer of UNet2DConditionModel ends in 'to_w'",
        ),
        (["hyper-sd", "--set", "objective.segments=[8, 2]"], "segments end with 2, student.steps is 4"),
        (["hyper-sd", "--set", "objective.segments=[7]"], "7 steps do not divide"),
        (["tdm", "--set", "objective.anchor_share=0.2"], "anchor_share would do nothing without an anchor"),
        (
            [
                "hyper-sd",
                "--set",
                "objective.segments=[4]",
                "--set",
                "objective.source=trajectories",
                "--set",
                "objective.points=16",
            ],
            "objective.points would do nothing with objective.source='trajectories'",
        ),
        (["one-step", "--set", "student.steps=4"], "one-step is for student.steps=1"),
        (["reward", "--set", "objective.reward=shapes"], "has no gradient: take a network's"),
        (["trajectory", "--set", "run.clip=1"], "unknown setting 'run.clip'"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    words: list[str], message: str, tmp_path: Path, cache: Path, as_loud_as_before: None
) -> None:
    result = run(*words, cache=cache, out=tmp_path / "run")
    told = " ".join(result.output.split())
    assert result.exit_code == 2, told
    assert message in told and "Traceback" not in told


@pytest.mark.parametrize(
    "words",
    [
        ("trajectory", "--resume"),
        ("speedupnet", "--resume"),
        ("hyper-sd", "--set", "objective.segments=[7]"),
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_a_run_that_is_refused_leaves_no_folder(
    words: tuple[str, ...], tmp_path: Path, cache: Path, as_loud_as_before: None
) -> None:
    result = run(*words, cache=cache, out=tmp_path / "new" / "run")
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    if "--resume" in words:
        assert "there is nothing to resume in" in " ".join(result.output.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [(" \n\n", "holds no prompt: write one a line"), ("a red circle " * 20, "tokens, the model reads 32")],
)
def test_prompts_that_are_empty_or_too_long_are_refused(
    text: str, message: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        _ = job("trajectory", cache, f"data.prompts={tmp_path / 'prompts.txt'}").prompts


@pytest.mark.pipe
@pytest.mark.parametrize(("method", "scale"), [("trajectory", 2.0), ("pso", 3.5)])
def test_the_scale_that_a_network_is_told_is_that_of_the_recipe(
    method: str, scale: float, tmp_path: Path, red_reward: str
) -> None:
    from diffplug.testing import tiny
    from diffplug.training.output import recipe_row

    tiny("flux").save_pretrained(tmp_path / "flux")
    (tmp_path / "p.txt").write_text("a b\nc d\n")
    told = [f"model={tmp_path / 'flux'}", f"data.prompts={tmp_path / 'p.txt'}", "teacher.steps=4"]
    told += ["teacher.guidance=2.0", "teacher.trajectories=2", "teacher.sampler=own", "student.steps=2"]
    made = Job.read(method, None, told, cache=tmp_path)
    assert set(made.conditions.leaves["guidance"].tolist()) == {scale}
    if method == "trajectory":
        made.store.fill(2)
        assert set(made.trajectories(2).conditions.leaves["guidance"].tolist()) == {scale}
    row = recipe_row(made, {"kind": "lora", "file": "adapter.safetensors"}, made.sampling(), 1)
    assert (row.guidance, row.guidance_scale) == ("embedded", scale)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_told_at_once(tmp_path: Path, cache: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write"):
        train(job("trajectory", cache), tmp_path / "run")


def test_a_recipe_of_another_family_is_refused(tmp_path: Path, cache: Path) -> None:
    from diffplug.testing import tiny

    train(job("trajectory", cache, "validation.sheet=1"), tmp_path)
    with pytest.raises(ValueError, match="sd15"), diffplug.plug(tiny("sd15"), FewStep(tmp_path / "student")):
        pass


@pytest.mark.parametrize("kind", ["full", "sara"])
def test_a_methods_own_layers_are_for_its_adapter(kind: str) -> None:
    assert Job.read("spo", None, []).config.tuner.targets
    assert Job.read("spo", None, [f"tuner.kind='{kind}'"]).config.tuner.targets == ()
    with pytest.raises(ValueError, match="targets is for adapters"):
        Job.read("spo", None, [f"tuner.kind='{kind}'", "tuner.targets=['to_q']"])
