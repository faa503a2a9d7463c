"""The server of the page: for this machine only, with a private folder; no environment opens a door."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["HOME", "LARGEST_UPLOAD", "private_environment", "serve"]

HOME = "127.0.0.1"
LARGEST_UPLOAD = "10mb"
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@contextmanager
def private_environment() -> Iterator[Path]:
    """Yield a folder that only this user can read, for the files of the page; it is gone afterwards.

    Gradio fills what is left out, or empty, from variables called GRADIO_*: they are dropped, so that no
    environment opens a door. Enter this before Gradio is imported.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    folder = Path(tempfile.mkdtemp(prefix="diffplug-"))
    for name in before:
        del os.environ[name]
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        yield folder
    finally:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            os.environ.pop(name, None)
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


class _Headers:
    """Adds headers that keep browsers from guessing types and other pages from framing this one."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class _Refusals:
    """Answers 400 to what Gradio breaks on: unknown keys, uploads without a file, unknown events.

    What goes wrong in the page's own functions does not come here: they answer through the queue.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        began = False

        async def watched(message: Any) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            print(f"refused {scope['path'][:80]!r}: {error!r:.200}", file=sys.stderr)
            if not began:
                await send({"type": "http.response.start", "status": 400, "headers": [_JSON]})
            body = b"" if began else b'{"detail": "this page cannot read the request"}'
            await send({"type": "http.response.body", "body": body})


_JSON = (b"content-type", b"application/json")


def serve(
    page: Any,
    folder: Path,
    *,
    host: str = HOME,
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    browser: bool = False,
    names: Sequence[str] = (),
    wait: bool = True,
    copies: int = 1,
    look: dict[str, Any] | None = None,
) -> str:
    """Serve a page until it is stopped; return its address. wait: False to go on at once.

    host: where to listen; others than this machine's own need auth, a name and a password. names: further
    names by which browsers may ask. Raises ValueError for a host without a password, OSError for a port
    that is taken.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if host not in (HOME, "localhost") and auth is None:
        raise ValueError(f"listening on {host} lets others in: give --auth NAME, and a password")
    allowed = [HOME, "localhost", *(() if host == "0.0.0.0" else (host,)), *names]  # noqa: S104
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed)]
    middleware += [Middleware(_Headers), Middleware(_Refusals)]
    page.queue(max_size=16, default_concurrency_limit=copies, api_open=False)
    _, address, _ = page.launch(
        share=False,
        server_name=host,
        server_port=port,
        auth=auth,
        inbrowser=browser,
        allowed_paths=[str(folder)],
        max_file_size=LARGEST_UPLOAD,
        show_error=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        strict_cors=True,
        max_threads=16,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={"middleware": middleware, "openapi_url": None, "docs_url": None, "redoc_url": None},
        **(look or {}),
    )
    if wait:
        page.block_thread()
    return str(address)
