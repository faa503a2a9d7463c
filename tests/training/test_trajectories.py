"""The store: made once, in any order, for one teacher; states where the student's segments begin and end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffplug.testing import tiny
from diffplug.training import trajectories
from diffplug.training.noise_path import NoisePath, edges
from diffplug.training.trajectories import TeacherSettings, TrajectoryStore

PROMPTS = ["a red circle", "a blue square", "a cat"]
TEACHER = TeacherSettings(sampler="ddim", steps=4, guidance=3.0, precision="no")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "PART", 3)


def store(folder: Path, pipe: Any = None, prompts: list[str] = PROMPTS, **changes: Any) -> TrajectoryStore:
    return TrajectoryStore.of(pipe or tiny("sd15"), prompts, replace(TEACHER, **changes), folder)


@pytest.mark.pipe
def test_states_are_those_of_a_guided_run(tmp_path: Path) -> None:
    pipe = tiny("sd15")
    one = store(tmp_path, pipe)
    one.fill(3)
    data = one.load(edges(NoisePath.of(pipe.scheduler), 4)[::-1])
    assert data.states.shape[:2] == (3, 5) and data.states.dtype == torch.float16
    assert data.index.tolist() == [1000, 750, 500, 250, 0] and data.prompts == PROMPTS
    from diffusers import DDIMScheduler

    other = tiny("sd15")
    other.scheduler = DDIMScheduler.from_config(
        other.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    seen: list[torch.Tensor] = []

    def note(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["latents"])
        return kwargs

    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    other(PROMPTS, num_inference_steps=4, guidance_scale=3.0, generator=generators, callback_on_step_end=note)
    assert torch.allclose(data.states[:, 1:].float(), torch.stack(seen, dim=1), atol=5e-3, rtol=5e-3)


@pytest.mark.pipe
def test_parts_do_not_depend_on_order_processes_or_what_was_there(tmp_path: Path) -> None:
    whole = store(tmp_path / "whole")
    whole.fill(9)
    for rank in (1, 0):
        store(tmp_path / "shared").fill(9, rank=rank, processes=2)
    files = [path.name for path in sorted((tmp_path / "whole").glob("part-*.safetensors"))]
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    damaged = tmp_path / "shared" / files[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    made: list[int] = []
    store(tmp_path / "shared").fill(9, on_part=made.append)
    assert made == [6, 3] and damaged.read_bytes() == (tmp_path / "whole" / files[1]).read_bytes()
    store(tmp_path / "shared").fill(12)
    assert store(tmp_path / "shared").count() == 12
    assert len(store(tmp_path / "shared").load([1000, 0], 7)) == 7


@pytest.mark.pipe
def test_a_reward_keeps_the_right_ones_and_scores_are_kept(
    tmp_path: Path, red_reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = store(tmp_path)
    one.fill(6)
    scores = [score for number in (0, 1) for score in one._scores(number, red_reward)]
    least = sorted(scores)[3]
    monkeypatch.setattr(TrajectoryStore, "_scored", lambda *_: pytest.fail("scored again"))
    again = store(tmp_path)
    assert again.keep_right(red_reward, least) == 0.5
    kept = again.load([1000, 0])
    assert kept.prompts == [PROMPTS[i % 3] for i, score in enumerate(scores) if score >= least]
    with pytest.raises(ValueError, match=r"none of 6 trajectories scores 7 by 'test-red'"):
        again.keep_right(red_reward, 7.0)


@pytest.mark.pipe
def test_a_reward_is_not_asked_about_the_empty_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrajectoryStore, "prompt", lambda self, i: "" if i % 2 else PROMPTS[0])
    one = store(tmp_path)
    one.fill(4)
    asked: list[str] = []
    scores = one._scored(0, lambda images, prompts: asked.extend(prompts) or torch.full((len(images),), -1.0))
    assert set(asked) == {PROMPTS[0]} and scores[0] == -1 and scores[1] > 1e20


@pytest.mark.pipe
def test_states_of_other_conventions_are_the_models_own(tmp_path: Path) -> None:
    """Euler's larger states become those of DDIM; both go down the same straight lines of the same model."""
    stores = {}
    for sampler in ("ddim", "euler"):
        one = store(tmp_path / sampler, sampler=sampler)
        one.fill(3)
        stores[sampler] = one.load([1000, 750, 500, 250, 0]).states.float()
    gap = (stores["ddim"] - stores["euler"])[:, 1:4].abs().max()
    assert gap < 0.01 * stores["ddim"].abs().max()


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flows_are_stored_at_equal_unshifted_steps_with_their_shift(name: str, tmp_path: Path) -> None:
    pipe = tiny(name)
    call = {"height": 16, "width": 16, "max_sequence_length": 16}
    one = store(tmp_path, pipe, call=call, sampler="own", guidance=3.5)
    one.fill(3)
    path = NoisePath.of(pipe.scheduler, one.shift())
    data = one.load(edges(path, 2)[::-1])
    assert data.states.shape[:2] == (3, 3) and path.flow and one.shift() > 0.5
    from safetensors.torch import load_file

    index = load_file(one.part(0))["index"]
    assert torch.allclose(index, torch.tensor([1000.0, 750, 500, 250, 0]).double(), atol=0.2)


def test_another_teacher_other_prompts_and_odd_steps_are_refused(tmp_path: Path) -> None:
    pipe = tiny("sd15")
    one = store(tmp_path, pipe)
    for changes in ({"guidance": 4.0}, {"steps": 8}, {"seed": 1}):
        with pytest.raises(ValueError, match="trajectories of another teacher"):
            store(tmp_path, pipe, **changes)
    with pytest.raises(ValueError, match="trajectories of another teacher"):
        store(tmp_path, pipe, [*PROMPTS, "a dog"])
    other = tiny("sd15", seed=1)
    with pytest.raises(ValueError, match="trajectories of another teacher"):
        store(tmp_path, other)
    one.fill(3)
    with pytest.raises(ValueError, match="4 steps do not divide into the student's: none ends at index 800"):
        one.load([1000, 800, 0])
    with pytest.raises(ValueError, match="there are no prompts"):
        store(tmp_path / "x", pipe, [" "])
    with pytest.raises(ValueError, match="sampler 'ddimm'"):
        store(tmp_path / "y", pipe, sampler="ddimm").fill(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"guidance": -1.0}, "guidance must be from 0"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherSettings(**changes)
