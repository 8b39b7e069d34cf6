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
NAMES = "ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY EBUSY EMFILE ENFILE ENAMETOOLONG ELOOP EXDEV ENXIO ENODEV ESTALE EIO"
OF_DISKS = CURES.keys() | {getattr(errno, name) for name in NAMES.split()}


def system_failure(error: BaseException) -> OSError | None:
    """The error of the system that `error` is, or that another library made of it; None for any other."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, shutil.Error):
        return error
    if match := SYSTEM_ERROR.search(str(error)):
        number = int(match[1])
        return OSError(number, os.strerror(number) if number in OF_DISKS else printable(first_line(error)))
    return None


def system_line(failure: OSError) -> str:
    """What failed, why, and the remedy: "FILE: No space left on device: make space", "Connection refused"."""
    place = failure.filename or ("disk" if failure.errno in OF_DISKS else "")
    cure = CURES.get(failure.errno or 0, "")
    return f"{printable(str(place))}: {failure.strerror}{cure}" if place else str(failure.strerror)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around every command: print a `PokediffError` as one line and exit with code 2; Ctrl-C exits with code 130.

    Errors of the system are printed the same way: no such folder, no space left, connection refused. A console that is
    not UTF-8 shows a mark in place of a letter that it does not have.
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
        if (failure := system_failure(error)) is None:
            raise
        print(f"error: {system_line(failure)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
