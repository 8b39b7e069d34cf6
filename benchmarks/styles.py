"""Are the styles obeyed? A small classifier of real pictures is asked about drawn ones.

    python benchmarks/styles.py --checkpoint checkpoints/pokediff-32 --data DATA --features mobilenet_v2:FILE

Logistic regression on the features of real training pictures of three styles: "official artwork", "pixel sprite" (third
to fifth generation) and "vector drawing", as many of each. Told are its accuracy on real pictures of test families, and
on pictures drawn from their captions with each style's own phrase (the rest of the caption says nothing of the style).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from pokediff import PokeDiffPipeline
from pokediff.data.captions import STYLES
from pokediff.data.dataset import Pictures, load_pictures
from pokediff.evaluation.evaluate import straight
from pokediff.evaluation.features import load_features
from pokediff.model.pipeline import quiet

PHRASES = {
    "official artwork": ("artwork",),
    "pixel sprite": ("sprite-gen3", "sprite-gen4", "sprite-gen5"),
    "vector drawing": ("dream-world",),
}


def of_style(pictures: Pictures, phrase: str, number: int) -> Pictures:
    return pictures.where(lambda record: record.style in PHRASES[phrase]).spread(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/pokediff-32")
    parser.add_argument("--data", default="data/bulbapedia")
    parser.add_argument("--features", required=True, help="as for pokediff evaluate")
    parser.add_argument("--number", type=int, default=100, help="pictures to draw of each style")
    args = parser.parse_args()
    quiet()
    assert all(phrase in STYLES.values() for phrase in PHRASES)
    pipe = PokeDiffPipeline.from_pretrained(args.checkpoint)
    network = load_features(args.features)
    styles = [style for several in PHRASES.values() for style in several]
    pictures = load_pictures(args.data, pipe.image_size, styles, report=lambda _: None)
    train, test = pictures.split("train"), pictures.split("test")

    parts = [of_style(train, phrase, 500) for phrase in PHRASES]
    features = np.concatenate([network(straight(part)) for part in parts])
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    weights = fit((features - mean) / deviation, labels)

    def accuracy(pixels: np.ndarray, label: int) -> float:
        scaled = torch.from_numpy((network(pixels) - mean) / deviation).float()
        guesses = (torch.cat([scaled, torch.ones(len(scaled), 1)], dim=1) @ weights).argmax(1)
        return round((guesses == label).float().mean().item(), 3)

    result: dict = {"checkpoint": Path(args.checkpoint).name, "number": args.number, "real": {}, "drawn": {}}
    for label, phrase in enumerate(PHRASES):
        held_out = of_style(test, phrase, args.number)
        result["real"][phrase] = accuracy(straight(held_out), label)
        captions = [next((c for c in several if phrase in c), several[0]) for several in held_out.captions]
        prompts = [captions[k % len(captions)] for k in range(args.number)]
        result["drawn"][phrase] = accuracy(pipe.generate(prompts, range(args.number)), label)
    for kind in ("real", "drawn"):
        result[kind]["mean"] = round(float(np.mean(list(result[kind].values()))), 3)
    print(json.dumps(result, indent=2))


def fit(features: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """(D + 1, classes) weights of a logistic regression with a little weight decay; the last row is the bias."""
    x = torch.from_numpy(features).float()
    x, y = torch.cat([x, torch.ones(len(x), 1)], dim=1), torch.from_numpy(labels)
    weights = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weights, y) + 1e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


if __name__ == "__main__":
    main()
