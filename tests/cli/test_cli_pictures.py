"""What `generate`, `compare`, `show` and `score` do with files: prompts in, settings out and in again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import diffplug
from diffplug.cli import main as cli
from diffplug.making.png import read_settings, read_texts

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]


@pytest.fixture(autouse=True)
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every model is one tiny pipeline, loaded already."""
    from diffplug.testing import tiny

    found = tiny("sd15")
    monkeypatch.setattr(diffplug, "load", lambda *_, **__: found)
    return found


def _call(*words: Any) -> Result:
    result = CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "60"})
    assert result.exit_code == 0, result.output
    return result


def _generate(out: Path, *words: Any) -> Result:
    return _call("generate", *words, "--model", "x/y", "--device", "cpu", "-o", out)


def test_prompts_from_a_file_with_their_own_seeds(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed,negative_prompt\na,7,\nb,,dogs\n")
    told = json.loads(
        _generate(tmp_path / "o", "x", "--prompts", tmp_path / "p.csv", "--steps", 1, "--json").stdout
    )
    assert [(p["prompt"], p["seed"]) for p in told["pictures"]] == [("x", 0), ("a", 7), ("b", 2)]
    assert read_settings(tmp_path / "o" / "seed-000002.png")["negative_prompt"] == "dogs"
    assert "negative_prompt" not in read_settings(tmp_path / "o" / "seed-000007.png")


def test_a_file_has_what_makes_it_again(tmp_path: Path, red_reward: str) -> None:
    words = ["--steps", 2, "--width", 16, "--height", 24, "--steer", "best-of-n", "--particles", 2]
    words += ["--reward", red_reward, "--option", "guidance_rescale=0.5", "--dtype", "float32", "--seed", 5]
    _generate(tmp_path, "a cat", *words)
    path = tmp_path / "seed-000005.png"
    settings = read_settings(path)
    assert (settings["width"], settings["height"], settings["dtype"]) == (16, 24, "float32")
    assert settings["call"] == {"guidance_rescale": 0.5} and settings["rewards"].keys() == {red_reward}
    used = settings["used"]
    assert used["guidance"] == 7.5 and used["scheduler"] == "DDIMScheduler" and used["width"] == 16
    assert used["versions"].keys() == {"diffplug", "diffusers", "torch"}
    assert "Size: 16x24" in read_texts(path)["parameters"]
    _call("generate", "--from", path, "--device", "cpu", "-o", tmp_path / "again")
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    _call("generate", "--from", path, "--device", "cpu", "--steps", 3, "--seed", 6, "-o", tmp_path / "other")
    other = read_settings(tmp_path / "other" / "seed-000006.png")
    assert (other["steps"], other["prompt"], other["particles"]) == (3, "a cat", 2)


def test_settings_of_another_program_are_started_from(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(
        "parameters", "a lighthouse\nSteps: 2, Sampler: Euler a, CFG scale: 4, Seed: 12, Size: 16x16"
    )
    Image.new("RGB", (16, 16)).save(tmp_path / "theirs.png", pnginfo=info)
    _generate(tmp_path / "o", "--from", tmp_path / "theirs.png")
    settings = read_settings(tmp_path / "o" / "seed-000012.png")
    assert (settings["prompt"], settings["sampler"], settings["guidance"]) == ("a lighthouse", "euler-a", 4.0)
    assert "again: diffplug generate --from" in _call("show", tmp_path / "theirs.png").stdout


def test_show_prints_the_settings(tmp_path: Path) -> None:
    _generate(tmp_path, "a cat", "--steps", 1)
    path = tmp_path / "seed-000000.png"
    said = _call("show", path).stdout
    assert "a cat" in said and "used.guidance" in said and "used.versions.torch" in said
    assert json.loads(_call("show", path, "--json").stdout)[str(path)] == read_settings(path)


def test_rewards_reached_are_told(tmp_path: Path, red_reward: str) -> None:
    words = ("a", "--steps", 1, "--steer", "best-of-n", "--particles", 2, "--reward", red_reward)
    (told,) = json.loads(_generate(tmp_path, *words, "--json").stdout)["pictures"]
    assert told["reward"] == read_settings(told["file"])["rewards"][red_reward] and told["made"]
    again = _generate(tmp_path, *words)  # nothing is made, all is told
    assert f"{told['reward']:.3f}" in again.stdout and "1 of 1 pictures were there already" in again.stdout
    scored = json.loads(_call("score", tmp_path, "--reward", red_reward, "--reward", "jpeg", "--json").stdout)
    assert scored["pictures"][0]["scores"][red_reward] == pytest.approx(told["reward"], abs=1 / 255)
    assert scored["means"]["jpeg"] < 0


def test_score_takes_pictures_of_any_size_and_their_prompt(tmp_path: Path) -> None:
    for i, size in enumerate([(8, 8), (8, 8), (16, 8)]):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{i}.jpg")
    said = _call("score", tmp_path, "--reward", "colour:red", "--prompt", "a", "--batch", 2).stdout
    assert said.count(".jpg") == 3 and "mean" in said
    result = CliRunner().invoke(cli.app, ["score", str(tmp_path), "--reward", "jpeg"])
    assert result.exit_code == 2 and "does not say its prompt: give --prompt" in result.stderr
    _generate(tmp_path, "a", "--steps", 1)
    assert "3 pictures do not say their prompt" in _call("score", tmp_path, "--reward", "jpeg").stderr
    (tmp_path / "3.png").write_text("no picture")
    result = CliRunner().invoke(cli.app, ["score", str(tmp_path), "--reward", "jpeg", "--prompt", "a"])
    assert result.exit_code == 2 and "3.png' cannot be read as a picture" in result.stderr


def test_score_says_where_the_pictures_of_a_folder_are_and_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.png").write_bytes(b"")
    (tmp_path / "six.json").write_text("{}")
    deeper, other = (
        CliRunner().invoke(cli.app, ["score", str(path), "--reward", "jpeg"])
        for path in (tmp_path, tmp_path / "six.json")
    )
    assert deeper.exit_code == 2 and "give the folders in it that do" in " ".join(deeper.stderr.split())
    assert other.exit_code == 2 and "cannot be read as a picture" in " ".join(other.stderr.split())


def test_paths_in_tables_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deep = Path("out") / ("x" * 70)
    assert str(deep / "seed-000000.png") in _generate(deep, "a", "--steps", 1).stdout


def test_reports_are_drawn(tmp_path: Path, red_reward: str) -> None:
    pytest.importorskip("matplotlib")
    words = ("--steps", 2, "--steer", "fk", "--particles", 2, "--reward", red_reward, "--option", "churn=1.0")
    _generate(tmp_path / "o", "a", "b", *words, "--report", tmp_path / "run.png")
    assert sorted(p.name for p in tmp_path.glob("run*")) == ["run-2.png", "run.png"]


def test_recipes_take_options_and_negative_prompts_in_quotes(tmp_path: Path, red_reward: str) -> None:
    run = f"steps=2,negative_prompt='lowres, bad hands',steer=fk,reward={red_reward},options='churn=0.5'"
    told = json.loads(
        _call("compare", "a", "--run", run, "-n", 1, "--model", "x/y", "-o", tmp_path, "--json").stdout
    )
    settings = told["rows"][0]["settings"]
    assert settings["negative_prompt"] == "lowres, bad hands" and settings["options"] == {"churn": 0.5}
    assert "reward" in told["rows"][0]


def test_a_sheet_of_other_settings_keeps_its_name(tmp_path: Path) -> None:
    words = ("compare", "a", "-n", 1, "--model", "x/y", "-o", tmp_path, "--run")
    for steps in (1, 2, 1):
        _call(*words, f"steps={steps}")
    assert sorted(os.listdir(tmp_path)) == ["column-1", "compare-2.png", "compare.png"]


def test_decoders_are_spared_when_asked(tmp_path: Path, pipe: Any) -> None:
    _generate(tmp_path, "a", "--steps", 1, "--vae-tiling", "--vae-slicing")
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    assert read_settings(tmp_path / "seed-000000.png")["vae_tiling"] is True


def test_prompts_that_are_cut_are_told(tmp_path: Path, pipe: Any) -> None:
    result = _generate(tmp_path, "a " * 90 + "zebra", "--steps", 1)
    assert (
        "prompt 1 is too long for the text encoder: '" in result.stderr
        and "zebra' is not read" in result.stderr
    )
    assert "too long" not in _generate(tmp_path, "a zebra", "--steps", 1).stderr


def test_a_file_that_is_there_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _generate(tmp_path, "a", "--steps", 1)
    monkeypatch.setattr(diffplug, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert "were there already" in _generate(tmp_path, "a", "--steps", 1).stdout
