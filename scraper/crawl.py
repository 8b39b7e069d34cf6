"""Build a data set from Bulbapedia's National Pokédex list.

    pokediff scrape --out data/bulbapedia --contact you@example.org

writes images/, metadata.jsonl and the text embeddings of all captions. Stopped at any moment and started again, it goes
on without asking for what it has: OUT/.scrape/ holds the list page, and a journal with one row for every picture stored
and every page read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from pokediff.data.records import Record, write_records, write_whole
from pokediff.errors import one_line_errors

from . import bulbapedia
from .bulbapedia import Entry, page_title
from .client import FetchError, NotThere, PoliteClient, StopRun

BASE_URL = "https://bulbapedia.bulbagarden.net"
MAX_PAGE_BYTES, MAX_IMAGE_BYTES = 20_000_000, 20_000_000
LIST_FRESH_S = 7 * 24 * 3600  # an unfinished run does not ask for the list again within a week
SAVE_EVERY = 100  # pictures between two writings of metadata.jsonl
LICENSE = (
    "Image: (c) Nintendo / Creatures Inc. / GAME FREAK inc. / The Pokémon Company; see its file page for the terms. "
    "Text: Bulbapedia, CC BY-NC-SA 2.5."
)


def main(args: Sequence[str] | None = None, prog: str = "pokediff scrape") -> int:
    """Returns the exit code: 0 when nothing is missing but what the server does not have, else 1; errors raise 2."""
    options = parse(args, prog)
    with one_line_errors():
        summary = scrape(options)
        tell(summary)
        if options.text_encoder != "none" and summary.stored and summary.stopped is None:
            from pokediff.data.dataset import embed

            print(embed(options.out, options.text_encoder, progress=tqdm))
    return 0 if summary.stopped is None and summary.failed == 0 else 1


def parse(args: Sequence[str] | None, prog: str) -> argparse.Namespace:
    from pokediff.config import DEFAULT_CLIP

    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--base-url", default=BASE_URL, help="the wiki (default: %(default)s)")
    parser.add_argument(
        "--contact", default="", help="an address at which the wiki's people can reach you; goes into the User-Agent"
    )
    parser.add_argument("--limit", type=int, help="only the first so many entries of the list")
    parser.add_argument(
        "--pages", action="store_true", help="also read each species' page: category, looks, evolution line"
    )
    parser.add_argument(
        "--forms", action=argparse.BooleanOptionalAction, default=True, help="regional and other forms too"
    )
    parser.add_argument(
        "--text-encoder", default=DEFAULT_CLIP, help='for the embeddings; "none" skips them (default: %(default)s)'
    )
    parser.add_argument("--refresh", action="store_true", help="ask for the list page again, even if it is fresh")
    options = parser.parse_args(args)
    if options.text_encoder != "none":
        from pokediff.model.text import ENCODERS

        if options.text_encoder.partition(":")[0] not in ENCODERS:
            parser.error(f"--text-encoder {options.text_encoder}: there are none, {', '.join(ENCODERS)}")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    if not urlsplit(options.base_url).netloc:
        parser.error(f"--base-url {options.base_url!r} is no address: it starts with https://")
    return options


# -------------------------------------------------------------------------------------------------------- the run


@dataclass
class Summary:
    """How a run ended."""

    out: Path
    entries: int = 0
    stored: int = 0
    pictures_gone: int = 0  # the server does not have them
    pages_gone: int = 0
    failed: int = 0  # may work next time
    requests: int = 0
    seconds: float = 0.0
    stopped: str | None = None  # why the server does not want us now


def scrape(options: argparse.Namespace, client: PoliteClient | None = None) -> Summary:
    """List, pages and pictures. Raises PageChanged when the list is no longer the list."""
    out: Path = options.out
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / ".scrape").mkdir(exist_ok=True)
    client = client or make_client(options)
    journal = Journal(out)
    summary, failures, started = Summary(out), list[dict[str, Any]](), time.monotonic()
    try:
        everything = bulbapedia.parse_list(list_page(options, client), bulbapedia.list_url(options.base_url))
        tell_found(everything)
        stems = unique_stems(everything)  # of the whole list: a file's name must not depend on the options
        species = {entry.dex: entry for entry in reversed(everything)}
        wanted = {stem: entry for stem, entry in stems.items() if options.forms or entry is species[entry.dex]}
        wanted = dict(list(wanted.items())[: options.limit])
        summary.entries = len(wanted)
        try:
            if options.pages:
                read_pages(wanted.values(), client, journal, failures)
            fetch_images(out, wanted, client, journal, failures, lambda: save(out, stems, journal))
        finally:  # whatever happened, metadata.jsonl speaks of every picture that is stored
            stored = save(out, stems, journal)
            summary.stored = len(stored & wanted.keys())
            write_failures(out, failures, journal)
    except StopRun as stop:
        summary.stopped = str(stop)
    summary.pictures_gone = sum(failure["gone"] and "file_name" in failure for failure in failures)
    summary.pages_gone = sum(failure["gone"] and "file_name" not in failure for failure in failures)
    summary.failed = sum(not failure["gone"] for failure in failures)
    summary.requests, summary.seconds = client.requests, time.monotonic() - started
    return summary


def make_client(options: argparse.Namespace) -> PoliteClient:
    from pokediff import __version__

    host = urlsplit(options.base_url).netloc
    hosts = {host} | (bulbapedia.HOSTS if host in bulbapedia.HOSTS else set())
    contact = f"; contact: {options.contact}" if options.contact else ""
    if not contact and options.base_url == BASE_URL:
        print(
            "no --contact given: with one, the wiki's people can write to you instead of blocking you", file=sys.stderr
        )
    return PoliteClient(hosts, f"pokediff/{__version__} (data set builder for text-to-sprite models{contact})")


def list_page(options: argparse.Namespace, client: PoliteClient) -> bytes:
    """The list, from .scrape/ when it was read within LIST_FRESH_S."""
    host = re.sub(r"[^\w.-]", "-", urlsplit(options.base_url).netloc)
    kept: Path = options.out / ".scrape" / f"list-{host}.html"
    if kept.exists() and not options.refresh and time.time() - kept.stat().st_mtime < LIST_FRESH_S:
        return kept.read_bytes()
    url = bulbapedia.list_url(options.base_url)
    try:
        body = client.get(url, MAX_PAGE_BYTES, "text/html").body
    except FetchError as error:
        raise StopRun(f"the list {url} cannot be had: {error}") from None
    bulbapedia.parse_list(body, url)  # never keep a page that is not the list
    write_whole(kept, body)
    return body


def read_pages(
    entries: Iterable[Entry], client: PoliteClient, journal: Journal, failures: list[dict[str, Any]]
) -> None:
    """Category, looks and evolution line of every species, from its own page."""
    pages = {page_title(entry.page_url): entry.page_url for entry in entries}
    todo = [(title, url) for title, url in pages.items() if title not in journal.pages]
    for title, url in tqdm(todo, desc="pages", unit="page"):
        try:
            answer = client.get(url, MAX_PAGE_BYTES, "text/html")
        except FetchError as error:
            failures.append({"url": url, "reason": str(error), "gone": isinstance(error, NotThere)})
            continue
        journal.add_page(title, bulbapedia.parse_species(answer.body))


def fetch_images(
    out: Path,
    entries: Mapping[str, Entry],
    client: PoliteClient,
    journal: Journal,
    failures: list[dict[str, Any]],
    save: Callable[[], Any],
) -> None:
    """Every picture that is not there yet: the original, else the largest thumbnail."""
    todo = [(stem, entry) for stem, entry in entries.items() if image_name(stem) not in journal.images]
    for number, (stem, entry) in enumerate(tqdm(todo, desc="pictures", unit="picture"), 1):
        file_name = image_name(stem)
        failure = {"file_name": file_name, "name": entry.name, "reason": "the list shows no picture", "gone": True}
        for url in entry.image_urls:
            try:
                png = fetch_image(client, url)
            except FetchError as error:
                failure.update(url=url, reason=str(error), gone=isinstance(error, NotThere))
                if failure["gone"]:
                    continue  # only then the thumbnail will do
            else:
                write_whole(out / file_name, png)
                journal.add_image(file_name, url, hashlib.sha256(png).hexdigest())
                failure = {}
            break
        if failure:
            failures.append(failure)
        if number % SAVE_EVERY == 0:
            save()


def fetch_image(client: PoliteClient, url: str) -> bytes:
    """One picture, decoded and encoded anew as an RGBA PNG. Raises FetchError when it is none."""
    from pokediff.data.images import BadImage, encode_png, read_image

    problem = ""
    for _ in range(3):  # a corrupt picture may be whole the next time
        body = client.get(url, MAX_IMAGE_BYTES, "image/").body
        try:
            return encode_png(read_image(body))
        except BadImage as error:
            problem = str(error)
    raise FetchError(problem)


# ------------------------------------------------------------------------------------------------ what is kept


class Journal:
    """What has been stored, a JSON row each, appended at once: the memory of a run that may be killed at any moment.

    Pictures that are no longer there as they were written are forgotten.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / ".scrape" / "journal.jsonl"
        self.images: dict[str, dict[str, str]] = {}
        self.pages: dict[str, dict[str, Any]] = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # empty, or cut short when the run was killed
            (self.images if "file_name" in row else self.pages)[row.get("file_name") or row["page"]] = row
        self.images = {name: row for name, row in self.images.items() if _sha256(out / name) == row["sha256"]}
        rows = [*self.images.values(), *self.pages.values()]
        write_whole(self.path, "".join(_json_line(row) for row in rows))

    def add_image(self, file_name: str, source_url: str, sha256: str) -> None:
        row = {"file_name": file_name, "source_url": source_url, "sha256": sha256, "retrieved_at": _now()}
        self.images[file_name] = row
        self._append(row)

    def add_page(self, title: str, species: bulbapedia.Species) -> None:
        row = {
            "page": title,
            "category": species.category,
            "biology": species.biology,
            "relatives": list(species.relatives),
            "retrieved_at": _now(),
        }
        self.pages[title] = row
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(_json_line(row))


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def save(out: Path, entries: Mapping[str, Entry], journal: Journal) -> set[str]:
    """Write metadata.jsonl, in the order of the list. Returns the stems of the pictures that are stored."""
    families = evolution_families(entries.values(), journal)
    records, stored = [], set()
    for stem, entry in entries.items():
        image = journal.images.get(image_name(stem))
        if image is None:
            continue
        page = journal.pages.get(page_title(entry.page_url), {})
        stored.add(stem)
        records.append(
            Record(
                file_name=image["file_name"],
                name=entry.name,
                dex=entry.dex,
                form=entry.form or None,
                family=families.get(entry.dex),
                style="artwork",
                types=entry.types,
                genus=page.get("category"),
                descriptions=(page["biology"],) if page.get("biology") else (),
                source_url=image["source_url"],
                page_url=entry.page_url,
                license=LICENSE,
                sha256=image["sha256"],
                retrieved_at=image["retrieved_at"],
            )
        )
    write_records(out, records)
    return stored


