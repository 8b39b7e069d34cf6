"""Train the scorer of a checkpoint, which chooses among drawings (`sample.py --best-of 8`), and store it in the folder.

python scripts/train_scorer.py --checkpoint checkpoints/pokediff \
    --ratings benchmarks/results/ratings.csv                                 # pip install "pokediff[dev]"

RATINGS is a table with the columns prompt, seed and rating: what people thought of the checkpoint's drawings, any
numbers, the higher the better; and guidance_scale, where it was not the checkpoint's own. Best are several drawings of
each prompt, rated side by side, as the scorer compares them. The base draws them again, six a second on one core; where
it has changed since then, that of `--drawn-by` does. Prints how well ratings of held-out prompts are predicted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from pokediff.config import Sampling
from pokediff.errors import PokediffError, one_line_errors
from pokediff.files import read_csv
from pokediff.model.pipeline import BATCH_SIZE, PokeDiffPipeline, quiet
from pokediff.model.scorer import Scorer, map_statistics
from pokediff.progress import ProgressBar

PENALTY = 30000.0  # of the squared weights: many weak features shall add up, no single one decide (docs/LOG.md)
FOLDS = 8  # of prompts
GROUP = 4  # drawings of a prompt that are compared with each other


class RidgeRegression:
    """Ridge regression of values (N,) on standardised features (N, D), as weights (D,) and a bias for features as they
    are (Hoerl & Kennard 1970).
    """

    def __init__(self, features: np.ndarray, values: np.ndarray) -> None:
        mean, deviation = features.mean(0), features.std(0) + 1e-6
        x = (features - mean) / deviation
        weights = np.linalg.solve(x.T @ x + PENALTY * np.eye(x.shape[1]), x.T @ (values - values.mean()))
        self.weights = weights / deviation
        self.bias = float(values.mean() - self.weights @ mean)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The values (M,) predicted for features (M, D)."""
        return features @ self.weights + self.bias


@dataclass(frozen=True)
class Rated:
    """A drawing and its rating."""

    prompt: str
    seed: int
    rating: float
    guidance_scale: float | None  # None: the checkpoint's own


def read_ratings(path: Path) -> list[Rated]:
    """The rows of a table of ratings. Raises PokediffError with the line that is wrong."""
    rows = []
    for where, cells in read_csv(path, "rating"):
        try:
            scale = float(cells["guidance_scale"]) if "guidance_scale" in cells else None
            rows.append(Rated(cells.get("prompt", ""), int(cells["seed"]), float(cells["rating"]), scale))
        except (KeyError, ValueError):
            raise PokediffError(f"{where}: seed must be a whole number, rating and guidance_scale numbers") from None
    if len(rows) < FOLDS:
        raise PokediffError(f"{path} has {len(rows)} ratings, at least {FOLDS} are needed")
    return rows


def drawn_features(
    pipeline: PokeDiffPipeline, drawn_by: PokeDiffPipeline, rated: Sequence[Rated], timestep: float
) -> np.ndarray:
    """Features (N, D) in the maps of a base of the drawings as that of `drawn_by` leaves them, float64."""
    found = []
    with ProgressBar(total=len(rated), desc="drawings", unit="drawing") as bar:
        for scale, rows in groupby(rated, key=lambda one: one.guidance_scale):
            several = list(rows)
            for start in range(0, len(several), BATCH_SIZE):
                batch = several[start : start + BATCH_SIZE]
                text = pipeline.encode_prompt([one.prompt for one in batch])
                x0 = drawn_by.base_x0(text, [one.seed for one in batch], Sampling(guidance_scale=scale))
                found.append(map_statistics(pipeline.base, x0, text, timestep).clone())
                bar.update(len(batch))
    return torch.cat(found).double().numpy()


def grouped(prompts: Sequence[str]) -> np.ndarray:
    """(N,) a number for each prompt: its own where it has GROUP drawings or more, 0 for all others."""
    _, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    return np.where(counts[which] >= GROUP, which + 1, 0)


def centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values (N, ...) less the mean of their group: the scorer compares drawings of one prompt."""
    result = values.copy()
    for group in np.unique(groups):
        result[groups == group] -= values[groups == group].mean(0)
    return result


def held_out_predictions(
    features: np.ndarray, ratings: np.ndarray, prompts: Sequence[str], rng: np.random.Generator
) -> np.ndarray:
    """For each drawing what a regression on the drawings of other prompts predicts; features and ratings `centred`."""
    _, which = np.unique(prompts, return_inverse=True)
    fold, predicted = (rng.permutation(which.max() + 1) % FOLDS)[which], np.zeros(len(ratings))
    for k in np.unique(fold):
        predicted[fold == k] = RidgeRegression(features[fold != k], ratings[fold != k])(features[fold == k])
    return predicted


def best_of_four(ratings: np.ndarray, predicted: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> float:
    """The mean rating of the drawing with the highest prediction of four of one group, drawn at random."""
    chosen = []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        fours = np.concatenate([rng.permutation(rows)[: len(rows) // 4 * 4] for _ in range(40)]).reshape(-1, 4)
        chosen.append(ratings[fours[np.arange(len(fours)), predicted[fours].argmax(1)]])
    return float(np.concatenate(chosen).mean())


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--ratings", type=Path, required=True, help="CSV: prompt, seed, rating, guidance_scale")
    parser.add_argument("--drawn-by", type=Path, help="the checkpoint of these drawings (default: --checkpoint)")
    parser.add_argument("--timestep", type=float, default=300.0, help="of the noise that the base sees them under")
    arguments = parser.parse_args(given)
    quiet()
    rated = read_ratings(arguments.ratings)
    pipeline = PokeDiffPipeline.from_pretrained(arguments.checkpoint)
    drawn_by = PokeDiffPipeline.from_pretrained(arguments.drawn_by) if arguments.drawn_by else pipeline
    drawn = drawn_features(pipeline, drawn_by, rated, arguments.timestep)

    rng, prompts, ratings = np.random.default_rng(0), [one.prompt for one in rated], np.array([r.rating for r in rated])
    groups = grouped(prompts)
    features, differences = centred(drawn, groups), centred(ratings, groups)
    predicted = held_out_predictions(features, differences, prompts, rng)
    chosen = best_of_four(ratings, predicted, groups, rng)
    print(
        f"{len(ratings)} ratings, mean {ratings.mean():.2f}; held-out prompts: correlation with the differences "
        f"{np.corrcoef(predicted, differences)[0, 1]:.2f}, mean of the best of four {chosen:.2f}"
    )
    regression = RidgeRegression(features, differences)
    scorer = Scorer(len(regression.weights), arguments.timestep)
    weights = torch.from_numpy(regression.weights).float()[None]
    bias = ratings.mean() - drawn.mean(0) @ regression.weights  # so that a score is a rating
    scorer.load_state_dict({"linear.weight": weights, "linear.bias": torch.tensor([bias], dtype=torch.float32)})
    pipeline.register_modules(scorer=scorer)
    scorer.save_pretrained(arguments.checkpoint / "scorer")
    pipeline.save_config(arguments.checkpoint)


if __name__ == "__main__":
    with one_line_errors():
        main()
