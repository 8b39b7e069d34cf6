"""Post-processing of a drawing: removal of specks, hard edges, a palette.

A diffusion model draws colours that only approximate those of a small palette. All functions work on straight RGBA
uint8 (H, W, 4), without a model.
"""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np

from pokediff.errors import PokediffError
from pokediff.files import read_text

MAX_COLORS = 256
PIXEL_COLORS = 14  # of a drawn pixel sprite: the median of real ones of 64 px is 13 to 15 (docs/LOG.md)
FAINT = 3  # of 255: alpha below is invisible, but disturbs trimming and counting
SPLIT_ROUNDS, MAX_ROUNDS = 3, 50  # of k-means, after a split and at the end
LAB_STEPS = 256  # of one unit of CIE Lab
# Linear sRGB to CIE XYZ (IEC 61966-2-1).
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
SPECK_SHARE = 0.05  # of the largest island: real pictures seldom have smaller ones, drawings often (docs/LOG.md)


def is_pixel_prompt(prompt: str) -> bool:
    """Does the prompt ask for pixel art ("pixel sprite of a dragon", "a dragon, pixel art")?"""
    return re.search(r"\bpixel[- ]?(art|sprite|tile|icon)s?\b", prompt, re.IGNORECASE) is not None


def remove_faint(rgba: np.ndarray) -> np.ndarray:
    """Make pixels with an alpha below FAINT transparent."""
    return np.where(rgba[..., 3:] >= FAINT, rgba, 0).astype(np.uint8)


