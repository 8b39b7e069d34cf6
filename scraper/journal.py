"""What a run keeps on disk: the journal, metadata.jsonl, failures.jsonl."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pokediff.data.captions import captions_of
from pokediff.data.colors import measured_colors
from pokediff.data.images import read_image
from pokediff.data.layouts import METADATA
from pokediff.data.records import Record, rows_of, write_rows
from pokediff.files import read_log, read_rows, write_whole

from .bulbapedia import Entry, Species, page_title

STATE = ".scrape"  # folder of the journal and the list
IMAGE_KEYS = ("file_name", "sha256", "source_url", "retrieved_at")  # of a row of a picture
Row = dict[str, Any]
LICENSE = (
    "Image: (c) Nintendo / Creatures Inc. / GAME FREAK inc. / The Pokémon Company; see its file page for the terms. "
    "Text: Bulbapedia, CC BY-NC-SA 2.5."
)


@dataclass(frozen=True)
class Failure:
    """A page or picture that was not stored."""

    url: str
    reason: str
    gone: bool  # the server does not have it; else another attempt may succeed
    file_name: str = ""  # of a picture, "" for a page
    name: str = ""  # of the species

    @property
    def key(self) -> str:
        return self.file_name or self.url


class Journal:
    """One JSON row for every picture stored and every page read, appended at once, so that a killed run can resume.

    Rows of pictures whose file is missing or changed are dropped when the journal is read.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / STATE / "journal.jsonl"
        self.images: dict[str, dict[str, Any]] = {}
        self.pages: dict[str, dict[str, Any]] = {}
        for row in read_log(self.path):
            if isinstance(row.get("page"), str) and isinstance(row.get("relatives"), list):
                self.pages[row["page"]] = row
            elif all(isinstance(row.get(key), str) for key in IMAGE_KEYS) and (kept := _checked(out, row)) is not None:
                self.images[row["file_name"]] = kept
        rows = [*self.images.values(), *self.pages.values()]
        write_whole(self.path, "".join(map(_json_line, rows)))

    def add_image(self, file_name: str, source_url: str, png: bytes, colors: Iterable[str]) -> None:
        sha256 = hashlib.sha256(png).hexdigest()
        row = {"file_name": file_name, "source_url": source_url, "sha256": sha256, "retrieved_at": _now()}
        self.images[file_name] = row | {"colors": list(colors)}
        self._append(self.images[file_name])

    def add_page(self, title: str, species: Species) -> None:
        self.pages[title] = {"page": title, **asdict(species), "retrieved_at": _now()}
        self._append(self.pages[title])

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(_json_line(row))


def _checked(out: Path, row: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a picture whose file is as it was written; with its colours, which old journals lack."""
    path = out / row["file_name"]
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return None
    return row if "colors" in row else row | {"colors": list(measured_colors(read_image(data)))}


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def save(out: Path, entries: Mapping[str, Entry], journal: Journal) -> None:
    """Write metadata.jsonl: the stored pictures of `entries` (by file name), in the order of the list.

    What somebody has changed or added in it since stays: rows are compared with those that were last written here,
    which .scrape/ keeps.
    """
    families = evolution_families(entries.values(), journal)
    records = []
    for file_name, entry in entries.items():
        if (image := journal.images.get(file_name)) is None:
            continue
        page = journal.pages.get(page_title(entry.page_url), {})
        records.append(
            Record(
                file_name=file_name,
                name=entry.name,
                dex=entry.dex,
                form=entry.form or None,
                family=families.get(entry.dex),
                style="artwork",
                types=entry.types,
                colors=tuple(image["colors"]),
                genus=page.get("category"),
                descriptions=(page["biology"],) if page.get("biology") else (),
                source_url=image["source_url"],
                page_url=entry.page_url,
                license=LICENSE,
                sha256=image["sha256"],
                retrieved_at=image["retrieved_at"],
            )
        )
    rows = rows_of(records, [captions_of(record)[0] for record in records])
    path, base = out / METADATA[0], out / STATE / METADATA[0]
    theirs = {row.get("file_name"): row for _, row in read_rows(path)} if path.is_file() else {}
    written = {row["file_name"]: row for row in read_log(base) if "file_name" in row} if base.is_file() else theirs
    ours = {row["file_name"]: row for row in rows}
    write_rows(base, rows)
    added = [row for name, row in theirs.items() if name not in ours and name not in written]
    write_rows(path, [merged(row, theirs.get(name), written.get(name, {})) for name, row in ours.items()] + added)


def merged(ours: Row, theirs: Row | None, written: Row) -> Row:
    """A new row with what somebody has changed in the one that was written before."""
    if theirs is None:
        return ours
    changed = {key for key in theirs.keys() | written.keys() if theirs.get(key) != written.get(key)}
    kept = {key: value for key, value in ours.items() if key not in changed}
    return kept | {key: theirs[key] for key in theirs if key in changed}


def write_failures(out: Path, failures: Iterable[Failure], journal: Journal) -> None:
    """Write failures.jsonl: the failures of this run, and earlier ones that no run has repaired."""
    path = out / "failures.jsonl"
    rows = {str(row.get("file_name") or row.get("url", "")): row for row in read_log(path)}
    rows |= {failure.key: {k: v for k, v in asdict(failure).items() if v != ""} for failure in failures}
    stored = journal.images.keys() | journal.pages.keys()
    left = [row for key, row in rows.items() if key not in stored and page_title(key) not in stored]
    write_whole(path, "".join(map(_json_line, left)))


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
