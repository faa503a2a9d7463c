"""The grader: right on renderings, wrong on changed captions, sound on what a model may draw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffplug import rewards
from diffplug.shapes.captions import Told, captioned_scenes, phrase, tell
from diffplug.shapes.grading import as_pixels, find, grade
from diffplug.shapes.rendering import render
from diffplug.shapes.world import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_SHAPE,
    KINDS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
)

pytestmark = pytest.mark.law


def truth(n: int, seed: int) -> tuple[list[Scene], list[Told], np.random.Generator]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, KINDS[i % 4]) for i in range(n)]
    return scenes, [tell(scene, rng) for scene in scenes], rng


def other(rng: np.random.Generator, names: object, name: str) -> str:
    return str(rng.choice([n for n in names if n != name]))


def changed(told: Told, rng: np.random.Generator) -> Told:
    """The content with exactly one of its facts changed."""
    i = int(rng.integers(len(told.nouns)))
    noun = told.nouns[i]

    def with_noun(**change: str) -> Told:
        return replace(told, nouns=(*told.nouns[:i], replace(noun, **change), *told.nouns[i + 1 :]))

    options = [
        with_noun(color=other(rng, COLORS, noun.color)),
        with_noun(shape=other(rng, (*SHAPES, HELD_OUT_SHAPE), noun.shape)),
    ]
    if noun.size:
        options.append(with_noun(size=other(rng, ("small", "large"), noun.size)))
    if told.relation:
        options.append(replace(told, relation=other(rng, RELATIONS, told.relation)))
    if told.background:
        options.append(replace(told, background=other(rng, BACKGROUNDS, told.background)))
    if len(told.nouns) > 1 and not told.relation:
        options.append(replace(told, nouns=told.nouns[:i] + told.nouns[i + 1 :]))
    return options[int(rng.integers(len(options)))]


def test_renderings_are_right_and_changed_captions_wrong() -> None:
    scenes, told, rng = truth(2000, seed=11)
    images = render(scenes)
    right = grade(images, [phrase(t, rng) for t in told])
    wrong = grade(images, [phrase(changed(t, rng), rng) for t in told])
    assert right.strict.mean() >= 0.995
    assert 1 - wrong.strict.mean() >= 0.995
    assert (wrong.score < 1)[~wrong.strict].all() and (wrong.score[~wrong.strict] >= 0).all()


def test_blur_and_noise_do_not_mislead_it() -> None:
    scenes, told, rng = truth(300, seed=12)
    images = render(scenes)
    soft = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    soft = (
        0.5 * images
        + 0.5 * soft
        + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    )
    assert grade(soft, [phrase(t, rng) for t in told]).strict.mean() >= 0.98


def test_facts_are_told_in_words() -> None:
    a = Thing(shape="circle", color="red", x=16.0, y=32.0, radius=10.5)
    b = Thing(shape="square", color="blue", x=48.0, y=32.0, radius=6.5)
    grades = grade(
        render([Scene(background="white", things=(a, b))]),
        "a red circle right of a small blue square on a grey background",
    )
    assert dict(zip(grades.facts[0], grades.holds[0], strict=True)) == {
        "a red circle": True,
        "a blue square": True,
        "the blue square is small": True,
        "2 objects": True,
        "red circle right of small blue square": False,
        "on grey": False,
    }
    assert grades.score[0] == pytest.approx(4 / 6) and not grades.strict[0]


def test_an_extra_object_breaks_the_count_only() -> None:
    a = Thing(shape="circle", color="red", x=16.0, y=32.0, radius=10.5)
    b = Thing(shape="cross", color="red", x=48.0, y=32.0, radius=6.5)
    grades = grade(render([Scene(background="black", things=(a, b))]), "a red circle")
    assert grades.holds == ((True, False),)


def test_two_alike_objects_need_two() -> None:
    a = Thing(shape="circle", color="red", x=16.0, y=32.0, radius=7.0)
    b = Thing(shape="circle", color="red", x=48.0, y=32.0, radius=7.0)
    prompt = "a red circle and a red circle"
    assert grade(render([Scene(background="black", things=(a, b))]), prompt).strict[0]
    assert not grade(render([Scene(background="black", things=(a,))]), prompt).strict[0]


def test_touching_objects_of_two_colours_are_two_objects() -> None:
    a = Thing(shape="square", color="red", x=22.0, y=32.0, radius=10.0)
    b = Thing(shape="square", color="green", x=40.0, y=32.0, radius=10.0)
    assert grade(
        render([Scene(background="white", things=(a, b))]), "a red square left of a green square"
    ).strict[0]


def test_the_held_out_shape_is_recognised() -> None:
    star = Thing(shape=HELD_OUT_SHAPE, color="yellow", x=30.0, y=30.0, radius=10.5)
    assert grade(render([Scene(background="black", things=(star,))]), "a large yellow star").strict[0]


def test_every_form_of_picture_is_taken() -> None:
    scenes, told, rng = truth(4, seed=13)
    prompts = [phrase(t, rng) for t in told]
    images = render(scenes)
    arrays = images.movedim(1, -1).numpy()
    pictures = [Image.fromarray((a * 255).round().astype(np.uint8)) for a in arrays]
    large = [p.resize((256, 256), Image.Resampling.LANCZOS) for p in pictures]
    for form in (images, arrays, pictures, large, images.double()):
        assert grade(form, prompts).strict.all()


def test_noise_nan_and_emptiness_hold_no_object() -> None:
    blank = torch.full((1, 3, 64, 64), 0.5)
    broken = torch.full((1, 3, 64, 64), float("nan"))
    static = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for image in (blank, broken, static):
        assert grade(image, "a red circle").holds[0][0] is False
    assert find(as_pixels(blank))[0] == ("grey", [])
    assert grade(torch.zeros(0, 3, 64, 64), []).score.shape == (0,)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        grade(torch.zeros(2, 3, 64, 64), ["a red circle"])
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\)"):
        grade(torch.zeros(3, 64, 64), "a red circle")


def test_the_reward_is_the_score() -> None:
    scenes, told, rng = truth(6, seed=14)
    images, prompts = render(scenes), [phrase(changed(t, rng), rng) for t in told]
    grades = grade(images, prompts)
    assert np.array_equal(rewards.get("shapes")(images, prompts), grades.score)
    assert np.array_equal(rewards.get("shapes", strict=True)(images, prompts), grades.strict.astype(float))


def test_outlines_are_judged_once_their_holes_are_filled() -> None:
    rng = np.random.default_rng(3)
    pairs = captioned_scenes(rng, 200)
    texts = [phrase(told, rng) for _, told in pairs]
    outlines, flat = (render([s for s, _ in pairs], style=style) for style in ("outline", "flat"))
    assert grade(outlines, texts, style="outline").strict.mean() >= 0.95
    assert grade(outlines, texts, style="any").strict.mean() >= 0.95
    assert grade(flat, texts, style="any").strict.all() and grade(flat, texts).strict.all()
    assert not grade(flat, texts, style="outline").strict.any()
    assert grade(outlines, texts).strict.mean() < 0.05
    assert "drawn in outline" in grade(outlines[:1], texts[:1], style="outline").facts[0]
    with pytest.raises(ValueError, match="Did you mean 'outline'"):
        grade(flat, texts, style="outlin")
