"""The demo under load, over loopback: many clients at once, many requests one after another, the page in a browser.

    python benchmarks/demo.py --clients 50 --requests 500
    python benchmarks/demo.py --clients 50 --minutes 10       # a mixed crowd, well-behaved and not

starts `pokediff demo`, and prints one JSON line for each measurement. The browser's part needs playwright and chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def demo(queue: int, *options: str, size: int = SIZE, port: int | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """A new server: its address and its process."""
    port = port or free_port()
    command = [sys.executable, "-m", "pokediff", "demo", "--port", str(port), "--queue", str(queue)]
    command += ["--size", str(size), *options]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ}, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(6000):
            if process.poll() is not None:
                raise RuntimeError("the demo did not start")
            try:
                requests.get(url, timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def join(url: str, seed: int, prompt: str = "a blue water turtle", size: int = SIZE) -> str | None:
    """Ask for a drawing: the id of the event, None when the queue is full."""
    values = [prompt, seed, "", None, None, None, None, size, False]  # the arguments of `sprite`, in their order
    joined = requests.post(f"{url}/gradio_api/call/sprite", json={"data": values}, timeout=120)
    return None if joined.status_code == 503 else joined.json()["event_id"]


def ask(url: str, seed: int, prompt: str = "a blue water turtle", size: int = SIZE) -> dict[str, Any] | None:
    """The final message of one drawing; None when the queue was full."""
    if (event := join(url, seed, prompt, size)) is None:
        return None
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


@dataclass
class Crowd:
    """Clients of every kind at one server, each client one request after another until the end."""

    url: str
    size: int
    expected: dict[int, str]  # the picture of each seed, drawn alone
    end: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def client(self, number: int) -> None:
        chance, ways = random.Random(number), [self.draw] * 6 + [self.leave, self.reload, self.pry, self.stuff]
        ways += [self.dawdle, self.forge, self.nonsense]
        while time.monotonic() < self.end:
            way = chance.choice(ways)
            try:
                self.counts[f"{way.__name__}: {way(chance)}"] += 1
            except (requests.RequestException, OSError, KeyError, ValueError, IndexError) as error:
                self.counts[f"{way.__name__}: {type(error).__name__}"] += 1
                self.wrong.append(f"{way.__name__}: {type(error).__name__} {str(error)[:150]}")

    def draw(self, chance: random.Random) -> str:
        """Every accepted request must be answered with its own picture."""
        seed = chance.choice(list(self.expected))
        answer = ask(self.url, seed, size=self.size)
        if answer is None:
            return "queue full"
        if answer["settings"]["seed"] != seed or answer["png"] != self.expected[seed]:
            self.wrong.append(f"draw: seed {seed} got another picture, of seed {answer['settings']['seed']}")
        return "own picture"

    def leave(self, chance: random.Random) -> str:
        """Ask, and go after the first message."""
        event = join(self.url, chance.randrange(1000), size=self.size)
        if event is None:
            return "queue full"
        with requests.get(f"{self.url}/gradio_api/call/sprite/{event}", stream=True, timeout=120) as answer:
            next(answer.iter_lines(), None)
        return "left"

    def reload(self, _: random.Random) -> str:
        for path in ("/", "/config"):
            requests.get(f"{self.url}{path}", timeout=120).raise_for_status()
        return "loaded"

    def pry(self, chance: random.Random) -> str:
        """Ask for files of others: of the system, of the program, guessed names beside an own upload."""
        own = requests.post(
            f"{self.url}/gradio_api/upload", files={"files": ("a.png", os.urandom(200))}, timeout=120
        ).json()[0]
        kept = requests.get(f"{self.url}/gradio_api/file={own}", timeout=120)
        folder = Path(own).parent.parent
        places = [
            "/etc/passwd",
            "../../etc/passwd",
            str(ROOT / "setup.cfg"),
            str(folder),
            f"{own}/../../..",
            "/proc/self/environ",
        ]
        places += [f"{folder}/drawing-*", f"{own}%00.png", f"//{own}/..;/x", "..%2f..%2fetc%2fpasswd"]
        place = chance.choice(places)
        found = requests.get(f"{self.url}/gradio_api/file={place}", timeout=120)
        if found.ok:
            self.wrong.append(f"pry: {place} is served")
        return "refused" if not found.ok and kept.ok else "served"

    def stuff(self, chance: random.Random) -> str:
        """Send too much: a file beyond the limit, a body of 40 MB, the same without its length."""
        way = chance.randrange(3)
        big = bytes(9_000_000 if way == 0 else 40_000_000)
        body: Any = {"files": {"files": ("a.png", big)}} if way == 0 else {"data": big if way == 1 else iter([big])}
        path = "upload" if way == 0 else "call/sprite"
        try:
            status = requests.post(f"{self.url}/gradio_api/{path}", timeout=120, **body).status_code
        except requests.ConnectionError:  # the server has closed it while we were sending
            return "refused"
        if status < 400:
            self.wrong.append(f"stuff: {path} accepts {len(big):,} bytes")
        return "refused"

    def dawdle(self, _: random.Random) -> str:
        """Send a request letter by letter, and never all of it."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            for letter in b"POST /gradio_api/call/sprite HTTP/1.1\r\nHost: x\r\nContent-Le":
                connection.sendall(bytes([letter]))
                time.sleep(0.05)
        return "left"

    def forge(self, chance: random.Random) -> str:
        """What the page of another site can make a browser send."""
        headers = chance.choice(
            [
                {"Origin": "https://evil.example"},
                {"Origin": "null"},
                {"Sec-Fetch-Site": "cross-site", "Origin": self.url},
                {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example", "Host": "evil.example"},
            ]
        )
        headers["Content-Type"] = chance.choice(["text/plain", "application/json"])
        path = chance.choice(["call/sprite", "upload", "queue/join", "run/predict"])
        text = json.dumps({"data": ["x"], "fn_index": 0, "session_hash": "x"})
        status = requests.post(f"{self.url}/gradio_api/{path}", data=text, headers=headers, timeout=120).status_code
        if status != 403:
            self.wrong.append(f"forge: {path} answers {status}")
        return "refused"

    def nonsense(self, chance: random.Random) -> str:
        """Calls that are none: answers in the 400s, or an error event; never a status of 500."""
        body = chance.choice(
            [b"{", b"[" * 10_000, b'{"data": 1}', b'{"data": []}', json.dumps({"data": [{}] * 9}).encode()]
        )
        path = chance.choice(["call/sprite", "call/none", "queue/join", "component_server", "reset", "cancel"])
        answer = requests.post(
            f"{self.url}/gradio_api/{path}", data=body, headers={"Content-Type": "application/json"}, timeout=120
        )
        if answer.status_code >= 500 and answer.status_code != 503:
            self.wrong.append(f"nonsense: {path} {body[:40]!r} answers {answer.status_code}")
        return "refused"


def mixed(url: str, process: psutil.Process, clients: int, seconds: float, size: int = SIZE) -> dict[str, Any]:
    """A crowd for some time: counts, what was wrong, and the server's memory and open files over the time."""
    expected = {seed: ask(url, seed, size=size)["png"] for seed in range(8)}  # type: ignore[index]
    crowd = Crowd(url, size, expected, time.monotonic() + seconds)
    memory, handles = [], []
    with ThreadPoolExecutor(clients) as pool:
        going = [pool.submit(crowd.client, number) for number in range(clients)]
        while time.monotonic() < crowd.end:
            time.sleep(min(seconds / 20, max(0.1, crowd.end - time.monotonic())))
            memory.append(round(process.memory_info().rss / 1e6))
            handles.append(process.num_fds())
        for one in going:
            one.result()
    after = ask(url, 3, size=size)
    return {
        "clients": clients,
        "seconds": round(seconds),
        **dict(sorted(crowd.counts.items())),
        "after_the_crowd": "own picture" if after and after["png"] == expected[3] else "wrong",
        "rss_mb": memory,
        "open_files": handles,
        "findings": len(crowd.wrong),
        "detail": crowd.wrong[:8],
    }


def killed(
    url: str, process: psutil.Process, size: int = SIZE, requests_at_once: int = 12
) -> tuple[list[str], list[bool | None]]:
    """Kill a server among its answers. Returns the pictures of four seeds, and for each request whether it was answered
    with its own; None: lost.
    """
    expected = [ask(url, seed, size=size)["png"] for seed in range(4)]  # type: ignore[index]
    lost = (requests.RequestException, IndexError)  # cut before the last message

    def one(number: int) -> bool | None:
        try:
            answer = ask(url, number % 4, size=size)
        except lost:
            return None
        return answer is not None and answer["png"] == expected[number % 4]

    with ThreadPoolExecutor(requests_at_once) as pool:
        going = [pool.submit(one, number) for number in range(requests_at_once)]
        wait(going, return_when=FIRST_COMPLETED)
        process.kill()
        return expected, [done.result() for done in going]


def restarted(url: str, expected: list[str], before: list[bool | None], size: int = SIZE) -> dict[str, Any]:
    """The same requests to the server in the place of one that was `killed`: each answer until then is a whole picture
    of its own, and so are all after it.
    """

    def one(number: int) -> bool:
        answer = ask(url, number % 4, size=size)
        return answer is not None and answer["png"] == expected[number % 4]

    with ThreadPoolExecutor(len(before)) as pool:
        after = list(pool.map(one, range(len(before))))
    return {
        "requests": len(before),
        "answered": before.count(True),
        "lost_by_the_restart": before.count(None),
        "answered_after_it": after.count(True),
        "findings": before.count(False) + after.count(False),
    }


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
    parser.add_argument("--minutes", type=float, help="a mixed crowd for so long, instead of the three measurements")
    args = parser.parse_args()
    if args.minutes:
        with demo(args.queue) as (url, process):
            print(json.dumps(mixed(url, process, args.clients, 60 * args.minutes)), flush=True)
        return
    with demo(args.queue) as (url, process):
        ask(url, 0)
        print(json.dumps(crowd(url, args.clients)), flush=True)
        print(json.dumps(many(url, process, args.requests)), flush=True)
        print(json.dumps(browser(url)), flush=True)


if __name__ == "__main__":
    main()
