"""Captions tell the truth, parse back to what they say, and never cross their split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffplug.shapes.captions import (
    SPLITS,
    VOCABULARY,
    Noun,
    Told,
    all_words,
    captioned_scenes,
    parse,
    phrase,
    sample_prompts,
    tell,
    unknown_words,
)
from diffplug.shapes.world import KINDS, sample_scene

pytestmark = pytest.mark.law


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
def test_every_wording_parses_to_its_content(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    told = tell(sample_scene(rng, kind), rng)
    wordings = {phrase(told, rng) for _ in range(6)}
    assert {parse(text).key for text in wordings} == {told.key}
    assert {parse(text).split for text in wordings} == {told.split}
    assert all_words(list(wordings)) <= VOCABULARY


def test_converse_relations_are_one_content() -> None:
    red, blue = Noun(color="red", shape="circle"), Noun(color="blue", shape="square", size="small")
    left = Told(nouns=(red, blue), relation="left of")
    assert left.key == Told(nouns=(blue, red), relation="right of").key
    assert left.key != Told(nouns=(blue, red), relation="left of").key


def test_parse_reads_what_people_type() -> None:
    told = parse("A Small RED circle, to the left of one blue square, on a gray background!")
    assert [str(noun) for noun in told.nouns] == ["small red circle", "blue square"]
    assert (told.relation, told.background) == ("left of", "grey")
    with pytest.raises(ValueError, match="'a zebra' names no object"):
        parse("a zebra")


def test_unknown_words_are_named_in_order_once() -> None:
    assert unknown_words("a furry red circle near a furry cat, 4k") == ["furry", "near", "cat", "4k"]
    assert unknown_words("a red circle above a blue square on a gray background") == []


def test_prompts_are_reproducible_and_splits_disjoint() -> None:
    keys = {}
    for split in SPLITS:
        prompts = sample_prompts(300, seed=4, kind="relation", split=split)
        assert prompts == sample_prompts(300, seed=4, kind="relation", split=split)
        assert prompts != sample_prompts(300, seed=5, kind="relation", split=split)
        keys[split] = {parse(p).key for p in prompts}
        assert all(parse(p).relation for p in prompts)
    assert (
        not keys["train"] & keys["test"]
        and not keys["train"] & keys["search"]
        and not keys["search"] & keys["test"]
    )


def test_mixed_prompts_take_every_kind_in_turn() -> None:
    counts = [len(parse(p).nouns) for p in sample_prompts(8, seed=0)]
    assert counts == [1, 2, 2, 3, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "four"}, "'four' is not known"),
        ({"split": "dev"}, "'dev' is not known"),
        ({"n": -1}, "n is -1"),
    ],
)
def test_bad_requests_for_prompts(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_prompts(**{"n": 2, **arguments})


def test_training_scenes_stay_in_training() -> None:
    pairs = captioned_scenes(np.random.default_rng(0), 60)
    assert {told.split for _, told in pairs} == {"train"}
