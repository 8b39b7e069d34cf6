"""Train the scorer of a checkpoint, which chooses among drawings (`sample.py --best-of 4`), and store it in the folder.

python scripts/train_scorer.py --checkpoint checkpoints/pokediff --ratings benchmarks/results/ratings.csv \
    --guidance-scale 3.2                                                     # pip install "pokediff[dev]"

RATINGS is a table with the columns prompt, seed and rating: what people thought of the checkpoint's drawings, any
numbers, the higher the better. The drawings are drawn again at the base's size, five a second on one core, under the
guidance that they were rated under. Prints how well held-out ratings are predicted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from pokediff.config import Sampling
from pokediff.errors import PokediffError, one_line_errors
from pokediff.files import read_csv
from pokediff.model.pipeline import BATCH_SIZE, PokeDiffPipeline, quiet
from pokediff.model.scorer import Scorer, map_statistics
from pokediff.progress import ProgressBar

PENALTY = 30000.0  # of the squared weights: many weak features shall add up, no single one decide (docs/LOG.md)
FOLDS = 8


class RidgeRegression:
    """Ridge regression of values (N,) on standardised features (N, D), as weights (D,) and a bias for features as they
    are (Hoerl & Kennard 1970; the dual form, since N < D).
    """

    def __init__(self, features: np.ndarray, values: np.ndarray) -> None:
        mean, deviation = features.mean(0), features.std(0) + 1e-6
        x = (features - mean) / deviation
        dual = np.linalg.solve(x @ x.T + PENALTY * np.eye(len(x)), values - values.mean())
        self.weights = (x.T @ dual) / deviation
        self.bias = float(values.mean() - self.weights @ mean)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The values (M,) predicted for features (M, D)."""
        return features @ self.weights + self.bias


def drawn_features(
    pipeline: PokeDiffPipeline, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float | None, at: float
) -> np.ndarray:
    """Features (N, D) of the drawings, float64."""
    sampling, found = Sampling(size=pipeline.sizes[0], guidance_scale=guidance_scale), []
    for rows in ProgressBar(torch.arange(len(seeds)).split(BATCH_SIZE), desc="drawings", unit="batch"):
        text = pipeline.encode_prompt([prompts[row] for row in rows])
        *_, last = pipeline.denoise(text, [seeds[row] for row in rows], sampling)
        found.append(map_statistics(pipeline.base, last.x0, text, at).clone())
    return torch.cat(found).double().numpy()


def held_out_predictions(features: np.ndarray, ratings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each drawing what a regression on the drawings of other FOLDS predicts."""
    fold, predicted = rng.permutation(len(ratings)) % FOLDS, np.zeros(len(ratings))
    for k in range(FOLDS):
        predicted[fold == k] = RidgeRegression(features[fold != k], ratings[fold != k])(features[fold == k])
    return predicted


def read_ratings(path: Path) -> tuple[list[str], list[int], np.ndarray]:
    """Prompts, seeds and ratings (N,) float64. Raises PokediffError with the line that is wrong."""
    rows = []
    for where, cells in read_csv(path, "rating"):
        try:
            rows.append((cells.get("prompt", ""), int(cells["seed"]), float(cells["rating"])))
        except (KeyError, ValueError):
            raise PokediffError(f"{where}: seed must be a whole number and rating a number") from None
    if len(rows) < FOLDS:
        raise PokediffError(f"{path} has {len(rows)} ratings, at least {FOLDS} are needed")
    prompts, seeds, ratings = zip(*rows, strict=True)
    return list(prompts), list(seeds), np.array(ratings)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--ratings", type=Path, required=True, help="CSV: prompt, seed, rating")
    parser.add_argument("--guidance-scale", type=float, help="of the drawings that were rated; default: the base's")
    parser.add_argument("--timestep", type=float, default=300.0, help="of the noise that the base sees them under")
    arguments = parser.parse_args(given)
    quiet()
    prompts, seeds, ratings = read_ratings(arguments.ratings)
    pipeline = PokeDiffPipeline.from_pretrained(arguments.checkpoint)
    features = drawn_features(pipeline, prompts, seeds, arguments.guidance_scale, arguments.timestep)

    rng = np.random.default_rng(0)
    predicted = held_out_predictions(features, ratings, rng)
    fours = rng.permutation(np.tile(np.arange(len(ratings)), 40)).reshape(-1, 4)
    chosen = ratings[fours[np.arange(len(fours)), predicted[fours].argmax(1)]]
    print(
        f"{len(ratings)} ratings, mean {ratings.mean():.2f}; held out: rank correlation "
        f"{spearmanr(predicted, ratings).statistic:.2f}, mean of the best of four {chosen.mean():.2f}"
    )
    regression = RidgeRegression(features, ratings)
    scorer = Scorer(len(regression.weights), arguments.timestep)
    weights = torch.from_numpy(regression.weights).float()[None]
    scorer.load_state_dict({"linear.weight": weights, "linear.bias": torch.tensor([regression.bias])})
    pipeline.register_modules(scorer=scorer)
    scorer.save_pretrained(arguments.checkpoint / "scorer")
    pipeline.save_config(arguments.checkpoint)


if __name__ == "__main__":
    with one_line_errors():
        main()
