"""MNIST's idx files: pictures and labels in one file each, gzipped or not (LeCun et al. 1998).

A row's file_name is its file and number, "train-images-idx3-ubyte.gz#17". The files of the test pictures, t10k-…, are
the test split; the last part of the others is the validation split.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pokediff.data.images import encode_png
from pokediff.errors import PokediffError

IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?")
IDX_ROW = re.compile(r"(.+idx3-ubyte(?:\.gz)?)#(\d+)")
LARGEST = 1 << 30  # bytes, unpacked: a small file may unpack to a thousand times its size
VALIDATION_PART = 12  # one of as many parts: 5,000 of MNIST's 60,000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def idx_files(files: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Those that hold pictures; of x and x.gz, x."""
    found = [file for file in files if IMAGES.fullmatch(file.name)]
    return [file for file in found if file.suffix != ".gz" or file.with_suffix("") not in found]


def read_idx_rows(folder: Path, file: PurePosixPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each picture, with the captions of its label. Raises PokediffError without labels, or broken files."""
    match = IMAGES.fullmatch(file.name)
    assert match, "one of idx_files"
    labels_file = file.with_name(f"{match[1]}labels{match[2]}idx1-ubyte{match[3] or ''}")
    if not (folder / labels_file).is_file():
        raise PokediffError(f"{folder / file}: {labels_file.name} is missing")
    labels, number = _read(folder / labels_file), len(_read(folder / file))
    if len(labels) != number:
        raise PokediffError(f"{folder / file} holds {number} pictures, {labels_file.name} {len(labels)} labels")
    test = file.name.startswith("t10k")
    for index, label in enumerate(labels.tolist()):
        split = "test" if test else "validation" if index >= number - number // VALIDATION_PART else "train"
        word = WORDS[label] if label < len(WORDS) else str(label)
        captions = [str(label), f"digit {label}", f"the digit {word}"]
        row = {"file_name": f"{file}#{index}", "captions": captions, "split": split}
        yield f"{folder / file}: picture {index}", row


def idx_picture(folder: Path, file: str, index: int) -> bytes:
    """A picture as a PNG file, opaque. Raises OSError when there is none."""
    try:
        grey = _read(folder / file)[index]
    except (IndexError, PokediffError) as error:
        raise OSError(str(error)) from None
    rgba = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    return encode_png(rgba)


@lru_cache(maxsize=4)
def _read(path: Path) -> np.ndarray:
    """The array of an idx file of bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MB")
        dims = data[3]
        shape = np.frombuffer(data, ">u4", dims, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise PokediffError(f"{path} is no idx file ({error})") from None
