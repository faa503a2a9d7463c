"""Ids and shards are functions of the manifest: what acts changes them, what does not does not."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from diffplug.demos.batch.manifest import ManifestError, Row, read_manifest
from diffplug.demos.batch.plan import Plan, plan

BASE = {"prompt": "a red circle", "seed": 7, "steps": 6}
GOLDEN = ["6915a18ff9656de620cc", "f4ec9cd46bfaf1ee4088", "0668506362efa6a2b131"]


def _plan(*rows: dict[str, Any], **options: Any) -> Plan:
    return plan("m", list(enumerate((Row(**row) for row in rows), 1)), **{"model": "m", **options})


def _id(row: dict[str, Any], **options: Any) -> str:
    return _plan(row, **options).pictures[0].id


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a red circlé"},
        {"seed": 8},
        {"steps": 7},
        {"guidance": 5.0},
        {"negative_prompt": "blue"},
        {"sampler": "ddim"},
        {"eta": 0.5},
        {"width": 64},
        {"call": {"clip_skip": 1}},
        {"steer": "fk"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_acts_changes_the_id(change: dict[str, Any]) -> None:
    assert _id({**BASE, **change}) != _id(BASE)


def test_what_does_not_act_does_not() -> None:
    assert _id({**BASE, "meta": {"a": 1}}) == _id(BASE) == _plan({"prompt": "y"}, BASE).pictures[1].id
    assert _id({**BASE, "guidance": 5}) == _id({**BASE, "guidance": 5.0})
    assert _id({**BASE, "eta": -0.0}) == _id({**BASE, "eta": 0.0})
    assert _id({"prompt": "x", "seed": 1}, settings={"steps": 6}) == _id(
        {"prompt": "x", "seed": 1, "steps": 6}
    )
    assert _id(BASE, model="other") != _id(BASE)


def test_ids_are_what_they_were() -> None:
    rows = [
        BASE,
        {**BASE, "guidance": 5},
        {"prompt": "ünï 😀", "seed": 2**63 - 1, "sampler": "ddim", "eta": 1.0},
    ]
    assert [_id(row) for row in rows] == GOLDEN


def test_seeds_follow_from_content_and_count_up_for_images() -> None:
    two = _plan({"prompt": "x"}, {"prompt": "y", "images": 3})
    turned = _plan({"prompt": "y", "images": 3}, {"prompt": "x"})
    assert {one.id for one in two.pictures} == {one.id for one in turned.pictures}
    seeds = [one.seed for one in two.pictures[1:]]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2] and all(0 <= seed < 2**53 for seed in seeds)
    assert _plan({"prompt": "x"}, seed=1).pictures[0].seed != two.pictures[0].seed


def test_doubles_are_made_once_and_told() -> None:
    found = _plan({"prompt": "x", "seed": 1, "images": 3}, {"prompt": "x", "seed": 2})
    assert (found.asked, found.doubles, found.first_double, len(found.pictures)) == (4, 1, (2, 1), 3)


def test_impossible_recipes_are_told_with_their_first_line() -> None:
    with pytest.raises(ManifestError, match=r"m:2: .*'dimm'.*ddim"):
        _plan({"prompt": "x"}, {"prompt": "x", "sampler": "dimm"})
    with pytest.raises(ManifestError, match="m:1: strength"):
        _plan({"prompt": "x", "strength": 1.0})


def test_settings_of_steering_act_on_rows_that_steer() -> None:
    settings = {"particles": 4, "reward": "jpeg"}
    plain, steered = _plan({"prompt": "x"}, {"prompt": "x", "steer": "fk"}, settings=settings).recipes
    assert plain.steer is None and (steered.particles, steered.reward) == (4, "jpeg")


def _names(prompts: list[str]) -> set[str]:
    return {shard.key for shard in _plan(*({"prompt": text} for text in prompts), shard=64).shards}


@pytest.mark.parametrize("edit", ["append", "insert", "delete"])
def test_an_edit_changes_one_shard(edit: str) -> None:
    prompts = [f"prompt {i}" for i in range(6000)]
    edited = {
        "append": [*prompts, "new"],
        "insert": ["new", *prompts],
        "delete": prompts[:3000] + prompts[3001:],
    }[edit]
    before = _names(prompts)
    assert 60 < len(before) < 160
    assert len(before - _names(edited)) <= 2


def test_a_few_edits_leave_most_shards(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(12_000)]
    before, edited = _names(prompts), list(prompts)
    for place in random.Random(1).sample(range(len(prompts)), 24):
        edited[place] += " edited"
    assert len(before & _names(edited)) / len(before) >= 0.8


def test_shards_hold_all_pictures_once_within_their_bounds() -> None:
    found = _plan(*({"prompt": f"prompt {i}", "steps": 1 + i % 2} for i in range(3000)), shard=64)
    ids = [one.id for shard in found.shards for one in shard.pictures]
    assert sorted(ids) == sorted(one.id for one in found.pictures)
    assert all(len(shard.pictures) <= 256 for shard in found.shards)
    assert all(len({one.group for one in shard.pictures}) == 1 for shard in found.shards)


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_read_and_cut_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"prompt": "a picture of number {i}", "steps": 6}}\n' for i in range(100_000)))
    tracemalloc.start()
    found = plan(path, read_manifest(path), model="m")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.pictures) == 100_000 and peak < 300e6
    start = process_time()
    plan(path, read_manifest(path), model="m")
    assert process_time() - start < 20


def test_a_sampler_that_says_its_steps_is_not_asked_for_the_commands() -> None:
    (few,) = _plan({"prompt": "x", "sampler": "shapes@4"}, settings={"steps": 6}).recipes
    assert few.steps == 4
    with pytest.raises(ManifestError, match="says 4 steps, steps=6"):
        _plan({"prompt": "x", "sampler": "shapes@4", "steps": 6})
