"""`diffplug batch` from the outside: statuses, lines of errors, workers, layouts that others read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffplug.files import host
from diffplug.making.png import read_settings
from diffplug.network.prompt_encodings import PromptEncodings

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.pipe, pytest.mark.usefixtures("as_loud_as_before")]


def _run(*words: Any) -> tuple[int, str, str]:
    from typer.testing import CliRunner

    from diffplug.cli.main import app

    result = CliRunner().invoke(app, ["batch", *(str(word) for word in words)])
    return result.exit_code, result.stdout, result.stderr


def _manifest(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _files(folder: Path) -> dict[str, str]:
    found = (path for path in sorted(folder.glob("shard-*/*")))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


ROWS: list[Any] = [
    {"prompt": "a red circle", "seed": 5, "images": 3},
    "a blue square",
    {"prompt": "a green cross", "sampler": "euler", "guidance": 5, "meta": {"tag": "x"}},
    {"prompt": "x", "steer": "best-of-n", "particles": 2, "reward": "jpeg", "seed": 1},
]


def test_pictures_are_made_once_and_say_how(tmp_path: Path, tiny_folder: Path) -> None:
    manifest = _manifest(tmp_path / "m.jsonl", ROWS)
    words = [manifest, "--model", tiny_folder, "--steps", 2, "-o", tmp_path / "out", "--json"]
    status, text, _ = _run(*words)
    report = json.loads(text)
    assert status == 0 and (report["made"], report["there"], report["failed"]) == (6, 6, 0)
    before = _files(tmp_path / "out")
    status, text, _ = _run(*words)
    assert status == 0 and json.loads(text)["made"] == 0 and _files(tmp_path / "out") == before
    pictures = [read_settings(path) for path in (tmp_path / "out").glob("shard-*/*.png")]
    assert sorted(one["seed"] for one in pictures if one["prompt"] == "a red circle") == [5, 6, 7]
    (steered,) = [one for one in pictures if "steer" in one]
    assert "jpeg" in steered["rewards"]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "out" / "metadata.parquet").to_pylist()
    assert [row["prompt"] for row in table[:3]] == ["a red circle"] * 3  # in the manifest's order
    assert json.loads(table[4]["meta"]) == {"tag": "x"}
    assert all((tmp_path / "out" / row["file_name"]).is_file() for row in table)


def test_each_prompt_is_encoded_once_and_no_picture_changes(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"x {i % 2}", "seed": i} for i in range(8)]
    manifest = _manifest(tmp_path / "m.jsonl", rows)
    words = [manifest, "--model", tiny_folder, "--steps", 2, "--max-rows", 2, "--shard", 64]
    kept: list[PromptEncodings] = []
    real = PromptEncodings.on
    monkeypatch.setattr(PromptEncodings, "on", lambda self, pipe: kept.append(self) or real(self, pipe))
    assert _run(*words, "-o", tmp_path / "kept")[0] == 0
    assert (kept[0].encoded, kept[0].hits) == (3, 13)  # two prompts and the empty one; 4 calls of 2 + 2 rows
    monkeypatch.setattr(PromptEncodings, "on", lambda self, pipe: nullcontext())
    assert _run(*words, "-o", tmp_path / "plain")[0] == 0
    assert _files(tmp_path / "kept") == _files(tmp_path / "plain")


def test_another_job_in_the_folder_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    manifest = _manifest(tmp_path / "m.jsonl", ["x"])
    words = [manifest, "--model", tiny_folder, "--steps", 1, "-o", tmp_path / "out"]
    assert _run(*words)[0] == 0
    status, _, error = _run(*words, "--layout", "tar")
    assert status == 2 and "belongs to another batch (layout 'folder' there, 'tar' asked for)" in error


def test_a_dry_run_checks_and_makes_nothing(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path / "m.jsonl", [*ROWS, ROWS[0]])
    status, text, error = _run(manifest, "-o", tmp_path / "out", "--dry-run", "--json")
    facts = json.loads(text)
    assert status == 0 and (facts["pictures"], facts["to_make"], facts["double_rows"]) == (6, 6, 3)
    assert "line 5 and line 1" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([{"prompt": "x", "stps": 1}], [], "m.jsonl:1: unknown key 'stps'"),
        (["x"], ["--layout", "zip"], "unknown layout 'zip'"),
        (["x"], ["--sampler", "dimm"], "m.jsonl:1: "),
        (["x", {"prompt": "x", "sampler": "nowhere.json"}], [], "m.jsonl:2: cannot read 'nowhere.json'"),
        (["x"], ["--rank", "2", "--world", "2"], "ranks count from 0 to 1"),
        (["x"], ["--engine", "dask"], "take local or ray"),
        (["x"], ["--model", "nobody"], "unknown model 'nobody'"),
        ([{"prompt": "x", "strength": 1.0}], [], "acts only with a steerer"),
        (["x", {"prompt": "x", "reward": "shapes"}], [], "m.jsonl:2: reward shapes acts only with a steerer"),
        ([{"prompt": "x", "particles": 8}], [], "m.jsonl:1: particles 8 acts only with a steerer"),
        (["x"], ["--reward", "jpeg"], "--reward jpeg acts only with a steerer, and no row has one"),
    ],
)
def test_bad_input_is_a_line_and_status_2(
    tmp_path: Path, rows: list[Any], words: list[str], said: str
) -> None:
    manifest = _manifest(tmp_path / "m.jsonl", rows)
    status, _, error = _run(manifest, "-o", tmp_path / "out", *words)
    assert status == 2 and said in error and "Traceback" not in error
    assert not list(tmp_path.glob("out/shard-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_pipeline_does_not_take_is_refused_before_the_first_picture(
    tmp_path: Path, tiny_folder: Path, workers: int
) -> None:
    rows = [{"prompt": "y"}, {"prompt": "x", "sampler": "euler", "eta": 0.5}, {"prompt": "x", "width": 9}]
    words = [_manifest(tmp_path / "m.jsonl", rows), "--model", tiny_folder, "--workers", workers]
    status, _, error = _run(*words, "-o", tmp_path / "out")
    assert status == 2 and "Traceback" not in error
    assert "m.jsonl:2: eta 0.5 does nothing" in error and "m.jsonl:3: width 9 is no multiple" in error
    _manifest(tmp_path / "m.jsonl", rows[:1])  # corrected, the same folder may be another batch
    again = (*words[:3], "--layout", "tar", "--steps", 1, "-o", tmp_path / "out")
    assert _run(*again)[0] == 0


def test_a_full_disk_is_a_line_and_status_3_and_room_lets_it_go_on(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = _manifest(tmp_path / "m.jsonl", [{"prompt": "x", "seed": i} for i in range(4)])
    words = [manifest, "--model", tiny_folder, "--steps", 1, "--max-rows", 2, "-o", tmp_path / "out"]
    assert _run(*words[:-1], tmp_path / "whole")[0] == 0
    real, count = os.fsync, [0]

    def full(handle: int) -> None:
        count[0] += 1
        if count[0] > 3:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, error = _run(*words)
    assert status == 3 and len(error.strip().splitlines()) == 1
    assert "error: stopped: " in error and "No space left on device" in error
    assert _run(*words)[0] == 0 and _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_geneval_finds_one_row_and_its_samples(tmp_path: Path, tiny_folder: Path) -> None:
    rows = [{"prompt": f"a photo of {i}", "images": 2, "meta": {"tag": "two", "n": i}} for i in range(3)]
    manifest = _manifest(tmp_path / "m.jsonl", rows)
    words = [manifest, "--model", tiny_folder, "--steps", 1, "--layout", "geneval", "-o", tmp_path / "out"]
    assert _run(*words)[0] == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.isdigit())
    assert found == ["00000", "00001", "00002"]
    for number, name in enumerate(found):
        with open(tmp_path / "out" / name / "metadata.jsonl") as file:
            assert json.load(file) == {"prompt": f"a photo of {number}", "tag": "two", "n": number}
        samples = sorted((tmp_path / "out" / name / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png"]
        Image.open(samples[0]).verify()
    _manifest(tmp_path / "m.jsonl", rows[1:])
    assert _run(*words)[0] == 0
    with open(tmp_path / "out" / "00000" / "metadata.jsonl") as file:
        assert json.load(file)["n"] == 1
    assert not (tmp_path / "out" / "00002").exists()


def test_geneval_has_a_folder_for_every_line_also_for_pictures_asked_for_before(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """A line whose pictures an earlier one had was left out, and the numbers of all later ones moved."""
    rows = [
        {"prompt": "x", "seed": 1, "images": 2, "meta": {"n": 0}},
        {"prompt": "x", "seed": 0, "images": 3, "meta": {"n": 1}},
        {"prompt": "x", "seed": 2, "meta": {"n": 2}},
        {"prompt": "y", "seed": 2, "meta": {"n": 3}},
    ]
    manifest = _manifest(tmp_path / "m.jsonl", rows)
    words = [manifest, "--model", tiny_folder, "--steps", 1, "--layout", "geneval", "-o", tmp_path / "out"]
    assert _run(*words)[0] == 0
    samples = []
    for number, row in enumerate(rows):
        folder = tmp_path / "out" / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text())["n"] == number
        samples.append([path.read_bytes() for path in sorted((folder / "samples").iterdir())])
        assert len(samples[-1]) == row.get("images", 1)
    assert samples[1][1:] == samples[0] and samples[2] == samples[0][1:]


def test_two_commands_may_lay_out_one_geneval_folder(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second to put a prompt's folder in its place ended with status 3."""
    rename = os.rename

    def second(source: Any, target: Any) -> None:
        if Path(target).name == "00000" and not Path(target).exists():
            shutil.copytree(source, target)  # another process is first
        rename(source, target)

    manifest = _manifest(tmp_path / "m.jsonl", [{"prompt": "x", "seed": 1, "images": 2}])
    words = [manifest, "--model", tiny_folder, "--steps", 1, "--layout", "geneval", "-o", tmp_path / "out"]
    monkeypatch.setattr(os, "rename", second)
    assert _run(*words)[0] == 0
    assert len(list((tmp_path / "out" / "00000" / "samples").iterdir())) == 2
    assert not [path for path in (tmp_path / "out" / ".work").iterdir() if path.is_dir()]


