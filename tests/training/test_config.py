"""Settings: TOML, overrides, nearest names, one-line errors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diffplug.training.config import (
    OptimizerSettings,
    RunSettings,
    as_mapping,
    differences,
    merged,
    overridden,
    read_toml,
    settings,
)


@dataclass(frozen=True, kw_only=True)
class Tree:
    model: str = "shapes"
    run: RunSettings = field(default_factory=RunSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


def test_a_file_with_overrides_becomes_nested_settings(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('model = "x"\n[run]\nupdates = 7\ntrackers = ["tensorboard"]\n')
    values = overridden(
        read_toml(tmp_path / "a.toml"), ["optimizer.lr=1e-3", "run.precision=bf16", "run.batch = 8"]
    )
    tree = settings(Tree, values)
    assert (tree.model, tree.run.updates, tree.run.batch, tree.run.precision) == ("x", 7, 8, "bf16")
    assert tree.optimizer.lr == 1e-3 and tree.run.trackers == ("tensorboard",)
    assert settings(Tree, as_mapping(tree)) == tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lrr=1", r"unknown setting 'optimizer.lrr'. Did you mean 'optimizer.lr'"),
        ("runn.batch=1", r"unknown setting 'runn'. Did you mean 'run'"),
        ("run.batch=many", r"run.batch: Input should be a valid integer.*got 'many'"),
        ("run.precision=fp8", r"run.precision: Input should be 'no' or 'bf16', got 'fp8'"),
        ("run.updates=0", r"updates must be a whole number of at least 1, got 0"),
        ("optimizer.ema=1", r"ema must be at least 0 and below 1"),
        ("run", r"--set 'run': write it as table.key=value"),
        ("model.name=x", r"'model' is a value, it has no keys"),
        ("run=3", r"run: .*got 3"),
    ],
)
def test_bad_input_is_one_line(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings(Tree, overridden({"model": "shapes"}, [change]))
    assert "\n" not in str(caught.value)


def test_the_last_of_two_on_one_key_wins() -> None:
    changes = ["tuner.kind=lora", "run.batch=2", "tuner.kind=full"]
    assert overridden({}, changes) == {"tuner": {"kind": "full"}, "run": {"batch": 2}}


def test_a_pipe_is_no_config_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(OSError, match="it is no regular file"):
        read_toml(tmp_path / "pipe.toml")


def test_files_that_are_missing_or_no_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config file .*gone.toml"):
        read_toml(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("a = \n")
    with pytest.raises(ValueError, match=r"bad.toml' is not valid TOML: .*line 1"):
        read_toml(tmp_path / "bad.toml")


def test_differences_name_keys_and_both_values() -> None:
    found = differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": "x"})
    assert found == ["a.c: 2 there, 3 here", "d: 'nothing' there, 'x' here"]


def test_merging_leaves_both_sides_alone() -> None:
    below, above = {"a": {"b": 1}, "c": 1}, {"a": {"d": 2}}
    assert merged(below, above) == {"a": {"b": 1, "d": 2}, "c": 1}
    assert below == {"a": {"b": 1}, "c": 1} and above == {"a": {"d": 2}}
