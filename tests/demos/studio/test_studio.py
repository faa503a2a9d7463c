"""The studio: each picture once, the same for everybody, and every request can be given up."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from diffplug.demos.batch.manifest import Row
from diffplug.demos.batch.plan import plan
from diffplug.demos.studio.pool import Pool
from diffplug.demos.studio.studio import Cell, Made, Step
from diffplug.demos.studio.votes import Pair, Votes, export_votes, read_votes
from diffplug.testing import tiny
from diffplug.training.preference.pairs import read_pairs
from tests.demos.studio.studio_parts import data, made, studio

pytestmark = pytest.mark.pipe


def test_a_picture_is_made_once_and_knows_its_settings(tmp_path: Path) -> None:
    one = studio(folder=tmp_path)
    (first,) = made(one, sampler="ddim", seed=3)
    (again,) = made(one, sampler="ddim", seed=3)
    assert not first.reused and again.reused and data(first) == data(again)
    assert first.evaluations == 2
    (other,) = made(studio(folder=tmp_path), sampler="ddim", seed=3)  # a later start finds the file
    assert other.reused and data(other) == data(first) and other.evaluations == 2
    settings = json.loads(other.images[0].info["diffplug"])
    assert (settings["seed"], settings["sampler"], settings["used"]["scheduler"]) == (
        3,
        "ddim",
        "DDIMScheduler",
    )


def test_a_picture_has_the_id_that_a_batch_would_give_it() -> None:
    one = studio(identity="tiny@1:float32")
    form = one.read({"prompt": "x", "seed": 3, "steps": 2, "sampler": "ddim", "guidance": 4})
    row = Row.model_validate(json.loads(form.row()))
    (picture,) = plan("manifest", [(1, row)], model="tiny@1:float32").pictures
    assert one.key(form) == picture.id
    assert studio(identity="tiny@2:float32").key(form) != picture.id


def test_what_is_kept_in_memory_is_bounded_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    one = studio()
    (first,) = made(one, sampler="ddim", seed=0)
    monkeypatch.setattr("diffplug.demos.studio.studio._KEPT_BYTES", 3 * first.bytes)
    for seed in range(1, 5):
        made(one, sampler="ddim", seed=seed)
    assert [
        one.find(one.read({"prompt": "x", "steps": 2, "sampler": "ddim", "seed": i})) is not None
        for i in range(5)
    ] == [False, False, True, True, True]
    assert one._bytes == 3 * first.bytes


def test_steps_are_told_and_show_the_clean_picture() -> None:
    one = studio()
    events = list(one.make(one.read({"prompt": "x", "steps": 4, "pictures": 2, "sampler": "ddim"})))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(event.done, event.of) for event in steps] == [(i, 4) for i in (1, 2, 3, 4)] * 2
    assert any(event.preview is not None and event.preview.size == (256, 256) for event in steps)
    assert sum(isinstance(event, Made) for event in events) == 2


def test_a_grid_reuses_what_is_there_and_is_checked_before_it_begins() -> None:
    one = studio()
    form = one.read({"prompt": "x", "steps": 2, "sampler": "ddim"})
    made(one, sampler="ddim")
    events = one.grid(form, ("steps", [2, 3]), ("sampler", ["ddim", "dpm++"]))
    cells = [event for event in events if isinstance(event, Cell)]
    assert [(cell.row, cell.column) for cell in cells] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [cell.made.reused for cell in cells] == [True, False, False, False]
    for columns in (("steps", [2, 300]), ("steps", []), ("steps", list(range(1, 8))), ("folder", ["x"])):
        with pytest.raises(ValueError):
            next(one.grid(form, columns, ("seed", [1])))


def test_three_users_get_what_they_would_get_alone() -> None:
    asked = [
        [{"sampler": name, "seed": seed, **more} for seed, name in enumerate(("ddim", "euler-a", "dpm++"))]
        for more in ({}, {"steps": 3}, {"steer": "fk", "particles": 2, "reward": "jpeg"})
    ]
    alone = studio()
    wanted = [[made(alone, **values)[0] for values in one] for one in asked]
    together, found = studio(copies=3), {}

    def user(number: int) -> None:
        found[number] = [made(together, **values)[0] for values in asked[number]]

    threads = [threading.Thread(target=user, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        for one, other in zip(wanted[number], found[number], strict=True):
            assert data(one) == data(other) and one.evaluations == other.evaluations


def test_a_request_that_is_given_up_ends_at_its_next_step() -> None:
    one = studio()
    made(one, seed=1)
    before = set(vars(one.pool._free.queue[0]))
    events = one.make(one.read({"prompt": "x", "steps": 100, "sampler": "ddim"}))
    seen = [next(events), next(events)]
    assert all(isinstance(event, Step) for event in seen)
    events.close()
    until = time.monotonic() + 10
    while one.pool.free == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert one.pool.free == 1
    pipe = one.pool._free.queue[0]
    assert set(vars(pipe)) == before and type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert len(made(one)) == 1


def test_a_request_has_a_time_limit_and_errors_give_the_pipeline_back() -> None:
    one = studio(seconds=0.0)
    with pytest.raises(TimeoutError, match="stopped after 0 s"):
        list(one.make(one.read({"prompt": "x", "steps": 50, "sampler": "ddim"})))
    assert one.pool.free == 1

    def broken(pipe: Any, control: Any) -> None:
        raise RuntimeError("broken")

    pool = Pool(tiny("sd15"))
    with pytest.raises(RuntimeError, match="broken"):
        list(pool.run(broken))
    assert pool.free == 1


@pytest.mark.parametrize(
    ("verdict", "swapped", "labels"),
    [
        ("left", False, (1.0, 0.0)),
        ("left", True, (0.0, 1.0)),
        ("right", True, (1.0, 0.0)),
        ("tie", True, (0.5, 0.5)),
    ],
)
def test_votes_are_rows_with_the_labels_of_what_was_shown(
    tmp_path: Path, verdict: str, swapped: bool, labels: tuple[float, float]
) -> None:
    one = studio()
    pair = Pair((made(one, sampler="ddim")[0], made(one, sampler="dpm++")[0]), ("one", "other"), swapped)
    votes = Votes(tmp_path, one)
    assert votes.vote(pair, verdict, "session") and not votes.vote(pair, verdict, "session")  # once only
    (row,) = read_votes(votes.path)
    assert (row["label_0"], row["label_1"]) == labels and row["recipe_0"]["sampler"] == "ddim"
    assert (tmp_path / row["image_0"]).is_file() and row["shown_left"] == int(swapped)
    with pytest.raises(ValueError, match="left, right or tie"):
        votes.vote(pair, "both", "session")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert export_votes(tmp_path, tmp_path / "votes.parquet") == 1
    (exported,) = parquet.read_table(tmp_path / "votes.parquet").to_pylist()
    assert exported["label_0"] == labels[0] and exported["jpg_0"].startswith(b"\x89PNG")
    _train_on(tmp_path, row, labels)
    (tmp_path / "votes.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"votes.jsonl:1: this is no vote"):
        read_votes(votes.path)
    with pytest.raises(OSError, match="there is no such file; the Vote tab"):
        read_votes(tmp_path / "gone")


def _train_on(folder: Path, row: dict[str, Any], labels: tuple[float, float]) -> None:
    """What the page writes and exports is what trainers read: the picture with the larger label is better."""
    if labels[0] == labels[1]:
        with pytest.raises(ValueError, match="none of the 1 rows .* has a winner"):
            read_pairs(folder / "votes.jsonl")
        return
    (pair,) = read_pairs(folder / "votes.jsonl")
    best = int(labels[1] > labels[0])
    assert (pair.better, pair.worse) == (folder / row[f"image_{best}"], folder / row[f"image_{1 - best}"])
    (again,) = read_pairs(folder / "votes.parquet")
    assert again.better == (folder / row[f"image_{best}"]).read_bytes()
