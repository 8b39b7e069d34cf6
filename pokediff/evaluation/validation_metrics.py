"""A quick look while training: likeness, colours and copies on a few pictures of the averaged weights.

The reference is the validation split: the test split is looked at once, when all is done.
"""

from __future__ import annotations

import numpy as np

from pokediff.config import TrainConfig
from pokediff.data.dataset import Pictures
from pokediff.data.images import unpremultiply
from pokediff.evaluation import copies, distances, prompts
from pokediff.evaluation.features import load_features
from pokediff.model.pipeline import PokeDiffPipeline

FEW = 50  # validation pictures: the least of fewer says nothing of the rarest percent
COPYING = 0.05  # share of suspicious pictures from which we speak of copying; 0.01 is chance


class QuickLook:
    """Measures a pipeline again and again with the same prompts and seeds."""

    def __init__(self, config: TrainConfig, training: Pictures, validation: Pictures) -> None:
        """Raises PokediffError when the feature network of `config.evaluation.features` cannot be loaded."""
        number, style = config.evaluation.number, validation.records[0].style or "artwork"
        self.net = load_features(config.evaluation.features) if config.evaluation.features else None
        self.known = np.stack([unpremultiply(picture) for picture in training.pixels])
        self.families = [record.family_key for record in training.records]
        self.real = np.stack([unpremultiply(picture) for picture in validation.pixels])
        self.captions = [several[0] for several in validation.spread(number).captions]
        asked = prompts.color_grid([style])
        self.asked = [asked[i] for i in np.linspace(0, len(asked) - 1, min(number, len(asked))).round().astype(int)]
        # How near unseen real pictures come to the training pictures by chance (docs/evaluation.md); of a small set one
        # half of the training pictures stands for what the other half has not seen.
        unseen, seen, families = self.real, self.known, self.families
        if len(self.real) < FEW:
            unseen, seen, families = self.known[::2], self.known[1::2], self.families[1::2]
        near = copies.nearest_in_pixels(unseen, seen, families)
        self.threshold = float(np.percentile(near.distance, 1))

    def __call__(self, pipeline: PokeDiffPipeline) -> dict[str, float]:
        """{"kernel_distance" (times 1000, with features only), "color_adherence", "copy_ratio"}; shares 0 to 1."""
        drawn = pipeline.generate(self.captions, range(len(self.captions)))
        colored = pipeline.generate([ask.prompt for ask in self.asked], range(len(self.asked)))
        near = copies.nearest_in_pixels(drawn, self.known, self.families)
        result = {
            "color_adherence": float(prompts.color_hits(colored, [ask.color for ask in self.asked])[0].mean()),
            "copy_ratio": float((near.copies | (near.distance < self.threshold)).mean()),
        }
        if self.net is not None:
            result["kernel_distance"] = 1000 * distances.kid(self.net(drawn), self.net(self.real))
        return result
