"""The one exception a user is meant to read."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class PokediffError(Exception):
    """Something the user can mend; its text is one line that says what to do."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """At the edge of every command: a `PokediffError` becomes one line and exit code 2, Ctrl-C exit code 130.

    So does what the system says of a path: no such folder, a file in the way, no permission, no space left.
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
