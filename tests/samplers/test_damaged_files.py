"""Files that are damaged, huge or of something else: one line with the file's name, no other error."""

from __future__ import annotations

import json
import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffplug.files import read_json
from diffplug.messages import LONGEST_QUOTE, reason, shown
from diffplug.samplers import CompensationPolynomial, DCSolver, ModelStatistics, Solver, SolverSchedule
from diffplug.samplers.schedule import presets
from diffplug.samplers.usf import load_ems, load_usf, usf_schedule

LINE = 700
NONE = {"type": "no_corrector", "start_point": None, "taylor_order": None, "derivative_type": None}


def decisions() -> dict[str, Any]:
    """A small schedule in the layout of USF's files."""
    first = {"estimate": "Difference_1", "active_points": [-2], "relaxation": None}
    return {
        "timesteps": [80.0, 10.0, 2.0, 0.5],
        "orders": [1, 2, 1],
        "prediction_types": ["noise_prediction", "data_prediction", "data_prediction"],
        "start_points": [-1, -1, -1],
        "derivative_types": [[], [first], []],
        "corrector_types": [NONE, NONE, NONE],
        "afs": "no_afs",
    }


def refused(read: Callable[[], Any], *named: str) -> str:
    """The message of the ValueError or OSError that reading raises; it is one line of a bearable length."""
    with pytest.raises((ValueError, OSError)) as caught:
        read()
    said = str(caught.value)
    assert "\n" not in said and len(said) < LINE, said
    assert all(name in said for name in named), said
    return said


@pytest.mark.law
@pytest.mark.parametrize(
    "text",
    ["[" * 3000, '{"a":' * 3000, "[1, 1, 1, 1" + "0" * 400 + "]", "[1, 1, 1, 1e999]", "x" * 10_000, ""],
    ids=["deep", "deep-objects", "digits", "infinite", "text", "empty"],
)
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    refused(lambda: DCSolver(path), "f.json")
    refused(lambda: SolverSchedule.load(path), "f.json")
    refused(lambda: CompensationPolynomial.load(path), "f.json")
    if text.startswith(("[[", "{")):
        refused(lambda: Solver(text) if text[0] == "{" else SolverSchedule.from_json(text))


@pytest.mark.law
def test_numbers_that_no_float_holds() -> None:
    for bad in (10**400, float("inf"), True, "1", None):
        refused(lambda bad=bad: DCSolver([1, 1, bad, 1]))
        refused(
            lambda bad=bad: SolverSchedule.from_json({**presets.ddim(2).to_json(), "time_shift": [bad, 0]})
        )


@pytest.mark.law
def test_files_that_are_too_large_or_no_files(tmp_path: Path) -> None:
    big = tmp_path / "big.json"
    big.write_text(json.dumps([1.0] * 400_000))
    assert "MiB" in refused(lambda: DCSolver(big), "big.json")
    many = {**presets.ddim(1).to_json(), "steps": [{}] * 10_001, "nfe": 10_001}
    assert "10001 steps" in refused(lambda: SolverSchedule.from_json(many))
    refused(lambda: DCSolver([1.0] * 10_001))
    refused(lambda: DCSolver(tmp_path), str(tmp_path.name))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        refused(lambda: read_json(tmp_path / "pipe.json"), "no regular file")
        refused(lambda: load_usf(tmp_path / "pipe.json", "edm"), "no regular file")


@pytest.mark.law
def test_damaged_arrays_of_numpy(tmp_path: Path) -> None:
    path, luck = tmp_path / "p.npy", random.Random(0)
    np.save(path, np.zeros(36))
    good = path.read_bytes()
    claims = good.replace(b"(36,)", b"(9" + b"9" * 12 + b",)", 1)
    for data in [claims, good[:70], b"", b"x", *(_flipped(good, luck) for _ in range(150))]:
        path.write_bytes(data)
        try:
            CompensationPolynomial.load(path)
        except ValueError as error:
            assert "p.npy" in str(error) and "\n" not in str(error)
    path.write_bytes(good)
    np.savez(tmp_path / "l.npz", l=np.ones(8))
    np.savez(tmp_path / "sb.npz", s=np.ones(8), b=np.ones(8))
    good = (tmp_path / "l.npz").read_bytes()
    load_ems(tmp_path, "edm", ends=(0.1, 10.0))
    for data in [b"", b"PK", good[:100], *(_flipped(good, luck) for _ in range(150))]:
        (tmp_path / "l.npz").write_bytes(data)
        try:
            load_ems(tmp_path, "edm", ends=(0.1, 10.0))
        except ValueError as error:
            assert str(tmp_path.name) in str(error) and "\n" not in str(error)


