"""What goes wrong in a batch stays where it went wrong: poison rows, memory, a set-up that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffplug.demos.batch.drivers import Stopped
from diffplug.demos.batch.store import FolderStore
from tests.demos.batch import fake_model
from tests.demos.batch.fake_model import colour, fake_batches, faked, final_files, make, planned

__all__ = ["faked"]
pytestmark = pytest.mark.usefixtures("faked")


def test_a_poison_row_is_recorded_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    counted = lambda *args, **kwargs: calls.append(1) or fake_batches(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(fake_model.render, "batches", counted)
    wanted = planned([*(f"prompt {i}" for i in range(40)), "poison"], shard=64)
    report = make(tmp_path, wanted, max_rows=16)
    assert (report["there"], report["failed"], report["made"]) == (40, 1, 40)
    assert report["failures"][0]["line"] == 41 and "not finite" in report["failures"][0]["message"]
    assert len(calls) <= 3 + 2 * 4 + 2


def test_failed_rows_are_tried_again_unless_they_are_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = planned(["poison", *(f"prompt {i}" for i in range(5))])
    assert make(tmp_path, wanted)["failed"] == 1
    monkeypatch.setattr(fake_model.render, "batches", _forgiving)
    assert make(tmp_path, wanted, keep_failed=True)["failed"] == 1
    report = make(tmp_path, wanted)
    assert (report["failed"], report["there"]) == (0, 6)
    assert list((tmp_path / "failed").iterdir()) == []


def _forgiving(recipe, pipe, prompts, seeds, **kwargs):  # type: ignore[no-untyped-def]
    return fake_batches(recipe, pipe, ["cured" if "poison" in p else p for p in prompts], seeds, **kwargs)


def test_a_set_up_that_cannot_work_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"so it is not the rows.*not finite"):
        make(tmp_path, planned([f"poison {i}" for i in range(30)]))


def test_short_memory_is_remembered_and_told_in_each_row(tmp_path: Path) -> None:
    make(tmp_path, planned([f"full {i}" for i in range(12)], shard=64), max_rows=8)
    finished = FolderStore(tmp_path)
    finished.refresh()
    records = [record for name in finished.names() for record in finished.records(name)]
    assert len(records) == 12
    assert all(record["batch"] == colour(finished.read_picture(record))[2] <= 3 for record in records)


def test_an_edit_makes_what_changed_and_leaves_orphans_alone(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(60)]
    make(tmp_path, planned(prompts, shard=8))
    before = final_files(tmp_path)
    report = make(tmp_path, planned([*prompts[:20], "another", *prompts[21:], "one more"], shard=8))
    assert (report["made"], report["orphans"], report["there"]) == (2, 1, 61)
    after = final_files(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name.startswith("shard-"))


def test_a_picture_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    wanted = planned([f"prompt {i}" for i in range(6)])
    make(tmp_path, wanted)
    next(tmp_path.glob("shard-*/*.png")).unlink()
    report = make(tmp_path, wanted)
    assert (report["made"], report["there"]) == (1, 6)


def test_names_of_prompts_do_nothing_in_the_sheet(tmp_path: Path) -> None:
    make(tmp_path, planned(["</figcaption><script>alert(1)</script>", '" onload="x']))
    page = (tmp_path / "contact_sheet.html").read_text("utf-8")
    assert "<script" not in page and '" onload' not in page and "&lt;script&gt;" in page
