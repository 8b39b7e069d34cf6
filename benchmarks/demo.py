"""The demo under load, over loopback: many clients at once, many requests one after another, the page in a browser.

    python benchmarks/demo.py --clients 50 --requests 500

starts `pokediff demo`, and prints one JSON line for each measurement. The browser's part needs playwright and chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32  # px
FRAMES = """() => { window.seen = []; window.begun = performance.now();
  new MutationObserver(() => { const strip = document.querySelector('#film .strip');
    if (strip && window.last !== strip.style.backgroundImage) { window.last = strip.style.backgroundImage;
      window.seen.push(performance.now() - window.begun); } })
    .observe(document.querySelector('#film'), {childList: true, subtree: true, attributes: true}); }"""

CHROMIUM = ["--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-quic", "--disable-sync"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update"]
DONE = "window.seen.length > 5 && document.querySelector('#status').innerText.startsWith('Done')"


@contextmanager
def demo(queue: int) -> Iterator[tuple[str, psutil.Process]]:
    """A new server: its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pokediff", "demo", "--port", str(port), "--queue", str(queue)]
    command += ["--size", str(SIZE)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ}, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                requests.get(url, timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def ask(url: str, seed: int, prompt: str = "a blue water turtle") -> dict[str, Any] | None:
    """The final message of one drawing; None when the queue was full."""
    values = [prompt, seed, "", None, None, None, None, SIZE, False]  # the arguments of `sprite`, in their order
    joined = requests.post(f"{url}/gradio_api/call/sprite", json={"data": values}, timeout=120)
    if joined.status_code == 503:
        return None
    event = joined.json()["event_id"]
    with requests.get(f"{url}/gradio_api/call/sprite/{event}", stream=True, timeout=120) as answer:
        rows = [line for line in answer.iter_lines(decode_unicode=True) if line.startswith("data: [")]
    return json.loads(rows[-1].removeprefix("data: "))[0]


def crowd(url: str, clients: int) -> dict[str, Any]:
    """All at once. The seed in each answer, and the same picture drawn alone, prove that no client got another's."""
    seconds: list[float] = []

    def one(seed: int) -> dict[str, Any] | None:
        begin = time.monotonic()
        answer = ask(url, seed)
        if answer is not None:
            seconds.append(time.monotonic() - begin)
        return answer

    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, range(clients)))
    whole = time.monotonic() - begin
    drawn = {seed: answer for seed, answer in enumerate(answers) if answer is not None}
    own = all(answer["settings"]["seed"] == seed for seed, answer in drawn.items())
    alone = [seed for seed in list(drawn)[:5] if ask(url, seed)["png"] == drawn[seed]["png"]]  # type: ignore[index]
    return {
        "clients": clients,
        "drawn": len(drawn),
        "refused": clients - len(drawn),
        "own_seed": own,
        "same_as_alone": f"{len(alone)} of {min(5, len(drawn))}",
        "median_s": round(statistics.median(seconds), 2),
        "slowest_s": round(max(seconds), 2),
        "pictures_per_s": round(len(drawn) / whole, 2),
    }


def many(url: str, process: psutil.Process, number: int, clients: int = 4) -> dict[str, Any]:
    """`number` pictures from a few clients; memory after every tenth of them."""
    memory = []
    with ThreadPoolExecutor(clients) as pool:
        for index, _ in enumerate(pool.map(lambda seed: ask(url, seed), range(number))):
            if index % max(1, number // 10) == 0 or index == number - 1:
                memory.append(round(process.memory_info().rss / 1e6))
    return {"requests": number, "rss_mb": memory}


def browser(url: str, rounds: int = 5) -> dict[str, Any]:
    """Seconds from the click to the first frame on the page, and frames a second while it draws."""
    from playwright.sync_api import sync_playwright

    first, rate = [], []
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = running.new_page()
        page.goto(url)
        page.wait_for_selector("#draw")
        page.evaluate(FRAMES)
        for _ in range(rounds):
            page.evaluate("() => { window.seen = []; window.begun = performance.now(); }")
            page.click("#draw")
            page.wait_for_function(DONE)
            seen = page.evaluate("window.seen")
            first.append(seen[0] / 1000)
            rate.append((len(seen) - 1) / (seen[-1] - seen[0]) * 1000)
            page.wait_for_timeout(1500)
        running.close()
    return {"first_frame_s": round(statistics.median(first), 2), "frames_per_s": round(statistics.median(rate), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--queue", type=int, default=32)
    args = parser.parse_args()
    with demo(args.queue) as (url, process):
        ask(url, 0)
        print(json.dumps(crowd(url, args.clients)), flush=True)
        print(json.dumps(many(url, process, args.requests)), flush=True)
        print(json.dumps(browser(url)), flush=True)


if __name__ == "__main__":
    main()
