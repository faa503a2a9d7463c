"""Whole runs on Shapes by config, on top of the shipped student; and every bad input of the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import diffplug
from diffplug.cli import app
from diffplug.samplers.few_step.catalogue import Row, Weights
from diffplug.samplers.few_step.plug import FewStep
from diffplug.seeds import Seeds
from diffplug.shapes import sample_prompts
from diffplug.training.job import Job
from diffplug.training.objective import Rows
from diffplug.training.output import plain_code, recipe_row
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.kernels import kernel_of
from diffplug.training.preference.rollout import rollout
from diffplug.training.preference.start import put_in
from diffplug.training.student import draw
from diffplug.training.train import train
from tests.samplers.few_step.few_step_kit import factors, kohya_file, peft_file

SMALL = [
    "student.start=shapes", "student.steps=4", "data.count=8", "tuner.rank=2", "run.updates=1", "run.batch=2",
    "validation.count=2", "validation.sheet=2", "run.precision=no",
]  # fmt: skip
ONLINE = ["objective.gauges.every=1", "objective.gauges.prompts=1", "objective.gauges.seeds=2"]


def job(method: str, *changes: str) -> Job:
    return Job.read(method, None, [*SMALL, *changes])


@contextmanager
def steps_of(pipe: Any) -> Iterator[list[int]]:
    """A block in which the timesteps that the denoiser is asked at are noted."""
    seen: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, told: seen.append(int(torch.as_tensor(told[1]).max()))
    )
    try:
        yield seen
    finally:
        hook.remove()


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def drawn(student: Any, **options: Any) -> torch.Tensor:
    pipe = diffplug.load("shapes")
    pipe.set_progress_bar_config(disable=True)
    with diffplug.plug(pipe, FewStep(student, steps=4)):
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.pipe
def test_pso_ends_in_one_lora_that_few_step_and_plain_diffusers_run(tmp_path: Path, red_reward: str) -> None:
    made = job("pso", *ONLINE, f"objective.reward={red_reward}", "optimizer.lr=1e-3", "optimizer.warmup=0",
               "optimizer.ema=0.0")  # fmt: skip
    done = train(made, tmp_path)
    assert done.student is not None
    assert {p.name for p in (tmp_path / "sheets").iterdir()} == {"update-000000.png", "update-000001.png"}
    (line,) = log(tmp_path)
    assert line["loss"] == pytest.approx(0.693147, abs=1e-6) and line["gauge_sharpness"] == 1.0
    weights = load_file(tmp_path / "student" / "adapter.safetensors")
    shipped = load_file(Path(diffplug.__file__).parent / "shapes" / "few_step" / "four.safetensors")
    assert {v.shape[0] for n, v in weights.items() if "lora_A" in n} <= {
        v.shape[0] + 2 for n, v in shipped.items() if "lora_A" in n
    }
    there, ours = drawn("shapes"), drawn(tmp_path / "student")
    assert 0 < float((there - ours).abs().mean()) < 0.5
    with torch.no_grad():
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        told = made.conditions[:1]
        live = made.network(x, torch.tensor([750.0]), told).x0
        pipe = diffplug.load("shapes")
        pipe.load_lora_weights(str(tmp_path / "student"), weight_name="adapter.safetensors")
        plain = pipe.unet(x, 749, told.leaves["encoder_hidden_states"]).sample
    path = made.path
    assert torch.allclose(path.predict(plain, x, torch.tensor([750.0])).x0, live, atol=5e-3)


@pytest.mark.pipe
def test_a_run_that_the_gauges_ended_says_so_and_stays_ended(tmp_path: Path, red_reward: str) -> None:
    told = (*ONLINE, "objective.gauges.max_blur=1e-9", f"objective.reward={red_reward}", "run.updates=4",
            "optimizer.lr=1e-3")  # fmt: skip
    done = train(job("pso", *told), tmp_path)
    assert done.updates == 2 and done.recipe.meta["updates"] == 2
    assert "(2 updates" in (tmp_path / "student" / "README.md").read_text()
    before, lines = load_file(tmp_path / "student" / "adapter.safetensors"), len(log(tmp_path))
    again = train(job("pso", *told), tmp_path, resume=True)
    after = load_file(tmp_path / "student" / "adapter.safetensors")
    assert again.updates == 2 and len(log(tmp_path)) == lines
    assert all(torch.equal(after[name], value) for name, value in before.items())


def theirs_of(kind: str, lora_scale: float = 1.0) -> Row:
    """The recipe of somebody's weights beside it."""
    weights = (Weights(file="lora.safetensors", component="unet"),)
    return Row(name="theirs", family="shapes", kind=kind, weights=weights, steps=(4,), lora_scale=lora_scale,
               scheduler="DDIMScheduler", licence="unknown", source="a test")  # fmt: skip


