"""Build a data set from Bulbapedia's National Pokédex list: pages and pictures to images/ and metadata.jsonl."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pokediff import __version__
from pokediff.config import DEFAULT_CLIP
from pokediff.data.colors import measured_colors
from pokediff.data.images import BadImage, encode_png, read_image
from pokediff.errors import PokediffError
from pokediff.files import own_folder, write_whole
from pokediff.progress import ProgressBar

from . import bulbapedia
from .bulbapedia import Entry, page_title
from .client import FetchError, NotThere, PoliteClient, StopRun
from .journal import STATE, Failure, Journal, save, write_failures

BASE_URL = "https://bulbapedia.bulbagarden.net"
MAX_BYTES = 20_000_000  # of a page or picture
LIST_FRESH_S = 7 * 24 * 3600  # a resumed run does not request the list again within a week
SAVE_EVERY = 100  # pictures between two writings of metadata.jsonl
DOWNLOADS = 3  # attempts at a picture that arrives corrupt


@dataclass(frozen=True)
class ScrapeOptions:
    """Build a data set from Bulbapedia's National Pokédex list.

    Writes images/, metadata.jsonl and the text embeddings of all captions. A run that was stopped resumes without
    requesting again what it has: OUT/.scrape/ keeps the list and a journal of all pictures and pages.
    """

    out: Path  # folder of the data set
    base_url: str = BASE_URL  # address of the wiki
    contact: str = ""  # your e-mail address for the wiki's administrators, sent in the User-Agent
    limit: int | None = None  # scrape only the first entries of the list
    pages: bool = False  # read each species' page, too: category, appearance, evolution line
    forms: bool = True  # include regional and other forms
    text_encoder: str = DEFAULT_CLIP  # encoder of the caption embeddings; none: no embeddings
    refresh: bool = False  # request the list even if the stored one is recent

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise PokediffError("--limit must be at least 1")
        if urlsplit(self.base_url).scheme not in ("http", "https") or not urlsplit(self.base_url).netloc:
            raise PokediffError(f"--base-url {self.base_url!r} is not a URL: it must start with https://")
        if self.text_encoder != "none":
            from pokediff.model.text import ENCODERS  # loads torch

            if self.text_encoder.partition(":")[0] not in ENCODERS:
                raise PokediffError(f"--text-encoder {self.text_encoder}: use none, {', '.join(ENCODERS)}")


@dataclass(frozen=True)
class Summary:
    """The result of a run."""

    entries: int
    stored: int
    failures: list[Failure]
    requests: int
    seconds: float
    stopped: str | None  # why the server refused further requests

    @property
    def failed(self) -> int:
        """Failures that another run may repair."""
        return sum(not failure.gone for failure in self.failures)


def run(options: ScrapeOptions) -> int:
    """Scrape and embed. Returns the exit code: 0 when all is stored that the server has, else 1."""
    summary = scrape(options)
    print_summary(summary, options.out)
    if options.text_encoder != "none" and summary.stored and summary.stopped is None:
        from pokediff.data.dataset import embed  # loads torch

        print(embed(options.out, options.text_encoder, progress=ProgressBar))
    return 0 if summary.stopped is None and summary.failed == 0 else 1


def scrape(options: ScrapeOptions) -> Summary:
    """Fetch list, pages and pictures.

    Raises PageChanged when the list page is no longer a list, and PokediffError for a folder with other files, or when
    another scraper writes to it.
    """
    with own_folder(options.out, STATE):
        return crawl(options)


def crawl(options: ScrapeOptions) -> Summary:
    out, client, started = options.out, make_client(options), time.monotonic()
    (out / STATE).mkdir(exist_ok=True)
    (out / "images").mkdir(exist_ok=True)
    journal = Journal(out)
    failures: list[Failure] = []
    wanted: dict[str, Entry] = {}
    stopped = None
    try:
        everything = read_list(options, client)
        print_found(everything)
        entries = by_file_name(everything)  # of the whole list: file names must not depend on the options
        wanted = select(entries, options)
        try:
            if options.pages:
                read_pages(wanted.values(), client, journal, failures)
            todo = [name for name in wanted if name not in journal.images]
            for number, name in enumerate(ProgressBar(todo, desc="pictures", unit="picture"), 1):
                if failure := fetch_image(out, name, wanted[name], client, journal):
                    failures.append(failure)
                if number % SAVE_EVERY == 0:
                    save(out, entries, journal)
        finally:  # metadata.jsonl lists all stored pictures however the run ends
            save(out, entries, journal)
            write_failures(out, failures, journal)
    except StopRun as stop:
        stopped = str(stop)
    stored = len(wanted.keys() & journal.images.keys())
    return Summary(len(wanted), stored, failures, client.requests, time.monotonic() - started, stopped)


def make_client(options: ScrapeOptions) -> PoliteClient:
    host = urlsplit(options.base_url).netloc
    hosts = {host} | (bulbapedia.HOSTS if host in bulbapedia.HOSTS else set())
    contact = f"; contact: {options.contact}" if options.contact else ""
    if not contact and options.base_url == BASE_URL:
        print(
            "no --contact: with one, the wiki's administrators can write to you before they block you", file=sys.stderr
        )
    return PoliteClient(hosts, f"pokediff/{__version__} (data set builder for text-to-sprite models{contact})")


def read_list(options: ScrapeOptions, client: PoliteClient) -> list[Entry]:
    """The entries of the list page, which is kept in .scrape/ for LIST_FRESH_S."""
    host = re.sub(r"[^\w.-]", "-", urlsplit(options.base_url).netloc)
    kept = options.out / STATE / f"list-{host}.html"
    url = bulbapedia.list_url(options.base_url)
    if kept.exists() and not options.refresh and time.time() - kept.stat().st_mtime < LIST_FRESH_S:
        return bulbapedia.parse_list(kept.read_bytes(), url)
    try:
        body = client.get(url, MAX_BYTES, "text/html")
    except FetchError as error:
        raise StopRun(f"the list {url} cannot be read: {error}") from None
    entries = bulbapedia.parse_list(body, url)  # raises for a page that is no list, which is not kept
    write_whole(kept, body)
    return entries


def select(entries: Mapping[str, Entry], options: ScrapeOptions) -> dict[str, Entry]:
    """The entries to fetch: the first `limit`; without forms, the first entry of every number."""
    species = {entry.dex: entry for entry in reversed(list(entries.values()))}
    wanted = {name: entry for name, entry in entries.items() if options.forms or entry is species[entry.dex]}
    return dict(list(wanted.items())[: options.limit])


def read_pages(entries: Iterable[Entry], client: PoliteClient, journal: Journal, failures: list[Failure]) -> None:
    """Read every species' own page into the journal; adds to `failures`."""
    pages = {page_title(entry.page_url): entry.page_url for entry in entries}
    todo = [(title, url) for title, url in pages.items() if title not in journal.pages]
    for title, url in ProgressBar(todo, desc="pages", unit="page"):
        try:
            body = client.get(url, MAX_BYTES, "text/html")
        except FetchError as error:
            failures.append(Failure(url, str(error), isinstance(error, NotThere)))
        else:
            journal.add_page(title, bulbapedia.parse_species(body))


