"""Do drawn pictures have the style of their prompt? A linear classifier of real pictures on features decides.

    python benchmarks/styles.py --checkpoint checkpoints/pokediff --size 64 --data DATA --features mobilenet_v2:FILE

Logistic regression on the features of real training pictures of three styles: "official artwork", "pixel sprite" (third
to fifth generation) and "vector drawing", equally many of each. Prints its accuracy on real pictures of test families,
and on pictures drawn from their captions. `pokediff evaluate` has a judge on pixels for the same question.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pokediff.config import DatasetConfig, Sampling
from pokediff.data.captions import STYLES
from pokediff.data.dataset import Pictures, load_pictures
from pokediff.drawing.sample import load_checkpoint
from pokediff.errors import one_line_errors
from pokediff.evaluation.classifiers import LinearClassifier
from pokediff.evaluation.features import FeatureNet, load_features
from pokediff.model.pipeline import PokeDiffPipeline, quiet

PHRASES = {
    "official artwork": ("artwork",),
    "pixel sprite": ("sprite-gen3", "sprite-gen4", "sprite-gen5"),
    "vector drawing": ("dream-world",),
}


def of_style(pictures: Pictures, phrase: str, number: int) -> Pictures:
    return pictures.where(lambda record: record.style in PHRASES[phrase]).spread(number)


def style_classifier(training: Pictures, network: FeatureNet) -> Callable[[np.ndarray], np.ndarray]:
    """A function from straight RGBA (N, S, S, 4) to the positions in PHRASES (N,)."""
    parts = [of_style(training, phrase, 500) for phrase in PHRASES]
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    classify = LinearClassifier(np.concatenate([network(part.straight()) for part in parts]), labels)
    return lambda pixels: classify(network(pixels))


def accuracies(
    pipe: PokeDiffPipeline, sampling: Sampling, data: str, network: FeatureNet, number: int
) -> dict[str, dict[str, float]]:
    select = DatasetConfig(styles={style: 1.0 for several in PHRASES.values() for style in several})
    pictures = load_pictures(data, sampling.size or pipe.image_size, select, report=lambda _: None)
    classify, test = style_classifier(pictures.split("train"), network), pictures.split("test")
    result: dict[str, dict[str, float]] = {"real": {}, "drawn": {}}
    for label, phrase in enumerate(PHRASES):
        held_out = of_style(test, phrase, number)
        captions = [next((c for c in several if phrase in c), several[0]) for several in held_out.captions]
        prompts = [captions[k % len(captions)] for k in range(number)]
        drawn = pipe.generate(prompts, range(number), sampling)
        for kind, pixels in (("real", held_out.straight()), ("drawn", drawn)):
            result[kind][phrase] = round(float((classify(pixels) == label).mean()), 3)
    return {
        kind: {**values, "mean": round(float(np.mean(list(values.values()))), 3)} for kind, values in result.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="default: the shipped one")
    parser.add_argument("--size", type=int, help="px (default: that of the checkpoint)")
    parser.add_argument("--data", default="data/bulbapedia")
    parser.add_argument("--features", required=True, help="as for pokediff evaluate")
    parser.add_argument("--number", type=int, default=100, help="pictures to draw of each style")
    args = parser.parse_args()
    quiet()
    assert all(phrase in STYLES.values() for phrase in PHRASES)
    with one_line_errors():
        pipe, network = load_checkpoint(args.checkpoint), load_features(args.features)
        sampling = pipe.resolved(Sampling(size=args.size))
        result = accuracies(pipe, sampling, args.data, network, args.number)
    facts = {"checkpoint": Path(args.checkpoint or "pokediff").name, "size": sampling.size, "number": args.number}
    print(json.dumps({**facts, **result}, indent=2))


if __name__ == "__main__":
    main()
