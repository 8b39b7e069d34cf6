"""Measure the browser page in headless Chromium: seconds to interact, to load, to draw; memory.

    python benchmarks/web.py --checkpoint pokediff --size 64

Needs Playwright and Chromium. Prints one row of Markdown for docs/web.md. Times are wall-clock seconds of one visit;
memory is the largest resident set of the browser's renderer process and of all its processes.
"""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from playwright.sync_api import Page, sync_playwright

from pokediff.drawing.web import make_server, web
from pokediff.model.pipeline import quiet


@dataclass(frozen=True)
class Options:
    """Measure the browser page."""

    checkpoint: str = "pokediff"
    size: int = 64  # px
    pictures: int = 50  # drawn one after another
    site: Path | None = None  # measure this site (default: a new one)


class Memory(threading.Thread):
    """The largest resident sets of Chromium's processes while a block runs, sampled ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.renderer = self.browser = 0.0  # MB
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            sizes = []
            for process in psutil.Process().children(recursive=True):
                try:
                    sizes.append(("--type=renderer" in process.cmdline(), process.memory_info().rss / 1e6))
                except psutil.Error:  # it ended
                    continue
            self.renderer = max([self.renderer, *(size for renderer, size in sizes if renderer)])
            self.browser = max(self.browser, sum(size for _, size in sizes))

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def draw(page: Page, number: int) -> float:
    """Seconds from the click to the last of `number` pictures."""
    page.get_by_label("Pictures", exact=True).fill(str(number))
    page.get_by_label("Prompt").focus()
    start = time.perf_counter()
    page.get_by_role("button", name="Draw", exact=True).click()
    noun = "picture" if number == 1 else "pictures"
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("status").filter(has_text=re.compile(f"^{number} {noun} drawn")).wait_for()
    return time.perf_counter() - start


def measure(url: str, options: Options) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright, Memory() as memory:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(600_000)
        start = time.perf_counter()
        page.goto(url, wait_until="commit")
        page.get_by_label("Prompt").fill("a blue water turtle")
        interactive = time.perf_counter() - start
        page.get_by_label("Size").select_option(str(options.size))
        page.get_by_role("status").filter(has_text="Ready").wait_for()
        ready = time.perf_counter() - start
        threads = page.evaluate("crossOriginIsolated ? navigator.hardwareConcurrency : 1")
        first, eight = draw(page, 1), draw(page, 8)
        seconds = [draw(page, 1) for _ in range(options.pictures)]
        browser.close()
    early, late = statistics.median(seconds[:5]), statistics.median(seconds[-5:])
    print("| threads | interactive | ready | first | eight | 1st to 5th | last five | memory of the page | of all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    times = " | ".join(f"{value:.2f} s" for value in (interactive, ready, first, eight, early, late))
    print(f"| {threads} | {times} | {memory.renderer:.0f} MB | {memory.browser:.0f} MB |")


def main(options: Options) -> None:
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        site = options.site or Path(temporary) / "site"
        if options.site is None:
            web(options.checkpoint, site)
        server = make_server(site, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        measure(f"http://127.0.0.1:{server.server_address[1]}/", options)
        server.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Options))
