"""Generators and discriminators of PikaPikaGenerator and of PikaPikaGen, from shared blocks.

Layers, widths and activations are those of the two projects (docs/baselines.md lists what had to be chosen). A
generator maps token ids and noise to `Drawn`; sizes are 8, 16, 32 ... 256 px.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from pokediff.baselines.words import PAD, WordEncoder
from pokediff.config import NetworkConfig

FIRST_SIDE = 4  # of the first map
RESIDUAL_WIDTHS = (1.0, 0.5, 0.25, 0.125, 0.0625, 1 / 12)  # of PikaPikaGenerator's blocks, times network.width
DECODER_WIDTHS = (256, 256, 128, 64, 32, 16)  # of PikaPikaGen's blocks
ATTENDING = 3  # PikaPikaGen's first blocks, at 4x4 to 16x16, attend to the words
DISCRIMINATOR_WIDTHS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class Drawn:
    """What a generator gives for N prompts of L tokens."""

    pictures: list[torch.Tensor]  # (N, C, S, S) in [-1, 1] of every stage, the final ones last
    attention: dict[str, torch.Tensor] = field(default_factory=dict)  # by map: (N, L), or (N, L, H, W) of every pixel


# -------------------------------------------------------------------------------------------------- PikaPikaGenerator


class PikaPikaGenerator(nn.Module):
    """Text and noise to a 4x4 map, then residual blocks with bilinear upsampling.

    The query of its attention is the sentence's vector, so that it weights tokens and no pixels.
    """

    def __init__(self, words: WordEncoder, config: NetworkConfig, channels: int, size: int) -> None:
        super().__init__()
        dim = config.text_dim
        self.words, self.size = words, size
        self.project = nn.Sequential(nn.Linear(words.dim, dim), nn.LayerNorm(dim), nn.Dropout(0.1))
        self.attention = nn.MultiheadAttention(dim, config.heads, dropout=0.1, batch_first=True)
        first = config.width * FIRST_SIDE**2
        self.first = nn.Sequential(nn.Linear(dim + config.noise, first), nn.BatchNorm1d(first), nn.ReLU())
        widths = [config.width, *(round(share * config.width) for share in RESIDUAL_WIDTHS[: _doublings(size)])]
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(widths)))
        self.out = nn.Sequential(
            nn.Conv2d(widths[-1], 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, channels, 3, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(size),
        )

    def forward(self, ids: torch.Tensor, noise: torch.Tensor) -> Drawn:
        """ids (N, L), noise (N, network.noise)."""
        tokens = self.project(self.words(ids))  # (N, L, D)
        query = self.words.summary(ids, tokens)[:, None]
        text, weights = self.attention(query, tokens, tokens, key_padding_mask=ids == PAD)  # (N, 1, D), (N, 1, L)
        h = self.first(torch.cat([text[:, 0], noise], dim=1)).unflatten(1, (-1, FIRST_SIDE, FIRST_SIDE))
        return Drawn([self.out(self.blocks(h))], {"sentence": weights[:, 0]})


class ResidualBlock(nn.Module):
    """Two convolutions, and twice the side: (N, in, S, S) to (N, out, 2S, 2S)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Sequential(nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A 1x1 convolution and interpolation commute, so the skip is computed on the small map.
        h = F.interpolate(self.body(x), scale_factor=2, mode="bilinear", align_corners=False)
        return F.relu(h + F.interpolate(self.skip(x), scale_factor=2, mode="bilinear", align_corners=False))


# -------------------------------------------------------------------------------------------------------- PikaPikaGen


class PikaPikaGen(nn.Module):
    """A transformer over the words, and a decoder whose small maps attend to them.

    With two stages, as in AttnGAN (Xu et al. 2018), the first draws a smaller picture, and the second goes on from its
    last feature map.
    """

    def __init__(self, words: WordEncoder, config: NetworkConfig, channels: int, size: int) -> None:
        super().__init__()
        dim = config.text_dim
        self.words = words
        self.encode = SentenceEncoder(words, config)
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))
        first = config.width * FIRST_SIDE**2
        self.first = nn.Sequential(nn.Linear(dim + config.noise, first), nn.BatchNorm1d(first), nn.LeakyReLU(0.2))
        # The second stage doubles the side; from 128 px on it quadruples it, as 64 to 256 px in the project.
        later = 0 if config.stages == 1 else 1 if size < 128 else 2
        widths = [config.width, *DECODER_WIDTHS[: _doublings(size)]]
        blocks = [
            DecoderBlock(a, b, dim if index < ATTENDING else None, config.heads, residual=config.stages == 2)
            for index, (a, b) in enumerate(pairwise(widths))
        ]
        cut = len(blocks) - later
        if later:  # the second stage begins with attention, whatever its place
            blocks[cut] = DecoderBlock(widths[cut], widths[cut + 1], dim, config.heads, residual=True)
        self.stages = nn.ModuleList(nn.ModuleList(part) for part in (blocks[:cut], blocks[cut:]) if part)
        ends = [widths[cut], widths[-1]] if later else [widths[-1]]
        self.outs = nn.ModuleList(nn.Sequential(nn.Conv2d(w, channels, 3, padding=1), nn.Tanh()) for w in ends)

    def forward(self, ids: torch.Tensor, noise: torch.Tensor) -> Drawn:
        """ids (N, L), noise (N, network.noise)."""
        tokens, padding = self.encode(ids), ids == PAD
        score = self.score(tokens).squeeze(-1).masked_fill(padding, -torch.inf)
        weights = score.softmax(dim=1)  # (N, L)
        text = (weights[..., None] * tokens).sum(dim=1)
        h = self.first(torch.cat([text, noise], dim=1)).unflatten(1, (-1, FIRST_SIDE, FIRST_SIDE))
        pictures, attention = [], {"sentence": weights}
        for blocks, out in zip(self.stages, self.outs, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                side = h.shape[-1]
                h, seen = block(h, tokens, padding)
                if seen is not None:
                    attention[f"{side}x{side}"] = seen
            pictures.append(out(h))
        return Drawn(pictures, attention)


class SentenceEncoder(nn.Module):
    """Embedded words through transformer layers of its own: ids (N, L) to (N, L, text_dim)."""

    def __init__(self, words: WordEncoder, config: NetworkConfig) -> None:
        super().__init__()
        dim = config.text_dim
        self.words = words
        self.project = nn.Linear(words.dim, dim) if words.dim != dim else nn.Identity()
        layer = nn.TransformerEncoderLayer(dim, config.heads, 4 * dim, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.project(self.words.embed(ids)), src_key_padding_mask=ids == PAD)


class DecoderBlock(nn.Module):
    """Attention of every pixel to the words, if `text_dim` is given; then twice the side."""

    def __init__(self, inputs: int, width: int, text_dim: int | None, heads: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.attention = self.query = self.fuse = None
        if text_dim is not None:
            self.query = nn.Conv2d(inputs, text_dim, 1) if inputs != text_dim else nn.Identity()
            self.attention = nn.MultiheadAttention(text_dim, heads, batch_first=True)
            self.fuse = nn.Conv2d(text_dim if residual else inputs + text_dim, inputs, 1)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(inputs, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)
        )

    def forward(
        self, h: torch.Tensor, tokens: torch.Tensor, padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, in, S, S) to (N, out, 2S, 2S), and the weights of the tokens at every pixel (N, L, S, S)."""
        if self.attention is None or self.query is None or self.fuse is None:
            return self.up(h), None
        side = h.shape[-1]
        rows = self.query(h).flatten(2).transpose(1, 2)  # (N, S*S, D)
        seen, weights = self.attention(rows, tokens, tokens, key_padding_mask=padding)
        seen = seen.transpose(1, 2).unflatten(2, (side, side))
        # With two stages the attention learns the difference to the map, before that a map to mix with it.
        h = h + self.fuse(seen) if self.residual else self.fuse(torch.cat([h, seen], dim=1))
        return self.up(h), weights.transpose(1, 2).unflatten(2, (side, side))


# ----------------------------------------------------------------------------------------------------- discriminators


class Discriminators(nn.Module):
    """One discriminator for each picture size, and the text encoder that they share, apart from the generator's."""

    def __init__(self, number: int, channels: int, sentence: SentenceEncoder | None, text_dim: int) -> None:
        super().__init__()
        self.sentence = sentence
        self.text_mlp = nn.Sequential(nn.Linear(text_dim, text_dim), nn.LeakyReLU(0.2)) if sentence else None
        self.stages = nn.ModuleList(Discriminator(channels, text_dim if sentence else 0) for _ in range(number))

    def judges(self) -> list[Discriminator]:
        """Those of the stages, the smallest pictures first."""
        return list(self.stages)  # type: ignore[arg-type]

    def text(self, ids: torch.Tensor) -> torch.Tensor | None:
        """(N, text_dim) of texts (N, L); None where pictures are judged without."""
        if self.sentence is None or self.text_mlp is None:
            return None
        tokens, known = self.sentence(ids), (ids != PAD)[..., None]
        return self.text_mlp((tokens * known).sum(1) / known.sum(1))


class Discriminator(nn.Module):
    """Halving convolutions and an average over the map; then a logit of "real" for the picture alone, and with
    `text_dim` another for picture and text.
    """

    def __init__(self, channels: int, text_dim: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, width in zip((channels, *DISCRIMINATOR_WIDTHS), DISCRIMINATOR_WIDTHS, strict=False):
            layers += [nn.Conv2d(inputs, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.judge_alone = _judge(DISCRIMINATOR_WIDTHS[-1])
        self.judge_pair = _judge(DISCRIMINATOR_WIDTHS[-1] + text_dim) if text_dim else None

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 512) of pictures (N, C, S, S)."""
        missing = max(0, 2 ** len(DISCRIMINATOR_WIDTHS) - x.shape[-1])  # as many halvings
        return self.body(F.pad(x, (0, missing, 0, missing), value=-1.0)).mean(dim=(2, 3))

    def forward(self, features: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """(N,) logits of pictures by their features (N, 512), alone or with their texts (N, text_dim)."""
        if text is None:
            return self.judge_alone(features).squeeze(1)
        assert self.judge_pair is not None, "a discriminator without text_dim"
        return self.judge_pair(torch.cat([features, text], dim=1)).squeeze(1)


def _judge(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(256, 1))


def init_dcgan(modules: Iterable[nn.Module]) -> None:
    """Weights of DCGAN (Radford et al. 2015): convolutions N(0, .02), norms N(1, .02), biases 0."""
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)), 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _doublings(size: int) -> int:
    """How often 4 px are doubled to `size`; at most six blocks, as the projects have."""
    return min(6, (size // FIRST_SIDE).bit_length() - 1)
