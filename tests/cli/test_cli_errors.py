"""Whatever is given or raised, a command ends in pictures, or in one line and status 2."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from diffusers import PNDMScheduler
from typer.testing import CliRunner

import diffplug
from diffplug.cli import boundary
from diffplug.cli import main as cli
from diffplug.making.png import read_settings

pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]
ROOT = Path(__file__).resolve().parents[2]


def _call(*words: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "200"})


def _refused(result: Result) -> str:
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("warning: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in result.output, (
        result.output
    )
    return lines[0]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every model is one tiny pipeline, loaded already."""
    from diffplug.testing import tiny

    pipe = tiny("sd15")
    monkeypatch.setattr(diffplug, "load", lambda *_, **__: pipe)
    return pipe


def _raising(error: BaseException) -> Any:
    @boundary.guarded
    def command() -> None:
        raise error

    app = typer.Typer(cls=boundary.Commands)
    app.command("raise")(command)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["raise"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("odd\nthing"),
            "unexpected RuntimeError: odd thing. This is a bug, here or in a library: --debug shows where",
        ),
        (KeyError("key"), "unexpected KeyError"),
        (RecursionError("maximum"), "nested too deeply"),
        (MemoryError(), "memory ran out: ask for less at once"),
        (SystemExit(0), "ended the program (sys.exit(0))"),
        (ModuleNotFoundError("No module named 'x'"), "`diffplug doctor` tells what is missing"),
        (ValueError(f"got {'y' * 5000!r}: no"), "yyyyy...yyyyy"),
        (ValueError("word " * 2000), " ..."),
    ],
)
def test_every_error_is_one_line(error: BaseException, said: str) -> None:
    line = _refused(_raising(error))
    assert said in line and len(line) < 900


def test_out_of_memory_is_told_with_the_options_that_the_command_has(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, tmp_path: Path
) -> None:
    import torch

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert _refused(_raising(torch.OutOfMemoryError("CUDA out of memory"))).endswith("ask for less at once")
    monkeypatch.setattr(diffplug, "load", full)
    words = ("a", "--model", "x/y", "-o", tmp_path)
    assert "lower --batch, --particles, --width and --height, or try --dtype" in _refused(
        _call("generate", *words)
    )
    line = _refused(_call("video", *words))
    assert "lower --frames, --windows, --width" in line and "--batch" not in line and "--offload" not in line


def test_files_are_named_whole_and_values_are_cut() -> None:
    path = "/very/" + "long/" * 30 + "name.json"
    assert path in boundary._in_a_line(f"cannot read {path!r}: gone")
    assert len(boundary._in_a_line(f"unknown sampler {'z' * 300!r}.")) < 130
    text = (
        "reward 'shapes' grades: prompt 'a cat' names no object, "
        + "many words " * 9
        + "as in 'a red circle'."
    )
    assert boundary._in_a_line(text) == text


def test_debug_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    def bug(*_: Any, **__: Any) -> Any:
        raise TypeError("a bug")

    monkeypatch.setattr(loaded, "encode_prompt", bug, raising=False)
    words = ("generate", "a", "--model", "x/y", "--steps", "1", "-o", tmp_path)
    assert (
        "unexpected TypeError: a bug. This is a bug, here or in a library: --debug shows where"
        in _refused(_call(*words))
    )
    result = _call(*words, "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr and "in encode_prompt" not in result.stdout


def test_foreign_code_that_leaves_ends_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "needs.py").write_text("class K:\n  def __init__(self, a): ...\n")
    for spec, said in (
        (f"{tmp_path}/leaves.py:f", "raised SystemExit: 0"),
        (f"{tmp_path}/needs.py:K", "K() raised TypeError"),
        (f"{tmp_path}/needs.py", "is a file: add its function"),
    ):
        line = _refused(_call("generate", "a", "--steer", "fk", "--reward", spec, "-o", tmp_path / "out"))
        assert said in line


