"""Scenes and pictures: they are what they say, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffplug.shapes.rendering import ALL_SHAPES, coverage, render
from diffplug.shapes.world import (
    BACKGROUNDS,
    COLORS,
    CONVERSE,
    HELD_OUT_SHAPE,
    KINDS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    holds,
    sample_scene,
)

pytestmark = pytest.mark.law


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
def test_scenes_keep_their_promises(seed: int, kind: str) -> None:
    scene = sample_scene(np.random.default_rng(seed), kind)
    again = sample_scene(np.random.default_rng(seed), kind)
    assert scene == again
    assert len(scene.things) == {"one": 1, "two": 2, "relation": 2, "three": 3}[kind]
    assert len({(t.shape, t.color) for t in scene.things}) == len(scene.things)
    assert all(t.shape in SHAPES and t.shape != HELD_OUT_SHAPE for t in scene.things)
    if kind == "relation":
        a, b = scene.things
        assert holds(scene.relation, (a.x, a.y), (b.x, b.y))
        assert holds(CONVERSE[scene.relation], (b.x, b.y), (a.x, a.y))
        assert sum(holds(r, (a.x, a.y), (b.x, b.y)) for r in RELATIONS) == 1


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'four' is not known.*one, two, relation, three"):
        sample_scene(np.random.default_rng(0), "four")


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_coverage_is_antialiased_and_moves_with_the_shape(shape: str) -> None:
    here = coverage([shape], torch.tensor([[30.3, 31.4, 10.0]]))[0]
    there = coverage([shape], torch.tensor([[34.3, 29.4, 10.0]]))[0]
    assert torch.allclose(here[2:60, 0:56], there[0:58, 4:60], atol=1e-5)
    assert here.min() == 0 and here.max() == 1
    assert ((here > 0) & (here < 1)).any()
    x = (here.sum(0) * (torch.arange(64) + 0.5)).sum() / here.sum()
    assert abs(float(x) - 30.3) < 0.05, "a shape is centred on its x"


def test_area_grows_with_the_square_of_the_radius() -> None:
    for shape in ALL_SHAPES:
        small, large = coverage([shape] * 2, torch.tensor([[32.0, 32.0, 7.0], [32.0, 32.0, 14.0]])).sum(
            (1, 2)
        )
        assert float(large / small) == pytest.approx(4.0, rel=0.03)


def test_render_paints_the_named_colours() -> None:
    thing = Thing(shape="square", color="red", x=20.0, y=40.0, radius=10.0)
    image = render([Scene(background="grey", things=(thing,))])
    assert image.shape == (1, 3, 64, 64)
    assert torch.allclose(image[0, :, 40, 20] * 255, torch.tensor(COLORS["red"]).float())
    assert torch.allclose(image[0, :, 5, 5] * 255, torch.tensor(BACKGROUNDS["grey"]).float())


def test_outline_leaves_the_inside_empty() -> None:
    thing = Thing(shape="circle", color="blue", x=32.0, y=32.0, radius=11.0)
    scene = Scene(background="white", things=(thing,))
    flat, outline = render([scene])[0], render([scene], style="outline")[0]
    assert torch.equal(outline[:, 32, 32], torch.ones(3)) and not torch.equal(flat[:, 32, 32], torch.ones(3))
    assert (outline < 1).any()
    with pytest.raises(ValueError, match="'sketch' is not known"):
        render([scene], style="sketch")


def test_a_batch_renders_what_its_scenes_render_alone() -> None:
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, KINDS[i % 4]) for i in range(8)]
    assert torch.equal(render(scenes), torch.cat([render([s]) for s in scenes]))
    assert render([]).shape == (0, 3, 64, 64)
