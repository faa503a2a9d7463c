"""The page in a real browser: every tab, by clicks; the pictures of docs/demo.md are taken here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from tests.demos.page.page_server import Served, served

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]
SHOTS = os.environ.get("DIFFPLUG_SCREENSHOTS")
EVIL = "<img src=x onerror=window.pwned=1><script>window.pwned=1</script> $x_{$"


@pytest.fixture(scope="module")
def page_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page")) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = [
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ]
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, page_process: Served) -> Iterator[Any]:
    """A fresh browser on the page; at the end the console was silent and nobody else was asked."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    one, errors, outside = context.new_page(), [], []
    one.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    one.on("request", lambda request: outside.append(request.url))
    one.goto(page_process.url)
    one.locator("#make").wait_for(timeout=60_000)
    yield one
    assert errors == []
    assert [url for url in outside if not url.startswith((page_process.url, "data:", "blob:"))] == []
    context.close()


def _wait(page: Any, where: str, text: str) -> str:
    page.wait_for_function(
        "([where, text]) => document.querySelector(where + ' textarea').value.includes(text)",
        arg=[where, text],
        timeout=90_000,
    )
    return str(page.input_value(f"{where} textarea"))


def _set(page: Any, name: str, value: Any) -> None:
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def _tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def _shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(700)
        page.screenshot(path=str(Path(SHOTS) / f"demo_{name}.png"), full_page=True)


def test_make_with_a_preview_then_again_at_once(page: Any) -> None:
    _set(page, "steps", 40)
    page.evaluate(
        """() => { window.frames_seen = new Set();
        new MutationObserver(() => { const i = document.querySelector('#preview img');
          if (i) window.frames_seen.add(i.src); }).observe(document.body, {subtree: true, childList: true,
          attributes: true}); }"""
    )
    page.click("#make")
    assert _wait(page, "#note", "evaluations").startswith("40 evaluations")
    page.locator("#pictures img").first.wait_for(timeout=10_000)
    assert page.evaluate("window.frames_seen.size") >= 2
    _shoot(page, "make")
    start = perf_counter()
    page.click("#make")
    _wait(page, "#note", "made before")
    assert perf_counter() - start < 10
    assert "diffplug generate" in page.inner_text("#command")


def _values(page: Any, **wanted: Any) -> None:
    """Wait until controls have values."""
    page.wait_for_function(
        "wanted => Object.entries(wanted).every(([name, value]) =>"
        " document.querySelector(`#${name} input[type=number], #${name} textarea`).value === String(value))",
        arg=wanted,
        timeout=20_000,
    )


def test_the_last_seed_is_shown_and_comes_back(page: Any) -> None:
    assert page.locator("#last").is_disabled()
    _set(page, "steps", 2)
    page.locator("#fresh input").check()
    page.click("#make")
    seed = _wait(page, "#note", "2 evaluations").rsplit("seed ", 1)[1]
    _values(page, seed=seed)
    assert page.inner_text("#last") == f"Last seed: {seed}"
    _set(page, "seed", 1)
    page.click("#last")
    _values(page, seed=seed)
    assert not page.locator("#fresh input").is_checked()
    page.click("#make")
    _wait(page, "#note", f"seed {seed} (made before)")


def test_controls_are_remembered_by_this_browser_only(page: Any, browser: Any, page_process: Served) -> None:
    _set(page, "steps", 9)
    _set(page, "guidance", 3.5)
    page.fill("#prompt textarea", "a green cross")
    page.wait_for_timeout(500)
    page.reload()
    page.locator("#make").wait_for(timeout=60_000)
    _values(page, steps=9, guidance=3.5, prompt="a green cross")
    context = browser.new_context()
    other = context.new_page()
    other.goto(page_process.url)
    other.locator("#make").wait_for(timeout=60_000)
    other.wait_for_timeout(1000)
    _values(other, steps=20)
    context.close()


def test_stop_ends_a_long_run(page: Any, page_process: Served) -> None:
    _set(page, "steps", 100)
    _set(page, "seed", 77)
    page.click("#make")
    _wait(page, "#note", "step ")
    page.click("#stop")
    _wait(page, "#note", "stopped")
    page.wait_for_timeout(500)
    assert page.input_value("#note textarea") == "stopped"  # no late step writes over it
    _set(page, "steps", 5)
    page.click("#make")
    _wait(page, "#note", "5 evaluations")  # the only pipeline is free again


def test_compare_and_slide(page: Any) -> None:
    _tab(page, "Compare")
    page.fill("#across_values textarea, #across_values input", "5, 10")
    page.click("#compare")
    _wait(page, "#compare_note", "4 cells, all there")
    assert page.locator("#cells img").count() >= 4
    page.click("#slide")
    page.locator("#slider img").first.wait_for(timeout=20_000)
    _shoot(page, "compare")


def test_steer_shows_particles_and_why(page: Any) -> None:
    _tab(page, "Steer")
    page.click("#steer_go")
    _wait(page, "#steer_note", "log Z")
    page.locator("#genealogy img").first.wait_for(timeout=20_000)
    assert page.locator("#particles_shown img").count() >= 4
    _shoot(page, "steer")


def test_a_picture_sets_every_control(page: Any, page_process: Served) -> None:
    _set(page, "steps", 7)
    _set(page, "seed", 12)
    page.click("#make")
    _wait(page, "#note", "7 evaluations")
    from diffplug.making.png import read_settings

    (file,) = [p for p in page_process.folder.glob("*.png") if read_settings(p).get("steps") == 7]
    _set(page, "steps", 20)
    _set(page, "seed", 0)
    _tab(page, "Restore")
    page.set_input_files("#drop input[type=file]", str(file))
    _wait(page, "#restored", "every control is set")
    assert page.input_value("#steps input[type=number]") == "7"
    assert page.input_value("#seed input[type=number]") == "12"
    _shoot(page, "restore")


def test_a_vote_is_a_row(page: Any, page_process: Served) -> None:
    _tab(page, "Vote")
    page.click("#new_pair")
    _wait(page, "#vote_note", "better")
    page.locator("#vote_right img").wait_for(timeout=10_000)
    _shoot(page, "vote")
    page.click("#left")
    _wait(page, "#vote_note", "written")
    rows = (page_process.folder / "votes.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == 1 and {json.loads(rows[0])[f"label_{i}"] for i in (0, 1)} == {0.0, 1.0}


def test_markup_in_a_prompt_stays_text(page: Any) -> None:
    page.fill("#prompt textarea", EVIL)
    _set(page, "steps", 2)
    page.click("#make")
    _wait(page, "#note", "2 evaluations")
    _tab(page, "Compare")
    page.click("#compare")
    _wait(page, "#compare_note", "all there")
    assert page.evaluate("window.pwned") is None
    assert page.input_value("#prompt textarea") == EVIL


def test_three_browsers_at_once_get_their_own_pictures(browser: Any, page_process: Served) -> None:
    contexts = [browser.new_context() for _ in range(3)]
    pages = [context.new_page() for context in contexts]
    for number, one in enumerate(pages):
        one.goto(page_process.url)
        one.locator("#make").wait_for(timeout=60_000)
        _set(one, "steps", 6)
        _set(one, "seed", 100 + number)
    for one in pages:
        one.click("#make")
    for number, one in enumerate(pages):
        assert f"seed {100 + number}" in _wait(one, "#note", "6 evaluations")
    for context in contexts:
        context.close()
