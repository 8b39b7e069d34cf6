"""Files of text, of rows and of JSON; atomic writing; folders that one process writes to.

Every text file is opened by `read_text`, every table by `read_rows` or `read_csv`, so all accept the same encodings and
name file and line of what is wrong.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pokediff.errors import PokediffError

LOCK, WRITER = ".lock", ".writer"  # in a folder that is written to: a lock, and whose it is

Row = tuple[str, dict[str, Any]]  # its place for error messages, and its columns


# --------------------------------------------------------------------------------------------------------- reading


def read_text(path: Path) -> str:
    """A UTF-8 text file with or without a byte order mark, or a UTF-16 one with it; any line ends become "\\n".

    Raises PokediffError for any other encoding, and for a pipe or device, which may never end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise PokediffError(f"{path} is no file")
    return text_of(path.read_bytes(), path)


def text_of(data: bytes, path: Path) -> str:
    """The text of a file's bytes. Raises PokediffError, with its name, for an encoding that `read_text` has not."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise PokediffError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    return io.StringIO(text, newline=None).read()


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: other bytes of a name or a command line come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_file(path: Path, what: str = "") -> None:
    """Raise PokediffError when there is no such file; `what` it is begins the message."""
    if not path.is_file():
        raise PokediffError(f"{what} {path} {'is a folder, not a file' if path.is_dir() else 'not found'}".strip())


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether `path` is a plain file that lies in `folder` when all links are resolved: what a stranger's folder names
    must not open other files of this machine, nor a pipe, which may never end. Files of a download of the Hugging Face
    hub are links to the blobs of their repository.
    """
    places = [folder.resolve()]
    for parent in folder.absolute().parents:
        if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--")):
            places.append(parent.parent.resolve() / "blobs")
    found = path.resolve()
    return path.is_file() and any(found.is_relative_to(place) for place in places)


def read_json(path: Path) -> Any:
    """A JSON file. Raises PokediffError with the line that is none."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    """JSON that begins in `first_line` of a file. Raises PokediffError with file and line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PokediffError(f"{path}:{first_line + error.lineno - 1}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise PokediffError(f"{path}:{first_line}: not JSON that can be read ({error})") from None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file; empty lines are skipped. Raises PokediffError with the line that is no JSON object."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", as_row(parse_json(line, path, number), f"{path}:{number}")


def as_row(value: Any, where: str) -> dict[str, Any]:
    """`value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise PokediffError(f"{where}: a row must be a JSON object")
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log that is written line by line, without those that were cut when a run was killed; [] without a
    file.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_csv(path: Path, required: str) -> Iterator[Row]:
    """The rows of a CSV file with commas, semicolons or tabs, without empty cells; names of columns in lower case.

    Raises PokediffError when the header lacks the column `required`, or a line has more values than columns.
    """
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # spreadsheets of some countries write semicolons
    table = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    try:
        names = [str(name).strip().lower() for name in table.fieldnames or ()]
        if required not in names:
            raise PokediffError(f"{path}:1: the header must have a column {required}")
        table.fieldnames = names
        for row in table:
            where = f"{path}:{table.line_num}"
            if None in row:
                raise PokediffError(f"{where}: more values than columns: put quotes around text with a {delimiter}")
            yield where, {key: value.strip() for key, value in row.items() if value and value.strip()}
    except csv.Error as error:  # a cell of 130,000 letters: a quote that is not closed
        raise PokediffError(f"{path}:{table.line_num}: not CSV ({error})") from None


# --------------------------------------------------------------------------------------------------------- writing


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a temporary file, then rename it: after a crash the file is complete, or the old one. A temporary file that
    is left is hidden, so it is part of no data set and makes no folder a foreign one; the next write replaces it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno is not None and error.filename is None:  # a full disk does not name the file
            error.filename = str(path)
        raise


def move_whole(temporary: Path, folder: Path, last: Sequence[str] = ()) -> None:
    """Move all files of a finished temporary folder, of the same disk, to their places in `folder`; those of the
    relative paths `last` at the end, in this order: a list after what it names. The temporary folder goes.
    """
    files = [path for path in temporary.rglob("*") if path.is_file()]
    for path in files:  # on the disk before the rename
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    order = [temporary / path for path in last]
    for path in sorted(files, key=lambda path: order.index(path) if path in order else -1):
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(temporary)


@contextmanager
def aside(folder: Path, *marks: str) -> Iterator[Path]:
    """A new folder, inside an output folder, for the files that `move_whole` moves there; at the end it goes.

    Where `marks` are moved last, it marks the output of a killed run as ours. So what such a run left in it goes, not
    itself; after an error it stays, empty, where the output would be foreign without it (see `refuse_foreign`).
    """
    folder.mkdir(exist_ok=True)
    _empty(folder)
    try:
        yield folder
    except BaseException:
        with suppress(OSError, PokediffError):
            _empty(folder)
            refuse_foreign(folder.parent, marks)
            folder.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_foreign(folder: Path, marks: Sequence[str]) -> None:
    """Raise PokediffError when a folder holds files, and none of `marks`, the files by which our own are known."""
    if any((folder / mark).exists() for mark in marks) or not folder.is_dir():
        return
    if found := sorted(path.name for path in folder.iterdir() if path.name[0] != "."):
        raise PokediffError(f"{folder} holds other files ({found[0]}): choose another --out, a new folder")


def refuse_inside(out: Path, data: Sequence[str | Path]) -> None:
    """Raise PokediffError when a folder to write to lies in a data set, whose pictures the written ones would join."""
    for folder in map(Path, data):
        if out.resolve().is_relative_to(folder.resolve()):
            raise PokediffError(f"{out} lies in the data {folder}: choose an --out elsewhere")


@contextmanager
def own_folder(folder: Path, *marks: str) -> Iterator[None]:
    """Create a folder, or take one of an earlier run, and keep other processes out of it until the end.

    Raises PokediffError when it holds other files (see `refuse_foreign`), or another process writes to it: its lock
    ends with that process, however that ends.
    """
    refuse_foreign(folder, marks)
    folder.mkdir(parents=True, exist_ok=True)
    lock, writer = FileLock(folder / LOCK), folder / WRITER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = writer.read_text(encoding="utf-8").strip() if writer.is_file() else "another process"
        raise PokediffError(f"{other} writes to {folder}: wait until it ends, or choose another --out") from None
    try:
        writer.write_text(f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name})\n", encoding="utf-8")
        yield
    finally:
        for path in (writer, folder / LOCK):  # before the release: after it, the lock may be another's
            with suppress(OSError):  # Windows does not delete an open file
                path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty: something was written
            folder.rmdir()


def new_folder(folder: Path) -> Path:
    """Create `folder` or, where it exists, the first of folder-2, folder-3 ... that does not. Returns its path."""
    number = 1
    while True:
        free = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            free.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return free
