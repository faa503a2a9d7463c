"""Names, recipes and the command line: one word for a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from few_step_kit import factors, recipe
from few_step_pipelines import PIPELINES, pipeline
from typer.testing import CliRunner

from diffplug.cli import app
from diffplug.recipe import Recipe
from diffplug.samplers import by_name as stock
from diffplug.samplers.few_step import FewStep, family_of, knows, named
from diffplug.samplers.few_step.code import plain_code
from diffplug.samplers.few_step.lookup import all_rows, row_for, rows_in, shipped_rows, split
from diffplug.testing import tiny


@pytest.mark.contract
@pytest.mark.parametrize(
    ("text", "name", "steps"),
    [
        ("hyper-sd@4", "hyper-sd", 4),
        ("lightning-4", "lightning", 4),
        ("lightning-4steps", "lightning", 4),
        ("Hyper-SD", "hyper-sd", None),
        ("hyper-sdxl-4", "hyper-sdxl-4", None),
        ("qwen-lightning-4", "qwen-lightning-4", None),
        ("dmd2@4", "dmd2", 4),
    ],
)
def test_names_with_and_without_steps(text: str, name: str, steps: int | None) -> None:
    assert split(text) == (name, steps) and knows(text)
    few = named(text)
    assert (few.name, few.steps) == (name, steps)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "family", "steps", "row"),
    [
        ("hyper-sd", "sd15", 4, "hyper-sd15-4"),
        ("hyper-sd", "sdxl", 8, "hyper-sdxl-8"),
        ("hyper-sd", "sdxl", 6, "hyper-sdxl-unified"),
        ("hyper-sd", "sdxl", 1, "hyper-sdxl-unified"),
        ("hyper-sd", "sd3", 6, "hyper-sd3-cfg-8"),
        ("hyper-sd", "flux-dev", 16, "hyper-flux-16"),
        ("lightning", "sdxl", 2, "lightning-sdxl-2"),
        ("lightning", "qwen-image", 8, "qwen-lightning-8"),
        ("turbo", "z-image", None, "z-image-turbo"),
    ],
)
def test_the_row_that_fits_family_and_steps(name: str, family: str, steps: int | None, row: str) -> None:
    assert row_for(name, family, steps, all_rows()).name == row


@pytest.mark.contract
@pytest.mark.parametrize("family", PIPELINES)
def test_families_are_told_by_structure(family: str) -> None:
    assert family_of(pipeline(family)) == family


@pytest.mark.contract
def test_samplers_by_name(tmp_path: Path) -> None:
    few = stock.sampler("hyper-sd@4", tiny("sd15"))
    assert isinstance(few, FewStep) and few.steps == 4
    folder = recipe(tmp_path, factors(tiny("sd15").unet))
    for path in (str(folder), str(folder / "recipe.json")):
        assert isinstance(stock.sampler(path, tiny("sd15")), FewStep)
    assert not stock.is_few_step("ddim") and not stock.is_few_step("lcm")
    with pytest.raises(ValueError, match="unknown sampler 'nonsense'"):
        stock.sampler("nonsense", tiny("sd15"))


@pytest.mark.contract
def test_recipes_take_the_steps_that_a_name_says() -> None:
    assert Recipe.parse("sampler=hyper-sd@4").steps == 4
    assert Recipe(sampler="hyper-sd@4", steps=4).steps == 4
    assert Recipe(sampler="hyper-sd").steps == 20
    with pytest.raises(ValueError, match="says 4 steps, steps=8"):
        Recipe(sampler="hyper-sd@4", steps=8)


@pytest.mark.pipe
def test_a_recipe_runs_a_trainers_folder(tmp_path: Path) -> None:
    pipe = tiny("sd15")
    folder = recipe(tmp_path, factors(pipe.unet))
    assert Recipe(sampler=str(folder)).steps == 4
    made = Recipe(sampler=str(folder)).run(pipe, ["a red circle"], [0])
    assert len(made.images) == 1 and made.evaluations == 4
    steered = Recipe(sampler=str(folder), steps=4, steer="fk", particles=2, reward="jpeg")
    assert steered.run(pipe, ["a red circle"], [0]).evaluations == 8


@pytest.mark.pipe
def test_searches_run_on_the_distilled_model(tmp_path: Path) -> None:
    """Weights and guidance are the checkpoint's, scheduler and steps the search's."""
    from few_step_kit import watched

    from diffplug.cli.commands.few_step import with_few_step

    pipe = tiny("sd15")
    before, scheduler = pipe.unet.conv_in.weight.clone(), pipe.scheduler
    assert with_few_step(pipe, None, None) is None and with_few_step(pipe, None, 3.0) == 3.0
    assert with_few_step(pipe, str(recipe(tmp_path, factors(pipe.unet))), None) == 0.0
    assert pipe.scheduler is scheduler and not torch.equal(pipe.unet.conv_in.weight, before)
    with watched(pipe) as seen:
        pipe("a red circle", num_inference_steps=3, output_type="latent")
    assert seen.rows == [1, 1, 1]


@pytest.mark.contract
@pytest.mark.parametrize("row", [r for r in shipped_rows() if not r.refused], ids=lambda row: row.name)
def test_plain_code_compiles_and_names_the_files(row: Any) -> None:
    for steps in {row.default_steps, row.steps[0]}:
        code = plain_code(row, steps)
        compile(code, row.name, "exec")
        for weights in row.weights if row.kind != "pipeline" else ():
            assert weights.repo in code and Path(weights.file).name in code
        assert f"num_inference_steps={steps}" in code


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["hyper-sd15-4", "hyper-sd15-cfg-12", "hyper-sd15-unified", "lcm-lora-sd15"])
def test_plain_code_makes_the_same_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed code, with a tiny pipeline in place of the base and a file in place of the hub's."""
    from few_step_kit import write_checkpoint

    from diffplug.plug import plug

    row = next(row for row in shipped_rows() if row.name == name)
    pipe = tiny("sd15")
    write_checkpoint(row, pipe, tmp_path)
    file = Path(row.weights[0].file).name
    code = plain_code(row).replace('"ByteDance/Hyper-SD"', repr(str(tmp_path)))
    code = code.replace('"latent-consistency/lcm-lora-sdv1-5"', repr(str(tmp_path)))
    code = code.replace(
        'pipe("a prompt"', 'pipe("a prompt", generator=torch.manual_seed(0), output_type="latent"'
    )
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: tiny("sd15"))
    space: dict[str, Any] = {}
    exec(code, space)  # noqa: S102  our own code is what is tested
    with plug(pipe, FewStep(row, merge="runtime", weights=tmp_path / file)):
        ours = pipe("a prompt", generator=torch.manual_seed(0), output_type="latent").images
    torch.testing.assert_close(space["result"].images, ours, rtol=1e-4, atol=1e-4)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