@pytest.mark.pipe
@pytest.mark.parametrize("form", ["kohya, alpha stored", "peft, scale of the recipe"])
def test_a_published_lora_is_where_a_policy_begins(form: str, tmp_path: Path, red_reward: str) -> None:
    unet = diffplug.load("shapes").unet
    layers = factors(unet, seed=3)
    scale = 0.5 if form.startswith("kohya") else 0.125
    state = kohya_file(layers, 1.0) if form.startswith("kohya") else peft_file(layers, "unet")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "lora.safetensors")
    theirs_of("lora", 1.0 if form.startswith("kohya") else scale).save(tmp_path / "recipe.json")
    made = job("pso", f"student.start={tmp_path}", f"objective.reward={red_reward}", "optimizer.warmup=0",
               "objective.gauges.every=0", "tuner.save_dtype=float32", "optimizer.lr=1e-2")  # fmt: skip
    x, index = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([750.0])
    told = made.conditions[:1]
    with torch.no_grad():
        for name, (down, up) in layers.items():
            weight = unet.get_submodule(name).weight
            weight.add_(scale * (up.flatten(1) @ down.flatten(1)).view_as(weight))
        theirs = made.path.predict(unet(x, 749, told.leaves["encoder_hidden_states"])[0], x, index).x0
    assert torch.allclose(made.network.original(x, index, told).x0, theirs, atol=1e-4)
    done = train(made, tmp_path / "run")
    with torch.no_grad():
        live = made.network(x, index, told).x0
    assert not torch.allclose(live, theirs, atol=1e-3)
    pipe = diffplug.load("shapes")
    with torch.no_grad(), diffplug.plug(pipe, FewStep(done.student)):
        both = made.path.predict(pipe.unet(x, 749, told.leaves["encoder_hidden_states"])[0], x, index).x0
    assert torch.allclose(both, live, atol=1e-3)


@pytest.mark.pipe
def test_a_start_that_one_lora_could_not_hold_is_refused(tmp_path: Path) -> None:
    unet = diffplug.load("shapes").unet
    state = peft_file(factors(unet, only=2), "unet")
    state["unet.conv_in.diff_b"] = torch.zeros(len(unet.conv_in.bias))
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="by more than two factors"):
        put_in(unet, tmp_path / "lora.safetensors")
    theirs_of("sara").save(tmp_path / "recipe.json")
    with pytest.raises(ValueError, match="no student in one file of weights"):
        _ = job("pso", f"student.start={tmp_path}").tuner


@pytest.mark.pipe
@pytest.mark.parametrize(
    "changes",
    [
        ("dtype=bfloat16", "run.precision=bf16"),
        ("dtype=bfloat16",),
        ("dtype=bfloat16", "tuner.kind=full"),
        ("dtype=float16", "tuner.kind=sara", "student.start="),
    ],
    ids=["lora, autocast", "lora", "full", "sara in float16"],
)
def test_a_base_in_half_precision_is_tuned(changes: tuple[str, ...], tmp_path: Path, red_reward: str) -> None:
    told = [*SMALL, f"objective.reward={red_reward}", "objective.gauges.every=0", *changes]
    words = [word for word in told if "student.start=" not in changes or "student.start" not in word]
    made = Job.read("pso", None, words)
    assert train(made, tmp_path).student is not None
    assert log(tmp_path)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert all(value.dtype == torch.float32 for value in made.tuner.parameters.values())
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    said = made.network.original(x, torch.tensor([750.0]), made.conditions[:1]).x0
    assert said.dtype == torch.float32
    if "student.start=" not in changes:
        single = job("pso")
        exact = single.network.original(x, torch.tensor([750.0]), single.conditions[:1]).x0
        assert float((said - exact).abs().mean()) < 0.05


