"""Every row of the catalogue on the tiny pipeline of its family, with a synthetic checkpoint."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from few_step_kit import assert_same, everything, watched, write_checkpoint
from few_step_pipelines import PIPELINES, inputs, pipeline

from diffplug.plug import plug
from diffplug.samplers.few_step import FewStep
from diffplug.samplers.few_step.catalogue import Row
from diffplug.samplers.few_step.grids import grid_of
from diffplug.samplers.few_step.lookup import all_rows, row_for, shipped_rows

ROWS = [row for row in shipped_rows() if not row.refused]
HERE = [row for row in ROWS if row.family in PIPELINES]

# the trailing timesteps of the papers and cards, written out
TRAILING = {
    1: [999],
    2: [999, 499],
    4: [999, 749, 499, 249],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
    12: [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82],
    16: [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61],
}
TCD = {
    1: [999],
    2: [999, 499],
    4: [999, 759, 499, 259],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
    20: [999, 959, 899, 859, 799, 759, 699, 659, 599, 559, 499, 459, 399, 359, 299, 259, 199, 159, 99, 59],
}


@functools.cache
def _pipe(family: str) -> Any:
    return pipeline(family)


def _home(row: Row) -> str:
    """Return the name of the tiny pipeline of a row."""
    return "animatediff" if row.kind == "motion" else row.family


@pytest.mark.contract
@pytest.mark.pipe
@pytest.mark.parametrize("row", HERE, ids=lambda row: row.name)
def test_a_row_runs_as_it_says_and_leaves_no_trace(row: Row, tmp_path: Path) -> None:
    pipe = _pipe(_home(row))
    changes = write_checkpoint(row, pipe, tmp_path)
    before = everything(pipe)
    paths = [tmp_path / Path(each.file).name for each in row.weights] if changes else None
    for steps in (
        {row.default_steps, row.steps[-1]} if row.family in ("sd15", "sdxl") else {row.default_steps}
    ):
        for merge in ("runtime", "fuse") if row.kind == "lora" and steps == row.default_steps else ("auto",):
            few = FewStep(row, steps, merge=merge, weights=paths)
            with warnings.catch_warnings():
                warnings.simplefilter("error" if row.verified else "ignore", UserWarning)
                warnings.filterwarnings("ignore", message="negative_prompt.* does nothing")
                with plug(pipe, few):
                    _check_weights(row, pipe, before, changes, merge)
                    if merge != "fuse" or row.family in ("sd15", "flux-dev"):
                        _check_run(row, pipe, steps)
            assert_same(before, everything(pipe))


def _check_run(row: Row, pipe: Any, steps: int) -> None:
    if row.scheduler:
        assert type(pipe.scheduler).__name__ == row.scheduler
    for name, value in row.scheduler_options.items():
        assert pipe.scheduler.config[name] == value
    with watched(pipe) as seen:
        pipe(**inputs(_home(row)))
    assert len(seen.timesteps) == steps * (len(seen.rows) // steps)
    assert sum(seen.rows) == steps * row.rows, "guidance costs more or less than the row says"
    told = seen.timesteps[:: len(seen.timesteps) // steps]
    expected = _expected(row, pipe, steps)
    if expected is not None:
        assert told == pytest.approx(expected, abs=0.06)
    assert told == sorted(told, reverse=True)


def _expected(row: Row, pipe: Any, steps: int) -> list[float] | None:
    """Return the timesteps that the network has to see: the row's, or those of the rule, written out."""
    if steps in row.seen:
        return list(row.seen[steps])
    if row.told_scale != 1.0:
        return None
    if steps in row.timesteps:
        return list(row.timesteps[steps])
    if row.grid in ("trailing", "tcd"):
        return [float(t) for t in {"trailing": TRAILING, "tcd": TCD}[row.grid][steps]]
    if row.grid == "linspace" or steps in row.sigmas:
        return _shifted(pipe.scheduler, grid_of(row, steps).values)
    return None


def _shifted(scheduler: Any, sigmas: tuple[float, ...]) -> list[float] | None:
    """Return 1000 times the sigmas after a static shift; None where the shift depends on the picture."""
    if scheduler.config.get("use_dynamic_shifting"):
        return None
    shift = scheduler.config.get("shift", 1.0)
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]


def _check_weights(row: Row, pipe: Any, before: dict[str, Any], changes: dict[str, Any], merge: str) -> None:
    """Compare what acts in every layer with the file's change at its scale, within 1e-5."""
    for index, (component, wanted) in enumerate(changes.items()):
        module = getattr(pipe, component)
        parts = dict(module.named_modules())
        for name, change in wanted.items():
            own = before[f"{index}.{name}"]
            expected = change if row.kind in ("denoiser", "motion") else own + change
            if row.kind == "lora" and merge == "runtime":
                layer = parts[name.removesuffix(".weight")]
                assert layer.active_adapters == ["few-step"]
                actual = layer.get_base_layer().weight + layer.get_delta_weight("few-step")
            else:
                actual = module.get_parameter(name) if name in dict(module.named_parameters()) else None
            if actual is not None:
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.contract
def test_there_are_at_least_sixty_rows_each_with_source_and_licence() -> None:
    assert len(ROWS) >= 60
    assert all(row.source and row.licence for row in all_rows())
    assert len({row.name for row in all_rows()}) == len(all_rows())


@pytest.mark.contract
@pytest.mark.parametrize("row", shipped_rows(), ids=lambda row: row.name)
def test_a_row_survives_json(row: Row) -> None:
    again = Row.from_json(row.to_json())
    assert again == row and again.to_json() == row.to_json()


@pytest.mark.contract
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_rows_name_finds_it(row: Row) -> None:
    assert row_for(row.name, row.family, None, all_rows()) == row
    for alias in row.aliases:
        found = row_for(alias, row.family, row.default_steps, all_rows())
        assert row.default_steps in found.steps and found.family == row.family


@pytest.mark.contract
@pytest.mark.parametrize("row", [row for row in shipped_rows() if row.refused], ids=lambda row: row.name)
def test_what_must_not_be_touched_is_refused_with_its_sentence(row: Row) -> None:
    with pytest.raises(ValueError) as caught:
        row_for(row.name, row.family, None, all_rows())
    assert row.refused in str(caught.value)