def _flipped(data: bytes, luck: random.Random) -> bytes:
    where = luck.randrange(len(data))
    return data[:where] + bytes([data[where] ^ (1 << luck.randrange(8))]) + data[where + 1 :]


@pytest.mark.law
def test_damaged_pickles(tmp_path: Path) -> None:
    path, luck = tmp_path / "m.pth", random.Random(0)
    torch.save(decisions(), path)
    good = path.read_bytes()
    load_usf(path, "edm")
    texts = [b"a red circle\n", b"", b"\x80\x02", b"\x80\x04\x95", b"(lp0\n."]
    for data in [*texts, *(_flipped(good[: luck.randrange(1, len(good))], luck) for _ in range(100))]:
        path.write_bytes(data)
        refused(lambda: load_usf(path, "edm"), "m.pth")


SCRAP = st.sampled_from(
    [None, True, 5, -1, float("nan"), float("inf"), 1e308, "x", ["x"], [], {}, [None], [[1]], 10**400, b"x"]
)


@pytest.mark.law
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(sorted(decisions())), scrap=SCRAP, inside=st.booleans(), place=st.integers(0, 4))
def test_schedules_of_usf_with_scrap_in_them(key: str, scrap: Any, inside: bool, place: int) -> None:
    document = dict(decisions())
    if inside and isinstance(document[key], list) and document[key]:
        document[key] = [*document[key]]
        document[key][place % len(document[key])] = scrap
    else:
        document[key] = scrap
    try:
        usf_schedule(document, "edm")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < LINE


@pytest.mark.law
def test_what_counts_of_a_derivative_list_is_what_the_order_uses() -> None:
    document = dict(decisions())
    spare = {"estimate": "Difference_0", "active_points": []}
    document["derivative_types"] = [[*given, spare] for given in document["derivative_types"]]
    assert usf_schedule(document, "edm").steps == usf_schedule(decisions(), "edm").steps


@pytest.mark.law
def test_statistics_tell_when_they_are_damaged_and_are_readable(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    made = ModelStatistics(lambdas=np.linspace(-3, 3, 50), l=np.ones(50), s=np.zeros(50), b=np.zeros(50))
    made.save(path)
    assert "sha256" not in ModelStatistics.load(path).told
    if os.name != "nt":
        mask = os.umask(0)
        os.umask(mask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    assert "damaged" in refused(lambda: ModelStatistics.load(path), "s.safetensors")
    for cut in (0, 7, 40, len(data) - 9):
        path.write_bytes(bytes(data[:cut]))
        refused(lambda: ModelStatistics.load(path), "s.safetensors")


@pytest.fixture
def usual_depth() -> Iterator[None]:
    """Python's own recursion limit: libraries raise it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.law
@pytest.mark.usefixtures("usual_depth")
def test_messages_quote_a_little_of_what_is_long() -> None:
    deep: Any = []
    for _ in range(200_000):
        deep = [deep]
    assert len(shown("x" * 10**6)) == LONGEST_QUOTE and shown(5) == "5"
    assert shown(deep) == "a list too large to show" and shown(10**5000) == "a int too large to show"
    assert reason(ValueError("one\ntwo")) == "one" and reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 10**6))) == 2 * LONGEST_QUOTE
    long = "k" * 5_000_000
    refused(lambda: SolverSchedule.from_json({**presets.ddim(1).to_json(), long: 1}))
    refused(lambda: SolverSchedule.from_json({**presets.ddim(1).to_json(), "first": long}))
    refused(lambda: Solver(solver=long))
    refused(lambda: Solver(grid=long))
    refused(lambda: SolverSchedule.from_json({**presets.ddim(1).to_json(), "meta": {"a": deep}}))
