"""Ratios for several steps and guidance scales: every source, the right entry for a call, one-line errors."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffplug.plug import plug
from diffplug.samplers import CompensationPolynomial, DCSolver
from diffplug.samplers.dc_solver.ratios import RatioBook
from diffplug.samplers.schedule import presets
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.search.parameters import with_ratios
from diffplug.testing import tiny

FOUR, SIX = [1.0, 1.0, 0.9, 1.2], [1.0, 1.0, 0.93, 0.81, 1.22, 1.07]


def searched(ratios: list[float], guidance: float | None = None, **options: Any) -> SolverSchedule:
    nodes = Nodes(kind="name", name="linspace", final="sigma_min")
    plain = presets.unipc(len(ratios), nodes, **{"disable_corrector": (0,), **options})
    found = with_ratios(plain, dict(enumerate(ratios)))
    return replace(found, meta={} if guidance is None else {"guidance_scale": guidance})


def gentle() -> CompensationPolynomial:
    """Ratios of 1 + (guidance / 12) / 10 for 5 to 10 steps at guidance 3 to 9."""
    coefficients = np.zeros((4, 3, 3))
    coefficients[0, 2, 2], coefficients[0, 1, 2] = 1.0, 0.1
    return CompensationPolynomial(coefficients, (5, 10), (3.0, 9.0))


@pytest.mark.law
def test_every_source_gives_the_same_ratios(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(SIX))
    searched(SIX).save(tmp_path / "searched.json")
    sources = [
        SIX, np.array(SIX), torch.tensor(SIX, dtype=torch.float64), {6: SIX}, {(6, None): SIX},
        searched(SIX), [searched(SIX), searched(FOUR)], searched(SIX).to_json(),
        tmp_path / "plain.json", str(tmp_path / "searched.json"),
    ]  # fmt: skip
    for source in sources:
        assert RatioBook.of(source).choose(6, 7.5) == (SIX, "")


@pytest.mark.law
def test_a_polynomial_answers_for_its_range_from_objects_and_files(tmp_path: Path) -> None:
    gentle().save(tmp_path / "ours.json")
    np.save(tmp_path / "reference.npy", gentle().coefficients.ravel())
    for source in (gentle(), tmp_path / "ours.json", tmp_path / "reference.npy"):
        ratios, note = RatioBook.of(source).choose(7, 6.0)
        assert ratios == pytest.approx([1.0, 1.0, *[1.05] * 5]) and not note
        near, note = RatioBook.of(source).choose(7, 12.0)
        assert near == pytest.approx([1.0, 1.0, *[1.075] * 5])
        assert note == "DC ratios for 7 steps are of guidance 9, not 12"
    with pytest.raises(ValueError, match="DC ratios are for 5 to 10 steps, the pipeline asked for 4"):
        RatioBook.of(gentle()).choose(4, 6.0)


@pytest.mark.law
def test_the_nearest_guidance_is_taken_and_told() -> None:
    book = RatioBook.of({(4, 5.0): FOUR, (4, 9.0): [1, 1, 1, 1.5], (6, 5.0): SIX})
    assert book.choose(4, 5) == (FOUR, "")
    assert book.choose(4, 6.5) == (FOUR, "DC ratios for 4 steps are of guidance 5, not 6.5")
    assert book.choose(4, 8.0)[0] == [1.0, 1.0, 1.0, 1.5]
    assert book.choose(6, None) == (SIX, "")
    with pytest.raises(ValueError, match="DC ratios are for 4, 6 steps, the pipeline asked for 8"):
        book.choose(8, 5.0)
    listed = replace(book, polynomial=gentle())
    assert listed.choose(6, 5.0)[0] == SIX  # what was searched before what was fitted
    assert listed.choose(6, 6.0)[0] == pytest.approx([1.0, 1.0, *[1.05] * 4])


@pytest.mark.law
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({(6, 7.5): FOUR}, "4 DC ratios for 6 steps: give one for each step"),
        ({(4, 7.5): [1, 1, 1, float("inf")]}, "ratio inf of step 3 is not a finite number"),
        ({"four": FOUR}, "key 'four' of the DC ratios: give"),
        ({(4, 7.5, 1): FOUR}, "of the DC ratios: give"),
        (searched(FOUR, disable_corrector=()), "decides more than DC-Solver's ratios: use Solver"),
        ([searched(FOUR, 5.0), searched(FOUR, 5.0)], "two schedules are for 4 steps at guidance 5"),
        (presets.ipndm(5), "for 5 steps decides more"),
        ("shaps", "no such file"),
    ],
    ids=range(8),
)
def test_bad_sources_are_refused_at_once(source: Any, said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said) as caught:
        DCSolver(source)
    assert "\n" not in str(caught.value)


@pytest.mark.law
def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[1, 1, NaN]")
    (tmp_path / "early.json").write_text("[1.1, 1, 1]")
    (tmp_path / "newer.json").write_text(json.dumps({**searched(FOUR).to_json(), "version": 2}))
    for name, said in {"bad": "not valid JSON", "early": "step 0 can do nothing", "newer": "update"}.items():
        with pytest.raises(ValueError, match=said) as caught:
            DCSolver(tmp_path / f"{name}.json")
        assert f"{name}.json" in str(caught.value)
    with pytest.raises(ValueError, match="elsewhere='ignore': allowed are 'refuse' and 'neutral'"):
        DCSolver(FOUR, elsewhere="ignore")


@pytest.mark.pipe
def test_a_call_gets_the_ratios_of_its_steps_and_guidance() -> None:
    pipe = tiny("sd15")
    old, used = pipe.scheduler, []

    def call(steps: int, guidance: float) -> None:
        pipe("a red circle", num_inference_steps=steps, guidance_scale=guidance, output_type="latent")
        used.append(list(pipe.scheduler.schedule.ratios))

    book = {(4, 5.0): FOUR, (6, 5.0): SIX}
    with plug(pipe, DCSolver(book)), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(4, 5.0)
        call(6, 5.0)
        with pytest.raises(ValueError, match="DC ratios are for 4, 6 steps, the pipeline asked for 3"):
            call(3, 5.0)
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="ratios for 4 steps are of guidance 5, not 7"):
            call(4, 7.0)
    with plug(pipe, DCSolver(book, elsewhere="neutral")):
        with pytest.warns(UserWarning, match="asked for 3.*run without compensation"):
            call(3, 5.0)
        call(4, 5.0)
    assert used == [FOUR, SIX, FOUR, [1.0] * 3, FOUR] and pipe.scheduler is old
