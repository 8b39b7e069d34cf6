"""Train the scorer of a checkpoint, which chooses among drawings (`sample.py --best-of 4`), and store it in the folder.

python scripts/train_scorer.py --checkpoint checkpoints/pokediff --config configs/pokemon-open.yaml \
    --data data/bulbapedia data/creatures

It learns to tell real training pictures from drawings of the base's size for captions of others, both drawn as the
recipe draws its batches. A quarter of an hour on one core. Prints how often it is right about held-out pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pokediff.config import Sampling, TrainConfig, load_yaml
from pokediff.data.dataset import Pictures, caption_vectors, draw_chances, load_pictures
from pokediff.data.images import to_model
from pokediff.evaluation.classifiers import LinearClassifier
from pokediff.model.pipeline import BATCH_SIZE, PokeDiffPipeline, quiet
from pokediff.model.scorer import Scorer, map_statistics
from pokediff.progress import ProgressBar

WEIGHT_DECAY = 6.0  # strong: many weak features shall add up, no single one decide (docs/LOG.md)


class Examples:
    """Pictures of a split with their text vectors, drawn at random as in the batches of a recipe."""

    def __init__(self, pipeline: PokeDiffPipeline, pictures: Pictures, config: TrainConfig, seed: int) -> None:
        self.pipeline, self.pictures, self.rng = pipeline, pictures, np.random.default_rng(seed)
        self.vectors = caption_vectors(config.data, pictures, pipeline.config.text_encoder_name)
        self.chances = draw_chances(pictures.records, config.dataset.styles, config.dataset.kinds)

    def draw(self, number: int) -> tuple[np.ndarray, torch.Tensor]:
        """Positions of `number` pictures, and a text vector of each."""
        index = self.rng.choice(len(self.pictures), number, p=self.chances)
        return index, self.vectors.table[[self.rng.choice(self.vectors.rows[i]) for i in index]]

    def real(self, number: int, timestep: float) -> torch.Tensor:
        """Features of real pictures."""
        index, text = self.draw(number)
        x0 = to_model(torch.from_numpy(np.stack([self.pictures.pixels[i] for i in index])), self.pipeline.channels)
        return torch.cat(
            [self.features(*rows, timestep) for rows in zip(x0.split(BATCH_SIZE), text.split(BATCH_SIZE), strict=True)]
        )

    def drawn(self, number: int, timestep: float) -> torch.Tensor:
        """Features of drawings for captions of others."""
        _, text = self.draw(number)
        first, found = int(self.rng.integers(2**31)), []
        for rows in ProgressBar(torch.arange(number).split(BATCH_SIZE), desc="drawings", unit="batch"):
            seeds = [first + row for row in rows.tolist()]
            *_, last = self.pipeline.denoise(text[rows], seeds, Sampling(size=self.pipeline.sizes[0]))
            found.append(self.features(last.x0, text[rows], timestep))
        return torch.cat(found)

    def features(self, x0: torch.Tensor, text: torch.Tensor, timestep: float) -> torch.Tensor:
        return map_statistics(self.pipeline.base, x0, text, timestep).clone()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--config", required=True, help="the recipe of its base: styles, kinds, licences")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--number", type=int, default=1200, help="real pictures, and drawings")
    parser.add_argument("--held-out", type=int, default=200, help="of the validation split, likewise")
    parser.add_argument("--timestep", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(given)
    quiet()
    pipeline = PokeDiffPipeline.from_pretrained(arguments.checkpoint)
    config = replace(load_yaml(arguments.config, TrainConfig), data=tuple(arguments.data))
    pictures = load_pictures(config.data, pipeline.sizes[0], config.dataset, progress=ProgressBar)

    def examples(split: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = Examples(pipeline, pictures.split(split), config, arguments.seed)
        return chosen.real(number, arguments.timestep), chosen.drawn(number, arguments.timestep)

    real, drawn = examples("train", arguments.number)
    labels = np.repeat([1, 0], [len(real), len(drawn)])
    classifier = LinearClassifier(torch.cat([real, drawn]).numpy(), labels, WEIGHT_DECAY)
    weights, bias = classifier.log_odds()
    scorer = Scorer(len(weights), arguments.timestep)
    scorer.load_state_dict({"linear.weight": torch.from_numpy(weights)[None], "linear.bias": torch.tensor([bias])})
    held_real, held_drawn = examples("validation", arguments.held_out)
    hits = np.concatenate([classifier(held_real.numpy()) == 1, classifier(held_drawn.numpy()) == 0])
    print(f"right about {hits.mean():.0%} of {len(hits)} held-out pictures")
    pipeline.register_modules(scorer=scorer)
    scorer.save_pretrained(arguments.checkpoint / "scorer")
    pipeline.save_config(arguments.checkpoint)


if __name__ == "__main__":
    main()
