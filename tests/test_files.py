"""Files are whole or absent, names stay inside, JSON errors name the file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffplug import files
from diffplug.files import (
    WriteError,
    atomic_path,
    atomic_write,
    output_file,
    output_folder,
    read_json,
    safe_join,
    write_json,
    write_new,
)

ROOT = Path(__file__).resolve().parents[1]


def test_write_creates_and_replaces(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.txt", "höhe")
    assert (tmp_path / "a.txt").read_bytes() == "höhe".encode()
    atomic_write(tmp_path / "a.txt", b"\x00\x01")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00\x01"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_temporary_file_keeps_folder_and_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "picture.png") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png"
        temporary.write_bytes(b"x")


@pytest.mark.parametrize("call", ["sync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "a.txt").write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files if call == "sync" else files.os, call, full)
    with pytest.raises(
        WriteError, match=r"cannot write .*a\.txt': No space left on device\. Choose"
    ) as caught:
        atomic_write(tmp_path / "a.txt", "new")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mid-way"), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("mid-way")
    assert os.listdir(tmp_path) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file"), atomic_path(tmp_path / "a.bin"):
        pass


def test_long_names_still_find_room_for_the_temporary_one(tmp_path: Path) -> None:
    name = "ü" * 125 + ".txt"
    atomic_write(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_is_a_file_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            WriteError, match="cannot write .* Choose a folder that can be written to"
        ) as caught:
            output_folder(bad)
        assert "\n" not in str(caught.value)


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.Path, "touch", denied)
    with pytest.raises(WriteError, match="Permission denied"):
        output_folder(tmp_path / "out")


def test_output_folder_leaves_no_probe(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []


def test_json_goes_round(tmp_path: Path) -> None:
    value = {"höhe": [1, 2.5, None, True], "nested": {"a": "b"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("text", ["{", '{"a": NaN}', "[1,]", "\ud800".encode("utf-8", "surrogatepass")])
def test_bad_json_names_the_file(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"bad\.json' is not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.json' cannot hold"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


UNSAFE = [
    "",
    ".",
    "..",
    "...",
    "a/b",
    "a\\b",
    "/etc",
    "c:",
    "C:x",
    "nul",
    "NUL.txt",
    "com1.png",
    "a.",
    "a ",
    " a",
]
UNSAFE += ["a\x00b", "a\nb", "\u2215", "a\u2044b", "\uff0e\uff0e", "\uff0f", "x" * 256, "a*", "\u202egnp"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file name: .* Use letters"):
        safe_join(tmp_path, name)


def test_links_that_lead_outside_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads outside"):
        safe_join(root, "link", "a.png")


@pytest.mark.law
@given(st.lists(st.text(max_size=12), min_size=1, max_size=3))
def test_what_is_joined_lies_inside_and_can_be_written(parts: list[str]) -> None:
    root = Path.cwd()
    try:
        joined = safe_join(root, *parts)
    except ValueError:
        return
    assert joined.is_relative_to(root.resolve()) and joined != root
    assert len(joined.relative_to(root.resolve()).parts) == len(parts)


def test_plain_names_pass(tmp_path: Path) -> None:
    assert safe_join(tmp_path, "run-1", "seed_000007.png") == tmp_path.resolve() / "run-1" / "seed_000007.png"
    json.dumps(str(safe_join(tmp_path, "grün.png")))


def test_an_output_file_gets_its_folder_and_a_folder_is_none(tmp_path: Path) -> None:
    assert output_file(tmp_path / "new" / "six.json").parent.is_dir()
    with pytest.raises(ValueError, match="is a folder: give the name of a file in it"):
        output_file(tmp_path)


def test_a_new_file_is_whole_and_nobody_s(tmp_path: Path) -> None:
    assert write_new(tmp_path / "a.png", b"ours")
    assert not write_new(tmp_path / "a.png", b"theirs")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    assert not write_new(tmp_path / "link.png", b"through a link")
    assert (tmp_path / "a.png").read_bytes() == b"ours"
    assert sorted(os.listdir(tmp_path)) == ["a.png", "link.png"]


def test_a_new_file_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "link", full)
    with pytest.raises(WriteError, match="No space left"):
        write_new(tmp_path / "a.png", b"x")
    assert os.listdir(tmp_path) == []


def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, kept = files.host(), []
    for name, stays in {
        f".seed-000000.tmp-{host}-{dead.pid}-0123abcd.png": False,
        f".seed-000001.tmp-{host}-{os.getpid()}-0123abcd.png": True,  # somebody writes it now
        f".seed-000002.tmp-ffffff-{dead.pid}-0123abcd.png": True,  # another host's
        f".seed-000003.tmp-{dead.pid}-0123abcd.png": True,  # of an older version, and not a day old
        ".hidden.png": True,
        "seed-000000.png": True,
    }.items():
        (tmp_path / name).write_bytes(b"half")
        kept += [name] if stays else []
    output_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    for name in kept:
        os.utime(tmp_path / name, (0, 0))
    assert files.sweep_temporaries(tmp_path) == 3
    assert sorted(os.listdir(tmp_path)) == [".hidden.png", "seed-000000.png"]


def test_the_temporary_file_of_a_killed_process_is_known_by_its_name(tmp_path: Path) -> None:
    code = (
        "import os, sys; from diffplug.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], cwd=ROOT, timeout=60)
    assert len(os.listdir(tmp_path)) == 1
    assert files.sweep_temporaries(tmp_path) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "large", "missing", "deep"])
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_text("[" * 100_000)
    sentence = {
        "folder": "it is a folder",
        "pipe": "no regular file",
        "large": "are allowed",
        "missing": "no such file",
        "deep": "nested too deeply",
    }[kind]
    with pytest.raises((OSError, ValueError), match=rf"a\.json.*{sentence}"):
        read_json(path, limit=1000 if kind == "large" else 2**20)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(ValueError, match="link in a circle|leads outside"):
        if safe_join(tmp_path, "a.png"):  # later versions of Python resolve it
            raise ValueError("link in a circle")


def test_a_file_of_its_owner_alone_gets_the_usual_mode(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        temporary.write_bytes(b"x")
        temporary.chmod(0o600)
    (tmp_path / "usual").write_bytes(b"x")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="the name of the output folder is empty"):
        output_folder("")
