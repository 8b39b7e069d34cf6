"""Records to decoded pictures, by all processor cores. Nothing here imports torch: a process starts in a moment."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np

from pokediff.data import images
from pokediff.data.captions import captions_of
from pokediff.data.colors import measured_colors
from pokediff.data.images import BadImage, fit_square, read_image
from pokediff.data.records import Record, picture_bytes

DECODED_SIDE = 1024  # larger pictures are shrunk towards this many px as they are decoded
MANY = 20_000  # pictures for which processes are started: threads share one interpreter, which small pictures wait for
CHUNK = 64  # pictures that a thread or process takes at a time


@dataclass(frozen=True)
class Decoded:
    """One picture."""

    record: Record  # with its colours
    captions: tuple[str, ...]
    pixels: np.ndarray  # (S, S, 4) uint8, premultiplied RGBA
    sha256: bytes  # of its file


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_all(records: Sequence[Record], size: int) -> Iterator[Decoded | BadImage]:
    """Every record's picture at size px, or why there is none, in order."""
    chunks = [records[start : start + CHUNK] for start in range(0, len(records), CHUNK)]
    done = 0
    work = partial(_decode_chunk, size=size)
    if len(records) >= MANY and cores() > 1:
        context = get_context("spawn")  # a copy of this process (fork) would inherit locks that its threads hold
        pool: Executor = ProcessPoolExecutor(cores(), context, _start_process, (context.Lock(),))
        try:
            for part in pool.map(work, chunks):
                yield from part
                done += 1
        except BrokenProcessPool:  # no memory, or a script that works without `if __name__ == "__main__"`
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    with ThreadPoolExecutor(cores()) as pool:
        for part in pool.map(work, chunks[done:]):
            yield from part


def _decode_chunk(records: Sequence[Record], size: int) -> list[Decoded | BadImage]:
    return [_decode(record, size) for record in records]


def _decode(record: Record, size: int) -> Decoded | BadImage:
    try:
        record, rgba, data = read_picture(record)
    except BadImage as error:
        return error
    return Decoded(record, captions_of(record), fit_square(rgba, size), hashlib.sha256(data).digest())


def read_picture(record: Record) -> tuple[Record, np.ndarray, bytes]:
    """The record with its colours, its picture (straight RGBA) and its file. Raises BadImage."""
    try:
        data = picture_bytes(record)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    rgba = read_image(data, side=DECODED_SIDE)
    return replace(record, colors=measured_colors(rgba)) if needs_colors(record) else record, rgba, data


def needs_colors(record: Record) -> bool:
    """Whether its captions need colours that its row does not have."""
    return not record.captions and not record.colors


def _start_process(one_large: Any) -> None:
    images.ONE_LARGE = one_large
    cv2.setNumThreads(1)  # there is a process a core
    if parent := parent_process():  # a process whose parent was killed would wait for work for ever
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
