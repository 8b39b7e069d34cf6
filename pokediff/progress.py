"""ProgressBar bars; where the output is no terminal, a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds from line to line


class ProgressBar(tqdm):
    """tqdm whose bar becomes a line every EVERY seconds, and a last one, where the output is a file or a pipe: tqdm
    itself fills a log with carriage returns. Of a shorter job nothing is written there.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        file = options.get("file") or sys.stderr
        self.in_lines = not (file and file.isatty())
        self.began = self.told = time.monotonic()
        super().__init__(*args, **options, **({"ncols": 0} if self.in_lines else {}))

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.in_lines:
            return super().display(msg, pos)
        if msg is None and time.monotonic() >= self.told + EVERY:
            self._line()
        return False

    def clear(self, nolock: bool = False) -> None:
        if not self.in_lines:
            super().clear(nolock)

    def close(self) -> None:
        if self.in_lines:
            if not self.disable and self.told > self.began:
                self._line()
            self.leave = False
        super().close()

    def _line(self) -> None:
        self.told = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()