@pytest.mark.contract
def test_the_table_of_names() -> None:
    told = run("names", "--few-step")
    assert told.exit_code == 0
    lines = told.output.splitlines()
    assert lines[0].split() == ["name", "also", "family", "steps", "guidance", "licence", "verified"]
    line = next(line for line in lines if line.startswith("dmd2-sdxl-4"))
    assert "cc-by-nc-4.0" in line and line.endswith("yes")
    assert next(line for line in lines if line.startswith("kandinsky6-distill")).endswith("not to be touched")
    rows = json.loads(run("names", "--few-step", "--json").output)
    assert [row["name"] for row in rows] == [row.name for row in all_rows()]


@pytest.mark.contract
def test_one_recipe_with_its_code(tmp_path: Path) -> None:
    told = run("recipe", "hyper-sd@4", "--family", "sdxl")
    assert told.exit_code == 0 and told.output.count("pipe = DiffusionPipeline") == 1
    assert "Hyper-SDXL-4steps-lora.safetensors" in told.output
    assert len(json.loads(run("recipe", "hyper-sdxl-4", "--json").output)["weights"]) == 1
    folder = recipe(tmp_path, factors(tiny("sd15").unet))
    assert "student-4" in run("recipe", str(folder)).output
    for words, said in (
        (("recipe", "hypersd"), "Did you mean 'hyper-sd'"),
        (("recipe", "hyper-sd@40"), "has no 40 steps"),
        (("recipe", "hyper-sd", "--family", "wan-t2v"), "hyper-sd is for"),
        (("generate", "a", "--sampler", "hyper-sd@4", "--steps", "8"), "says 4 steps"),
    ):
        failed = run(*words)
        assert failed.exit_code == 2 and said in " ".join(failed.output.split())
    assert "must not be replaced" in run("recipe", "kandinsky6-distill").output


SD_NEXT = {
    "Tempest Turbo": {
        "path": "owner/tempest",
        "desc": "fast",
        "extras": "sampler: Euler a, cfg_scale: 1.0, steps: 4",
    },
    "Guided": {
        "path": "owner/guided@rev",
        "extras": "sampler: Default, cfg_scale: 2.5, steps: 8, image_size: 3",
    },
    "No settings": {"path": "owner/none"},
}


@pytest.mark.contract
def test_sd_nexts_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "reference-distilled.json"
    path.write_text(json.dumps(SD_NEXT))
    turbo, guided = rows_in(path)
    assert (turbo.name, turbo.steps, turbo.guidance) == ("tempest-turbo", (4,), "off")
    assert turbo.scheduler == "EulerAncestralDiscreteScheduler" and not turbo.verified
    assert (guided.guidance, guided.guidance_scale) == ("cfg", 2.5)
    assert guided.weights[0].revision == "rev" and "image_size" in guided.doubt
    assert row_for("tempest-turbo", "z-image", 4, all_rows(path)) == turbo
    path.write_text(json.dumps({"a": {"path": "o/a", "extras": "steps 4"}}))
    with pytest.raises(ValueError, match="is no 'key: value'"):
        rows_in(path)
    path.write_text(json.dumps({"a": {"path": "o/a", "extras": "steps: four"}}))
    with pytest.raises(ValueError, match="steps is 'four', not a number"):
        rows_in(path)


@pytest.mark.contract
def test_entry_points_and_files_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "name": "mine-3", "aliases": ["mine"], "family": "sd15", "kind": "pipeline", "steps": [3],
        "licence": "mit", "source": "a test",
    }  # fmt: skip
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"groups": [{"common": {"eta": 0.0}, "rows": [row]}]}))
    assert FewStep("mine", catalogue=path).row_for(tiny("sd15")).eta == 0.0

    class Entry:
        name = "mine"

        def load(self) -> Any:
            return str(path)

    monkeypatch.setattr("diffplug.samplers.few_step.lookup.entry_points", lambda group: [Entry()])
    assert FewStep("mine@3").row_for(tiny("sd15")).name == "mine-3"
    path.write_text(json.dumps({"groups": [{"rows": [row, row]}]}))
    with pytest.raises(ValueError, match="two few-step recipes are called 'mine-3'"):
        all_rows(path)
