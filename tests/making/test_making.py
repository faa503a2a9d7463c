"""Pictures into a folder: whole, claimed by one, made once, and the same whatever came between."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffplug import files
from diffplug.files import WriteError
from diffplug.making import Row, make, unmade
from diffplug.making.png import read_settings
from diffplug.recipe import Recipe, batches
from diffplug.recipe.batches import Batch

ROOT = Path(__file__).resolve().parents[2]
SETUP = {"model": "tiny", "dtype": "float32"}


def _rows(n: int, **recipe: Any) -> list[Row]:
    return [Row(Recipe(steps=2, **recipe), f"prompt {i % 3}", i, SETUP) for i in range(n)]


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffplug.testing import tiny

    return tiny("sd15")


@pytest.fixture
def batch_dependent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A pipeline whose pictures depend on how many are made at once, as rounding does; sizes of its calls."""
    calls: list[int] = []

    def made(recipe: Recipe, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], on_step: Any) -> Batch:
        calls.append(len(prompts))
        images = [Image.new("RGB", (4, 4), (seed % 256, len(prompts), 0)) for seed in seeds]
        return Batch(0, images, 1, [None] * len(images), 1.0, {})

    monkeypatch.setattr(batches, "_made", made)
    return calls


@pytest.mark.pipe
def test_every_picture_is_on_the_disk_when_its_batch_is_done(tmp_path: Path, pipe: Any) -> None:
    seen = [len(os.listdir(tmp_path)) for _ in make(pipe, _rows(5), tmp_path, max_rows=2)]
    assert seen == [1, 2, 3, 4, 5]
    assert read_settings(tmp_path / "seed-000003.png")["prompt"] == "prompt 0"


@pytest.mark.pipe
def test_a_second_run_makes_only_what_is_missing(tmp_path: Path, pipe: Any) -> None:
    list(make(pipe, _rows(6), tmp_path, max_rows=4))
    before = _digests(tmp_path)
    (tmp_path / "seed-000004.png").unlink()
    assert unmade(_rows(6), tmp_path) == [4]
    assert [one.place for one in make(pipe, _rows(6), tmp_path, max_rows=4)] == [4]
    assert _digests(tmp_path) == before
    assert list(make(pipe, _rows(6), tmp_path)) == []
    assert len(list(make(pipe, _rows(6), tmp_path, again=True))) == 6
    assert (tmp_path / "seed-000000-2.png").read_bytes() == (tmp_path / "seed-000000.png").read_bytes()


def test_other_settings_of_a_seed_are_another_picture(
    tmp_path: Path, pipe: Any, batch_dependent: list[int]
) -> None:
    list(make(pipe, _rows(1), tmp_path))
    for other in (
        {"guidance": 2.0},
        {"steps": 3},
        {"negative_prompt": "x"},
        {"width": 16},
        {"call": {"guidance_rescale": 0.5}},
    ):
        row = replace(_rows(1)[0], recipe=Recipe(**{"steps": 2, **other}))
        assert unmade([row], tmp_path) == [0], other
    assert unmade([replace(_rows(1)[0], setup={**SETUP, "dtype": "float16"})], tmp_path) == [0]


