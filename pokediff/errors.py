"""The one exception a user is meant to read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class PokediffError(Exception):
    """Something the user can mend; its text is one line that says what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """At the edge of every command: a `PokediffError` becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        yield
    except PokediffError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