@pytest.mark.pipe
def test_the_reference_is_the_start_student_to_the_last_bit(tmp_path: Path) -> None:
    made = job("pso")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    told, index = made.conditions[:1], torch.tensor([750.0])
    before = made.network.original(x, index, told).x0
    with torch.no_grad():
        for value in made.tuner.parameters.values():
            value.add_(0.01)
        assert not torch.equal(made.network(x, index, told).x0, before)
    assert torch.equal(made.network.original(x, index, told).x0, before)


def test_a_named_kernel_is_what_the_result_is_drawn_with(tmp_path: Path, red_reward: str) -> None:
    told = ("objective.kernel=renoise", "objective.gauges.every=0", f"objective.reward={red_reward}")
    made = job("pso", *told)
    done = train(made, tmp_path)
    assert done.student is not None and done.recipe is not None
    assert done.recipe.scheduler == "LCMScheduler" and "timesteps=[999, 749, 499, 249]" in plain_code(
        done.recipe, "shapes", "runs/student"
    )
    with steps_of(made.pipe) as seen:
        by_draw = draw(made.pipe, made.sampling(), ["a red circle"], [0]).latents
    pipe = diffplug.load("shapes")
    with steps_of(pipe) as also, diffplug.plug(pipe, FewStep(done.student), Seeds([0])):
        by_recipe = pipe("a red circle", output_type="latent").images
    assert seen == also == [999, 749, 499, 249]
    assert torch.allclose(by_draw, by_recipe.float(), atol=5e-2)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["renoise", "ddim"])
def test_gauges_draw_as_the_result_is_drawn(name: str, red_reward: str) -> None:
    told = (f"objective.kernel={name}", "objective.gauges.prompts=1", f"objective.reward={red_reward}")
    made = job("pso", *told)
    objective = made.method.from_job(made)
    noise = Rows(0, 0, 2, range(2)).normal(5, 4, 16, 16)
    kernels = {"renoise": objective.kernel, "ddim": Kernel.ddim(made.path, 4, eta=0.0)}
    two = made.conditions[torch.tensor([0, 0])]
    drawn = {n: rollout(made.network, k, two, noise[:, 0], noise[:, 1:]).final for n, k in kernels.items()}
    other = "ddim" if name == "renoise" else "renoise"
    latents = objective.gauges.draw()
    assert torch.equal(latents, drawn[name]) and not torch.allclose(latents, drawn[other], atol=0.1)


@pytest.mark.parametrize(
    ("changes", "scheduler", "timesteps"),
    [
        (("objective.kernel=LCMScheduler", "objective.timesteps=[999,759,499,259]"), "LCMScheduler",
         [999, 759, 499, 259]),
        (("objective.kernel=TCDScheduler", "objective.eta=0.3"), "TCDScheduler", [999, 749, 499, 249]),
        (("objective.kernel=EulerAncestralDiscreteScheduler",), "EulerAncestralDiscreteScheduler",
         [999, 749, 499, 249]),
        (("objective.kernel=DDIMScheduler",), "DDIMScheduler", [999, 749, 499, 249]),
    ],
    ids=["lcm", "tcd", "euler ancestral", "ddim"],
)  # fmt: skip
@pytest.mark.pipe
def test_training_and_drawing_stand_at_the_same_timesteps(
    changes: tuple[str, ...], scheduler: str, timesteps: list[int]
) -> None:
    made = job("pso", *changes)
    assert (kernel_of(made).index - 1).tolist() == timesteps
    with steps_of(made.pipe) as seen:
        draw(made.pipe, made.sampling(), ["a red circle"], [0])
    row = recipe_row(made, {"kind": "lora", "file": "adapter.safetensors"}, made.sampling(), 1)
    assert seen == timesteps and row.seen == {4: tuple(timesteps)} and row.scheduler == scheduler