def write_failures(out: Path, failures: Iterable[dict[str, Any]], journal: Journal) -> None:
    """Write failures.jsonl: what failed now, and what failed earlier and was not tried or had this time."""
    path = out / "failures.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    earlier = [json.loads(line) for line in lines if line]
    rows = {row.get("file_name") or row["url"]: row for row in [*earlier, *failures]}
    had = journal.images.keys() | journal.pages.keys()
    left = [row for key, row in rows.items() if key not in had and page_title(key) not in had]
    write_whole(path, "".join(_json_line(row) for row in left))


def evolution_families(entries: Iterable[Entry], journal: Journal) -> dict[int, int]:
    """{dex: smallest dex of its evolution line}, for species whose page was read."""
    entries = list(entries)
    dex_of = {page_title(entry.page_url): entry.dex for entry in entries}
    parent = {dex: dex for dex in dex_of.values()}

    def root(dex: int) -> int:
        while parent[dex] != dex:
            dex = parent[dex]
        return dex

    known = set()
    for entry in entries:
        page = journal.pages.get(page_title(entry.page_url))
        if page is None:
            continue
        line = {entry.dex} | {dex_of[title] for title in page["relatives"] if title in dex_of}
        smallest = min(root(dex) for dex in line)
        for dex in line:
            parent[root(dex)] = smallest
        known |= line
    return {dex: root(dex) for dex in known}


