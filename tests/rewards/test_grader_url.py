"""A grader behind a URL: what is sent, what is read, and every way in which a server can misbehave."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import pickle
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image

from diffplug import rewards
from diffplug.rewards.grader_url import GraderReward

PICTURES = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"picture {i}, “quoted”" for i in range(5)]


class Server(ThreadingHTTPServer):
    """Answers by its path; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Any] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, dict(self.headers)))
        way, count = self.path.strip("/"), len(body["images"])
        if way == "moved":
            self.send_response(302)
            self.send_header("Location", self.server.url("good"))
            self.end_headers()
            return
        answers: dict[str, Any] = {
            "good": {"scores": [float(len(p)) for p in body["prompts"]]},
            "null": {"scores": [None] * count},
            "few": {"scores": [1.0]},
            "long": {"scores": [10**310] + [0.0] * (count - 1)},
            "texts": {"scores": ["1.0"] * count},
            "true": {"scores": [True] * count},
            "list": [1.0] * count,
            "number": {"scores": 3},
            "huge": {"scores": [1.0], "rest": "x" * 5000},
        }
        if way == "slow":
            time.sleep(1.5)
        self.send_response(500 if way == "broken" else 200)
        self.end_headers()
        raw = {"pickle": pickle.dumps({"scores": [1.0] * count}), "deep": b"[" * 100_000}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(raw.get(way) or json.dumps(answers.get(way, {})).encode())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()


def test_pictures_go_out_as_png_and_numbers_come_back(server: Server) -> None:
    server.seen.clear()
    reward = GraderReward(server.url("good"), batch=2, headers={"Authorization": "Bearer me"})
    scores = rewards.score(reward, PICTURES, PROMPTS)
    assert scores.tolist() == [float(len(prompt)) for prompt in PROMPTS]
    assert [len(body["images"]) for _, body, _ in server.seen] == [2, 2, 1]
    _, body, headers = server.seen[0]
    assert body["prompts"] == PROMPTS[:2] and headers["Authorization"] == "Bearer me"
    sent = Image.open(io.BytesIO(base64.b64decode(body["images"][1])))
    assert sent.size == (6, 8)
    pixels = torch.tensor(list(sent.getdata())).reshape(8, 6, 3) / 255
    torch.testing.assert_close(pixels, PICTURES[1].movedim(0, -1), atol=0.5 / 255 + 1e-6, rtol=0)


def test_null_is_no_score(server: Server) -> None:
    assert all(math.isnan(one) for one in GraderReward(server.url("null"))(PICTURES, PROMPTS))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("few", "answered with 1 scores for 5 pictures"),
        ("texts", "scores that are no numbers"),
        ("true", "scores that are no numbers"),
        ("number", "scores that are no numbers"),
        ("long", "too large for a score"),
        ("list", "something else than"),
        ("pickle", "something else than"),
        ("deep", "more than 1000 bytes|something else than"),
        ("huge", "answered with more than 1000 bytes"),
        ("broken", "answered with status 500"),
        ("moved", "answered with status 302"),
        ("slow", "gave no answer .*timed out"),
    ],
)
def test_bad_answers_are_one_line(server: Server, way: str, message: str) -> None:
    reward = GraderReward(server.url(way), timeout=0.5, reply_limit=1000)
    with pytest.raises(ConnectionError, match=message) as found:
        reward(PICTURES, PROMPTS)
    assert "\n" not in str(found.value) and server.url(way) in str(found.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ConnectionError, match="gave no answer .*refused"):
        GraderReward("http://127.0.0.1:9/")(PICTURES, PROMPTS)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/score",
        "http://127.0.0.1.example.com/",
        "http://localhost@example.com/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "https://",
        "127.0.0.1:80",
        "",
        "http://[::1",
        "http://127.0.0.1:port/",
    ],
)
def test_only_https_and_this_machine(url: str) -> None:
    with pytest.raises(ValueError, match="https://host/path"):
        GraderReward(url)


def test_secrets_in_an_address_are_not_shown() -> None:
    with pytest.raises(ConnectionError) as found:
        GraderReward("http://me:secret@127.0.0.1:9/score?key=hidden")(PICTURES, PROMPTS)
    assert "secret" not in str(found.value) and "hidden" not in str(found.value)


def test_options_and_specs(server: Server) -> None:
    for options in ({"timeout": 0}, {"timeout": "long"}, {"batch": 0}, {"reply_limit": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GraderReward("https://example.com", **options)  # type: ignore[arg-type]
    spec = f"2*url:'{server.url('good')}'"
    assert rewards.get(spec)(PICTURES[:1], ["ab"]).tolist() == [4.0]
    with pytest.raises(ValueError, match="reward 'url' needs an address: write url:https://host/path"):
        rewards.get("url")
    with pytest.raises(ValueError, match="'url' opens addresses or downloads: it is not accepted"):
        rewards.parse("url:https://example.com", python=False)