@pytest.mark.pipe
def test_guidance_reaches_roll_outs_reference_and_recipe(tmp_path: Path, red_reward: str) -> None:
    told = ("objective.guidance=3.0", f"objective.reward={red_reward}", "student.steps=2")
    made = job("pso", *(word for word in told))
    assert made.sampling().guidance == 3.0 and made.network.null is not None
    objective = made.method.from_job(made)
    rows = Rows(0, 0, 2, range(2))
    drawn = objective.drawn(rows)
    kernel, at = objective.kernel, torch.zeros(4, dtype=torch.long)
    first = kernel.predict(
        made.network, drawn.paths.states[:, 0], at, drawn.conditions, original=True, guidance=3.0
    )
    assert torch.allclose(first, drawn.paths.x0[:, 0], atol=1e-5)
    ell = objective.transitions(drawn, torch.arange(4), anchor=False).ell
    assert float(ell.detach().abs().max()) == 0.0


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("spo", ("student.start=", "student.steps=4", "objective.first=1", "objective.guidance=2.0",
                 "objective.threshold=0.0", "tuner.targets=[]", "tuner.kind=full", "tuner.extract=2")),
        ("ddpo", ("objective.candidates=2", "objective.anchor=1.0")),
        ("draft", ("objective.reward=shapes-clip", "objective.last=2")),
        ("draft", ("objective.reward=shapes-clip", "student.steps=1")),
    ],
    ids=["spo", "ddpo", "draft", "draft of one step"],
)  # fmt: skip
def test_kin_train_the_shapes_model(method: str, changes: tuple[str, ...], tmp_path: Path) -> None:
    if method == "draft":
        pytest.importorskip("open_clip")
    words = [*SMALL, "objective.gauges.every=0", *changes]
    done = train(Job.read(method, None, [w for w in words if w != "student.start=" and (
        method != "spo" or w != "student.start=shapes")]), tmp_path)  # fmt: skip
    assert done.student is not None and (done.student / "recipe.json").exists()
    assert log(tmp_path)[0]["loss"] is not None