def test_what_a_dead_process_left_of_a_geneval_folder_is_swept(tmp_path: Path, tiny_folder: Path) -> None:
    manifest = _manifest(tmp_path / "m.jsonl", [{"prompt": "x", "seed": 1}])
    words = [manifest, "--model", tiny_folder, "--steps", 1, "--layout", "geneval", "-o", tmp_path / "out"]
    assert _run(*words)[0] == 0
    work = tmp_path / "out" / ".work"
    gone, here = work / f"00000.{host()}-{2**22 + 1}-a", work / f"00000.{host()}-{os.getppid()}-a"
    for left in (gone, here):
        (left / "samples").mkdir(parents=True)
    assert _run(*words)[0] == 0
    assert not gone.exists() and here.exists()


def test_others_read_the_layouts(tmp_path: Path, tiny_folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    webdataset = pytest.importorskip("webdataset")
    rows = [{"prompt": "x", "seed": 1}, {"prompt": "y", "seed": 2, "guidance": 5.0}]
    manifest = _manifest(tmp_path / "m.jsonl", rows)
    words = [manifest, "--model", tiny_folder, "--steps", 1]
    assert _run(*words, "-o", tmp_path / "folder")[0] == 0
    assert _run(*words, "-o", tmp_path / "tar", "--layout", "tar")[0] == 0
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(loaded["prompt"]) == ["x", "y"] and sorted(loaded["guidance"], key=str) == [5.0, None]
    tars = [str(path) for path in sorted((tmp_path / "tar").glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert sorted(one["txt"] for one in samples) == ["x", "y"]
    assert all(one["json"]["prompt"] == one["txt"] and one["png"].size[0] > 0 for one in samples)


def _process(*words: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    command = [sys.executable, "-m", "diffplug", "batch", *(str(word) for word in words)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_stopped_and_started_again_end_with_the_same_bytes(
    tmp_path: Path, tiny_folder: Path
) -> None:
    manifest = _manifest(tmp_path / "m.jsonl", [{"prompt": f"x {i}", "seed": i} for i in range(48)])
    words = [manifest, "--model", tiny_folder, "--steps", 16, "--shard", 4, "--max-rows", 2]
    assert _run(*words, "-o", tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    first = _process(*words, "--workers", 2, "-o", out)
    until = time.monotonic() + 120
    while not list(out.glob("shard-*")) and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 143 and b"stopped: " in error, error
    wanted = _files(tmp_path / "whole")
    assert _files(out) and _files(out).items() <= wanted.items()
    second = _process(*words, "--workers", 2, "-o", out)
    assert second.wait(120) == 0
    assert _files(out) == wanted


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path, tiny_folder: Path, address: str) -> None:
    pytest.importorskip("ray.data")
    manifest = _manifest(tmp_path / "m.jsonl", ["x"])
    words = [manifest, "--model", tiny_folder, "--engine", "ray", "--address", address]
    status, _, error = _run(*words, "-o", tmp_path / "out")
    assert status == 2 and f"no Ray cluster at '{address}'" in error and len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ray_driver_that_is_killed_goes_on(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("ray.data")
    manifest = _manifest(tmp_path / "m.jsonl", [{"prompt": f"x {i}", "seed": i} for i in range(48)])
    words = [manifest, "--model", tiny_folder, "--steps", 10, "--shard", 4, "--max-rows", 2]
    assert _run(*words, "-o", tmp_path / "whole")[0] == 0
    wanted, out = _files(tmp_path / "whole"), tmp_path / "out"
    first = _process(*words, "--engine", "ray", "--workers", 2, "-o", out)
    until = time.monotonic() + 150
    while not list(out.glob("shard-*")) and time.monotonic() < until and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    first.communicate(timeout=60)
    assert _files(out).items() <= wanted.items()
    second = _process(*words, "--engine", "ray", "--workers", 2, "-o", out)
    _, error = second.communicate(timeout=400)
    assert second.returncode == 0, error[-2000:]
    assert _files(out) == wanted
