"""The Shapes world: rendered scenes, captions, a grader that knows the truth, and a small model trained on
them.

pipe = diffplug.load("shapes")
prompts = sample_prompts(4, seed=0, kind="relation")
print(grade(pipe(prompts).images, prompts).strict)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffplug.shapes.captions import caption as caption
    from diffplug.shapes.captions import parse as parse
    from diffplug.shapes.captions import sample_prompts as sample_prompts
    from diffplug.shapes.captions import unknown_words as unknown_words
    from diffplug.shapes.grading import Grades as Grades
    from diffplug.shapes.grading import grade as grade
    from diffplug.shapes.rendering import render as render
    from diffplug.shapes.world import Scene as Scene
    from diffplug.shapes.world import Thing as Thing
    from diffplug.shapes.world import sample_scene as sample_scene

_HOMES = {
    "Grades": "grading",
    "Scene": "world",
    "Thing": "world",
    "caption": "captions",
    "grade": "grading",
    "parse": "captions",
    "render": "rendering",
    "sample_prompts": "captions",
    "sample_scene": "world",
    "unknown_words": "captions",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"diffplug.shapes.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'diffplug.shapes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
