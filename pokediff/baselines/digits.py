"""Digits on demand: a digit in, a picture of 28 px out (Keras, rebuilt in PyTorch).

No noise and no picture enters the network, so the best it can learn is the mean picture of each digit; with binary
cross-entropy on MNIST's test pictures that is .2189, and one mean picture for all digits .2625.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from pokediff.config import NetworkConfig
from pokediff.data.idx import WORDS
from pokediff.errors import PokediffError


def digit_of(prompt: str) -> int:
    """The one digit that a prompt names, "3" or "three". Raises PokediffError when it names none, or several."""
    parts = re.findall(r"[a-z]+|\d", prompt.lower())
    found = {WORDS.index(part) if part in WORDS else int(part) for part in parts if part in WORDS or part.isdigit()}
    if len(found) != 1:
        raise PokediffError(f"{prompt!r}: this network draws one digit, so name one: 0 to 9")
    return found.pop()


class DigitNetwork(nn.Module):
    """`config.latent` numbers for each digit to a picture.

    With `config.layers` 0 a decoder without attention: model A with 10 numbers, model B with 1. Model B cannot tell
    digits apart: a LayerNorm over one number returns its bias, whatever the number is. With more layers an encoder and
    a decoder of a transformer, which attend to a sequence of one token, that is to itself.
    """

    def __init__(self, config: NetworkConfig, size: int) -> None:
        super().__init__()
        dim = config.latent
        self.size, self.layers = size, config.layers
        self.embedding = nn.Embedding(10, dim)
        nn.init.uniform_(self.embedding.weight, -1, 1)
        if config.layers:
            self.transformer = nn.Transformer(
                dim, config.heads, config.layers, config.layers, 2 * dim, 0.0, layer_norm_eps=1e-6, batch_first=True
            )
        else:
            self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.out = nn.Linear(dim, size * size)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        """(N,) int64 to (N, 1, S, S) in [-1, 1]."""
        h = self.embedding(digits)
        if self.layers:
            h = self.transformer(h[:, None], h[:, None])[:, 0]
        else:
            h = self.norm1(h)
            h = self.norm2(h + self.feed_forward(h))
        return 2 * self.out(h).sigmoid().unflatten(1, (1, self.size, self.size)) - 1
