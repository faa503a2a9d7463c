"""The page as an attacker of the same machine, or a page in the same browser, meets it."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import urllib.error
import urllib.request  # addresses here are of this machine
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.demos.page.page_server import Served, served

pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page")) as one:
        yield one


def _ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, named)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def call(page: Served, name: str, values: list[Any]) -> str:
    """Return the event stream of a function of the page."""
    address = f"{page.url}/gradio_api/call/{name}"
    body = json.dumps({"data": values}).encode()
    status, _, text = _ask(address, body, Content_Type="application/json")
    if status != 200:
        return f"{status} {text.decode()}"
    return _ask(f"{address}/{json.loads(text)['event_id']}")[2].decode()


_PARTS = "multipart/form-data; boundary=xx"
FORM: list[Any] = ["a red circle", "", "dc-solver", 5, 5.0, 0, 1, "none", "shapes", 4, 0.0, False]


def _with(place: int, value: Any) -> list[Any]:
    return [value if i == place else one for i, one in enumerate(FORM)]


def test_it_listens_here_only_whatever_the_environment_says(page: Served) -> None:
    port = int(page.url.rsplit(":", 1)[1])
    wanted = f"0100007F:{port:04X}"
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [wanted]
    assert "gradio.live" not in page.errors.read_text()


def test_other_names_of_this_machine_are_refused_and_headers_are_there(page: Served) -> None:
    assert _ask(page.url, Host="evil.example")[0] == 400
    status, headers, _ = _ask(page.url)
    assert status == 200 and headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    _, headers, _ = _ask(f"{page.url}/config", Origin="http://evil.example")
    assert "access-control-allow-origin" not in {name.lower() for name in headers}
    assert _ask(f"{page.url}/openapi.json")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "pyproject.toml",
        "../../../../etc/passwd",
        "/proc/self/environ",
        "diffplug/making/png.py",
    ],
)
def test_no_file_of_the_machine_is_served(page: Served, path: str) -> None:
    status, _, text = _ask(f"{page.url}/gradio_api/file={path}")
    assert status in (403, 404) and b"root:" not in text


def test_the_settings_of_the_page_tell_no_path(page: Served) -> None:
    text = _ask(f"{page.url}/config")[2].decode()
    assert str(page.folder) not in text and str(Path.home()) + "/" not in text


def test_files_by_path_or_address_are_no_uploads(page: Served) -> None:
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(1)

        def listen() -> None:
            try:
                trap.accept()
                asked.append("came")
            except OSError:
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        for path in ("/etc/passwd", address):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            assert "error" in call(page, "restore", [file])
            assert "error" in call(page, "restore", [{**file, "url": path}])
        thread.join()
    assert asked == []


@pytest.mark.parametrize(
    "values",
    [
        _with(0, "x" * 600),
        _with(0, None),
        _with(0, "\ud800"),
        _with(2, "/etc/passwd"),
        _with(2, "owner/name"),
        _with(3, 10_000),
        _with(3, True),
        _with(5, 1e30),
        _with(5, "NaN"),
        _with(8, "evil.py"),
        [],
    ],
    ids=lambda values: repr(values)[:30],
)
def test_what_is_out_of_range_is_an_error_without_a_trace(page: Served, values: list[Any]) -> None:
    answer = call(page, "make", values)
    assert "event: error" in answer or answer[:1] in "45", answer[:300]
    assert "Traceback" not in answer and "/demos/" not in answer and str(Path.home()) not in answer


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("call/v2/make", b'{"nope": 1}', "application/json"),
        ("call/v2/make", b"{}", "application/json"),
        ("call/v2/vote_left", b"[]", "application/json"),
        ("call/v2/nothing", b"{}", "application/json"),
        ("upload", b'--xx\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--xx--\r\n', _PARTS),
        ("call/make/nothing", None, ""),
    ],
)
def test_a_request_that_cannot_be_read_is_no_breakdown(
    page: Served, path: str, body: bytes | None, kind: str
) -> None:
    headers = {"Content_Type": kind} if kind else {}
    status, _, text = _ask(f"{page.url}/gradio_api/{path}", body, **headers)
    assert status < 500 and b"Traceback" not in text and b"site-packages" not in text, text[:300]


def test_uploads_are_small(page: Served) -> None:
    edge = b"xx"
    head = b'--xx\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + b"0" * (11 * 2**20) + b"\r\n--" + edge + b"--\r\n"
    status, _, _ = _ask(
        f"{page.url}/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=xx"
    )
    assert status == 413


def test_the_folder_of_the_page_is_private_and_nothing_of_ours_broke(page: Served) -> None:
    assert "complete" in call(page, "make", FORM)
    (private,) = [path for path in page.temporary.iterdir() if path.name.startswith("diffplug-")]
    assert stat.S_IMODE(os.stat(private).st_mode) == 0o700
    assert "/demos/" not in page.errors.read_text()
    assert page.process.poll() is None
