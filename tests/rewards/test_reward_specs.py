"""Specs on one line: sums, signs, arguments, functions of the user's own, errors that say what to write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffplug import rewards
from diffplug.cli.main import app
from diffplug.recipe import Recipe
from diffplug.registry import REWARDS
from diffplug.rewards.clip import ClipReward
from diffplug.rewards.colour import ColourReward
from diffplug.rewards.jpeg import JpegReward
from diffplug.rewards.shapes import ShapesReward

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a", "b"]
ONE, TWO = IMAGES[:, 0].mean((1, 2)).double(), IMAGES[:, 1].mean((1, 2)).double()


def first(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


class Second:
    def __init__(self, times: float = 1.0) -> None:
        self.times = times

    @classmethod
    def from_spec(cls, text: str) -> Second:
        return cls(float(text))

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.times * images[:, 1].mean((1, 2))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    REWARDS.register("t-one", first)
    REWARDS.register("t-two", Second)
    yield
    REWARDS.unregister("t-one")
    REWARDS.unregister("t-two")


def score(spec: str) -> torch.Tensor:
    return rewards.score(rewards.get(spec), IMAGES, TEXTS)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("t-one", ONE),
        (" t-one ", ONE),
        ("-t-one", -ONE),
        ("+t-one", ONE),
        ("- t-one", -ONE),
        ("--t-one", ONE),
        ("t-two:3", 3 * TWO),
        ("t-two: 3", 3 * TWO),
        ("2*t-one", 2 * ONE),
        (".5 * t-one", 0.5 * ONE),
        ("-1e+1*t-one", -10 * ONE),
        ("t-one+t-two", ONE + TWO),
        ("t-one - t-two", ONE - TWO),
        ("t-one -t-two", ONE - TWO),
        ("t-one-0.5*t-two", ONE - 0.5 * TWO),
        ("t-two:2-3*t-one", 2 * TWO - 3 * ONE),
        ("t-two:'2'+t-one", 2 * TWO + ONE),
        ("0.7*t-one+0.3*t-two", 0.7 * ONE + 0.3 * TWO),
        ("2*(t-one - 3*t-two)", 2 * ONE - 6 * TWO),
        ("-(t-one+t-two)-t-one", -2 * ONE - TWO),
        ("standard(t-one; 0.5; 0.25)", (ONE - 0.5) / 0.25),
        ("2*standard(t-one;-1;2) + t-two", ONE + 1 + TWO),
        ("standard(t-one)", (ONE - ONE.mean()) / ONE.std()),
    ],
)
def test_what_specs_mean(spec: str, wanted: torch.Tensor) -> None:
    assert torch.allclose(score(spec), wanted)


_WEIGHT = st.floats(0.001, 100).map(lambda x: round(x, 3))


@settings(max_examples=60, deadline=None)
@given(
    terms=st.lists(st.tuples(st.sampled_from("+-"), _WEIGHT, st.booleans()), min_size=1, max_size=6),
    blank=st.sampled_from(["", " "]),
)
def test_any_sum_of_terms(terms: list[tuple[str, float, bool]], blank: str) -> None:
    text, wanted = "", torch.zeros(2, dtype=torch.float64)
    for sign, weight, is_first in terms:
        text += f"{blank}{sign}{blank}{weight}*{'t-one' if is_first else 't-two'}"
        wanted += (1 if sign == "+" else -1) * weight * (ONE if is_first else TWO)
    assert torch.allclose(score(text), wanted, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.text("t-one12*+();'.: \tstandrd", max_size=24))
def test_nonsense_never_raises_anything_but_a_sentence(spec: str) -> None:
    try:
        rewards.get(spec)
    except ValueError as error:
        assert "\n" not in str(error).replace(spec, "")


def test_arguments_reach_their_rewards(tmp_path: Path) -> None:
    clip: Any = rewards.get("clip:ViT-B-32/laion2b_s34b_b79k")
    assert isinstance(clip, ClipReward) and clip._loaded.arguments == ("ViT-B-32", "laion2b_s34b_b79k")
    assert rewards.get(f"clip:ViT-L-14/{tmp_path}/x.pt")._loaded.arguments == ("ViT-L-14", f"{tmp_path}/x.pt")  # type: ignore[attr-defined]
    assert rewards.get(f"clip:{tmp_path}")._loaded.arguments == (str(tmp_path), None)  # type: ignore[attr-defined]
    assert rewards.get("clip:hf-hub:a/b")._loaded.arguments == ("hf-hub:a/b", None)  # type: ignore[attr-defined]
    head = tmp_path / "sac+logos - x.pth"
    torch.save({"weight": torch.zeros(1, 4)}, head)
    assert rewards.get(f"aesthetic:'{head}'")._loaded.arguments[0] == str(head)  # type: ignore[attr-defined]
    both: Any = rewards.get(f"aesthetic:'{head}@ViT-L-14-quickgelu/clip.pt'")
    assert both._loaded.arguments == (str(head), "ViT-L-14-quickgelu", "clip.pt")
    colour, jpeg, shapes = (rewards.get(s) for s in ("colour:#ff8000", "jpeg:80", "shapes:strict"))
    assert isinstance(colour, ColourReward) and colour.rgb == (1.0, 128 / 255, 0.0)
    assert isinstance(jpeg, JpegReward) and jpeg.quality == 80
    assert isinstance(shapes, ShapesReward) and shapes.strict


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "a name is expected at its end"),
        ("t-one +", "a name is expected at its end"),
        ("0.5*", "a name is expected at its end"),
        ("t-one)", "nothing is expected at '.'"),
        ("(t-one", "a parenthesis is not closed"),
        ("t-two:'3", "the quote ' is not closed"),
        ("standard(t-one; 1)", "standard..... takes a reward, or a reward; its mean; its deviation"),
        ("standard(t-one; x; 1)", "a number is expected at 'x; 1.'"),
        ("standard(t-one; 0; 0)", "std finite and above 0"),
        ("(" * 30 + "t-one" + ")" * 30, "nested more than 20 deep"),
        ("1e400*t-one", "a weight is too large"),
        ("clpi", "unknown reward 'clpi'. Did you mean 'clip'.* Known: aesthetic, clip, colour"),
        ("jpeg-clip", "unknown reward 'jpeg-clip': to subtract, write 'jpeg - clip' with blanks"),
        ("clpi:ViT-B-32/openai", "no module that Python finds. Did you mean 'clip'. Known: aesthetic"),
        ("t-one:3", "reward 't-one' takes no argument, got '3'"),
        ("sharpness:3", "reward 'sharpness' takes no argument, got '3'"),
        ("jpeg:", "the argument after the colon is missing"),
        ("shapes:lax", "write 'shapes', or 'shapes:strict'"),
    ],
)
def test_bad_specs(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rewards.get(spec)


def test_options_are_for_plain_names() -> None:
    assert rewards.get("t-two", times=2.0)(IMAGES, TEXTS).shape == (2,)
    with pytest.raises(ValueError, match="is no plain name and takes no options, got times"):
        rewards.get("2*t-two", times=2.0)


CODE = """
import torch
LIMIT = 3
def brightness(images, prompts):
    return images.mean((1, 2, 3))
