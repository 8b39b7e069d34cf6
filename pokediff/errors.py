"""PokediffError, the error that a user can fix, and how commands print it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class PokediffError(Exception):
    """An error that the user can fix; its message is one line with the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around every command: print a `PokediffError` as one line and exit with code 2; Ctrl-C exits with code 130.

    Errors of the file system are printed the same way: no such folder, no permission, no space left.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        print(f"error: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except PokediffError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