def test_a_reward_that_raises_is_named_wherever_it_is_asked(tmp_path: Path, loaded: Any) -> None:
    (tmp_path / "raises.py").write_text("def f(images, prompts): raise RuntimeError('odd')")
    words, reward = ("a", "--model", "x/y", "-o", tmp_path / "out"), f"{tmp_path}/raises.py:f"
    said = "the reward 'f' raised RuntimeError: odd"
    assert said in _refused(_call("compare", *words, "--run", "steps=1", "-n", 1, "--judge", reward))
    picture = tmp_path / "out" / "column-1" / "seed-000000.png"
    assert said in _refused(_call("score", picture, "--reward", reward))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "a", "--steps", "0"], "Invalid value for '--steps', '0': Input should be greater"),
        (["generate", "a", "--images=-3"], "Invalid value for '--images' / '-n', '-3': Input"),
        (["generate", "--nope"], "No such option: --nope"),
        (["genrate"], "Did you mean 'generate'? `"),
        (["generate", "a", "-o", ""], "the folder's name is empty"),
        (["generate"], "Give a prompt, or --prompts FILE"),
        (["generate", " "], "prompt 1 is blank"),
        (["generate", "a\udcff"], "prompt 1 is not valid UTF-8"),
        (["generate", "a", "--guidance", "1e30"], "'1e30': Input should be less than or equal to 1000"),
        (["video", "a", "--guidance", "1e30"], "'1e30': Input should be less than or equal to 1000"),
        (["search", "--guidance", "inf"], "'inf': Input should be less than or equal to 1000"),
        (["score-adapter", "--guidance", "1e30"], "'1e30': Input should be less than or equal to 1000"),
        (["video", " "], "the prompt is blank"),
        (["video", "a\udcff"], "the prompt is not valid UTF-8"),
        (["video", "a", "--at", "8:b\0"], "the prompt from frame 8 has a NUL character"),
        (["video", "a", "--windows", "16"], "write FRAMES/OVERLAP"),
        (["generate", "a", "--particles", "8"], "--particles 8 acts only with --steer"),
        (["generate", "a", "--returns", "all"], "--returns all acts only with --steer"),
        (["generate", "a", "--report", "x.png"], "add --steer fk"),
        (["generate", "a", "--steer", "fk", "--option", "chrun=1"], "Did you mean 'churn'"),
        (["generate", "a", "--option", "churn"], "write name=value"),
        (["generate", "a", "--option", "prompt=x"], "the recipe itself says the prompts"),
        (["generate", "a cat", "--steer", "fk"], "reward 'shapes' grades the Shapes world only"),
        (["generate", "a", "--steer", "fk", "--reward", "hps:missing.pt"], "'missing.pt' does not exist"),
        (["generate", "a", "--offload", "disk"], "unknown offload 'disk'"),
        (["generate", "a", "--device", "meta"], "device 'meta' holds no numbers"),
        (["generate", "a", "--prompts", "nowhere.txt"], "cannot read 'nowhere.txt': no such file"),
        (["generate", "--from", "nowhere.png"], "cannot read 'nowhere.png'"),
        (["compare", "a", "--run", "steps=2,particles=4"], "particles acts only with steer"),
        (["compare", "a", "--run", "steps=2", "--judge", "hps:missing.pt"], "'missing.pt' does not exist"),
        (["compare", "a", "--run", "negative_prompt='a, b"], "the quote ' is not closed"),
        (["show", "nowhere.png"], "cannot read 'nowhere.png'"),
        (["batch", "m.jsonl", "--address", "auto"], "--address 'auto' is of a Ray cluster: add --engine ray"),
        (["demo", "--device", "gpu", "--no-browser"], "device 'gpu' cannot be used here (Expected one of"),
        (["demo", "-o", __file__, "--no-browser"], "it is a file, not a folder"),
        (["score", "nowhere", "--reward", "jpeg"], "'nowhere' does not exist"),
        (
            ["train", "trajectory", "--tuner", "lora", "--set", "tuner.kind=full"],
            "--set tuner.kind=full contradicts the option that says tuner.kind=lora",
        ),
        (["score", ".", "--reward", "jpge"], "unknown reward 'jpge'. Did you mean 'jpeg'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffplug, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert said in _refused(_call(*words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sampler", "euler", "--eta", "1"], "eta 1 does nothing with EulerDiscreteScheduler"),
        (
            ["--guidance", "1", "--negative-prompt", "x"],
            "the negative prompt acts only with guidance above 1",
        ),
        (["--option", "nothing=0.5"], "takes no nothing: leave it out"),
        (["--option", "guidance_rescal=0.5"], "did you mean guidance_rescale?"),
        (["--option", "clip_skip=99"], "StableDiffusionPipeline fails with clip_skip=99: IndexError: "),
        (["--width", "97"], "width 97 is no multiple of 2: take 96"),
        (["--steps", "3"], "PNDM needs 4 steps or more"),
        (["--offload", "model"], "leave it out on cpu"),
    ],
)
def test_what_would_do_nothing_is_refused_before_the_network(
    words: list[str], said: str, tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "PNDM" in said:
        own = PNDMScheduler.from_config(loaded.scheduler.config, skip_prk_steps=False)
        monkeypatch.setattr(loaded, "scheduler", own)
    monkeypatch.setattr(loaded.unet, "forward", lambda *_, **__: pytest.fail("the network was run"))
    line = _refused(_call("generate", "a", "--model", "x/y", "--device", "cpu", *words, "-o", tmp_path))
    assert said in line


VALUES: dict[str, list[str]] = {
    "--sampler": [
        "ddim",
        "euler",
        "dc-solver",
        "solver",
        "pndm",
        "heun",
        "lcm",
        "tcd",
        "unipc",
        "no",
        "x.json",
        "",
    ],
    "--steps": ["1", "2", "3", "0", "1001", "x", "-1"],
    "--guidance": ["0", "1", "5", "nan", "inf", "-3", "1e30", "900"],
    "--negative-prompt": ["", "bad, worse", "\udcff"],
    "--eta": ["0", "0.5", "1", "2", "nan"],
    "--width": ["8", "16", "17", "0", "100000"],
    "--height": ["8", "32", "31"],
    "--seed": ["0", "7", str(2**62), str(2**63), "-1", "1.5"],
    "--images": ["1", "2", "0"],
    "--steer": [
        "fk",
        "svdd",
        "best-of-n",
        "beam",
        "code",
        "two-level",
        "noise-search",
        "importance",
        "fq",
        "",
    ],
    "--particles": ["1", "2", "3", "0", "99999"],
    "--reward": [
        "test-red",
        "jpeg",
        "-jpeg",
        "shapes",
        "sharpness + jpeg",
        "",
        "((",
        "colour:red",
        "no.py:f",
    ],
    "--strength": ["0", "3", "inf", "-1"],
    "--option": [
        "churn=1.0",
        "churn=x",
        "returns=all",
        "a=b",
        "guidance_rescale=0.5",
        "=",
        "seed=3",
    ],
    "--returns": ["best", "sample", "all", "none"],
    "--batch": ["1", "3", "0"],
    "--offload": ["none", "model", "tape"],
    "--dtype": ["float32", "auto", "bfloat16", "float8"],
    "--device": ["cpu", "auto", "meta", "cuda:99", "gpu"],
}
FLAGS = ["--again", "--vae-tiling", "--vae-slicing", "--json"]
PROMPTS = ["a red circle", "", "x" * 300, "a\udc80", "a small green cross", "--", "y" * 5000]


def _combination(chance: random.Random) -> list[str]:
    words = [chance.choice(PROMPTS[:1] * 4 + PROMPTS) for _ in range(chance.choice([0, 1, 1, 1, 2]))]
    for option in chance.sample(sorted(VALUES), chance.choice([1, 2, 3, 4, 6])):
        choices = VALUES[option]
        words += [option, chance.choice(choices[:2] * 6 + choices)]
    if {"--particles", "--reward", "--strength", "--returns"} & set(words) and "--steer" not in words:
        words += ["--steer", "fk"] if chance.random() < 0.8 else []
    return words + [flag for flag in FLAGS if chance.random() < 0.15]


@pytest.mark.usefixtures("red_reward")
@pytest.mark.parametrize("part", range(4))
def test_random_options_end_in_pictures_or_in_a_line(part: int, tmp_path: Path, loaded: Any) -> None:
    """200 combinations, half of their values usable."""
    chance, ends = random.Random(part), {0: 0, 2: 0}
    for number in range(50):
        out = tmp_path / str(number)
        words = ["generate", "--model", "x/y", "--steps", "2", "--device", "cpu", "-o", str(out)]
        result = _call(*words, *_combination(chance))
        assert "Traceback" not in result.output and "This is a bug" not in result.output, result.output
        if result.exit_code == 0:
            pictures = [path for path in out.iterdir() if path.suffix == ".png"]
            assert pictures and all(read_settings(path)["prompt"] for path in pictures)
        else:
            _refused(result)
        ends[result.exit_code] += 1
    assert min(ends.values()) >= 8, ends


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_says_what_is_done_and_how_to_go_on(
    number: int,
    status: int,
    tmp_path: Path,
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    forward, calls = loaded.unet.forward, [0]

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            while len(list(tmp_path.glob("seed-*.png"))) < 2:  # files are written beside the network
                time.sleep(0.01)
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.unet, "forward", stops)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs behind
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    words = ("generate", "a", "-n", "5", "--model", "x/y", "--steps", "1", "--batch", "2", "-o", tmp_path)
    result = _call(*words)
    assert result.exit_code == status, result.output
    said = f"stopped: 2 of 5 pictures are in {tmp_path}; the same command goes on with the rest"
    assert result.stderr.strip() == said
    monkeypatch.setattr(loaded.unet, "forward", forward)
    assert _call(*words).exit_code == 0
    assert sorted(os.listdir(tmp_path)) == [f"seed-00000{i}.png" for i in range(5)]


def test_a_late_error_says_what_is_there(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    forward = loaded.unet.forward

    def breaks(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (out[0] * (torch.nan if len(os.listdir(tmp_path)) == 2 else 1.0),)

    monkeypatch.setattr(loaded.unet, "forward", breaks)
    words = ("generate", "a", "-n", "5", "--model", "x/y", "--steps", "1", "--batch", "2", "-o", tmp_path)
    line = _refused(_call(*words))
    assert "latents are not finite after step 1" in line and f"[2 of 5 pictures are in {tmp_path}]" in line


def test_an_interrupted_comparison_leaves_a_sheet_of_what_is_done(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = loaded.unet.forward

    def stops(*args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "column-2").exists():
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.unet, "forward", stops)
    runs = ("--run", "steps=1", "--run", "steps=2", "--run", "steps=3")
    result = _call("compare", "a", *runs, "--model", "x/y", "--batch", "1", "-o", tmp_path)
    assert result.exit_code == 130 and "stopped: 1 of 3 recipes are done" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["column-1", "column-2", "compare.png"]


def test_videos_are_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffplug.testing import tiny

    pipe = tiny("wan")
    monkeypatch.setattr(diffplug, "load", lambda *_, **__: pipe)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: pytest.fail("the network was run"))
    line = _refused(_call("generate", "a", "--model", "x/y", "--device", "cpu", "-o", tmp_path))
    assert "makes videos: recipes are for single pictures" in line


def test_help_comes_quickly_and_says_what_one_gets() -> None:
    code = (
        "import sys; from diffplug.cli.main import app; print('torch' in sys.modules, 'PIL' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "False"]
    for command in ("generate", "compare", "score", "show", "names", "doctor"):
        said = _call(command, "--help").stdout
        first = next(line.strip() for line in said.splitlines() if line.strip() and "Usage:" not in line)
        assert first.split()[0] in {"Make", "Draw", "Print"}, first
