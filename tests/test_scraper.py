"""The scraper against a wiki of our own on loopback, and against the mirror where it is."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import COLORS, ROOT, draw_creature, free_port

from pokediff import cli
from pokediff.data.captions import captions_of
from pokediff.data.images import encode_png
from pokediff.data.records import read_records
from pokediff.scraper import bulbapedia, client, crawl
from pokediff.scraper.client import FetchError, NotThere, PoliteClient, StopRun
from pokediff.scraper.crawl import ScrapeOptions

NAMES = [f"Creature{chr(97 + i)}" for i in range(12)]
ARTWORK = encode_png(draw_creature(COLORS["green"], "round"))


class Wiki(http.server.ThreadingHTTPServer):
    """Answers are set by tests: {path: function(handler, number of requests for it)}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[str] = []
        self.agents: set[str] = set()
        self.special: dict[str, Any] = {}
        self.robots = "User-agent: *\nCrawl-delay: 0\nDisallow: /wiki/Special:\n"

    def list_page(self) -> str:
        rows = "".join(
            f'<tr><td>#{i:04}</td><td><img src="/media/upload/thumb/a/aa/{n}.png/70px-{n}.png" '
            f'srcset="/media/upload/thumb/a/aa/{n}.png/140px-{n}.png 2x"></td>'
            f'<td><a href="/wiki/{n}_(Pok%C3%A9mon)">{n}</a></td><td><a>Water</a></td></tr>'
            for i, n in enumerate(NAMES, 1)
        )
        return f"<table><tr><th>Ndex</th><th>MS</th><th>Pokémon</th><th>Type</th></tr>{rows}</table>"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Wiki

    def log_message(self, *_: Any) -> None:
        time.sleep(0.01)

    def do_GET(self) -> None:
        path = self.path
        self.server.requests.append(path)
        self.server.agents.add(self.headers["User-Agent"])
        if path in self.server.special:
            return self.server.special[path](self, self.server.requests.count(path))
        if path == "/robots.txt":
            return self.answer(200, self.server.robots.encode(), "text/plain")
        if path.startswith("/wiki/List_of"):
            return self.answer(200, self.server.list_page().encode(), "text/html; charset=UTF-8")
        if path.startswith("/media/upload/"):
            return self.answer(200, ARTWORK, "image/png")
        self.answer(404, b"<html>no such page</html>", "text/html")

    def answer(self, status: int, body: bytes, kind: str, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


@pytest.fixture
def wiki(monkeypatch):
    monkeypatch.setattr(bulbapedia, "EXPECTED_SPECIES", len(NAMES))
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    server = Wiki()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client_of(wiki: Wiki, **options: Any) -> PoliteClient:
    return PoliteClient({wiki.base.removeprefix("http://")}, "pokediff/test (contact: me@example.org)", **options)


def scrape(wiki: Wiki, out: Path, *options: str) -> int:
    return command("--out", str(out), "--base-url", wiki.base, "--text-encoder", "none", *options)


def command(*args: str) -> int:
    """The exit code of `pokediff scrape`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["scrape", *args])
    return stop.value.code


def failures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()]


def original(name: str) -> str:
    return f"/media/upload/a/aa/{name}.png"


# -------------------------------------------------------------------------------------------------------- client


def test_robots_are_read_once_and_obeyed(wiki):
    agent = client_of(wiki)
    with pytest.raises(FetchError, match=r"robots\.txt disallows"):
        agent.get(f"{wiki.base}/wiki/Special:Search", 1000)
    agent.get(f"{wiki.base}{original('a')}", 10**6)
    assert wiki.requests == ["/robots.txt", original("a")]
    assert wiki.agents == {"pokediff/test (contact: me@example.org)"}


@pytest.mark.parametrize(
    "rules",
    [
        "User-agent: *\nAllow: /\nDisallow: /media/",  # the longest match counts (RFC 9309)
        "User-agent: *\nDisallow: /*/upload/",
        "User-agent: *\nDisallow: /*.png$",
        "User-agent: *\nDisallow: /x/\n\nUser-agent: *\nDisallow: /media/",
        "User-agent: *\n\nDisallow: /media/",
        "\ufeffUser-agent: *\nDisallow: /media/",
        "User-agent: Pokediff\nDisallow: /media/\n\nUser-agent: *\nAllow: /",
    ],
)
def test_all_forms_of_robots_rules(wiki, rules):
    wiki.robots = rules
    with pytest.raises(FetchError, match=r"robots\.txt disallows"):
        client_of(wiki).get(wiki.base + original("a"), 10**6)
    wiki.robots = "User-agent: *\nCrawl-delay: 2.5"
    agent = client_of(wiki, sleep=lambda s: None)
    agent.get(wiki.base + original("a"), 10**6)
    assert agent.interval(wiki.base.removeprefix("http://")) == 2.5


def test_crawl_delay_is_kept_between_requests(wiki):
    wiki.robots = "User-agent: *\nCrawl-delay: 7\n"
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    agent = client_of(wiki, sleep=sleep, clock=lambda: now[0])
    for name in "ab":
        agent.get(wiki.base + original(name), 10**6)
    assert [s for s in slept if s] == [7, 7]  # robots.txt, picture, picture


def test_without_robots_a_pause_is_kept_and_unreadable_robots_stop_the_run(wiki):
    wiki.special["/robots.txt"] = lambda h, n: h.answer(404, b"", "text/plain")
    slept: list[float] = []
    agent = client_of(wiki, sleep=slept.append)
    agent.get(wiki.base + original("a"), 10**6)
    assert max(slept) > 0.9 * client.DEFAULT_INTERVAL_S
    wiki.special["/robots.txt"] = lambda h, n: h.answer(500, b"", "text/plain")
    with pytest.raises(StopRun, match=r"robots\.txt cannot be read"):
        client_of(wiki, sleep=lambda s: None).get(wiki.base + original("a"), 10**6)


@pytest.mark.parametrize("trouble", ["429", "503", "drop", "cut", "html", "challenge once"])
def test_temporary_errors_are_retried(wiki, trouble):
    def answer(handler: Handler, times: int) -> None:
        if times > 2:
            return handler.answer(200, ARTWORK, "image/png")
        if trouble == "429":
            return handler.answer(429, b"", "text/plain", Retry_After="2")
        if trouble == "503":
            return handler.answer(503, b"", "text/plain")
        if trouble == "drop":
            handler.close_connection = True
            return handler.connection.close()
        if trouble == "html":
            return handler.answer(200, b"<html>sorry</html>", "text/html")
        if trouble == "challenge once":
            return handler.answer(200, b"<html><title>Just a moment...</title></html>", "text/html")
        return handler.answer(200, ARTWORK, "image/png", cut=True)

    wiki.special["/a.png"] = answer
    slept: list[float] = []
    assert client_of(wiki, sleep=slept.append).get(f"{wiki.base}/a.png", 10**6, "image/") == ARTWORK
    assert wiki.requests.count("/a.png") == 3
    if trouble == "429":
        assert slept.count(2) == 2


def test_pauses_grow_until_the_last_attempt(wiki):
    wiki.special["/a.png"] = lambda h, n: h.answer(503, b"", "text/plain")
    slept: list[float] = []
    with pytest.raises(FetchError, match=r"status 503 \(6 attempts\)"):
        client_of(wiki, sleep=slept.append).get(f"{wiki.base}/a.png", 10**6)
    pauses = [s for s in slept if s > 0]
    assert len(pauses) == 5
    assert all(0.5 * 0.01 * 2**k <= pause <= 1.5 * 0.01 * 2**k for k, pause in enumerate(pauses))
    assert len(set(pauses)) == 5


def test_a_long_retry_after_stops_the_run(wiki):
    wiki.special["/a.png"] = lambda h, n: h.answer(429, b"", "text/plain", Retry_After="3600")
    with pytest.raises(StopRun, match="pause of 3600 s"):
        client_of(wiki).get(f"{wiki.base}/a.png", 10**6)
    assert wiki.requests.count("/a.png") == 1


@pytest.mark.parametrize(
    ("status", "headers", "requests"),
    [(403, {}, 1), (503, {}, 1), (403, {"cf_mitigated": "challenge"}, 1), (200, {}, 3)],
)
def test_a_challenge_stops_the_run(wiki, status, headers, requests):
    page = b"<html><title>Just a moment...</title></html>"
    wiki.special["/a.png"] = lambda h, n: h.answer(status, page, "text/html", **headers)
    with pytest.raises(StopRun, match="challenge"):
        client_of(wiki, sleep=lambda s: None).get(f"{wiki.base}/a.png", 10**6, "image/")
    assert wiki.requests.count("/a.png") == requests


def test_not_there_too_long_and_elsewhere(wiki):
    wiki.special["/far.png"] = lambda h, n: h.answer(302, b"", "text/plain", Location="http://elsewhere.example/x.png")
    wiki.special["/near.png"] = lambda h, n: h.answer(301, b"", "text/plain", Location=original("b"))
    wiki.special["/round.png"] = lambda h, n: h.answer(302, b"", "text/plain", Location="/round.png")
    wiki.special["/torn.png"] = lambda h, n: h.answer(302, b"", "text/plain", Location="http://[torn")
    script = b"<html><script src='/cdn-cgi/challenge-platform/scripts/jsd/main.js'></script>no such page</html>"
    wiki.special["/gone.png"] = lambda h, n: h.answer(404, script, "text/html")
    agent = client_of(wiki)
    with pytest.raises(NotThere):
        agent.get(f"{wiki.base}/none", 1000)
    with pytest.raises(NotThere):  # the script alone is no challenge
        agent.get(f"{wiki.base}/gone.png", 1000)
    with pytest.raises(FetchError, match="malformed answer"):
        agent.get(f"{wiki.base}/torn.png", 1000)
    with pytest.raises(FetchError, match="longer than 100 bytes"):
        agent.get(wiki.base + original("a"), 100)
    with pytest.raises(FetchError, match=r"unexpected host elsewhere\.example"):
        agent.get(f"{wiki.base}/far.png", 1000)
    with pytest.raises(FetchError, match="unexpected host"):
        agent.get("file:///etc/passwd", 1000)
    with pytest.raises(FetchError, match="redirects"):
        agent.get(f"{wiki.base}/round.png", 1000)
    assert agent.get(f"{wiki.base}/near.png", 10**6) == ARTWORK
    assert wiki.requests[-2:] == ["/near.png", original("b")]


# ------------------------------------------------------------------------------------------------------- the run


def test_a_whole_run(wiki, tmp_path, capsys):
    assert scrape(wiki, tmp_path) == 0
    records = read_records(tmp_path)
    assert [r.file_name for r in records] == [f"images/{i:04}-{n.lower()}.png" for i, n in enumerate(NAMES, 1)]
    first = records[0]
    assert (first.dex, first.name, first.types) == (1, NAMES[0], ("water",))
    assert first.source_url == wiki.base + original(NAMES[0])
    assert first.page_url.endswith("/wiki/Creaturea_(Pok%C3%A9mon)")
    assert first.license
    assert first.colors == ("green",)
    row = json.loads((tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["text"] == "official artwork of a green water creature" == captions_of(first)[0]
    assert len(captions_of(first)) > 1
    assert first.retrieved_at
    assert (tmp_path / first.file_name).read_bytes() == ARTWORK
    output = capsys.readouterr().out
    assert "12 species and 0 further forms, no number missing" in output
    assert "12 of 12 pictures" in output
    requests = len(wiki.requests)
    assert scrape(wiki, tmp_path) == 0
    assert len(wiki.requests) == requests  # the second run needs no request


def test_the_thumbnail_serves_where_the_original_is_missing_and_what_is_gone_is_listed(wiki, tmp_path):
    gone = lambda h, n: h.answer(404, b"", "text/html")  # noqa: E731
    wiki.special[original(NAMES[1])] = gone
    wiki.special[original(NAMES[2])] = gone
    wiki.special[f"/media/upload/thumb/a/aa/{NAMES[2]}.png/140px-{NAMES[2]}.png"] = gone
    assert scrape(wiki, tmp_path) == 0  # nothing is missing but what the server does not have
    sources = {r.name: r.source_url for r in read_records(tmp_path)}
    assert sources[NAMES[1]].endswith(f"140px-{NAMES[1]}.png")
    assert NAMES[2] not in sources
    (row,) = failures(tmp_path)
    assert row["name"] == NAMES[2]
    assert row["gone"]


@pytest.mark.slow
def test_nothing_bad_is_stored_and_failures_are_tried_again(wiki, tmp_path):
    wiki.special[original(NAMES[3])] = lambda h, n: h.answer(200, ARTWORK[:60] + bytes(500), "image/png")
    wiki.special[original(NAMES[4])] = lambda h, n: h.answer(200, b"<html>x</html>", "text/html")
    assert scrape(wiki, tmp_path) == 1
    assert len(read_records(tmp_path)) == 10
    assert len(list((tmp_path / "images").iterdir())) == 10
    reasons = {row["name"]: row["reason"] for row in failures(tmp_path)}
    assert "not a whole picture" in reasons[NAMES[3]]
    assert "content type text/html, expected image/" in reasons[NAMES[4]]
    wiki.special.clear()
    wiki.requests.clear()
    assert scrape(wiki, tmp_path) == 0
    assert wiki.requests == ["/robots.txt", original(NAMES[3]), original(NAMES[4])]
    assert failures(tmp_path) == []


@pytest.mark.slow
def test_a_picture_that_vanished_is_not_listed(wiki, tmp_path, capsys):
    assert scrape(wiki, tmp_path) == 0
    (tmp_path / "images" / "0003-creaturec.png").unlink()
    (tmp_path / "images" / "0005-creaturee.png").write_bytes(b"torn")
    wiki.special[original(NAMES[2])] = lambda h, n: h.answer(503, b"", "text/plain")
    assert scrape(wiki, tmp_path) == 1
    assert "11 of 12 pictures" in capsys.readouterr().out
    assert [record.name for record in read_records(tmp_path)] == [*NAMES[:2], *NAMES[3:]]
    assert (tmp_path / "images" / "0005-creaturee.png").read_bytes() == ARTWORK
    assert scrape(wiki, tmp_path, "--limit", "2") == 0
    assert [row["name"] for row in failures(tmp_path)] == [NAMES[2]]  # not tried again, so still missing


def test_a_journal_cut_within_a_letter_is_read(wiki, tmp_path):
    assert scrape(wiki, tmp_path) == 0
    with (tmp_path / ".scrape" / "journal.jsonl").open("ab") as file:
        file.write(b'{"page": "Flab' + "é".encode()[:1])
    assert scrape(wiki, tmp_path) == 0


def test_what_was_added_or_changed_by_hand_stays(wiki, tmp_path):
    assert scrape(wiki, tmp_path / "d", "--limit", "3") == 0
    path = tmp_path / "d" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["captions"] = ["my own words"]
    rows[1]["genus"] = "my own genus"
    del rows[2]["license"]
    rows.append({"file_name": "images/mine.png", "text": "a picture of mine"})
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")  # as an editor saves it
    assert scrape(wiki, tmp_path / "d", "--limit", "4") == 0
    again = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [*again[:3], again[4]] == rows
    assert again[3]["name"] == NAMES[3]
    assert scrape(wiki, tmp_path / "d", "--limit", "4") == 0
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == again


def test_a_folder_of_somebody_else_is_left_alone(wiki, tmp_path, capsys):
    (tmp_path / "metadata.jsonl").write_text("mine")
    assert scrape(wiki, tmp_path) == 2
    assert "holds other files (metadata.jsonl)" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("metadata.jsonl", "mine")]


def test_failures_that_were_cut_do_not_stop_a_run(wiki, tmp_path):
    assert scrape(wiki, tmp_path, "--limit", "1") == 0
    (tmp_path / "failures.jsonl").write_text('{"url": "http://x/1", "reason": "x", "gone": true}\n{"url": "htt')
    assert scrape(wiki, tmp_path, "--limit", "1") == 0
    assert [row["url"] for row in failures(tmp_path)] == ["http://x/1"]


def test_a_challenge_keeps_everything_and_the_next_run_completes(wiki, tmp_path, capsys):
    page = b"<html><title>Just a moment...</title></html>"
    wiki.special[original(NAMES[7])] = lambda h, n: h.answer(403, page, "text/html", cf_mitigated="challenge")
    assert scrape(wiki, tmp_path) == 1
    assert len(read_records(tmp_path)) == 7
    error = capsys.readouterr().err
    assert "stopped" in error
    assert "run the same command again" in error
    assert wiki.requests[-1] == original(NAMES[7])  # not one request more
    wiki.special.clear()
    assert scrape(wiki, tmp_path) == 0
    assert len(read_records(tmp_path)) == 12


@pytest.mark.slow
def test_options(wiki, tmp_path):
    assert scrape(wiki, tmp_path / "a", "--limit", "3", "--contact", "me@example.org") == 0
    assert len(read_records(tmp_path / "a")) == 3
    assert any("me@example.org" in agent for agent in wiki.agents)
    wiki.list_page = lambda: (
        Wiki.list_page(wiki).replace("#0002", "#0001").replace("#0003", "#0001")
    )  # two forms of number 1
    for option, number in (("--forms", 12), ("--no-forms", 10)):
        assert scrape(wiki, tmp_path / option, option) == 0
        assert len(read_records(tmp_path / option)) == number


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--limit", "0", "--limit must be at least 1"),
        ("--base-url", "bulbapedia", "is not a URL"),
        ("--text-encoder", "clap:x", "--text-encoder clap:x: use none, builtin"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, option, value, words):
    assert command("--out", str(tmp_path / "d"), option, value) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_the_list_is_parsed_once(wiki, tmp_path, monkeypatch):
    parsed, parse = [], bulbapedia.parse_list
    monkeypatch.setattr(bulbapedia, "parse_list", lambda *page: parsed.append(page) or parse(*page))
    assert scrape(wiki, tmp_path, "--limit", "2") == 0
    assert len(parsed) == 1


def test_colours_are_added_to_an_old_journal(wiki, tmp_path):
    assert scrape(wiki, tmp_path) == 0
    path = tmp_path / ".scrape" / "journal.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "colors"}) + "\n" for row in rows))
    requests = len(wiki.requests)
    assert scrape(wiki, tmp_path) == 0
    assert len(wiki.requests) == requests
    assert {record.colors for record in read_records(tmp_path)} == {("green",)}


@pytest.mark.slow
def test_pages_add_looks_and_families(wiki, tmp_path):
    page = """<a href="/wiki/Pok%C3%A9mon_category">Tiny Turtle Pokémon</a><h2 id="Biology">B</h2>
    <p>It is a small, blue, turtle-like creature with a brown shell.</p><h3 id="Evolution">E</h3>
    <p><a href="/wiki/Creatureb_(Pok%C3%A9mon)">next</a></p>"""
    wiki.special["/wiki/Creatureb_(Pok%C3%A9mon)"] = lambda h, n: h.answer(
        200, page.encode(), "text/html; charset=UTF-8"
    )
    wiki.special["/wiki/Creaturec_(Pok%C3%A9mon)"] = lambda h, n: h.answer(
        200, page.encode(), "text/html; charset=UTF-8"
    )
    assert scrape(wiki, tmp_path, "--pages") == 0
    records = {record.name: record for record in read_records(tmp_path)}
    assert records["Creaturec"].genus == "Tiny Turtle Pokémon"
    assert records["Creaturec"].descriptions == ("It is a small, blue, turtle-like creature with a brown shell.",)
    assert records["Creatureb"].family == records["Creaturec"].family == 2
    assert records["Creaturea"].family is None
    wiki.requests.clear()
    scrape(wiki, tmp_path, "--pages")
    assert "/wiki/Creatureb_(Pok%C3%A9mon)" not in wiki.requests


def test_a_page_that_is_not_the_list_is_not_kept(wiki, tmp_path, capsys):
    wiki.list_page = lambda: "<p>moved</p>"
    assert scrape(wiki, tmp_path) == 2
    assert "no longer looks like the list" in capsys.readouterr().err
    assert not list((tmp_path / ".scrape").glob("list*"))


@pytest.mark.slow
def test_embeddings_are_written_too(wiki, tmp_path):
    assert command("--out", str(tmp_path), "--base-url", wiki.base, "--text-encoder", "builtin") == 0
    assert (tmp_path / "embeddings-builtin.safetensors").is_file()


@pytest.mark.slow
def test_an_encoder_out_of_reach_leaves_the_pictures(wiki, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert command("--out", str(tmp_path), "--base-url", wiki.base) == 2
    assert 'use "builtin"' in capsys.readouterr().err
    assert len(read_records(tmp_path)) == 12


# ------------------------------------------------------------------------------------------------------ the mirror


@pytest.fixture
def mirror(shared):
    """Start the mirror with options; returns its address."""
    started: list[subprocess.Popen] = []

    def start(*options: str) -> str:
        for _ in range(10):  # another process may have taken the port
            port = free_port()
            command = [sys.executable, str(shared / "bulbapedia" / "mirror.py"), "--port", str(port), *options]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            if "serving" in started[-1].stdout.readline():
                return f"http://127.0.0.1:{port}"
        raise AssertionError("the mirror does not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


def options(base: str, out: Path) -> ScrapeOptions:
    return ScrapeOptions(out, base, limit=40, text_encoder="none")


def images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "images").glob("*.png")}


def stats(base: str) -> dict[str, Any]:
    return json.load(urllib.request.urlopen(f"{base}/__stats__"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_faults_a_challenge_and_a_kill_end_in_the_same_pictures(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(bulbapedia, "parse_list", functools.cache(bulbapedia.parse_list))  # it takes seconds
    plain = mirror()
    crawl.scrape(options(plain, tmp_path / "plain"))
    expected = images(tmp_path / "plain")
    assert len(expected) > 30

    faulty = mirror("--faults", "0.2", "--seed", "3")
    for _ in range(4):
        if crawl.scrape(options(faulty, tmp_path / "faulty")).failed == 0:
            break
    assert images(tmp_path / "faulty") == expected

    challenge = mirror("--challenge-after", "20")
    assert "challenge" in crawl.scrape(options(challenge, tmp_path / "challenge")).stopped
    kept = len(images(tmp_path / "challenge"))
    assert 10 <= kept <= 20
    assert len(read_records(tmp_path / "challenge")) == kept
    assert crawl.scrape(options(plain, tmp_path / "challenge")).stopped is None
    assert images(tmp_path / "challenge") == expected

    out = tmp_path / "killed"
    command = [
        sys.executable,
        str(ROOT / "scraper" / "run.py"),
        "--out",
        str(out),
        "--base-url",
        plain,
        "--limit",
        "40",
    ]
    for _ in range(10):  # on a busy machine it may end before it is killed
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([*command, "--text-encoder", "none"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and len(images(out)) < 10:
            time.sleep(0.01)
        process.kill()
        _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            break
        assert process.returncode == 0, errors
    assert process.returncode == -signal.SIGKILL
    requests = stats(plain)["requests"]
    assert crawl.scrape(options(plain, out)).failed == 0
    assert images(out) == expected
    assert stats(plain)["requests"] - requests < 40
    assert stats(plain)["max_parallel"] == 1
    assert all(agent.startswith(("pokediff/", "Python-urllib")) for agent in stats(plain)["agents"])
