"""steer="auto": the rule that a call gets, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffplug.plug import plug
from diffplug.seeds import Seeds
from diffplug.steering import Auto, BestOfN, FeynmanKac, Scoring
from diffplug.testing import tiny


class Bounded:
    """A reward that cannot exceed 1, which half of all pictures reach."""

    best = 1.0

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return (images.mean((1, 2, 3)) * 1000).long() % 2


def dark(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return -images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny("sd15")


@pytest.mark.parametrize(
    ("steerer", "wanted", "guidance", "kind", "particles", "said"),
    [
        (
            Auto(dark),
            1,
            5.0,
            BestOfN,
            8,
            "best of 8, since under guidance free draws.*Guidance is 5.*try less",
        ),
        (Auto(dark), 1, 1.0, BestOfN, 8, "the reward chooses one picture"),
        (Auto(Bounded()), 1, 2.0, BestOfN, 16, "best of at most 16, drawn until a picture has 1, since"),
        (Auto(Bounded(), particles=4), 1, None, BestOfN, 4, "best of at most 4"),
        (Auto(dark), 3, 1.0, FeynmanKac, 8, "several pictures are wanted and nothing guides"),
        (Auto(Bounded(), particles=12), 3, 0.0, FeynmanKac, 12, "Feynman-Kac"),
        (Auto(dark), 3, 5.0, BestOfN, 8, "under guidance"),
        (Auto(dark, returns="sample"), 1, 5.0, FeynmanKac, 8, "drawn by weight.*Guidance is 5"),
    ],
)
def test_the_rule_follows_the_call(
    pipe: Any, steerer: Auto, wanted: int, guidance: float | None, kind: type, particles: int, said: str
) -> None:
    import re

    rule, why = steerer.chosen(pipe, wanted, guidance)
    assert type(rule) is kind and rule.particles == particles
    assert re.search(said, why), why
    assert isinstance(rule, FeynmanKac) or (rule.enough == 1.0) == isinstance(steerer.reward, Bounded)


@pytest.mark.pipe
def test_a_call_gets_the_pictures_of_its_rule_and_the_reason(pipe: Any) -> None:
    given = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0}
    auto, plain = Auto(Bounded()), BestOfN(Bounded(), particles=16, enough=1.0)
    found = []
    for steerer in (auto, plain):
        with plug(pipe, Seeds([1, 2]), steerer):
            found.append(pipe(["a", "b"], **given).images)
    assert torch.equal(*found)
    assert auto.report.draws == plain.report.draws and "auto: best of at most 16" in str(auto.report)


def test_what_cannot_be_copied_gets_free_draws() -> None:
    pipe = type("OnnxPipeline", (), {"scheduler": object()})()
    assert isinstance(Auto(dark).chosen(pipe, 3, None)[0], BestOfN)


def test_a_loop_names_its_rule_and_options_are_checked() -> None:
    with pytest.raises(ValueError, match="Auto cannot steer a loop of one's own.*name the rule"):
        Auto(dark).crowd(steps=1)
    for options, message in (({"particles": 0}, "particles=0"), ({"seed": "x"}, "seed='x'")):
        with pytest.raises(ValueError, match=message):
            Auto(dark, **options)
    with pytest.raises(ValueError, match="chooses the scored calls itself"):
        Auto(dark, scoring=Scoring(at=(0.5,)))
