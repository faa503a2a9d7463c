"""A grader behind a URL: pictures go out as PNG in JSON, numbers come back as JSON.

    POST  {"prompts": ["a red circle", ...], "images": ["<base64 of a PNG>", ...]}
    reply {"scores": [0.7, null, ...]}                      null: no score for this picture

Only https, or http on this machine. Redirects are not followed, proxies of the environment are not asked, and
the reply is read as JSON, never unpickled.
"""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any
from urllib import error, request
from urllib.parse import urlsplit

from torch import Tensor

from diffplug.checks import check_number, check_whole

_HERE = ("127.0.0.1", "::1", "localhost")
_LARGEST_REPLY = 2**20


class GraderReward:
    """The numbers that a server gives for pictures and prompts.

    url: https://..., or http:// on this machine (127.0.0.1, ::1, localhost). timeout: seconds for connecting
    and for each read. batch: pictures in one request. reply_limit: bytes of a reply at most. headers: sent
    with every request, for instance a token. A call raises ConnectionError, in one line, where there is no
    good answer; `prepare()` asks nothing. Raises ValueError for other addresses, and for bad options.
    """

    reaches_out = True
    needs = "an address: write url:https://host/path"
    differentiable = False

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        batch: int = 16,
        reply_limit: int = _LARGEST_REPLY,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.url = checked_url(url)
        check_number("timeout", timeout)
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout={timeout}: give seconds above 0")
        check_whole("batch", batch)
        check_whole("reply_limit", reply_limit)
        self.timeout, self.batch, self.reply_limit = timeout, batch, reply_limit
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        self._opener = request.build_opener(request.ProxyHandler({}), _NoRedirect())

    @classmethod
    def from_spec(cls, text: str) -> GraderReward:
        """From the address."""
        return cls(text)

    def __call__(self, images: Tensor, prompts: list[str]) -> list[float]:
        """Return scores of pictures [n, 3, h, w] in [0, 1]; NaN where the server gives none."""
        found: list[float] = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            found += self._asked(images[part], prompts[part])
        return found

    def _asked(self, images: Tensor, prompts: list[str]) -> list[float]:
        message = {"prompts": list(prompts), "images": [_png(image) for image in images]}
        asked = request.Request(  # noqa: S310  the scheme was checked
            self.url, json.dumps(message).encode(), self.headers, method="POST"
        )
        try:
            with self._opener.open(asked, timeout=self.timeout) as reply:
                body = reply.read(self.reply_limit + 1)
        except error.HTTPError as refused:
            raise self._trouble(f"answered with status {refused.code}") from None
        except (OSError, ValueError) as failed:
            reason = str(getattr(failed, "reason", failed)).partition("\n")[0]
            raise self._trouble(f"gave no answer ({reason})") from None
        if len(body) > self.reply_limit:
            raise self._trouble(f"answered with more than {self.reply_limit} bytes")
        return self._scores(body, len(images))

    def _scores(self, body: bytes, count: int) -> list[float]:
        try:
            scores: Any = json.loads(body)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._trouble('answered with something else than {"scores": [...]}') from None
        numbers = isinstance(scores, list) and all(
            one is None or (isinstance(one, (int, float)) and not isinstance(one, bool)) for one in scores
        )
        if not numbers or len(scores) != count:
            given = f"{len(scores)} scores" if numbers else "scores that are no numbers"
            raise self._trouble(f"answered with {given} for {count} pictures")
        try:
            return [math.nan if one is None else float(one) for one in scores]
        except OverflowError:
            raise self._trouble("answered with a whole number too large for a score") from None

    def _trouble(self, what: str) -> ConnectionError:
        return ConnectionError(
            f"the grader at {_shown(self.url)} {what}: see docs/rewards.md for what it must say"
        )


class _NoRedirect(request.HTTPRedirectHandler):
    """A redirect is an answer with its status: pictures go nowhere but to the address named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return None: do not follow."""
        return None


def checked_url(url: str) -> str:
    """Return the address. Raises ValueError unless it is https, or http on this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        raise ValueError(f"url={url!r} is no address: write https://host/path") from None
    if parts.scheme == "https" and host:
        return url
    if parts.scheme == "http" and host in _HERE:
        return url
    raise ValueError(
        f"url={_shown(url)!r}: give https://host/path, or http:// on this machine ({', '.join(_HERE)}); "
        "pictures and prompts are not sent over the network in the clear"
    )


def _shown(url: str) -> str:
    """Return an address without the name and password in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _png(image: Tensor) -> str:
    from diffusers.utils.pil_utils import numpy_to_pil

    buffer = io.BytesIO()
    array = image.detach().float().clamp(0, 1).movedim(0, -1).cpu().numpy()
    numpy_to_pil(array)[0].save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
