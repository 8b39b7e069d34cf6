"""Throughput, time limit and signals of a training."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

STOPS = ("", "time", "signal", "patience", "copies", "steps")  # reasons to stop a stage, by ascending priority


class Window:
    """Averages since the last log line. Validation, previews and checkpoints do not count as training time."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.images, self.seconds, self.waiting = 0, 0.0, 0.0
        self.resume()

    def resume(self) -> None:
        """Start the clock."""
        self.mark = time.monotonic()

    def waited(self) -> None:
        """Count the time since `resume` as waiting for data."""
        self.waiting += time.monotonic() - self.mark

    def done(self, images: int, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Add the time and the pictures of a step, its loss and gradient norm; a norm of None: a skipped step."""
        self.images += images
        self.seconds += time.monotonic() - self.mark
        if norm is not None:
            self.losses.append(loss.detach())
            self.norms.append(norm.detach())

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages, the loss over all processes."""
        values = {"images_per_s": self.images / self.seconds, "data_wait_share": self.waiting / self.seconds}
        values["processes"] = accelerator.num_processes  # a state may go on with others
        if self.losses:  # empty when every step was skipped; the same on all processes, which share the gradient
            loss = accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
            values = {"loss": loss, "grad_norm": torch.stack(self.norms).mean().item(), **values}
        return values


@dataclass(frozen=True)
class Pace:
    """The seconds that a stage takes here."""

    step: float
    closing: float = 0.0  # what follows the last step: validation, metrics, previews, files
    opening: float = 0.0  # what precedes the first step: drawings to learn from


class Limit:
    """A limit of wall-clock time; None is no limit."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def part(self, share: float) -> Limit:
        """A limit at this fraction of the remaining time."""
        return Limit(None if self.end is None else share * (self.end - time.monotonic()) / 60)

    def left(self) -> float:
        """Seconds."""
        return math.inf if self.end is None else self.end - time.monotonic()

    def reached(self, ahead: float = 0.0) -> bool:
        """Whether less than `ahead` seconds are left."""
        return self.left() <= ahead


def agreed(accelerator: Accelerator, reason: str) -> str:
    """The reason to stop of highest priority, of STOPS, over all processes."""
    codes = accelerator.gather(torch.tensor([STOPS.index(reason)], device=accelerator.device))
    return STOPS[int(codes.max())]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag, so that the step is finished and a checkpoint written; a second one acts at once.

    Signals within a second of the first are the same one: a terminal signals all processes, and a launcher again.
    """
    received: list[float] = []
    before: dict[signal.Signals | int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread, where no signal arrives
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)


def duration(seconds: float) -> str:
    """ "25 min", "3 h 05 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
