"""Manifests: every format says the same, and every mistake has its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffplug.demos.batch.manifest import ManifestError, Row, read_manifest
from diffplug.demos.batch.plan import plan
from diffplug.files import ReadError

SLOW = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x", "steps": "6"}', "steps: input should be a valid integer, got '6'"),
        ('{"prompt": "x", "seed": true}', "seed: input should be a valid integer, got True"),
        ('{"prompt": "x", "stps": 6}', "Did you mean 'steps'"),
        ('{"prompt": "x", "guidance": NaN}', "NaN is no JSON number"),
        ('{"prompt": "x", "guidance": 1e999}', "finite"),
        ('{"prompt": "x", "width": 9000, "height": 9000}', "81,000,000 pixels"),
        ('{"prompt": "x" "steps": 6}', "2:16: no JSON"),
        ('{"prompt": "x", "prompt": "y"}', "'prompt' stands there twice"),
        ('{"prompt": " "}', "is blank"),
        ('{"prompt": "a\\u0000b"}', "NUL"),
        ('{"prompt": "a\\ud800b"}', "unicode"),
        ('{"steps": 6}', "prompt is missing"),
        ("[1]", "an object or a prompt is expected, got list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "x", "meta": {"a": "' + "x" * 5000 + '"}}', "4,096 are allowed"),
        ('"' + "x" * 2**21 + '"', "more than 1,048,576 bytes"),
        (b'{"prompt": "\xff"}', "13: the byte 0xff is not UTF-8"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: bytes | str, said: str) -> None:
    data = line.encode() if isinstance(line, str) else line
    path = _write(tmp_path / "m.jsonl", b'{"prompt": "fine"}\n' + data + b'\n{"prompt": "fine"}\n')
    with pytest.raises(ManifestError) as error:
        list(read_manifest(path))
    (problem,) = error.value.problems
    assert problem.startswith(f"{path}:2:") and said in problem


def test_twenty_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.jsonl", '{"prompt": ""}\n' * 50)
    with pytest.raises(ManifestError) as error:
        list(read_manifest(path))
    assert len(error.value.problems) == 20 and error.value.more == 30


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("m.csv", "prmpt\nx\n", "the header needs a column 'prompt'"),
        ("m.csv", "prompt,steps\nx,six\n", ":2: steps:"),
        ("m.csv", "prompt\nx,y\n", ":2: more values than columns"),
        ("m.csv", 'prompt\n"x\n', "no CSV"),
        ("m.txt", "\n\n", "holds no row"),
        ("m.jsonl", b"\xff\xfex", "UTF-16"),
    ],
)
def test_files_that_are_no_manifests(tmp_path: Path, name: str, data: bytes | str, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        list(read_manifest(_write(tmp_path / name, data)))


def test_a_missing_file_and_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="no such file"):
        list(read_manifest(tmp_path / "none.jsonl"))
    pytest.importorskip("pyarrow")
    with pytest.raises(ReadError, match="no parquet"):
        list(read_manifest(_write(tmp_path / "m.parquet", "x")))


def test_marks_and_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.jsonl", b'\xef\xbb\xbf{"prompt": "x"}\r\n\r\n"y"')
    assert [(n, row.prompt) for n, row in read_manifest(path)] == [(1, "x"), (3, "y")]


def test_csv_rows_begin_where_they_begin(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.csv", 'prompt,seed,meta\n"two\nlines",7,"{""a"": 1}"\ny,,\n')
    rows = list(read_manifest(path))
    assert [n for n, _ in rows] == [2, 4]
    assert rows[0][1] == Row(prompt="two\nlines", seed=7, meta={"a": 1}) and rows[1][1].seed is None


_prompts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=40).filter(
    lambda text: text.strip()
)
_rows = st.fixed_dictionaries(
    {"prompt": _prompts},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "steps": st.integers(1, 1000),
        "guidance": st.floats(0, 1000) | st.integers(0, 1000),
        "eta": st.sampled_from([0.0, -0.0, 0.5, 1.0]),
    },
)


def _ids(path: Path) -> list[str]:
    return [one.id for one in plan(path, read_manifest(path), model="m").pictures]


@SLOW
@given(st.lists(_rows, min_size=1, max_size=4, unique_by=repr))
def test_ids_do_not_depend_on_the_format(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    jsonl = _write(tmp_path / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    turned = _write(
        tmp_path / "t.jsonl", "".join(json.dumps(dict(reversed(row.items()))) + "\n" for row in rows)
    )
    with open(tmp_path / "m.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "seed", "steps", "guidance", "eta"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    table = pyarrow.Table.from_pylist(
        [{k: float(v) if k == "guidance" else v for k, v in row.items()} for row in rows],
        pyarrow.schema(
            [
                ("prompt", pyarrow.string()),
                ("seed", pyarrow.int64()),
                ("steps", pyarrow.int64()),
                ("guidance", pyarrow.float64()),
                ("eta", pyarrow.float64()),
            ]
        ),
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    wanted = _ids(jsonl)
    assert _ids(turned) == _ids(tmp_path / "m.csv") == _ids(tmp_path / "m.parquet") == wanted


@SLOW
@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_a_line_that_is_told(tmp_path: Path, data: bytes) -> None:
    for suffix in (".jsonl", ".csv", ".txt"):
        path = _write(tmp_path / f"m{suffix}", data)
        try:
            list(read_manifest(path))
        except ManifestError as error:
            assert all(str(path) in problem for problem in error.problems)
