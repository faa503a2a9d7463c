"""What ships gives the pictures that it gave before the house was rebuilt (tests/pictures/*.png)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffplug
from diffplug.recipe import Recipe

FOLDER = Path(__file__).parent / "pictures"
PROMPT = "a red circle left of a blue square"
RECIPES = {
    "ddim": Recipe(sampler="ddim", steps=5, guidance=5.0),
    "dc-solver": Recipe(sampler="dc-solver", steps=6, guidance=5.0),
    "solver": Recipe(sampler="solver", steps=6, guidance=5.0),
    "fk": Recipe(sampler="ddim", steps=6, guidance=5.0, steer="fk", particles=4, options={"churn": 1.0}),
    "svdd": Recipe(sampler="ddim", steps=4, guidance=2.0, steer="svdd", particles=4, eta=1.0),
    "best-of-n": Recipe(sampler="dc-solver", steps=5, guidance=5.0, steer="best-of-n", particles=3),
    "noise-search": Recipe(sampler="solver", steps=5, guidance=5.0, steer="noise-search", particles=4),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return diffplug.load("shapes")


@pytest.mark.pipe
@pytest.mark.parametrize("name", RECIPES)
def test_pictures_are_the_same(name: str, pipe: Any) -> None:
    """Bit for bit on one machine; kernels of another processor may round a grey level differently."""
    made = RECIPES[name].run(pipe, [PROMPT], [11]).images[0]
    kept = np.asarray(Image.open(FOLDER / f"{name}.png"), dtype=int)
    assert np.abs(np.asarray(made, dtype=int) - kept).max() <= 2
