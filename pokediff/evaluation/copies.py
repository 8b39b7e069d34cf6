"""Copies: the nearest training picture of every picture, in pixels and in features.

A copy is a picture whose nearest training picture is much nearer than anything else: distance to the nearest below
a third of the distance to the nearest of another evolution family (Gu et al., "On Memorization in Diffusion Models",
2023, with families in place of pictures, since one creature occurs in many styles). Pixels are compared on the figure
alone, cut out by its alpha and brought to one size: a flat background makes everything look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pokediff.data.images import premultiply
from pokediff.evaluation.distances import distance_matrix

SIDE, MARGIN = 24, 1  # px of the cut-out figure, and around it: how far it is shifted to look for a match
COPY_RATIO = 1 / 3


@dataclass(frozen=True)
class Nearest:
    """For each of N pictures, among M training pictures; distances 0 to 1 in pixels, or in units of the features."""

    index: np.ndarray  # (N,) the nearest
    distance: np.ndarray  # (N,) to it
    ratio: np.ndarray  # (N,) that distance over the distance to the nearest picture of another family

    @property
    def copies(self) -> np.ndarray:
        """(N,) bool."""
        return self.ratio < COPY_RATIO


def nearest_in_pixels(pictures: np.ndarray, training: np.ndarray, families: Sequence[str]) -> Nearest:
    """Straight RGBA uint8 (N, H, W, 4) against (M, H, W, 4); shifts by a pixel and mirror images count as equal."""
    whole = cut_out(training)  # (M, S, S, 4)
    pad = SIDE + 2 * MARGIN
    canvas = np.zeros((len(whole), pad, pad, 4), np.float32)
    canvas[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = whole
    target = canvas.reshape(len(whole), -1)
    best = np.full((len(pictures), len(whole)), np.inf, np.float32)
    figures = cut_out(pictures)
    for mirrored in (figures, figures[:, :, ::-1]):
        for down in range(2 * MARGIN + 1):
            for right in range(2 * MARGIN + 1):
                moved = np.zeros((len(figures), pad, pad, 4), np.float32)
                moved[:, down : down + SIDE, right : right + SIDE] = mirrored
                np.minimum(best, _rms(moved.reshape(len(moved), -1), target), out=best)
    return _nearest(best, families)


def nearest_in_features(features: np.ndarray, training: np.ndarray, families: Sequence[str]) -> Nearest:
    """Feature vectors (N, D) against (M, D)."""
    return _nearest(distance_matrix(features, training), families)


def cut_out(rgba: np.ndarray) -> np.ndarray:
    """The figures alone, (N, SIDE, SIDE, 4), premultiplied, 0 to 1: cropped to their alpha, the longer side filled."""
    result = np.zeros((len(rgba), SIDE, SIDE, 4), np.float32)
    for index, picture in enumerate(premultiply(rgba)):
        rows, columns = np.nonzero(picture[..., 3] >= 64)
        if len(rows) == 0:
            continue  # nothing there: all zero
        figure = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        scale = SIDE / max(figure.shape[:2])
        height, width = (max(1, round(length * scale)) for length in figure.shape[:2])
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        result[index, top : top + height, left : left + width] = cv2.resize(figure, (width, height), interpolation=way)
    return result / 255


def _rms(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) root mean square differences of float32 rows."""
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T
    return np.sqrt(np.maximum(squared, 0) / x.shape[1])


def _nearest(distances: np.ndarray, families: Sequence[str]) -> Nearest:
    index = distances.argmin(1)
    family = np.asarray(families)
    rows = np.arange(len(distances))
    others = np.where(family[None, :] == family[index][:, None], np.inf, distances).min(1)
    distance = distances[rows, index]
    return Nearest(index, distance, distance / np.maximum(others, 1e-12))
