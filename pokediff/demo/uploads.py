"""Decoding of uploads and of the sketch pad, limited in bytes and pixels."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from pokediff.data.images import BadImage, premultiply, read_image, unpremultiply
from pokediff.errors import PokediffError
from pokediff.files import read_text

MAX_MB, MAX_PIXELS = 8, 16_000_000
MAX_TEXT_BYTES = 100_000
MAX_SIDE = 512  # px; larger uploads are shrunk
DECODING = Lock()  # a picture at the limit takes some 250 MB while it is decoded: one at a time


def read_picture(path: str | Path) -> np.ndarray:
    """An uploaded picture as `decode` returns it. Raises PokediffError as `decode` does, or for a missing file."""
    try:
        if Path(path).stat().st_size > MAX_MB * 2**20:
            raise PokediffError(f"The file is larger than {MAX_MB} MB.")
        return decode(Path(path).read_bytes())
    except OSError:
        raise PokediffError("The upload failed; try again.") from None


def decode(data: bytes) -> np.ndarray:
    """The bytes of a picture file as straight RGBA uint8 (H, W, 4), at most MAX_SIDE px a side.

    Raises PokediffError for bytes that are not a picture, truncated, or beyond MAX_MB or MAX_PIXELS.
    """
    if len(data) > MAX_MB * 2**20:
        raise PokediffError(f"The file is larger than {MAX_MB} MB.")
    with DECODING:
        try:
            picture = read_image(data, MAX_PIXELS)
        except BadImage as error:
            raise PokediffError(f"This file cannot be used: {error}.") from None
        factor = MAX_SIDE / max(picture.shape[:2])
        if factor >= 1:
            return picture
        size = (max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
        return unpremultiply(np.asarray(Image.fromarray(premultiply(picture)).resize(size, Image.Resampling.BOX)))


def read_lines(path: str | Path) -> str:
    """An uploaded text file. Raises PokediffError when it is larger than MAX_TEXT_BYTES or not UTF-8."""
    if Path(path).stat().st_size > MAX_TEXT_BYTES:
        raise PokediffError(f"A file of prompts has at most {MAX_TEXT_BYTES // 1000} kB.")
    try:
        return read_text(Path(path))
    except PokediffError:  # its text names a path of the server
        raise PokediffError("This file cannot be used: not UTF-8 text.") from None


def canvas_picture(value: Any) -> np.ndarray:
    """The picture on a sketch pad, its strokes included, straight RGBA uint8 (H, W, 4).

    `value` is that of `patches.sketch_pad`. Raises PokediffError for an empty or refused one.
    """
    whole, *others = (Image.fromarray(part) for part in _parts(value))
    for part in others:
        whole = Image.alpha_composite(whole, part.resize(whole.size))
    return np.asarray(whole)


def canvas_mask(value: Any) -> tuple[np.ndarray, np.ndarray]:
    """The picture below the strokes, straight RGBA uint8 (H, W, 4), and where the strokes are, bool (H, W).

    Raises PokediffError as `canvas_picture`, and when there is no picture or no stroke.
    """
    _parts(value)
    background = value["background"]
    if background is None or not background[..., 3].any():
        raise PokediffError("Upload a picture first: there is nothing under the strokes.")
    strokes = [Image.fromarray(layer[..., 3]).resize(background.shape[1::-1]) for layer in value["layers"]]
    mask = np.any([np.asarray(stroke) > 0 for stroke in strokes], axis=0) if strokes else np.zeros(1, bool)
    if not mask.any():
        raise PokediffError("Paint over the part to redraw first.")
    return background, mask


def _parts(value: Any) -> list[np.ndarray]:
    if value and "refused" in value:
        raise PokediffError(value["refused"])
    parts = [] if not value else [part for part in (value["background"], *value["layers"]) if part is not None]
    if not any(part[..., 3].any() for part in parts):
        raise PokediffError("Upload a picture or draw one first.")
    return parts
