"""WebDataset shards: tar files whose members key.png, key.txt, key.json and key.cls are one sample.

A row's file_name is its shard and key, "train-000.tar#0017". A shard is indexed by the offsets that tarfile finds, and
its members are read where they lie. The webdataset library is not used: it reads shards from start to end, where
training needs any picture at any step, and it unpickles members that a stranger has named so.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from pokediff.data.images import picture_formats
from pokediff.errors import PokediffError, first_line
from pokediff.files import Row, as_row, parse_json, read_text, text_of

SHARD_ROW = re.compile(r"(.+?\.tar)#(.+)", re.IGNORECASE)
SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and extension, up to the first dot, as webdataset has them
CLASS_NAMES = "classnames.txt"  # beside the shards: a line for each number of a .cls
LARGEST_TEXT = 1 << 20  # bytes of a caption or of a header; a picture's are bounded by its shard
SHARDS_IN_MEMORY = 512  # their indices

Member = tuple[str, int, int]  # extension in lower case, offset and size in the shard


def read_shard_rows(folder: Path, file: PurePosixPath, classes: Sequence[str]) -> tuple[list[Row], int]:
    """The rows of the samples that have a picture, and the number of members that were left out.

    Raises PokediffError for a file that is no tar file, or not whole, and for texts that cannot be read.
    """
    path, rows = folder / file, []
    samples, left_out = _index(path)
    with path.open("rb") as shard:

        def read(key: str, member: Member) -> tuple[str, Path]:
            extension, offset, size = member
            where = Path(f"{path}#{key}.{extension}")
            if size > LARGEST_TEXT:
                raise PokediffError(f"{where} has {size} bytes, too many for a text")
            shard.seek(offset)
            return text_of(shard.read(size), where), where

        for key, members in samples.items():
            if _picture(members) is None:
                continue
            row: dict[str, Any] = {}
            texts = {member[0]: member for member in reversed(members)}  # the first of a name
            if "json" in texts:
                text, where = read(key, texts["json"])
                row = dict(as_row(parse_json(text, where), str(where)))
            lines = [read(key, texts[name])[0] for name in ("txt", "caption") if name in texts]
            if captions := [line.strip() for text in lines for line in text.splitlines() if line.strip()]:
                row.setdefault("captions", captions)
            if "cls" in texts:
                row = {**_class(read(key, texts["cls"])[0].strip(), classes), **row}
            rows.append((f"{path}#{key}", {**row, "file_name": f"{file}#{key}"}))
    return rows, left_out + sum(_picture(members) is None for members in samples.values())


def _class(label: str, classes: Sequence[str]) -> dict[str, Any]:
    """What a .cls says: a class by its name or number; without names, the number is the caption."""
    if not label.isdecimal():
        return {"genus": label} if label else {}
    number = int(label[:9])
    return {"genus": classes[number]} if number < len(classes) else {"captions": [label]}


def class_names(folder: Path, files: Sequence[PurePosixPath]) -> list[str]:
    """The lines of classnames.txt, [] without one."""
    found = next((file for file in files if file.name.lower() == CLASS_NAMES), None)
    return [line.strip() for line in read_text(folder / found).splitlines()] if found else []


def shard_picture(path: Path, key: str) -> bytes:
    """The picture file of a sample. Raises OSError when there is none."""
    try:
        member = _picture(_index(path)[0].get(key, ()))
    except PokediffError as error:
        raise OSError(str(error)) from None
    if member is None:
        raise OSError("the shard has no such picture")
    with path.open("rb") as shard:
        shard.seek(member[1])
        return shard.read(member[2])


def _picture(members: Sequence[Member]) -> Member | None:
    """Of a sample's members, the picture: key.png rather than key.mask.png."""
    suffixes = picture_formats()[1]
    found = [member for member in members if f".{member[0].rpartition('.')[2]}" in suffixes]
    return min(found, key=lambda member: member[0].count("."), default=None)


@lru_cache(maxsize=SHARDS_IN_MEMORY)
def _index(path: Path) -> tuple[dict[str, tuple[Member, ...]], int]:
    """The members of every sample, in the order of the shard, and the number of members that are none."""
    samples: dict[str, tuple[Member, ...]] = {}
    left_out = 0
    for member in _members(path):
        match = SAMPLE.fullmatch(member.name)
        if member.isdir() or (match and match[1].rpartition("/")[2].startswith("__")):
            continue  # what webdataset calls meta
        if match is None or not _is_plain(member) or not _is_inside(match[1]):
            left_out += 1
        else:
            samples[match[1]] = (*samples.get(match[1], ()), (match[2].lower(), member.offset_data, member.size))
    return samples, left_out


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _is_inside(key: str) -> bool:
    """Whether a key may be the name of a file of the data set, and can be written."""
    parts = PurePosixPath(key).parts
    return not key.startswith("/") and ".." not in parts and not set("\\:\0") & set(key) and key.isprintable()


class _Headers(io.BufferedReader):
    """A shard of which only headers are read: one that says it is longer is refused before it fills the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LARGEST_TEXT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    size, last = path.stat().st_size, -1
    try:
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                lies = _is_plain(member) and not 0 <= member.size <= size - member.offset_data
                if lies or member.offset <= last:
                    raise tarfile.ReadError(f"{member.name} lies outside of the file")
                last = member.offset
                archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps them all
                yield member
            file.seek(archive.offset)
            # tarfile takes a header that is broken or cut for the end
            if any(file.read(tarfile.BLOCKSIZE)) or size % tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it does not end as one")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise PokediffError(f"{path} is not a tar file, or not whole ({first_line(error)})") from None