@pytest.mark.parametrize("n", range(1, 11))
def test_stopped_at_any_write_the_set_ends_with_the_same_bytes(
    tmp_path: Path, pipe: Any, batch_dependent: list[int], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    list(make(pipe, _rows(10), tmp_path / "whole", max_rows=4))
    link, count = os.link, [0]

    def dies(*where: Any) -> None:
        count[0] += 1
        if count[0] == n:
            raise KeyboardInterrupt
        link(*where)

    monkeypatch.setattr(files.os, "link", dies)
    with pytest.raises(KeyboardInterrupt):
        list(make(pipe, _rows(10), tmp_path / "stopped", max_rows=4))
    monkeypatch.setattr(files.os, "link", link)
    whole, part = _digests(tmp_path / "whole"), _digests(tmp_path / "stopped")
    assert part.items() <= whole.items() and len(part) == n - 1
    list(make(pipe, _rows(10), tmp_path / "stopped", max_rows=4))
    assert _digests(tmp_path / "stopped") == whole


def test_a_full_disk_keeps_what_is_there(
    tmp_path: Path, pipe: Any, batch_dependent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def full(*where: Any) -> None:
        if len([name for name in os.listdir(tmp_path) if name.startswith("seed")]) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        link(*where)

    monkeypatch.setattr(files.os, "link", full)
    with pytest.raises(WriteError, match="No space left on device"):
        list(make(pipe, _rows(6), tmp_path, max_rows=2))
    assert sorted(os.listdir(tmp_path)) == [f"seed-00000{i}.png" for i in range(3)]


def test_without_hard_links_names_are_claimed_too(
    tmp_path: Path, pipe: Any, batch_dependent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuses)
    (tmp_path / "seed-000000.png").write_bytes(b"somebody's")
    list(make(pipe, _rows(2), tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["seed-000000-2.png", "seed-000000.png", "seed-000001.png"]
    assert (tmp_path / "seed-000000.png").read_bytes() == b"somebody's"


WRITER = """
import sys, time
from pathlib import Path
from PIL import Image
from diffplug.making.png import save_new_picture

folder, prompt = Path(sys.argv[1]), sys.argv[2]
image = Image.new("RGB", (8, 8), (len(prompt), 0, 0))
print("ready", flush=True)
sys.stdin.read(1)
for seed in range(60):
    save_new_picture(image, folder, f"seed-{seed:06d}", {"prompt": prompt, "seed": seed})
"""


def test_processes_that_write_one_folder_lose_no_picture(tmp_path: Path) -> None:
    prompts = ["one", "other", "other"]  # two of them want the same pictures
    words = [sys.executable, "-c", WRITER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen([*words, prompt], cwd=ROOT, **pipes) for prompt in prompts]  # type: ignore[call-overload]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        writer.stdin.write(b"x")
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    found = [read_settings(path) for path in tmp_path.iterdir()]
    assert sorted((s["seed"], s["prompt"]) for s in found) == sorted(
        (seed, prompt) for seed in range(60) for prompt in set(prompts)
    )


@pytest.mark.pipe
def test_out_of_memory_halves_the_batch_and_keeps_the_pictures(
    tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (tmp_path / "plain").mkdir()
    (tmp_path / "short").mkdir()
    list(make(pipe, _rows(8), tmp_path / "plain", max_rows=2))
    forward, rows = pipe.unet.forward, []

    def short(sample: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        if len(sample) > 4:  # two pictures with guidance
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", short)
    list(make(pipe, _rows(8), tmp_path / "short", max_rows=8))
    assert _digests(tmp_path / "short") == _digests(tmp_path / "plain")
    assert rows[:3] == [16, 8, 4] and set(rows[3:]) == {4}  # the size that fits is remembered


@pytest.mark.pipe
def test_one_picture_that_does_not_fit_is_told_with_the_remedy(
    tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.unet, "forward", never)
    with pytest.raises(MemoryError, match="on a single picture: lower width and height"):
        list(make(pipe, _rows(2), tmp_path))


@pytest.mark.pipe
def test_more_particles_than_fit_go_through_the_network_in_slices(
    pipe: Any, red_reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    forward, rows = pipe.unet.forward, []

    def short(sample: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        if len(sample) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", short)
    recipe = Recipe(
        sampler="ddim", steps=2, steer="fk", particles=6, reward=red_reward, options={"churn": 1.0}
    )
    assert len(recipe.run(pipe, ["a", "b"], [0, 1]).images) == 2
    assert max(rows) == 24 and min(rows) <= 6


@pytest.mark.pipe
def test_all_particles_become_files_with_their_rewards(tmp_path: Path, pipe: Any, red_reward: str) -> None:
    recipe = Recipe(steps=2, steer="best-of-n", particles=3, reward=red_reward, options={"returns": "all"})
    row = Row(recipe, "a", 7, SETUP)
    made = list(make(pipe, [row], tmp_path))
    assert [one.path.name for one in made] == [f"seed-000007-particle-0{i}.png" for i in range(3)]
    for one in made:
        assert read_settings(one.path)["rewards"] == {red_reward: one.reward}
    (tmp_path / "seed-000007-particle-01.png").unlink()
    assert unmade([row], tmp_path) == [0]
    assert [one.fresh for one in make(pipe, [row], tmp_path)] == [False, True, False]


@pytest.mark.pipe
def test_a_searched_sampler_that_was_edited_makes_another_picture(tmp_path: Path, pipe: Any) -> None:
    from diffplug.samplers.schedule.presets import dpmpp

    out, path = tmp_path / "out", tmp_path / "three.json"
    out.mkdir()
    dpmpp(3, final="sigma_min").save(path)
    row = Row(Recipe(sampler=str(path), steps=3), "a", 0, SETUP)
    list(make(pipe, [row], out))
    assert unmade([row], out) == []
    path.write_text(path.read_text() + "\n")
    assert unmade([row], out) == [0]
