"""Figure and plain background of a picture, and the basic colours that people name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np

from pokediff.data.images import fit_square, unpremultiply

# The eleven basic colour terms (Berlin & Kay, "Basic Color Terms", 1969), each by a few anchors in sRGB. A pixel gets
# the name of the nearest anchor in CIELAB.
COLOR_ANCHORS: dict[str, str] = {
    "black": "000000 1c1c1c 2e2a2e 20242e 38363c 40404a",
    "gray": "585858 707070 888888 a0a0a0 b4b4b4 8a8680 94989c",
    "white": "ffffff f4f4f4 e6e6e6 d4d4d4 f6f0e4 e4ecf4 f0e8f0",
    "red": "ff0000 e02020 c01818 a01020 d84038 e85048 801018 c83c50 a83840 983028",
    "orange": "ff8000 f08018 ff9830 e86820 f89850 ffa050 d87020 f07848",
    "yellow": "ffff00 ffe020 f8d030 ffd700 f0e060 fff080 e8c830 d8c020 f8e8a0 c8b028",
    "green": "00a000 20c040 60d060 90e080 c0f0a0 108030 305828 708830 a0c048 40b890 98d0a8 1c4028 6c9c6c "
    "d0ecc8 90a888 508070",
    "blue": "0000ff 2040c0 3068d8 4090f0 60b0f8 90d0ff 101860 203870 48c8e0 80e0f0 00a0c0 5878a8 88a0d0 b8d8f8 307080 "
    "607488 8496ac a8b8cc 384868 34b0b0",
    "purple": "800080 602090 8040b0 a060d0 c090e0 482060 9858a8 7058a0 a078b8 5c3c70 b0a0e0 8880a0 6c6088 ccb8dc",
    "pink": "ff80c0 ffa0c8 f8b8d0 e060a0 ffc8d8 f090a8 d870a0 f8a8a0 e83890 d898b0 f4d4dc",
    "brown": "804020 603010 a05828 a87848 784830 50301c c09058 c8a078 906040 b88868 8c6c54 d0b088 5c4838 887464 a08c78 "
    "685c50",
}
# Shadow and shine make parts of every creature gray or white, so people name the other colours first.
SALIENCE = {"gray": 0.6, "white": 0.8, "black": 0.9}
COLOR_SIZE = 64  # px, so that captions do not depend on the model's size


def color_shares(rgba: np.ndarray) -> dict[str, float]:
    """{basic colour: share of the opaque pixels}, largest first, sum 1.

    `rgba` is straight uint8 (H, W, 4). The outermost pixels of the figure are left out where enough others remain, for
    outlines are dark whatever the creature's colour. Empty for a picture without opaque pixels.
    """
    mask = figure_mask(rgba)
    three = np.ones((3, 3), np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), three, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    pixels = rgba[inner if inner.sum() >= 0.4 * mask.sum() and inner.any() else mask][:, :3]
    if len(pixels) == 0:
        return {}
    r, g, b = (pixels >> 3).T
    shares = np.bincount(_basic_colors()[r, g, b], minlength=len(COLOR_ANCHORS)) / len(pixels)
    named = {name: float(share) for name, share in zip(COLOR_ANCHORS, shares, strict=True) if share > 0}
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def figure_mask(rgba: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels of the figure. By alpha; in an opaque picture, all but a plain backdrop.

    If at least 80 % of the edge pixels have nearly one colour, the backdrop is the regions of that colour which touch
    the edge.
    """
    mask = rgba[..., 3] >= 128
    if not mask.all():
        return mask
    rgb = rgba[..., :3].astype(np.int16)
    edge = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    middle = np.median(edge, axis=0)
    if (np.abs(edge - middle).max(1) <= 24).mean() < 0.8:
        return mask  # a scene, or a figure that fills the picture
    plain = (np.abs(rgb - middle).max(2) <= 24).astype(np.uint8)
    _, parts = cv2.connectedComponents(plain, connectivity=4)
    outside = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    backdrop = np.isin(parts, outside) & (plain > 0)
    return mask if backdrop.all() else ~backdrop


def cut_backdrop(rgba: np.ndarray) -> np.ndarray:
    """Make the plain backdrop of an opaque picture transparent; others are returned as they are. Straight RGBA."""
    if (rgba[..., 3] < 255).any():
        return rgba
    return np.where(figure_mask(rgba)[..., None], rgba, 0).astype(np.uint8)


def main_colors(rgba: np.ndarray) -> tuple[str, ...]:
    """The one or two basic colours a person would name, the main one first; empty without opaque pixels."""
    scores = {name: share * SALIENCE.get(name, 1.0) for name, share in color_shares(rgba).items()}
    ranked = sorted(scores, key=lambda name: -scores[name])
    return tuple(name for name in ranked[:2] if scores[name] >= max(0.15, 0.5 * scores[ranked[0]]) or name == ranked[0])


def measured_colors(rgba: np.ndarray) -> tuple[str, ...]:
    """The main colours of a straight RGBA picture, for its row: measured at COLOR_SIZE px, whatever its size."""
    return main_colors(unpremultiply(fit_square(rgba, COLOR_SIZE)))


def color_name(rgb: Sequence[int]) -> str:
    """The basic colour of (r, g, b), 0..255."""
    r, g, b = (value >> 3 for value in rgb)
    return list(COLOR_ANCHORS)[int(_basic_colors()[r, g, b])]


def is_typical(rgb: Sequence[int]) -> bool:
    """Would most people give (r, g, b) the same name? Not if a second basic colour is nearly as close in CIELAB."""
    kinds, anchors = _anchors()
    distance = np.linalg.norm(to_lab(np.array([rgb], np.uint8)) - anchors, axis=-1)
    nearest = kinds[distance.argmin()]
    return bool(distance[kinds != nearest].min() > 1.5 * distance[kinds == nearest].min() + 2)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 (..., 3) to CIELAB float32 (..., 3), D65, L in 0..100."""
    flat = rgb.reshape(1, -1, 3).astype(np.float32) / 255
    return cv2.cvtColor(flat, cv2.COLOR_RGB2LAB).reshape(rgb.shape)


@cache
def _anchors() -> tuple[np.ndarray, np.ndarray]:
    """Of every anchor, the position of its name in COLOR_ANCHORS (A,) and its CIELAB colour (A, 3)."""
    codes = [(index, code) for index, line in enumerate(COLOR_ANCHORS.values()) for code in line.split()]
    colors = np.array([list(bytes.fromhex(code)) for _, code in codes], np.uint8)
    return np.array([index for index, _ in codes]), to_lab(colors)


@cache
def _basic_colors() -> np.ndarray:
    """(32, 32, 32) table from the upper five bits of r, g, b to the position of its name in COLOR_ANCHORS."""
    kinds, anchors = _anchors()
    levels = np.arange(4, 256, 8, dtype=np.uint8)
    colors = to_lab(np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1))  # (32, 32, 32, 3)
    distance = np.stack([np.linalg.norm(colors - anchor, axis=-1) for anchor in anchors], axis=-1)  # (32, 32, 32, A)
    return kinds[distance.argmin(-1)]