def unique_stems(entries: Iterable[Entry]) -> dict[str, Entry]:
    """A name for each entry's picture; equal ones are numbered in the order of the list."""
    stems: dict[str, Entry] = {}
    for entry in entries:
        stem, number = bulbapedia.file_stem(entry), 2
        while stem in stems:
            stem, number = f"{bulbapedia.file_stem(entry)}-{number}", number + 1
        stems[stem] = entry
    return stems


def image_name(stem: str) -> str:
    return f"images/{stem}.png"


# ------------------------------------------------------------------------------------------------ what is told


def tell_found(entries: Sequence[Entry]) -> None:
    missing = bulbapedia.missing_numbers(list(entries))
    species = len({entry.dex for entry in entries})
    gaps = f"; missing numbers: {', '.join(map(str, missing))}" if missing else ", no number missing"
    print(f"the list has {species} species and {len(entries) - species} further forms{gaps}")


def tell(summary: Summary) -> None:
    pages = f" and {summary.pages_gone} pages" if summary.pages_gone else ""
    print(
        f"{summary.stored} of {summary.entries} pictures in {summary.out}; {summary.pictures_gone} pictures{pages} "
        f"are not on the server, {summary.failed} failed (failures.jsonl says why); "
        f"{summary.requests} requests in {summary.seconds:.0f} s"
    )
    if summary.stopped:
        print(
            f"stopped: {summary.stopped}. Everything so far is kept. Wait some hours, better a day, then run the same "
            "command again: it goes on where it stopped. Should it happen again, ask the wiki's people first.",
            file=sys.stderr,
        )
    elif summary.failed:
        print("run the same command again to try the failed ones once more", file=sys.stderr)
