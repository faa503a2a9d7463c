"""The examples, one a family, run on tiny pipelines of the same classes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

from diffplug.testing import tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "demos" / "examples"
FAMILIES = {
    "flux": "flux",
    "pixart": "pixart",
    "qwen_image": "qwenimage",
    "sdxl": "sdxl",
    "stable_diffusion": "sd15",
    "stable_diffusion_3": "sd3",
}


def test_every_example_has_its_family() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(FAMILIES)


@pytest.mark.pipe
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_an_example_makes_a_picture(name: str) -> None:
    family = FAMILIES[name]
    make = runpy.run_path(str(EXAMPLES / f"{name}.py"))["make"]
    pipe = tiny(family)
    before = type(pipe.scheduler)
    given = tiny.inputs(family)
    size = {
        key: given[key]
        for key in ("height", "width", "max_sequence_length", "use_resolution_binning")
        if key in given
    }
    first, again = (make(pipe, "a lighthouse", steps=2, **size) for _ in range(2))
    assert isinstance(first, Image.Image) and first.tobytes() == again.tobytes()
    assert type(pipe.scheduler) is before
