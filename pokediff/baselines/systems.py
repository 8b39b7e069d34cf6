"""The systems: networks with their losses. SYSTEMS is the table; training.py trains any of them, generator.py draws.

A system has *players*, each with parameters and an optimizer of its own: a generator, and perhaps a discriminator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pokediff.baselines.digits import DigitNetwork, digit_of
from pokediff.baselines.latent import LatentDiffusion
from pokediff.baselines.losses import PictureLosses, discriminator_loss, generator_loss
from pokediff.baselines.networks import (
    Discriminators,
    Drawn,
    PikaPikaGen,
    PikaPikaGenerator,
    SentenceEncoder,
    init_dcgan,
)
from pokediff.baselines.words import WordEncoder
from pokediff.config import BaselineConfig
from pokediff.data.images import CHANNELS

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
Losses = dict[str, torch.Tensor]  # weighted terms, scalars


@dataclass(frozen=True)
class Batch:
    """Training tensors."""

    x0: torch.Tensor  # (N, C, S, S) in [-1, 1]
    ids: torch.Tensor  # (N, L) token ids, or labels (N, 1)
    noise: torch.Tensor  # (N, *noise_shape)


class System(nn.Module):
    """What all systems have. `noise_shape` is that of one picture's noise; `steps` the default number of sampler steps,
    None for a network without time steps; `words` the text encoder that may be frozen at first.
    """

    noise_shape: tuple[int, ...] = ()
    steps: int | None = None
    words: WordEncoder | None
    compare: PictureLosses

    def ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """(N, L) of N prompts: what `draw` reads."""
        assert self.words is not None
        return self.words.ids(prompts)

    def players(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each player, in the order in which they are trained in a step."""
        return {GENERATOR: list(self.parameters())}

    def forward(self, batch: Batch) -> Any:
        """What the losses of one step share: the drawn pictures."""
        return self.draw(batch.ids, batch.noise)

    def errors(self, batch: Batch, given: Any) -> Losses:
        """The losses that are measured on validation pictures, too."""
        return self.compare(given.pictures[-1], batch.x0)

    def losses(self, player: str, batch: Batch, given: Any) -> Losses:
        """The losses of a player."""
        return self.errors(batch, given)

    def draw(self, ids: torch.Tensor, noise: torch.Tensor, steps: int | None = None) -> Drawn:
        raise NotImplementedError


class TextToPicture(System):
    """A generator that regresses the picture of a text, with or without discriminators."""

    def __init__(self, config: BaselineConfig, words: str) -> None:
        super().__init__()
        network = {"pikapikagenerator": PikaPikaGenerator, "pikapikagen": PikaPikaGen}[config.system]
        channels, self.kind = CHANNELS[config.dataset.channels], config.discriminator
        self.noise_shape = (config.network.noise,)
        self.words = WordEncoder.load(words)
        self.generator = network(self.words, config.network, channels, config.image_size)
        self.discriminators: Discriminators | None = None
        if self.kind != "none":
            with_text = self.kind != "picture"
            sentence = SentenceEncoder(copy.deepcopy(self.words), config.network) if with_text else None
            number = config.network.stages
            self.discriminators = Discriminators(number, channels, sentence, config.network.text_dim)
            if with_text:
                init_dcgan([*self.generator.modules(), *self.discriminators.modules()])
        self.compare = PictureLosses(config)
        self.adversarial = config.losses.get("adversarial", 0.0)

    def players(self) -> dict[str, list[nn.Parameter]]:
        own = {GENERATOR: list(self.generator.parameters())}
        return {DISCRIMINATOR: list(self.discriminators.parameters()), **own} if self.discriminators else own

    def losses(self, player: str, batch: Batch, given: Drawn) -> Losses:
        losses = self.errors(batch, given) if player == GENERATOR else {}
        if self.discriminators is None:
            return losses
        with torch.set_grad_enabled(player == DISCRIMINATOR):
            text = self.discriminators.text(batch.ids)
        values = []
        for judge, drawn in zip(self.discriminators.judges(), given.pictures, strict=True):
            if player == DISCRIMINATOR:
                real = F.avg_pool2d(batch.x0, batch.x0.shape[-1] // drawn.shape[-1])
                values.append(discriminator_loss(judge, real, drawn.detach(), text, batch.ids, self.kind))
            else:
                values.append(generator_loss(judge, drawn, text, self.kind))
        loss = torch.stack(values).mean()
        return losses | ({player: loss} if player == DISCRIMINATOR else {"adversarial": self.adversarial * loss})

    def draw(self, ids: torch.Tensor, noise: torch.Tensor, steps: int | None = None) -> Drawn:
        return self.generator(ids, noise)


class Digits(System):
    """A digit to its picture, without noise: it learns the mean picture of each class."""

    def __init__(self, config: BaselineConfig, words: str) -> None:
        super().__init__()
        self.words = None
        self.network = DigitNetwork(config.network, config.image_size)
        self.compare = PictureLosses(config)

    def ids(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[digit_of(prompt)] for prompt in prompts])

    def draw(self, ids: torch.Tensor, noise: torch.Tensor, steps: int | None = None) -> Drawn:
        return Drawn([self.network(ids[:, 0])])


class Latent(System):
    """Latent diffusion whose autoencoder is learnt at the same time."""

    steps = 20

    def __init__(self, config: BaselineConfig, words: str) -> None:
        super().__init__()
        self.words = WordEncoder.load(words)
        self.network = LatentDiffusion(config, self.words.dim)
        self.noise_shape = self.network.shape

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.words is not None
        return F.normalize(self.words.summary(ids, self.words(ids)), dim=1)

    def forward(self, batch: Batch) -> Losses:
        return self.network.losses(batch.x0, batch.noise, self.text(batch.ids))

    def errors(self, batch: Batch, given: Losses) -> Losses:
        return given

    def draw(self, ids: torch.Tensor, noise: torch.Tensor, steps: int | None = None) -> Drawn:
        return Drawn([self.network.draw(noise, self.text(ids), steps or self.steps)])


SYSTEMS: dict[str, Callable[[BaselineConfig, str], System]] = {
    "pikapikagenerator": TextToPicture,
    "pikapikagen": TextToPicture,
    "digits": Digits,
    "latent": Latent,
}
