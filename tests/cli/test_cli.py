"""The command line: files it writes, what it prints, and how it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from diffplug.cli import main as cli
from diffplug.cli import pipeline
from diffplug.making.png import read_settings

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]


def _call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "200"})


def _refused(result: Result) -> str:
    """The one line on the error stream of a command that gave up with status 2."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and lines[0].startswith("error: ") and not result.stdout
    assert "Traceback" not in result.output
    return lines[0]


def test_version() -> None:
    assert _call("--version").stdout.strip() == cli.diffplug.__version__


@pytest.mark.parametrize("command", ["generate", "compare", "doctor", "names"])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = _call(command, "--help")
    assert result.exit_code == 0
    assert f"diffplug {command}" in result.stdout and "Example:" in result.stdout


def test_generate_writes_one_file_for_each_seed(tmp_path: Path, tiny_folder: Path) -> None:
    result = _call(
        "generate",
        "../a",
        "b",
        "--model",
        tiny_folder,
        "--steps",
        "2",
        "-n",
        "2",
        "--seed",
        "7",
        "-o",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path)) == [f"seed-{seed:06d}.png" for seed in (7, 8, 9, 10)]
    for seed, prompt in zip((7, 8, 9, 10), ["../a", "../a", "b", "b"], strict=True):
        settings = read_settings(tmp_path / f"seed-{seed:06d}.png")
        assert (settings["seed"], settings["prompt"], settings["steps"]) == (seed, prompt, 2)
    assert "seed-000010.png" in result.stdout and "network evaluations" in result.stdout


def test_generate_twice_makes_a_picture_once_unless_asked_again(tmp_path: Path, tiny_folder: Path) -> None:
    words = ("generate", "a", "--model", tiny_folder, "--steps", "1", "-o", tmp_path)
    assert [_call(*words).exit_code for _ in range(2)] == [0, 0]
    assert os.listdir(tmp_path) == ["seed-000000.png"]  # what is there is not made again
    assert _call(*words, "--again").exit_code == 0
    one, two = sorted(tmp_path.iterdir())
    assert two.name == "seed-000000.png" and one.name == "seed-000000-2.png"
    assert one.read_bytes() == two.read_bytes()


def test_generate_json_is_all_there_is_on_stdout(tmp_path: Path, tiny_folder: Path) -> None:
    words = ("--sampler", "dc-solver", "--steps", "3", "--guidance", "2", "-o", tmp_path, "--json")
    result = _call("generate", "a", "--model", tiny_folder, *words)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["evaluations"] == 3 and told["pictures"][0]["prompt"] == "a"
    assert read_settings(told["pictures"][0]["file"])["sampler"] == "dc-solver"


def test_generate_steered(tmp_path: Path, tiny_folder: Path, red_reward: str) -> None:
    steer = ("--steer", "fk", "--particles", "3", "--reward", red_reward, "--sampler", "ddim", "--eta", "1")
    words = ("generate", "a", "--model", tiny_folder, "--steps", "3", "-o", tmp_path)
    result = _call(*words, *steer, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["evaluations"] == 9
    assert read_settings(tmp_path / "seed-000000.png")["particles"] == 3
    result = _call(*words, "--steer", "svdd", "--particles", "2", "--reward", red_reward, "--seed", "1")
    assert "svdd duplicates particles, which part in noise: churn 1 at the scored calls" in result.output
    assert "churn 1" in read_settings(tmp_path / "seed-000001.png")["used"]["noise"]


def test_compare_ends_with_the_sheet(tmp_path: Path, tiny_folder: Path, red_reward: str) -> None:
    runs = ("--run", "label=[long],sampler=ddim,steps=4", "--run", "label=few,sampler=dc-solver,steps=2")
    words = ("--model", tiny_folder, *runs, "-n", "2", "--judge", red_reward, "-o", tmp_path)
    result = _call("compare", "a", "b", *words)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "compare.png")
    assert "[long]" in result.stdout and "few" in result.stdout
    assert sorted(os.listdir(tmp_path)) == ["column-1", "column-2", "compare.png"]
    assert len(os.listdir(tmp_path / "column-2")) == 4
    assert Image.open(tmp_path / "compare.png").width > 400


