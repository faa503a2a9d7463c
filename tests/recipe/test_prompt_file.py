"""Prompts from files: what editors and spreadsheets write is read, what cannot be is told by line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffplug.recipe.prompt_file import Prompt, check_prompt, read_prompts


def _file(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"a red circle\na green cross\n",
        b"\xef\xbb\xbfa red circle\r\n\r\n  a green cross  \r\n",
        b"a red circle\ra green cross",
    ],
)
def test_a_text_with_a_prompt_in_each_line(tmp_path: Path, data: bytes) -> None:
    assert read_prompts(_file(tmp_path, "p.txt", data)) == [Prompt("a red circle"), Prompt("a green cross")]


def test_a_csv_with_its_columns(tmp_path: Path) -> None:
    data = '\ufeffseed,prompt,negative_prompt\r\n7,"a cat, asleep",\r\n\r\n,"two ""cats""",dog\r\n'
    found = read_prompts(_file(tmp_path, "p.csv", data))
    assert found == [Prompt("a cat, asleep", None, 7), Prompt('two "cats"', "dog", None)]


def test_json_lines_with_texts_and_objects(tmp_path: Path) -> None:
    data = '"a cat"\n\n{"prompt": "a dög", "seed": 3, "negative_prompt": null}\n'
    assert read_prompts(_file(tmp_path, "p.jsonl", data)) == [Prompt("a cat"), Prompt("a dög", None, 3)]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"a\nb\xfc\n", r"p\.txt:2: the byte 0xfc is not UTF-8"),
        ("p.txt", "ab".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", "a\n" + "x" * 5000, r"p\.txt:2: the prompt has 5,000 characters"),
        ("p.csv", "text\na\n", r"p\.csv:1: the header has no column 'prompt'"),
        ("p.csv", "prompt,seed\na,1\nb,-1\n", r"p\.csv:3: seed is '-1'"),
        ("p.csv", "prompt\na, b\n", r"p\.csv:2: more values than columns"),
        ("p.csv", "prompt,sed\na,1\n", "unknown key 'sed'. Did you mean 'seed'"),
        ("p.csv", 'prompt\n"a\n', r"p\.csv:\d: no CSV"),
        ("p.jsonl", '"a"\n{"prompt": "b",}\n', r"p\.jsonl:2: no JSON"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "a key stands there twice"),
        ("p.jsonl", '{"seed": 1}', "a prompt is needed"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "seed is 'True'"),
        ("p.jsonl", "[" * 5000, r"p\.jsonl:1: no JSON"),
        ("p.jsonl", "[1]", "a text or an object is expected"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "not valid UTF-8"),
        ("p.jsonl", '{"prompt": "a\\u0000"}', "NUL"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(
    tmp_path: Path, name: str, data: str | bytes, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        read_prompts(_file(tmp_path, name, data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_missing_files_folders_and_pipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot read 'missing.txt': no such file"):
        read_prompts("missing.txt")
    with pytest.raises(OSError, match="it is a folder"):
        read_prompts(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        with pytest.raises(OSError, match="no regular file"):
            read_prompts(tmp_path / "pipe.txt")


@given(st.binary(max_size=200), st.sampled_from(["p.txt", "p.csv", "p.jsonl"]))
def test_any_bytes_are_prompts_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = _file(tmp_path_factory.getbasetemp(), name, data)
    try:
        assert all(prompt.text.strip() for prompt in read_prompts(path))
    except ValueError as error:
        assert "\n" not in str(error) or b"\\n" in data or "\n" in repr(data)


@given(st.lists(st.text(min_size=1, max_size=20).filter(lambda t: t.strip() and "\0" not in t), min_size=1))
def test_what_json_lines_hold_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    lines = "\n".join(json.dumps({"prompt": text}) for text in texts)
    path = _file(tmp_path_factory.getbasetemp(), "all.jsonl", lines)
    assert [prompt.text for prompt in read_prompts(path)] == texts


def test_prompts_of_the_command_line_are_checked() -> None:
    check_prompt("prompt 1", "a cat")
    for text, sentence in (("  ", "prompt 1 is blank"), ("a\udcff", "prompt 1 is not valid UTF-8")):
        with pytest.raises(ValueError, match=sentence):
            check_prompt("prompt 1", text)
