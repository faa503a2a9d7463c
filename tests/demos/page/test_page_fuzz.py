"""The page's functions with values that no browser would send, as its OpenAPI document names them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffplug import load
from diffplug.making.png import read_settings
from diffplug.recipe import Recipe
from diffplug.testing import tiny
from tests.demos.page.page_server import Served, served
from tests.demos.page.test_page_security import FORM, _ask, call

pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x" * 3000, "../../etc/passwd", "\u0000", "<script>", "ddim", "none", "4, 20"])
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page on a tiny model, whose pictures cost next to nothing."""
    home = tmp_path_factory.mktemp("page")
    tiny("sd15").save_pretrained(home / "tiny")
    with served(home, model=str(home / "tiny")) as one:
        yield one


def functions(page: Served) -> dict[str, int]:
    """Return how many values each function of the page takes, by its name in the OpenAPI document."""
    document = json.loads(_ask(f"{page.url}/gradio_api/openapi.json")[2])
    found = (re.fullmatch(r"/gradio_api/call/v2/(\w+)", path) for path in document["paths"])
    names = {match[1] for match in found if match}
    config = json.loads(_ask(f"{page.url}/config")[2])
    return {one["api_name"]: len(one["inputs"]) for one in config["dependencies"] if one["api_name"] in names}


def _as_alone(page: Served) -> None:
    """The page still makes the picture that the pipeline makes by itself."""
    answer = call(page, "make", [*FORM[:2], "ddim", 2, 5.0, 2**40, 1, "none", "jpeg", 4, 0.0, False])
    assert "event: complete" in answer, answer[-300:]
    (found,) = [path for path in page.folder.glob("*.png") if read_settings(path)["seed"] == 2**40]
    pipe = load(page.folder.parent / "tiny")
    alone = Recipe(sampler="ddim", steps=2, guidance=5.0).run(pipe, [FORM[0]], [2**40])
    assert Image.open(found).tobytes() == alone.images[0].tobytes()


def _refused_or_done(page: Served, answer: str) -> None:
    assert answer[:1] != "5", answer[:300]
    assert "event: complete" in answer or "event: error" in answer or answer[:1] == "4", answer[:300]
    for secret in ("Traceback", "/demos/", str(page.folder), str(Path.home()) + "/", "site-packages"):
        assert secret not in answer, answer[:600]


def _with_anything(page: Served, name: str, count: int) -> None:
    """Call a function with values of any kind, as many as it takes or fewer."""

    @_FEW
    @given(st.lists(_VALUES, min_size=count, max_size=count) | st.lists(_VALUES, max_size=2))
    def anything(values: list[Any]) -> None:
        _refused_or_done(page, call(page, name, values))

    anything()

    @_FEW
    @given(st.dictionaries(st.text(max_size=12) | st.sampled_from(["prompt", "steps"]), _VALUES, max_size=3))
    def any_keys(values: dict[str, Any]) -> None:
        body = json.dumps(values).encode()
        address = f"{page.url}/gradio_api/call/v2/{name}"
        status, _, text = _ask(address, body, Content_Type="application/json")
        _refused_or_done(page, f"{status} {text.decode()} event: complete")

    any_keys()


def test_no_function_breaks_on_values_of_any_kind(page: Served) -> None:
    known = functions(page)
    assert {"make", "compare", "steer", "restore", "new_pair", "vote_left", "last_seed", "recall"} <= set(
        known
    )
    for name, count in known.items():
        _with_anything(page, name, count)

    @_FEW
    @given(st.integers(0, len(FORM) - 1), _VALUES)
    def one_wrong(place: int, value: Any) -> None:
        plain = [*FORM[:2], "ddim", 2, 5.0, 99, 1, "none", "jpeg", 4, 0.0, False]
        _refused_or_done(page, call(page, "make", [value if i == place else v for i, v in enumerate(plain)]))

    one_wrong()
    assert page.process.poll() is None
    _as_alone(page)
    frames = [line for line in page.errors.read_text().splitlines() if 'File "' in line and "/demos/" in line]
    assert frames == []