def test_compare_json(tmp_path: Path, tiny_folder: Path, red_reward: str) -> None:
    runs = ("--run", "sampler=ddim,steps=4", "--run", "sampler=ddim,steps=4")
    result = _call(
        "compare", "a", "--model", tiny_folder, *runs, "--judge", red_reward, "-o", tmp_path, "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    first, second = told["rows"]
    assert first["evaluations"] == 4 and first["score"] == second["score"]  # same recipe, same seeds
    assert Path(told["sheet"]).is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "shaps"], "unknown model 'shaps'. Did you mean 'shapes'"),
        (["--sampler", "dcsolver"], "unknown sampler 'dcsolver'. Did you mean 'dc-solver'"),
        (["--steer", "fq"], "unknown steerer 'fq'. Did you mean 'fk'"),
        (["--steer", "fk", "--reward", "shape"], "unknown reward 'shape'. Did you mean 'shapes'"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--dtype", "float61"], "unknown dtype 'float61'. Did you mean 'float16'"),
        (["--guidance", "inf"], "'--guidance', 'inf': Input should be less than"),
        (["--strength", "3"], "--strength 3.0 acts only with --steer"),
        (["--reward", "jpeg"], "--reward jpeg acts only with --steer"),
        (["--steer", "fk", "--strength", "inf"], "strength must be a finite number"),
        (["--steer", "fk", "--reward", "no_module:score"], "'no_module' is no known name and no module"),
        (["--steer", "fk", "--reward", "nowhere.py:score"], "the file 'nowhere.py' does not exist"),
        (["--steer", "two-level", "--particles", "3"], "duplicates=2 does not divide particles=3"),
        (["--steer", "best-of-n", "--strength", "3"], "steerer 'best-of-n' takes no strength"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    tmp_path: Path, tiny_folder: Path, words: list[str], sentence: str
) -> None:
    model = [] if "--model" in words else ["--model", tiny_folder]
    assert sentence in _refused(_call("generate", "a", *model, *words, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    "words", [["--steps", "0"], ["--steps", "two"], ["--seed", "-1"], ["--particles", "0"]]
)
def test_numbers_out_of_range_are_usage_errors(words: list[str]) -> None:
    result = _call("generate", "a", *words)
    assert result.exit_code == 2 and "Invalid value" in result.stderr


def test_compare_refuses_a_bad_recipe(tmp_path: Path) -> None:
    line = _refused(_call("compare", "a", "--run", "sampler=ddim,step=4", "-o", tmp_path))
    assert "unknown setting 'step'. Did you mean 'steps'" in line


def test_a_damaged_weight_file_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    file = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    line = _refused(_call("generate", "a", "--model", tmp_path / "model", "-o", tmp_path / "out"))
    assert file.name in line and "is damaged" in line and "copy it again" in line
    assert os.listdir(tmp_path / "out") == []


def test_an_output_folder_that_cannot_be_written_to(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "file").write_text("x")
    line = _refused(_call("generate", "a", "--model", tiny_folder, "-o", tmp_path / "file"))
    assert "cannot write" in line and "Choose a folder" in line


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_output_folder(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    line = _refused(_call("generate", "a", "--model", tiny_folder, "-o", tmp_path / "out"))
    assert "Permission denied" in line


def test_a_full_disk_leaves_no_part_of_a_picture(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[:11])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = _call("generate", "a", "--model", tiny_folder, "--steps", "1", "-o", tmp_path, "--json")
    assert "No space left on device" in _refused(result)
    assert os.listdir(tmp_path) == []


def test_doctor_examines_everything() -> None:
    result = _call("doctor", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["healthy"] else 1)
    assert {f["topic"] for f in told["findings"]} >= {
        "system",
        "package",
        "extra",
        "device",
        "attention",
        "model",
    }
    assert all("remedy" in f for f in told["findings"] if f.get("ok") is False)


def test_doctor_tells_the_command_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffplug.cli import environment as doctor

    have = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: {"peft": None, "torch": "2.5.1"}.get(name, have(name))
    )
    result = _call("doctor")
    assert result.exit_code == 1
    assert (
        'pip install --upgrade "peft>=' in result.stdout
        and 'pip install --upgrade "torch>=2.6"' in result.stdout
    )


def test_names_lists_what_can_be_asked_for() -> None:
    told = json.loads(_call("names", "--json").stdout)
    assert {"dc-solver", "ddim", "unipc"} <= set(told["samplers"])
    assert {"fk", "best-of-n"} <= set(told["steerers"]) and "shapes" in told["rewards"]


def test_unknown_words_are_named() -> None:
    with pytest.warns(UserWarning, match="does not know elephant"):
        pipeline._warn_of_unknown_words(["a red circle", "a red elephant"])