def fetch_image(out: Path, file_name: str, entry: Entry, client: PoliteClient, journal: Journal) -> Failure | None:
    """Store one picture: the original, or the largest thumbnail if the server does not have the original."""
    failure = Failure("", "the list shows no picture", True, file_name, entry.name)
    for url in entry.image_urls:
        try:
            png, colors = download_image(client, url)
        except FetchError as error:
            failure = Failure(url, str(error), isinstance(error, NotThere), file_name, entry.name)
            if not failure.gone:
                break
        else:
            write_whole(out / file_name, png)
            journal.add_image(file_name, url, png, colors)
            return None
    return failure


def download_image(client: PoliteClient, url: str) -> tuple[bytes, tuple[str, ...]]:
    """One picture as an RGBA PNG, and its main colours. Raises FetchError when it is corrupt DOWNLOADS times."""
    problem = ""
    for _ in range(DOWNLOADS):
        body = client.get(url, MAX_BYTES, "image/")
        try:
            rgba = read_image(body)
        except BadImage as error:
            problem = str(error)
        else:
            return encode_png(rgba), measured_colors(rgba)
    raise FetchError(problem)


def by_file_name(entries: Iterable[Entry]) -> dict[str, Entry]:
    """{"images/0019-rattata-alola.png": entry}; equal names are numbered in the order of the list."""
    named: dict[str, Entry] = {}
    for entry in entries:
        stem = f"images/{bulbapedia.file_stem(entry)}"
        name, number = f"{stem}.png", 2
        while name in named:
            name, number = f"{stem}-{number}.png", number + 1
        named[name] = entry
    return named


# ---------------------------------------------------------------------------------------------------------- output


def print_found(entries: Sequence[Entry]) -> None:
    missing = bulbapedia.missing_numbers(list(entries))
    species = len({entry.dex for entry in entries})
    gaps = f"; missing numbers: {', '.join(map(str, missing))}" if missing else ", no number missing"
    print(f"the list has {species} species and {len(entries) - species} further forms{gaps}")


def print_summary(summary: Summary, out: Path) -> None:
    gone = {
        kind: sum(failure.gone and bool(failure.file_name) == (kind == "pictures") for failure in summary.failures)
        for kind in ("pictures", "pages")
    }
    parts = [f"{summary.stored} of {summary.entries} pictures in {out}"]
    if any(gone.values()):
        parts.append(f"not on the server: {', '.join(f'{n} {kind}' for kind, n in gone.items() if n)}")
    if summary.failed:
        parts.append(f"{summary.failed} failed (reasons in failures.jsonl)")
    print("; ".join([*parts, f"{summary.requests} requests in {summary.seconds:.0f} s"]))
    if summary.stopped:
        print(
            f"stopped: {summary.stopped}. Everything so far is kept. Wait some hours, better a day, then run the same "
            "command again: it resumes. If it happens again, ask the wiki's administrators first.",
            file=sys.stderr,
        )
    elif summary.failed:
        print("run the same command again to retry the failed ones", file=sys.stderr)
