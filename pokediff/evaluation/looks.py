"""Measures of pixels that need no network. Pictures are straight RGBA uint8 (N, H, W, 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pokediff.data.colors import COLOR_ANCHORS, main_colors
from pokediff.data.images import composite, premultiply
from pokediff.data.records import Record


def color_hits(pictures: np.ndarray, colors: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool each: is the colour the main one, is it one of the two main ones (CIELAB, opaque pixels)?"""
    found = [main_colors(picture) for picture in pictures]
    pairs = list(zip(found, colors, strict=True))
    return np.array([names[:1] == (color,) for names, color in pairs]), np.array([color in n for n, color in pairs])


def named_colors(pictures: np.ndarray, records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    """The real pictures whose colour people wrote down (the Pokédex; not for shiny ones), and these colours."""
    known = [i for i, record in enumerate(records) if record.color in COLOR_ANCHORS and not record.shiny]
    return pictures[known], [str(records[i].color) for i in known]


def opaque_share(pictures: np.ndarray) -> np.ndarray:
    """(N,) share of pixels with alpha of at least one half."""
    return (pictures[..., 3] >= 128).mean((1, 2))


def half_transparent_share(pictures: np.ndarray) -> np.ndarray:
    """(N,) share of pixels with an alpha of 10 % to 90 %."""
    alpha = pictures[..., 3] / 255
    return ((alpha > 0.1) & (alpha < 0.9)).mean((1, 2))


def border_alpha(pictures: np.ndarray) -> np.ndarray:
    """(N,) mean alpha, 0 to 1, of the outermost rows and columns."""
    alpha = pictures[..., 3] / 255
    edge = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], axis=1)
    return edge.mean(1)


def palette_size(pictures: np.ndarray, levels: int = 32) -> np.ndarray:
    """(N,) different colours of opaque pixels, each channel in `levels` steps."""
    step = 256 // levels
    return np.array([len(np.unique(picture[picture[..., 3] >= 128][:, :3] // step, axis=0)) for picture in pictures])


def run_length(pictures: np.ndarray, levels: int = 32) -> np.ndarray:
    """(N,) mean length in px of the horizontal runs of one colour among opaque pixels; 0 without opaque pixels.

    Colours are compared in `levels` steps a channel. Pixel art has long runs, noise has runs of 1.
    """
    opaque = pictures[..., 3] >= 128  # (N, H, W)
    colors = pictures[..., :3] // (256 // levels)
    same = (colors[:, :, 1:] == colors[:, :, :-1]).all(-1) & opaque[:, :, 1:] & opaque[:, :, :-1]
    pixels = opaque.sum((1, 2))
    return pixels / np.maximum(pixels - same.sum((1, 2)), 1)


def sharpness(pictures: np.ndarray) -> np.ndarray:
    """(N,) mean absolute difference of neighbouring pixels on white, 0 to 1: blurred pictures score low."""
    rgb = composite(pictures).astype(np.float32) / 255
    return (np.abs(np.diff(rgb, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(rgb, axis=2)).mean((1, 2, 3))) / 2


def picture_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) root mean square difference of premultiplied pixels, 0 to 1."""
    difference = (premultiply(a).astype(np.float32) - premultiply(b).astype(np.float32)) / 255
    return np.sqrt((difference**2).mean((1, 2, 3)))


LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "share of opaque pixels": opaque_share,
    "share of half-transparent pixels": half_transparent_share,
    "mean alpha on the border": border_alpha,
    "colours of a picture (15 bit)": palette_size,
    "sharpness (mean difference of neighbours)": sharpness,
}
