"""Moving Shapes: scenes that move by a formula, a small video model trained on them, and a grader of videos.

pipe = diffplug.load("moving-shapes")
video = pipe("a red circle", num_frames=16, output_type="pt").frames[0]
print(grade_video(video).kept)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.shapes.moving.grading import VideoGrades as VideoGrades
    from diffplug.shapes.moving.grading import grade_video as grade_video
    from diffplug.shapes.moving.pipeline import MovingShapesPipeline as MovingShapesPipeline
    from diffplug.shapes.moving.world import MovingScene as MovingScene
    from diffplug.shapes.moving.world import render_video as render_video
    from diffplug.shapes.moving.world import sample_moving as sample_moving

_HOMES = {
    "MovingScene": "diffplug.shapes.moving.world",
    "MovingShapesPipeline": "diffplug.shapes.moving.pipeline",
    "VideoGrades": "diffplug.shapes.moving.grading",
    "grade_video": "diffplug.shapes.moving.grading",
    "render_video": "diffplug.shapes.moving.world",
    "sample_moving": "diffplug.shapes.moving.world",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
