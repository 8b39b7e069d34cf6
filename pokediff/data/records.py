"""Record: one picture of a data set with its metadata; read_records(folder) reads any layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pokediff.data import layouts
from pokediff.errors import PokediffError
from pokediff.files import is_text, write_whole

CAPTION_COLUMNS = ("captions", "text", "caption", "prompt")  # the first that is not empty is read
LISTS = ("types", "colors")  # in a CSV their values are separated by commas

Split = Literal["train", "validation", "test"]
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.10  # of the families
FEWEST_HELD_OUT, SMALLEST_SET = 3, 20  # pictures in validation and in test at least, in a set of at least 20


@dataclass(frozen=True)
class Record:
    """One picture with its metadata. Only `file_name` is required."""

    file_name: str  # relative to the folder, forward slashes; rows of other files: "train.parquet#17", "0.tar#key"
    captions: tuple[str, ...] = ()  # written by people; empty: captions.py makes them from the fields below

    name: str | None = None  # in no caption of a species (a row with `dex`); in the captions of anything else
    dex: int | None = None  # National Pokédex number
    form: str | None = None
    family: str | int | None = None  # the evolution line, or any group that one split keeps together
    style: str | None = None
    kind: str | None = None  # of a thing: animal, monster, plant, person, face, object
    types: tuple[str, ...] = ()
    color: str | None = None  # of the species
    colors: tuple[str, ...] = ()  # the one or two main colours measured on this picture
    shape: str | None = None
    genus: str | None = None
    descriptions: tuple[str, ...] = ()  # sentences; of a thing, also keywords separated by commas
    shiny: bool = False  # recoloured: `color` is wrong for this picture

    author: str | None = None
    source: str | None = None
    source_url: str | None = None
    page_url: str | None = None
    license: str | None = None
    sha256: str | None = None  # of the stored file
    retrieved_at: str | None = None  # ISO 8601, UTC

    split: Split | None = None  # None: by a hash of the family
    root: str = field(default="", compare=False)  # the data set's folder; not a column

    @property
    def family_key(self) -> str:
        """The group that one split keeps together: the family, else the species, else the picture alone."""
        for part in (self.family, self.dex, self.name):
            if part not in (None, ""):
                return str(part)
        return self.file_name

    @property
    def is_species(self) -> bool:
        """Captions of a species leave out its name; captions of anything else use it."""
        return self.dex is not None or (self.kind is None and bool(self.types or self.shape))

    @property
    def is_described(self) -> bool:
        """Does a column other than the file name say what the picture shows?"""
        known = (self.captions, self.style, self.kind, self.types, self.color, self.shape, self.genus)
        return any((*known, self.descriptions, self.name and self.dex is None))


COLUMNS = {*CAPTION_COLUMNS, *(column.name for column in dataclasses.fields(Record))}

# ---------------------------------------------------------------------------------------------------------- splits


def split_of(record: Record) -> Split:
    """The split of a picture: its column, else a hash of its family, so that adding data moves no other picture."""
    if record.split is not None:
        return record.split
    place = _place(record.family_key)
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def _place(family_key: str) -> float:
    """A hash of the family, uniform in [0, 1)."""
    key = unicodedata.normalize("NFC", family_key)  # of a file name, which systems write in two forms
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def with_full_splits(records: Sequence[Record]) -> list[Record]:
    """Give a small set validation and test pictures where the hash gives too few.

    A set of at least SMALLEST_SET pictures gets FEWEST_HELD_OUT in each, as long as half of it stays for training.
    The training families with the smallest hashes are taken, so data added later moves no picture out of training.
    """
    splits = [split_of(record) for record in records]
    enough = all(splits.count(split) >= FEWEST_HELD_OUT for split in ("test", "validation"))
    if enough or len(records) < SMALLEST_SET:
        return list(records)
    members: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        members[record.family_key].append(index)
    families = sorted(members, key=_place)
    for split in ("test", "validation"):
        for family in families:
            if splits.count(split) >= FEWEST_HELD_OUT:
                break
            if all(splits[index] == "train" for index in members[family]):
                for index in members[family]:
                    splits[index] = split
    if splits.count("train") < len(records) / 2:
        return list(records)
    now = zip(records, splits, strict=True)
    return [record if split_of(record) == split else replace(record, split=split) for record, split in now]


# --------------------------------------------------------------------------------------------------------- reading


def read_records(folder: str | Path, report: Callable[[str], Any] = lambda _: None) -> list[Record]:
    """All pictures of a folder in any layout of layouts.py, in file order.

    `report` gets one line that says where the captions come from ("captions: 60 of 60, from metadata.csv"), and one
    for what was found and not read. A picture of which nothing is known gets the words of its file name as genus.
    Unknown columns are ignored. Raises PokediffError, with file and line, for a row that lacks `file_name`, has a
    value of the wrong type, names a file outside the folder, or repeats a `file_name`.
    """
    folder = Path(folder)
    listing = layouts.read_listing(folder)
    records: list[Record] = []
    seen: set[str] = set()
    for where, row in listing.rows:
        record = record_from_json(row, where, str(folder))
        if record.file_name in seen:
            raise PokediffError(f"{where}: {record.file_name} is listed twice")
        seen.add(record.file_name)
        records.append(record)
    if not records:
        raise PokediffError(f"{folder / listing.source} is empty")
    described = sum(record.is_described for record in records)
    records = [record if record.is_described else _named_by_file(record) for record in records]
    named = sum(record.is_described for record in records) - described
    report(_caption_line(described, named, len(records), listing.source))
    unknown = listing.rows[0][1].keys() - COLUMNS
    if unknown and not described:
        report(
            f"not read: columns {', '.join(sorted(unknown))} (captions are in a column {', '.join(CAPTION_COLUMNS)})"
        )
    for note in listing.notes:
        report(note)
    return with_full_splits(records)


def picture_bytes(record: Record) -> bytes:
    """The file of a record's picture. Raises OSError when it cannot be read."""
    return layouts.picture_bytes(Path(record.root), record.file_name)


