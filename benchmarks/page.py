"""How long the page keeps people waiting: a real browser, or plain requests where there is none.

python -m benchmarks.page                     # needs the extra demo; with playwright and chromium also clicks
python -m benchmarks.page --parts memory      # some of clicks, crowd, memory
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from gradio_client import Client

from tests.demos.page.page_server import Served, served

FORM: list[Any] = ["a red circle", "", "dc-solver", 6, 5.0, 0, 1, "none", "shapes", 4, 0.0, False]


def users(page: Served, count: int, pictures: int, first: int) -> float:
    """Return the seconds in which `count` users make `pictures` each, all at once, of seeds from `first`."""
    clients = [Client(page.url, verbose=False) for _ in range(count)]

    def work(number: int) -> None:
        for i in range(pictures):
            seed = first + number * pictures + i
            clients[number].predict(*FORM[:5], seed, *FORM[6:], api_name="/make")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - start


def resident(pid: int) -> float:
    """Return the memory of a process in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def memory(page: Served, pictures: int) -> dict[str, Any]:
    """Return how much memory grows over so many pictures, after some that do not count, in four parts."""
    users(page, 1, 20, 10_000)
    before, grew = resident(page.process.pid), []
    for part in range(4):
        users(page, 1, pictures // 4, 20_000 + part * 1_000)
        grew.append(round(resident(page.process.pid) - before, 1))
    return {"pictures": pictures, "before_mib": round(before), "grew_mib": grew}


def clicks(page: Served) -> dict[str, Any]:
    """Return seconds from a click to the first preview, the picture, and a picture that was there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        one = browser.new_page()
        one.goto(page.url)
        one.locator("#make").wait_for(timeout=60_000)
        one.locator("#steps input[type=number]").fill("6")
        one.locator("#steps input[type=number]").press("Tab")
        found: dict[str, list[float]] = {"preview": [], "picture": [], "reused": []}
        for seed in (501, 502, 503):
            one.locator("#seed input[type=number]").fill(str(seed))
            one.locator("#seed input[type=number]").press("Tab")
            for kinds in (("preview", "picture"), ("reused",)):
                shown = one.evaluate(_PREVIEW)
                start = perf_counter()
                one.click("#make")
                if "preview" in kinds:
                    one.wait_for_function(f"old => ({_PREVIEW})() !== old", arg=shown, polling=20)
                    found["preview"].append(perf_counter() - start)
                wanted = f"seed {seed}" + (" (made before)" if "reused" in kinds else "")
                one.wait_for_function(_NOTE, arg=wanted, polling=20)
                found[kinds[-1]].append(perf_counter() - start)
        browser.close()
    return {name: [round(value, 2) for value in values] for name, values in found.items()}


_PREVIEW = "() => document.querySelector('#preview img')?.src ?? null"
_NOTE = "text => document.querySelector('#note textarea').value.includes(text)"


def crowd(page: Served) -> dict[str, Any]:
    """Return the seconds of nine pictures of one user and of three, three times in turn, and their ratio."""
    pairs = [(users(page, 1, 9, 100 + 50 * i), users(page, 3, 3, 3_000 + 50 * i)) for i in range(3)]
    ratios = sorted(three / one for one, three in pairs)
    return {"one_and_three": [[round(x, 2) for x in pair] for pair in pairs], "ratio": round(ratios[1], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts: dict[str, Callable[[Served], dict[str, Any]]] = {
        "clicks": clicks,
        "crowd": crowd,
        "memory": lambda page: memory(page, 200),
    }
    parser.add_argument("--parts", nargs="+", choices=[*parts], default=[*parts])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, served(Path(home)) as page:
        users(page, 1, 2, 5_000)
        for name in asked.parts:
            if name != "clicks" or shutil.which("chromium"):
                print(json.dumps({name: parts[name](page)}), flush=True)


if __name__ == "__main__":
    main()