class Dark:
    def __call__(self, images, prompts):
        return -images.mean((1, 2, 3))
    @staticmethod
    def half(images, prompts):
        return images.mean((1, 2, 3)) / 2
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_rewards.py").write_text(CODE)
    (tmp_path / "their_broken.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "their_needy.py").write_text("import no_such_package\n")
    return tmp_path


def test_functions_of_the_users_own(module: Path) -> None:
    light = IMAGES.mean((1, 2, 3)).double()
    assert torch.allclose(score("their_rewards:brightness"), light)
    assert torch.allclose(score("their_rewards:Dark"), -light)
    assert torch.allclose(score("0.5*their_rewards:Dark.half + t-one"), 0.25 * light + ONE)
    assert torch.allclose(score(f"{module}/their_rewards.py:brightness"), light)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (
            "their_reward:brightness",
            "'their_reward' is no known name and no module that Python finds.*PYTHONPATH",
        ),
        ("their_rewards:brigthness", "'their_rewards' has no 'brigthness'. Did you mean 'brightness'"),
        ("their_rewards:LIMIT", "is no function but int: give a function .images, prompts. -> scores"),
        ("their_broken:x", "importing 'their_broken' raised ZeroDivisionError: division by zero"),
        (
            "their_needy:x",
            "importing 'their_needy' raised ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("their_rewards:", "write module:function or file.py:function"),
        ("{folder}/their_broken.py:x", "raised ZeroDivisionError"),
        ("{folder}/nowhere.py:x", "nowhere.py' does not exist"),
    ],
)
def test_functions_that_cannot_be_had(module: Path, spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rewards.get(spec.format(folder=module))


def test_strangers_may_not_name_code(module: Path) -> None:
    for spec in ("their_broken:x", f"{module}/their_broken.py:x", "jpeg + 2*their_broken:x"):
        with pytest.raises(ValueError, match="Python functions are not accepted here"):
            rewards.parse(spec, python=False)
    assert rewards.parse("jpeg:90", python=False).quality == 90


def test_recipes_take_specs() -> None:
    recipe = Recipe.parse("steer=fk,reward=0.7*jpeg+0.3*colour:red,particles=2")
    assert recipe.reward == "0.7*jpeg+0.3*colour:red"
    assert math.isfinite(rewards.score(recipe.steerer([0]).reward, IMAGES, TEXTS).sum())
    with pytest.raises(ValueError, match="unknown reward 'clpi'"):
        Recipe(steer="fk", reward="jpeg + clpi")


def test_the_command_line_lists_rewards_and_takes_specs(
    tmp_path: Path, tiny_folder: Path, module: Path
) -> None:
    run = CliRunner().invoke
    listed = json.loads(run(app, ["names", "--json"]).stdout)["rewards"]
    assert {"clip", "hps", "pickscore", "image-reward", "aesthetic", "jpeg", "colour", "sharpness"} <= set(
        listed
    )
    assert {"shapes", "shapes-clip"} <= set(listed)
    words = [
        "generate",
        "a",
        "--model",
        str(tiny_folder),
        "--steps",
        "2",
        "--steer",
        "best-of-n",
        "-o",
        str(tmp_path),
    ]
    words += ["--particles", "2", "--json"]
    for spec in ("-jpeg", "0.7*colour:red + 0.3*their_rewards:brightness"):
        done = run(app, [*words, "--reward", spec])
        assert done.exit_code == 0, done.output
    bad = run(app, [*words, "--reward", "0.7*colour:rde"])
    assert bad.exit_code == 2 and "Did you mean 'red'" in bad.output