def remove_specks(rgba: np.ndarray, share: float = SPECK_SHARE) -> np.ndarray:
    """Make islands smaller than `share` of the largest one transparent.

    An island is a set of connected pixels, corners included, with an alpha above 25 of 255. Fainter pixels that touch
    no island become transparent too.
    """
    seen = (rgba[..., 3] > 25).astype(np.uint8)
    number, labels, stats, _ = cv2.connectedComponentsWithStats(seen, connectivity=8)
    if number <= 1:
        return rgba
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= share * areas[1:].max()
    kept[0] = False  # the background
    near = cv2.dilate(kept[labels].astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return np.where(near[..., None] & ~((labels > 0) & ~kept[labels])[..., None], rgba, 0).astype(np.uint8)


def harden(rgba: np.ndarray) -> np.ndarray:
    """Alpha 255 where it is at least 128, else 0, and the colour black there."""
    opaque = np.concatenate([rgba[..., :3], np.full_like(rgba[..., 3:], 255)], axis=-1)
    return np.where(rgba[..., 3:] >= 128, opaque, 0).astype(np.uint8)


def pick_palette(rgba: np.ndarray, colors: int) -> np.ndarray:
    """(K, 3) uint8, K at most `colors`: the palette of the picture's opaque pixels, by k-means in CIE Lab, where equal
    distances look alike. Each colour is the median of its cluster: the mean would be greyed by the pixels of the
    outline.

    Raises PokediffError for `colors` outside 2 to 256.
    """
    _require_colors(colors)
    opaque = rgba[rgba[..., 3] >= 128][:, :3]
    distinct, counts = np.unique(opaque, axis=0, return_counts=True)
    if len(distinct) <= colors:
        return distinct
    labels = _cluster(_to_lab(distinct), counts, colors)
    groups = (np.repeat(distinct[labels == k], counts[labels == k], axis=0) for k in range(colors))
    return np.unique([np.median(group, axis=0).round() for group in groups if len(group)], axis=0).astype(np.uint8)


def _cluster(points: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """The cluster, 0 to number - 1, of each of N points (N, 3) of whole numbers, with weights (N,).

    k-means that starts by splitting: the cluster with the largest squared error gets a second centre, at its point with
    the largest error (after Linde, Buzo & Gray 1980). Without chance, and with centres of whole numbers, so that the
    browser page, whose pictures.ts has the same steps, finds the same palette. The first of equal values counts.
    """
    labels = np.zeros(len(points), dtype=np.intp)
    centers = _means(points, weights, labels, points[:1])
    while len(centers) < number:
        errors = weights * _squared(points, centers)[np.arange(len(points)), labels]
        largest = np.bincount(labels, errors, len(centers)).argmax()
        farthest = np.where(labels == largest, errors, -1).argmax()
        centers = np.concatenate([centers, points[farthest : farthest + 1]])
        for _ in range(SPLIT_ROUNDS):
            labels = _squared(points, centers).argmin(1)
            centers = _means(points, weights, labels, centers)
    for _ in range(MAX_ROUNDS):
        moved = _squared(points, centers).argmin(1)
        if (moved == labels).all():
            break
        labels = moved
        centers = _means(points, weights, labels, centers)
    return labels


def _means(points: np.ndarray, weights: np.ndarray, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The weighted mean of each cluster, rounded; an empty one keeps its centre."""
    totals = np.bincount(labels, weights, len(centers))[:, None]
    sums = np.stack([np.bincount(labels, weights * axis, len(centers)) for axis in points.T], axis=1)
    return np.where(totals > 0, np.round(sums / np.maximum(totals, 1)), centers)


def _squared(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(N, K) squared distances; exact for whole numbers below 2**24."""
    return np.square(points).sum(1)[:, None] - 2 * points @ centers.T + np.square(centers).sum(1)


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 (..., 3) to CIE Lab, D65, in whole steps of 1 / LAB_STEPS, float64 (..., 3).

    Whole numbers, since the last digits of a power differ between processors and languages; no colour lies so near to
    the middle of two steps that they decide. colors.to_lab, which names the colours of captions, is another one.
    """
    values = rgb / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = linear @ (XYZ / XYZ.sum(1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.round(LAB_STEPS * np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1))


def apply_palette(rgba: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Every visible pixel in the colour of the palette (K, 3) that is nearest in CIE Lab; alpha stays."""
    nearest = _squared(_to_lab(rgba[..., :3]).reshape(-1, 3), _to_lab(palette)).argmin(1)
    recolored = palette[nearest].reshape(rgba[..., :3].shape)
    return np.concatenate([np.where(rgba[..., 3:] > 0, recolored, 0), rgba[..., 3:]], axis=-1).astype(np.uint8)


def read_palette(text: str) -> int | np.ndarray:
    """The value of `--palette`: a number of colours, or a file with the colours, as (K, 3) uint8.

    Files: .hex (one rrggbb a line, as Lospec writes them) and .gpl (GIMP, Aseprite, Inkscape).
    Raises PokediffError for a number outside 2 to 256, and for a file that does not exist, is of another kind, or holds
    no colours, more than 256, or a line that is no colour.
    """
    if text.isdigit():
        _require_colors(int(text))
        return int(text)
    path = Path(text)
    if not path.is_file():
        raise PokediffError(f"palette {path} not found (a number of colours, or a .gpl or .hex file)")
    lines = [line.strip() for line in read_text(path).splitlines()]
    if path.suffix.lower() == ".hex":
        colors = [bytes.fromhex(line.lstrip("#")) for line in lines if re.fullmatch(r"#?[0-9a-fA-F]{6}", line)]
        unread = [line for line in lines if line and not re.fullmatch(r"#?[0-9a-fA-F]{6}", line)]
    elif path.suffix.lower() == ".gpl":
        if not lines or lines[0] != "GIMP Palette":
            raise PokediffError(f"palette {path}: its first line is not 'GIMP Palette'")
        body = [line for line in lines[1:] if line and not re.match(r"#|(Name|Columns|Channels):", line)]
        matches = [re.match(r"(\d+)\s+(\d+)\s+(\d+)", line) for line in body]
        colors = [bytes(min(255, int(part)) for part in match.groups()) for match in matches if match]
        unread = [line for line, match in zip(body, matches, strict=True) if not match]
    else:
        raise PokediffError(f"palette {path}: a palette is a .gpl or .hex file")
    if unread:
        raise PokediffError(f"palette {path}: {unread[0]!r} is not a colour")
    if not 1 <= len(colors) <= MAX_COLORS:
        raise PokediffError(f"palette {path} has {len(colors)} colours, not 1 to {MAX_COLORS}")
    return np.array([list(color) for color in colors], dtype=np.uint8)


def finish(
    rgba: np.ndarray, palette: int | np.ndarray | None = None, hard_alpha: bool = False, clean: bool = True
) -> np.ndarray:
    """A finished drawing (H, W, 4): with `clean` without faint pixels and specks, with `hard_alpha` without half
    transparent pixels, in the colours of `palette`, (K, 3) uint8 or their number.
    """
    rgba = remove_specks(remove_faint(rgba)) if clean else rgba
    rgba = harden(rgba) if hard_alpha else rgba
    if palette is None:
        return rgba
    colors = pick_palette(rgba, palette) if isinstance(palette, int) else palette
    return apply_palette(rgba, colors) if len(colors) else rgba  # an empty picture has no colours


def _require_colors(number: int) -> None:
    if not 2 <= number <= MAX_COLORS:
        raise PokediffError(f"a palette has 2 to {MAX_COLORS} colours, not {number}")
