"""Measurements while training: kernel distance, colours and copies of a few pictures of the averaged weights.

The reference is the validation split; the test split is used once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pokediff.config import Sampling, ValidationMetricsConfig
from pokediff.data.dataset import Pictures
from pokediff.evaluation import copies, distances, looks, prompts
from pokediff.evaluation.features import load_features
from pokediff.model.pipeline import PokeDiffPipeline, Step

FEW = 50  # validation pictures; fewer cannot estimate the 1 % quantile of distances
COPYING = 0.05  # share of suspicious pictures that counts as copying; 0.01 is chance


class ValidationMetrics:
    """Measures a pipeline repeatedly with the same prompts and seeds."""

    def __init__(self, config: ValidationMetricsConfig, training: Pictures, validation: Pictures) -> None:
        """Raises PokediffError when the feature network `config.features` cannot be loaded."""
        number, style = config.number, validation.records[0].style or "artwork"
        self.net = load_features(config.features) if config.features else None
        self.known, self.real = training.straight(), validation.straight()
        self.families = [record.family_key for record in training.records]
        self.captions = [several[0] for several in validation.spread(number).captions]
        grid = prompts.color_grid([style], prompts.subjects(validation.records))
        self.colored = [grid[i] for i in np.linspace(0, len(grid) - 1, min(number, len(grid))).round().astype(int)]
        # The distance to the training pictures that unseen real pictures have by chance (docs/evaluation.md). In a
        # small set, one half of the training pictures replaces held-out pictures.
        unseen, seen, families = self.real, self.known, self.families
        if len(self.real) < FEW:
            unseen, seen, families = self.known[::2], self.known[1::2], self.families[1::2]
        near = copies.nearest_in_pixels(unseen, seen, families)
        self.threshold = float(np.percentile(near.distance, 1))

    def __call__(
        self, pipeline: PokeDiffPipeline, sampling: Sampling, on_step: Callable[[Step], None] = lambda _: None
    ) -> dict[str, float]:
        """{"kernel_distance" (times 1000, with features only), "color_adherence", "copy_ratio"}; shares 0 to 1.

        `on_step` gets every step of the drawing.
        """
        prompts = [row.prompt for row in self.colored]
        drawn = pipeline.generate(self.captions, range(len(self.captions)), sampling, on_step=on_step)
        colored = pipeline.generate(prompts, range(len(prompts)), sampling, on_step=on_step)
        near = copies.nearest_in_pixels(drawn, self.known, self.families)
        result = {
            "color_adherence": float(looks.color_hits(colored, [row.color for row in self.colored])[0].mean()),
            "copy_ratio": float((near.copies | (near.distance < self.threshold)).mean()),
        }
        if self.net is not None:
            result["kernel_distance"] = 1000 * distances.kid(self.net(drawn), self.net(self.real))
        return result