def has_license(record: Record, patterns: Iterable[str]) -> bool:
    """Is its licence one of these shell patterns ("CC0-1.0", "CC-BY-[0-9]*")? A picture without one has none."""
    return any(fnmatchcase(record.license or "", pattern) for pattern in patterns)


def _named_by_file(record: Record) -> Record:
    return replace(record, genus=layouts.words_of(layouts.stem_of(record.file_name)) or None)


def _caption_line(described: int, named: int, total: int, source: str) -> str:
    if not source and named:
        described, named, source = named, 0, "file names"
    line = f"captions: {described} of {total}, from {source or 'no file'}"
    if described == total:
        return line
    rest = "file names" if named else "measured colours"
    return f"{line}; {rest} are used {'for the rest' if described else 'instead'}"


def _captions(row: dict[str, Any], where: str) -> list[str]:
    """The captions of the first column that has any."""
    for column in CAPTION_COLUMNS:
        value = row.get(column) or ()
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list | tuple) or not all(isinstance(caption, str) for caption in several):
            raise PokediffError(f"{where}: {column} must be a text or a list of texts")
        if not all(map(is_text, several)):
            raise PokediffError(f"{where}: {column} must be UTF-8 text")
        if captions := [caption.strip() for caption in several if caption.strip()]:
            return captions
    return []


def record_from_json(row: dict[str, Any], where: str, root: str = "") -> Record:
    """Validate one row of a folder. `where` begins the PokediffError that is raised for a bad one."""
    from pydantic import ValidationError

    row = {key: value for key, value in row.items() if value is not None} | {"root": root}
    # The text of a row of the scraper is the first of the captions that are made from its other columns.
    scraped = row.get("dex") and row.get("retrieved_at") and not row.get("captions")
    row["captions"] = [] if scraped else _captions(row, where)
    for column in LISTS:
        if isinstance(row.get(column), str):
            row[column] = [part.strip() for part in re.split("[,;|]", row[column]) if part.strip()]
    if isinstance(row.get("descriptions"), str):
        row["descriptions"] = [row["descriptions"]]
    row["split"] = layouts.SPLITS.get(str(row.get("split")).lower())
    try:
        record = _validator().validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        raise PokediffError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    path = PurePosixPath(record.file_name)
    if path.is_absolute() or ".." in path.parts or set("\\:\0") & set(record.file_name):
        raise PokediffError(f"{where}: file_name {record.file_name!r} must lie inside the folder")
    return record


@cache
def _validator() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


# --------------------------------------------------------------------------------------------------------- writing


def write_records(folder: str | Path, records: Iterable[Record], texts: Iterable[str] | None = None) -> None:
    """Write `folder/metadata.jsonl`, the rows of `rows_of`."""
    write_rows(Path(folder) / layouts.METADATA[0], rows_of(records, texts))


def rows_of(records: Iterable[Record], texts: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Records as rows; empty fields are left out.

    `texts`: one caption a record, for the column `text` that text-to-image trainers read.
    """
    records, rows = list(records), []
    for record, text in zip(records, texts if texts is not None else [""] * len(records), strict=True):
        row = {"file_name": record.file_name, "text": text, **dataclasses.asdict(replace(record, root=""))}
        known = {key: value for key, value in row.items() if value not in (None, (), "") and value is not False}
        rows.append(json.loads(json.dumps(known)))  # lists in place of tuples, as they are read back
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
