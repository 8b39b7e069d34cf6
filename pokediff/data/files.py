"""Reading of text files, atomic writing of files."""

from __future__ import annotations

import os
from pathlib import Path

from pokediff.errors import PokediffError


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark, with any line ends.

    Raises PokediffError for any other encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PokediffError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a temporary file, then rename it: after a crash the file is complete, or the old one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
