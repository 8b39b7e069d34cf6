from __future__ import annotations

import io
import time

import pytest

from pokediff import progress
from pokediff.progress import ProgressBar


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_now_and_then_and_the_last_one(clock):
    file = io.StringIO()
    with ProgressBar(total=100, desc="base-32", file=file, mininterval=0) as bar:
        for step in range(100):
            clock.seconds = step
            bar.update()
            bar.set_postfix(loss=f"{step / 100}")
    lines = file.getvalue().splitlines()
    assert len(lines) == 100 // progress.EVERY + 1
    assert lines[0].startswith("base-32")
    assert "31/100" in lines[0]
    assert "100/100" in lines[-1]
    assert "loss=0.9" in lines[-1]
    assert "\r" not in file.getvalue()


def test_a_short_job_writes_nothing_into_a_file(clock, capsys):
    for _ in ProgressBar(range(3), desc="outer", mininterval=0):
        for _ in ProgressBar(range(3), desc="inner", leave=False, mininterval=0):
            clock.seconds += 1
            ProgressBar.write("said")
    assert capsys.readouterr() == ("said\n" * 9, "")


def test_a_terminal_gets_the_bar(clock):
    file = Terminal()
    for _ in ProgressBar(range(3), desc="drawing", file=file, mininterval=0):
        pass
    assert "\rdrawing: 100%|" in file.getvalue()
