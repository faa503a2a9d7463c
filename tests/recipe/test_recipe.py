"""Recipes check themselves, run on a pipeline, and leave it as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffplug.loading import load
from diffplug.recipe import Recipe
from diffplug.registry import STEERERS
from diffplug.samplers import GRIDS, PRESETS
from diffplug.samplers import by_name as stock


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffplug.testing import tiny

    return tiny("sd15")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"particles": True}, "particles must be a whole number"),
        (
            {"guidance": float("nan")},
            "guidance must be a finite number of at least 0 and at most 1000, got nan",
        ),
        ({"strength": -1.0}, "strength must be a finite number"),
        ({"eta": 10**400}, "eta must be a finite number of at least 0 and at most 1, got 1000000000"),
        ({"sampler": 5}, "sampler must be a text, got 5"),
        ({"steer": {}}, "steer must be a text, got {}"),
        ({"negative_prompt": ["a"]}, "negative_prompt must be a text"),
        ({"call": "eta=1"}, "call must be names with values, got 'eta=1'"),
        ({"sampler": "dc-solvr"}, "unknown sampler 'dc-solvr'. Did you mean 'dc-solver'"),
        ({"steer": "fkk"}, "unknown steerer 'fkk'. Did you mean 'fk'"),
        ({"steer": "fk", "reward": "shaps"}, "unknown reward 'shaps'. Did you mean 'shapes'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe(**settings)


def test_a_recipe_can_be_written_in_a_line() -> None:
    recipe = Recipe.parse("sampler=ddim, steps=7,eta=0.5,steer=fk,particles=3")
    assert recipe == Recipe(
        label="sampler=ddim, steps=7,eta=0.5,steer=fk,particles=3",
        sampler="ddim",
        steps=7,
        eta=0.5,
        steer="fk",
        particles=3,
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step=5", "unknown setting 'step'. Did you mean 'steps' or 'steer'"),
        ("steps", "write steps=value, once"),
        ("steps=5,steps=6", "write steps=value, once"),
        ("steps=many", "steps must be a number, got 'many'"),
    ],
)
def test_a_bad_line_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe.parse(text)


def test_settings_tell_what_acted() -> None:
    assert Recipe(sampler="ddim").settings() == {"sampler": "ddim", "steps": 20}
    assert Recipe(steer="fk", strength=3.0).settings()["strength"] == 3.0


@pytest.mark.pipe
def test_pictures_follow_their_seeds_not_their_batch(pipe: Any) -> None:
    recipe = Recipe(sampler="ddim", steps=2)
    told: list[int] = []
    apart = recipe.run(
        pipe, ["a", "b", "a"], [5, 6, 7], max_rows=2, on_batch=lambda batch: told.append(batch.prompts)
    )
    alone = recipe.run(pipe, ["b"], [6])
    assert told == [2, 1]
    assert np.array_equal(np.asarray(apart.images[1]), np.asarray(alone.images[0]))
    assert not np.array_equal(np.asarray(apart.images[0]), np.asarray(apart.images[2]))


@pytest.mark.pipe
def test_steered_pictures_follow_their_seeds_too(pipe: Any, red_reward: str) -> None:
    recipe = Recipe(
        sampler="ddim", eta=1.0, steps=4, steer="fk", particles=3, reward=red_reward, strength=500.0
    )
    together = recipe.run(pipe, ["a", "b"], [5, 6])
    alone = recipe.run(pipe, ["b"], [6])
    assert np.array_equal(np.asarray(together.images[1]), np.asarray(alone.images[0]))


@pytest.mark.pipe
def test_evaluations_count_a_guided_pair_once(pipe: Any) -> None:
    guided = Recipe(sampler="ddim", steps=3, guidance=4.0).run(pipe, ["a", "b"], [0, 1])
    plain = Recipe(sampler="ddim", steps=3, guidance=1.0).run(pipe, ["a", "b"], [0, 1])
    assert guided.evaluations == plain.evaluations == 6
    assert guided.network.rows == 2 * plain.network.rows


@pytest.mark.pipe
def test_the_pipeline_is_afterwards_what_it_was(pipe: Any) -> None:
    scheduler, bar = pipe.scheduler, dict(pipe._progress_bar_config)
    Recipe(sampler="unipc", steps=2).run(pipe, ["a"], [0])
    assert pipe.scheduler is scheduler
    assert pipe._progress_bar_config == bar


@pytest.mark.pipe
def test_arguments_the_pipeline_does_not_take_are_refused(pipe: Any) -> None:
    from diffplug.testing import tiny

    with pytest.raises(ValueError, match="takes no eta: leave it out"):
        Recipe(steps=2, eta=1.0).run(tiny("flux"), ["a"], [0])
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        Recipe(steps=2).run(pipe, ["a", "b"], [0])


def test_what_acted_is_told_where_a_plug_changes_the_call() -> None:
    shapes, told = load("shapes"), list[Any]()
    for recipe in (Recipe(sampler="shapes@4", steps=4), Recipe(steps=1)):
        recipe.run(shapes, ["a red circle"], [0], on_batch=lambda batch: told.append(batch.used["guidance"]))
    assert told == [0.0, 7.5]


@pytest.mark.pipe
@pytest.mark.parametrize("steer", ["fk", "best-of-n"])
def test_steering_by_name(pipe: Any, red_reward: str, steer: str) -> None:
    recipe = Recipe(sampler="ddim", eta=1.0, steps=4, steer=steer, particles=4, reward=red_reward)
    made = recipe.run(pipe, ["a", "b"], [0, 1])
    assert len(made.images) == 2
    assert made.evaluations == 2 * 4 * 4
    assert len(made.reports) == 1 and made.reports[0] is not None


def noise(recipe: Recipe, pipe: Any) -> str:
    """Return where the noise of a steered recipe came from, in the words of its report."""
    made = recipe.run(pipe, ["a"], [0])
    assert len(made.images) == 1
    return str(made.reports[0].noise)


@pytest.mark.pipe
@pytest.mark.parametrize("sampler", ["ddim", "dc-solver", None])
@pytest.mark.parametrize("steer", STEERERS.names())
def test_solvers_get_noise_where_particles_are_duplicated(
    pipe: Any, red_reward: str, steer: str, sampler: str | None
) -> None:
    """Without noise SVDD would be refused; what duplicates nothing keeps the deterministic solver."""
    recipe = Recipe(sampler=sampler, steps=3, steer=steer, particles=2, reward=red_reward)
    if steer in ("auto", "best-of-n", "importance", "noise-search"):
        assert noise(recipe, pipe) in ("none", "")
    else:
        assert noise(recipe, pipe).startswith("churn 1 at the scored calls, since ")


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"sampler": "euler-a"}, "the solver's own"),
        ({"eta": 0.5}, "the solver's own"),
        ({"options": {"churn": 0.5}}, "churn 0.5 at the scored calls"),
        ({"options": {"twist": 2.0}}, "eta=1, since DDIMScheduler adds none by itself, leant by a twist of "),
    ],
)
def test_noise_that_was_asked_for_or_is_there_stays(
    pipe: Any, red_reward: str, own: dict[str, Any], words: str
) -> None:
    recipe = Recipe(sampler="ddim", steps=3, steer="fk", particles=2, reward=red_reward)
    assert noise(replace(recipe, **own), pipe).startswith(words)


@pytest.mark.pipe
def test_no_noise_is_what_was_asked_for_too(pipe: Any, red_reward: str) -> None:
    recipe = Recipe(sampler="ddim", steps=5, steer="fk", particles=2, reward=red_reward, strength=1e4)
    with pytest.warns(UserWarning, match="added no noise after a selection"):
        assert noise(replace(recipe, options={"churn": 0.0}), pipe) == "none"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"options": {"nonsense": 1}}, "steerer 'fk' takes no nonsense"),
        ({"options": {"score_at": (2.0,)}}, "score_at contains 2.0"),
        ({"steer": "two-level", "particles": 3}, "duplicates=2 does not divide particles=3"),
        ({"steer": "best-of-n", "strength": 3.0}, "steerer 'best-of-n' takes no strength"),
    ],
)
def test_options_that_the_steerer_refuses_are_refused_at_once(
    red_reward: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        Recipe(**{"steer": "fk", "reward": red_reward, **options})


@pytest.mark.contract
@pytest.mark.parametrize("name", stock.names())
def test_every_sampler_name_makes_a_scheduler(pipe: Any, name: str) -> None:
    from diffusers import SchedulerMixin

    found = stock.sampler(name, pipe)
    scheduler = found.scheduler_for(pipe) if hasattr(found, "scheduler_for") else found
    assert isinstance(scheduler, SchedulerMixin) or issubclass(scheduler, SchedulerMixin)


@pytest.mark.contract
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_on_every_grid_by_name(pipe: Any, preset: str, grid: str) -> None:
    scheduler = stock.sampler(f"{preset}@{grid}", pipe).scheduler_for(pipe)
    scheduler.set_timesteps(6)
    assert (scheduler.config.solver, scheduler.config.grid) == (preset, grid)
    assert scheduler.timesteps.diff().lt(0).all()


def test_presets_are_named_without_being_loaded() -> None:
    assert set(stock._PRESETS) == set(PRESETS)


def test_a_misspelt_preset_or_grid_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown grid 'karas'\. Did you mean 'karras'\?"):
        stock.sampler("dpm++@karas", None)
    with pytest.raises(ValueError, match=r"unknown preset 'dpm\+'\. Did you mean 'dpm\+\+'"):
        stock.sampler("dpm+@karras", None)


@pytest.mark.pipe
def test_a_searched_schedule_is_a_sampler_by_its_file(pipe: Any, tmp_path: Path) -> None:
    from diffplug.samplers.schedule.presets import dpmpp

    path = tmp_path / "three.json"
    dpmpp(3, final="sigma_min").save(path)
    recipe = Recipe(sampler=str(path), steps=3)
    made = recipe.run(pipe, ["a red circle"], [0])
    assert made.evaluations == 3 and len(made.images) == 1
    with pytest.raises(OSError, match="nowhere.json"):
        Recipe(sampler=str(tmp_path / "nowhere.json"))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"three\.json.*is no solver schedule"):
        Recipe(sampler=str(path))


@pytest.mark.pipe
def test_guidance_that_a_few_step_model_refuses_is_told_before_the_first_picture() -> None:
    """A batch recorded it as a failure of every row."""
    shapes = load("shapes")
    Recipe(sampler="shapes@4").check(shapes)
    Recipe(sampler="shapes@4", guidance=1.0).check(shapes)
    with pytest.raises(ValueError, match=r"guidance_scale=5.* would run shapes-4 twice a step"):
        Recipe(sampler="shapes@4", guidance=5.0).check(shapes)
