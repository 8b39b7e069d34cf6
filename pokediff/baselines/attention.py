"""A plot of what a baseline attends to."""

from __future__ import annotations

from typing import Any

from pokediff.baselines.generator import Attention
from pokediff.data.images import composite


def attention_plot(found: Attention) -> Any:
    """A matplotlib Figure: the picture, the weights of the tokens in the sentence, and a heat map of every token at the
    size of each attended map.
    """
    from matplotlib.figure import Figure

    maps = {name: weights for name, weights in found.maps.items() if weights.ndim == 3}
    columns = len(found.tokens)
    plot = Figure(figsize=(max(6, 1.1 * columns), 2.4 + 1.25 * len(maps)), layout="constrained")
    parts = plot.add_gridspec(1 + len(maps), columns, height_ratios=[2, *([1] * len(maps))])
    picture = plot.add_subplot(parts[0, : max(1, columns // 3)])
    picture.imshow(composite(found.picture), interpolation="nearest")
    picture.axis("off")
    bars = plot.add_subplot(parts[0, max(1, columns // 3) :])
    bars.bar(range(columns), found.maps["sentence"])
    bars.set_xticks(range(columns), found.tokens, rotation=30, ha="right", fontsize=8)
    bars.set_title("weight of each token in the sentence's vector", fontsize=9)
    for row, (name, weights) in enumerate(maps.items(), 1):
        for column in range(columns):
            axes = plot.add_subplot(parts[row, column])
            axes.imshow(weights[column], cmap="inferno", vmin=0, vmax=float(weights.max()))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(found.tokens[column], fontsize=7)
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
    return plot
