"""Distances between two sets of feature vectors (N, D) and (M, D), and the intervals of estimates.

The sets are small, a few hundred pictures, so an estimate comes with its interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
NEIGHBOURS = 5  # k of precision, recall, density, coverage; Naeem et al. use it throughout


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


# ------------------------------------------------------------------------------------------------ kernel distance


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) values of KID's kernel (x.y / D + 1)^3 (Bińkowski et al., "Demystifying MMD GANs", 2018)."""
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of two sets; around 0, and below it by chance, for equal ones."""
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    ones = np.ones((1, len(x))), np.ones((1, len(y)))
    return float(_weighted_mmd(xx, yy, xy, *ones)[0])


def kid_bootstrap(x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """`kid` with an interval from resampling both sets.

    Pairs of a picture with itself are excluded even if it was resampled several times: they would bias the
    U-statistic upwards.
    """
    rng = np.random.default_rng(seed)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    wx = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), resamples).astype(np.float64)  # (B, N)
    wy = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), resamples).astype(np.float64)
    low, high = np.percentile(_weighted_mmd(xx, yy, xy, wx, wy), [2.5, 97.5])
    return Estimate(kid(x, y), float(low), float(high))


def _weighted_mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, wx: np.ndarray, wy: np.ndarray) -> np.ndarray:
    """(B,) unbiased MMD^2 with weights wx (B, N), wy (B, M)."""

    def within(k: np.ndarray, w: np.ndarray) -> np.ndarray:
        k = k - np.diag(np.diag(k))
        return np.einsum("bi,bi->b", w @ k, w) / (w.sum(1) ** 2 - (w**2).sum(1))

    across = np.einsum("bi,bi->b", wx @ xy, wy) / (wx.sum(1) * wy.sum(1))
    return within(xx, wx) + within(yy, wy) - 2 * across


def kid_subsets(x: np.ndarray, y: np.ndarray, subsets: int, size: int, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of `kid` over random subsets of `size`, the form that papers report.

    Raises ValueError when `size` is larger than a set.
    """
    if size > min(len(x), len(y)):
        raise ValueError(f"subsets of {size} out of {len(x)} and {len(y)}")
    rng = np.random.default_rng(seed)
    values = [
        kid(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1))


# ------------------------------------------------------------------------------------------------ Fréchet distance


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of the Gaussians through two sets (FID: Heusel et al. 2017). Biased upwards by about 1/N.

    tr((S1 S2)^(1/2)) is the sum of the singular values of X Y^T, X and Y centred: exact, and no square root of a
    singular D x D matrix is taken when there are fewer pictures than features.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum()
    x, y = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(mean + (x**2).sum() + (y**2).sum() - 2 * cross)


# ----------------------------------------------------------------------------------------- precision and coverage


def manifold(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020) of two sets of one size.

    Raises ValueError when the sizes differ (both depend on it) or there are not more than k.
    """
    if len(real) != len(fake) or len(real) <= k:
        raise ValueError(f"{len(real)} real and {len(fake)} generated: equal numbers, more than {k}, are needed")
    across = distance_matrix(real, fake)
    real_radius, fake_radius = _radius(real, k), _radius(fake, k)
    inside = across < real_radius[:, None]  # (real, fake): is the generated one in the real one's ball?
    return {
        "precision": float(inside.any(0).mean()),
        "recall": float((across < fake_radius[None, :]).any(1).mean()),
        "density": float(inside.sum(0).mean() / k),
        "coverage": float((across.min(1) < real_radius).mean()),
    }


def _radius(x: np.ndarray, k: int) -> np.ndarray:
    """(N,) distance of each to its k-th neighbour, itself not counted."""
    return np.partition(distance_matrix(x, x), k, axis=1)[:, k]


def distance_matrix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) Euclidean distances."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T
    return np.sqrt(np.maximum(squared, 0))


# -------------------------------------------------------------------------------------------------------- intervals


def jackknife(
    statistic: Callable[[np.ndarray], float], number: int, blocks: int = 20, seed: int = 0, most: float = np.inf
) -> Estimate:
    """A statistic of `number` items, 0 to `most`, with the interval of the block jackknife (Künsch 1989).

    `statistic` takes the positions to use. Unlike the bootstrap it repeats no item, and repeated items bias statistics
    of neighbours and covariances.
    """
    blocks = min(blocks, number)
    parts = np.array_split(np.random.default_rng(seed).permutation(number), blocks)
    value = statistic(np.arange(number))
    left_out = np.array([statistic(np.setdiff1d(np.arange(number), part)) for part in parts])
    error = float(np.sqrt((blocks - 1) / blocks * ((left_out - left_out.mean()) ** 2).sum()))
    return Estimate(value, max(0.0, value - 1.96 * error), min(most, value + 1.96 * error))


def share_estimate(hits: np.ndarray) -> Estimate:
    """The share of (N,) bools with Wilson's interval (1927): 0 of 500 has [0, 0.8 %]."""
    number, share, z = len(hits), float(np.mean(hits)), 1.96
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    reach = z * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    low, high = max(0.0, float(middle - reach)), min(1.0, float(middle + reach))
    return Estimate(share, min(low, share), max(high, share))  # against rounding errors at 0 and 1


def mean_estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of values (N,) with its bootstrap interval."""
    values = np.asarray(values, np.float64)
    means = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))
