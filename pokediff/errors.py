"""PokediffError, the error that a user can fix, and how commands print it."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class PokediffError(Exception):
    """An error that the user can fix; its message is one line with the remedy."""


LONGEST = 1000  # letters of an error


def printable(text: str) -> str:
    """Text of a stranger's file as one line that a terminal shows and does not obey."""
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


SPACE = ": make space, or write elsewhere with --out; what was written before is whole"
RIGHTS = ": check its permissions, or write elsewhere with --out"
CURES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), SPACE)
CURES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), RIGHTS)
# Libraries in Rust (safetensors) and copies of folders pass on the text of an error of the system, not the error.
SYSTEM_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)[)\]]")


def disk_failure(error: BaseException) -> OSError | None:
    """The error of the file system that `error` is, or that another library made of it; None for any other."""
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return error if error.errno is not None else None
    if match := SYSTEM_ERROR.search(str(error)):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    return None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around every command: print a `PokediffError` as one line and exit with code 2; Ctrl-C exits with code 130.

    Errors of the file system are printed the same way: no such folder, no permission, no space left. A console that
    is not UTF-8 shows a mark in place of a letter that it does not have.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except PokediffError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except Exception as error:
        if (failure := disk_failure(error)) is None:
            raise
        cure = CURES.get(failure.errno or 0, "")
        place = printable(str(failure.filename or "disk"))
        print(f"error: {place}: {failure.strerror}{cure}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
