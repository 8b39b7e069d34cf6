"""Record: one row of `metadata.jsonl`, in the ImageFolder convention of Hugging Face (`file_name` first)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pokediff.errors import PokediffError

METADATA = "metadata.jsonl"

PICTURES = {".png", ".webp", ".gif", ".jpg", ".jpeg", ".bmp"}
NAMELESS = {"img", "image", "picture", "pic", "sprite", "dsc", "screenshot", "untitled", "frame", "final", "copy"}

Split = Literal["train", "validation", "test"]
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.10  # of the families


@dataclass(frozen=True)
class Record:
    """One picture and what is known of it. Only `file_name` is required."""

    file_name: str  # relative to the folder, forward slashes
    captions: tuple[str, ...] = ()  # written by people; empty: captions.py makes them from what follows

    name: str | None = None
    dex: int | None = None
    form: str | None = None
    family: str | int | None = None  # the evolution line; splits never cut through one
    style: str | None = None
    types: tuple[str, ...] = ()
    generation: int | None = None
    color: str | None = None
    shape: str | None = None
    genus: str | None = None
    descriptions: tuple[str, ...] = ()
    shiny: bool = False  # recoloured: `color` belongs to the species and is wrong for this picture

    source_url: str | None = None
    page_url: str | None = None
    license: str | None = None
    sha256: str | None = None  # of the stored file
    retrieved_at: str | None = None  # ISO 8601, UTC

    @property
    def family_key(self) -> str:
        """What a split must keep together: the family, else the species, else the picture alone."""
        for part in (self.family, self.dex, self.name):
            if part not in (None, ""):
                return str(part)
        return self.file_name


def split_of(record: Record) -> Split:
    """By a hash of the evolution family: no family stands on both sides, and adding data moves nothing."""
    digest = hashlib.sha256(record.family_key.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def read_records(folder: str | Path) -> list[Record]:
    """All rows of `folder/metadata.jsonl`, in file order; without one, a row for every picture file (`bare_records`).

    Columns we do not know are left alone; `text` (one caption) is read as `captions`. Raises PokediffError, with file
    and line, for a row that is not JSON, lacks `file_name`, has a value of the wrong type, names a file outside the
    folder, or repeats a `file_name`.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        return bare_records(Path(folder))
    records: list[Record] = []
    seen: set[str] = set()
    for where, row in _rows(path):
        record = record_from_json(row, where)
        if record.file_name in seen:
            raise PokediffError(f"{where}: {record.file_name} stands twice")
        seen.add(record.file_name)
        records.append(record)
    if not records:
        raise PokediffError(f"{path} is empty")
    return records


def bare_records(folder: Path) -> list[Record]:
    """A row for every picture below `folder`, in the order of their names, from what the files themselves tell.

    A text file of the same name holds captions, one a line (the convention of most trainers). Without it the words of
    the file's name are its `genus` ("fire_dragon_03.png": fire dragon) and the folder it lies in is its `style`.
    Raises PokediffError when there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise PokediffError(f"{folder} not found")
    records = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file()):
        beside = path.with_suffix(".txt")
        lines = (line.strip() for line in read_text(beside).splitlines()) if beside.is_file() else ()
        words = [word for word in re.findall(r"[^\W\d_]{3,}", path.stem.lower()) if word not in NAMELESS]
        place = path.relative_to(folder)
        records.append(
            Record(
                file_name=place.as_posix(),
                captions=tuple(filter(None, lines)),
                genus=" ".join(words) or None,
                style=place.parent.as_posix().replace("/", " ") if len(place.parts) > 1 else None,
            )
        )
    if not records:
        raise PokediffError(f"{folder} holds neither a {METADATA} nor pictures (docs/data.md)")
    return records


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PokediffError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise PokediffError(f"{where}: a row must be a JSON object")
        yield where, row


def record_from_json(row: dict[str, Any], where: str) -> Record:
    """Validate one row. `where` stands at the head of the PokediffError raised for a bad one."""
    from pydantic import ValidationError

    row = dict(row)
    text = row.pop("text", None)
    if text and not row.get("captions"):
        row["captions"] = (text,)
    try:
        record = _validator().validate_python({key: value for key, value in row.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise PokediffError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    path = PurePosixPath(record.file_name)
    if path.is_absolute() or ".." in path.parts or "\\" in record.file_name or ":" in record.file_name:
        raise PokediffError(f"{where}: file_name {record.file_name!r} must lie inside the folder")
    return record


@cache
def _validator() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def write_records(folder: str | Path, records: Iterable[Record]) -> None:
    """Write `folder/metadata.jsonl` whole or not at all; fields that are not known are left out."""
    lines = []
    for record in records:
        row = {key: value for key, value in dataclasses.asdict(record).items() if value not in (None, (), "")}
        lines.append(json.dumps(row, ensure_ascii=False))
    write_whole(Path(folder) / METADATA, "".join(line + "\n" for line in lines))


def read_text(path: Path) -> str:
    """A text file that a person may have written: UTF-8, with or without a byte order mark, any line ends.

    Raises PokediffError when it is something else.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PokediffError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file under a temporary name, then rename: killed at any moment, it is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