@pytest.mark.pipe
def test_pairs_of_pictures_train_offline(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for i, prompt in enumerate(sample_prompts(3, split="train")):
        for name, shade in (("b", 60), ("w", 200)):
            Image.new("RGB", (64, 64), (shade, 20 * i, 0)).save(folder / f"{name}{i}.png")
        lines.append(json.dumps({"prompt": prompt, "better": f"b{i}.png", "worse": f"w{i}.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    made = Job.read("pso-offline", None, [*SMALL, f"objective.pairs={folder}"], cache=tmp_path / "cache")
    assert made.prompts == sample_prompts(3, split="train")  # sheets are of the pairs' own
    sampler = "objective.scheduler=EulerAncestralDiscreteScheduler"
    turbo = Job.read("pso-offline", None, [*SMALL, f"objective.pairs={folder}", sampler], cache=tmp_path)
    assert turbo.sampling().scheduler == (sampler.partition("=")[2], {"timestep_spacing": "trailing"})
    listed = ("objective.scheduler=LCMScheduler", "objective.timesteps=[999,759,499,259]")
    lcm = Job.read("pso-offline", None, [*SMALL, f"objective.pairs={folder}", *listed], cache=tmp_path)
    index, omega = lcm.method.from_job(lcm).levels(Rows(0, 0, 4, range(4)))
    alpha, sigma = lcm.path.levels(torch.tensor([760.0, 500, 260, 260]))
    assert index.tolist() == [1000, 760, 500, 260] and lcm.sampling().given(4) == (999, 759, 499, 259)
    assert torch.allclose(omega, (alpha / sigma).square() / 2, rtol=1e-12)
    with pytest.raises(ValueError, match="without objective.scheduler"):
        train(Job.read("pso-offline", None, [f"objective.pairs={folder}", listed[1]]), tmp_path / "idle")
    idle = Job.read("pso-offline", None, [f"objective.pairs={folder}", "data.prompts=mine.txt"])
    with pytest.raises(ValueError, match="prompts are in the pairs"):
        train(idle, tmp_path / "idle")
    done = train(made, tmp_path / "run")
    assert done.student is not None and log(tmp_path / "run")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pso", "--set", "objective.candidates=1"], "candidates must be at least 2"),
        (["pso", "--set", "objective.eta=0.0"], "give objective.eta above 0"),
        (["pso", "--set", "student.start=gone"], "neither a folder with a recipe.json nor a few-step name"),
        (["pso", "--set", "student.start=shapes", "--set", "student.steps=5"], "has no 5 steps"),
        (["pso", "--set", "student.start=hyper-sd"], "this pipeline is shapes"),
        (["pso", "--set", "student.steps=1", "--set", "student.start=shapes"], "take `pso-offline`"),
        (["pso", "--set", "objective.kernel=Euler"], "unknown kernel 'Euler'"),
        (["pso", "--set", "objective.reward=shappes"], "Did you mean 'shapes'"),
        (["pso", "--set", "objective.beta=-1.0"], "beta must be above 0"),
        (["pso-offline"], "neither a .jsonl or .parquet file nor a folder"),
        (["spo", "--set", "objective.first=19"], "it is at most 18"),
        (["spo", "--set", "objective.judge=gone"], "no folder of a step-aware preference model"),
        (["draft", "--set", "objective.reward=shapes"], "has no gradient"),
        (["draft", "--set", "objective.kernel=renoise"], "objective.kernel would do nothing: draft compares"),
        (["pso", "--set", "objective.timesteps=[999, 499]"], "would do nothing with kernel='ddim'"),
        (
            ["pso", "--set", "objective.kernel=renoise", "--set", "objective.eta=0.5"],
            "eta=0.5 would do nothing",
        ),
        (
            ["pso", "--set", "objective.kernel=LCMScheduler", "--set", "objective.timesteps=[999, 499]"],
            "student.steps 4: give as many timesteps as steps",
        ),
        (
            ["pso", "--set", "objective.kernel=DDIMScheduler", "--set", "objective.timesteps=[9,8,7,6]"],
            "DDIMScheduler takes no list of timesteps",
        ),
        (["pso", "--set", "dtype=float16"], "take dtype=bfloat16"),
        (["pso", "--set", "objective.epsilon=0.2"], "epsilon=0.2 would do nothing with clip='none'"),
        (["spo", "--set", "objective.start=independent"], "objective.start would do nothing"),
        (["pso", "--set", "student.guidance=5.0"], "set objective.guidance=5 too"),
        (["tilted", "--set", "objective.tilt=0.0"], "without a reward take tdm"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    words: list[str], message: str, tmp_path: Path, as_loud_as_before: None
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    changes = ["--set", f"data.prompts={tmp_path / 'p.txt'}", "--device", "cpu", "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["train", words[0], *changes, *words[1:]])
    told = " ".join(result.output.split())
    assert result.exit_code == 2, told
    assert message in told and "Traceback" not in told


def test_prompts_that_the_reward_cannot_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a photo of a cat\n")
    with pytest.raises(ValueError, match="cat"):
        train(job("pso", f"data.prompts={tmp_path / 'p.txt'}"), tmp_path / "run")


def test_a_reward_without_a_number_is_told(tmp_path: Path) -> None:
    (tmp_path / "nan.py").write_text("def nan(images, prompts):\n    return [float('nan')] * len(prompts)\n")
    with pytest.raises(ValueError, match="a preference needs finite scores"):
        train(job("pso", f"objective.reward={tmp_path / 'nan.py'}:nan"), tmp_path / "run")


@pytest.mark.pipe
def test_the_tuned_student_that_ships_is_another_than_its_start() -> None:
    gap = float((drawn("shapes") - drawn("shapes-pso")).abs().mean())
    assert 0.01 < gap < 0.5
