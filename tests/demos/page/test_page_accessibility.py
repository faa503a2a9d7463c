"""The page for people who do not see it: every control has a name, and axe finds nothing that is ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffplug.testing import tiny
from tests.demos.page.page_server import Served, served
from tests.demos.page.test_page_browser import CHROMIUM, browser

__all__ = ["browser"]
pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]
TABS = ("Make", "Compare", "Steer", "Restore", "Vote")
AXE = os.environ.get("DIFFPLUG_AXE")
GRADIOS_OWN = {"aria-prohibited-attr", "color-contrast", "label-content-name-mismatch"}

_NAMELESS = """() => [...document.querySelectorAll(
    'button, input, textarea, select, [role=button], [role=tab], [role=listbox]')]
  .filter(one => one.offsetParent !== null && one.type !== 'hidden')
  .filter(one => !(one.getAttribute('aria-label') || one.getAttribute('title') ||
    [...(one.labels ?? [])].map(label => label.innerText).join('').trim() || one.innerText?.trim() ||
    (one.getAttribute('aria-labelledby') ?? '').split(' ')
      .map(id => document.getElementById(id)?.innerText ?? '').join('').trim()))
  .map(one => one.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def page_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("page")
    tiny("sd15").save_pretrained(home / "tiny")
    with served(home, model=str(home / "tiny")) as one:
        yield one


@pytest.fixture
def page(browser: Any, page_process: Served) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    one = context.new_page()
    one.goto(page_process.url)
    one.locator("#make").wait_for(timeout=60_000)
    yield one
    context.close()


def _open(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()
    page.wait_for_timeout(300)


def test_every_control_has_a_name(page: Any) -> None:
    page.get_by_text("Steering, negative prompt").click()
    for tab in TABS:
        _open(page, tab)
        assert page.evaluate(_NAMELESS) == [], tab


def test_the_keyboard_reaches_the_picture(page: Any) -> None:
    page.locator("#prompt textarea").focus()
    page.keyboard.type("x")
    page.keyboard.press("Control+Enter")
    page.wait_for_function(
        "document.querySelector('#note textarea').value.includes('evaluations')", timeout=60_000
    )
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"make", "random", "last"} <= seen


@pytest.mark.skipif(AXE is None, reason="DIFFPLUG_AXE names no axe.min.js (of the package axe-core)")
def test_axe_finds_nothing_that_is_ours(page: Any) -> None:
    page.add_script_tag(path=str(Path(str(AXE))))
    for tab in TABS:
        _open(page, tab)
        found = page.evaluate(
            "axe.run().then(result => result.violations.map("
            "one => [one.id, one.impact, one.nodes.map(node => node.html.slice(0, 160))]))"
        )
        assert [one for one in found if one[0] not in GRADIOS_OWN] == [], tab
