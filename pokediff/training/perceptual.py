"""Losses that see pictures as people do: LPIPS, and a critic. Both are added to the squared error of x0.

A squared error blurs an edge whose place it does not know. LPIPS asks for some edge, a critic for a likely one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pokediff.config import CriticConfig, PerceptualConfig
from pokediff.evaluation.features import Lpips
from pokediff.model.diffusion import Texts

SEEN_SIDE = 128  # px, to which smaller pictures are enlarged: below it the networks see little
TAPS = (1, 2, 4, 6)  # of SqueezeNet's seven outputs: 128, 256, 384, 512 channels at 1/4 to 1/16 of the side
PROJECTED = 64  # channels of a projected tap
RISE = 200  # updates over which the critic's weight rises from 0: at first it knows nothing


def on_plain_color(pictures: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """(B, C, S, S) in [-1, 1] as (B, 3, S', S') on colours (B, 3, 1, 1) in [0, 1]; premultiplied RGBA, RGB or grey.

    On a colour that differs from picture to picture errors of alpha count, and colours under alpha 0 do not.
    """
    if pictures.shape[1] == 4:
        half = (pictures + 1) / 2
        pictures = 2 * (half[:, :3] + (1 - half[:, 3:]) * color) - 1
    side = max(SEEN_SIDE, pictures.shape[-1])
    pictures = pictures.expand(-1, 3, -1, -1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
    return F.interpolate(pictures, size=(side, side), mode="bilinear", align_corners=False)


def frozen_lpips(name: str, device: torch.device) -> Any:
    """The network of LPIPS. Raises PokediffError when it cannot be loaded."""
    network = Lpips(name).network.requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last)  # twice as fast on a CPU


class PerceptualLoss:
    """LPIPS (Zhang et al. 2018) of predicted and true x0, beside the squared error as in PixelGen (Ma et al. 2026).

    Raises PokediffError when the network cannot be loaded.
    """

    def __init__(self, config: PerceptualConfig, device: torch.device) -> None:
        self.config = config
        self.network = frozen_lpips(config.lpips, device)

    def __call__(
        self,
        predicted: torch.Tensor,
        x0: torch.Tensor,
        _loss: torch.Tensor | None = None,
        unpaired: torch.Tensor | None = None,
        _texts: Texts | None = None,
    ) -> torch.Tensor:
        """(B,) weighted distances of (B, C, S, S) in [-1, 1]; 0 for unpaired pictures and the last ones, beyond the
        share.
        """
        number = math.ceil(self.config.share * len(x0))
        color = torch.rand(number, 3, 1, 1, device=x0.device)
        distance = self.network(*(on_plain_color(pictures[:number], color) for pictures in (predicted, x0))).flatten()
        distance = F.pad(distance.float() * self.config.weight / self.config.share, (0, len(x0) - number))
        return distance if unpaired is None else distance.masked_fill(unpaired, 0.0)


class Critic(nn.Module):
    """How real pictures look, by heads on a frozen SqueezeNet: a projected critic (Sauer et al., "Projected GANs
    Converge Faster", 2021), whose random projections keep it from relying on a few channels. With `text_dim` also
    whether they fit their captions (Miyato & Koyama, "cGANs with Projection Discriminator", 2018). (B, 3, S, S) and
    text (B, D) to (B,).
    """

    updates: torch.Tensor
    margin: torch.Tensor  # running mean of the scores of real minus predicted pictures
    caption_margin: torch.Tensor  # of real pictures with their own minus with another caption

    def __init__(self, body: Any, text_dim: int | None = None) -> None:
        super().__init__()
        self.body = [body]  # in a list: no part of the state
        widths = (128, 256, 384, 512)
        self.project = nn.ModuleList(nn.Conv2d(width, PROJECTED, 1, bias=False) for width in widths)
        self.project.requires_grad_(False)
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(PROJECTED, PROJECTED, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(PROJECTED, 1, 3, padding=1)),
            )
            for _ in widths
        )
        self.words = nn.ModuleList(nn.Linear(text_dim, PROJECTED, bias=False) for _ in widths) if text_dim else None
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("margin", torch.zeros(()))
        if text_dim:
            self.register_buffer("caption_margin", torch.zeros(()))

    def forward(self, x: torch.Tensor, *texts: torch.Tensor) -> torch.Tensor:
        """The scores with each of `texts` in turn, (B * len(texts),); those of the pictures alone without any."""
        taps = self.body[0](x)
        scores = []
        for level, (tap, project, head) in enumerate(zip(TAPS, self.project, self.heads, strict=True)):
            assert isinstance(head, nn.Sequential)
            features = F.normalize(taps[tap].float(), dim=1) * math.sqrt(PROJECTED)  # every place equally loud
            seen = head[:2](project(features))
            score = head[2](seen).float().mean(dim=(1, 2, 3))
            if self.words is not None and texts:
                mean = seen.float().mean(dim=(2, 3))
                words = (self.words[level](F.layer_norm(text, text.shape[1:])).float() for text in texts)
                score = torch.cat([score + (mean * word).sum(1) for word in words])
            scores.append(score)
        return torch.stack(scores).mean(0)


class AdversarialLoss:
    """The gradient of a critic that is trained along, scaled to a share of the gradient of the other losses.

    Hinge loss and augmentation as in Projected GAN; the share as in VQGAN (Esser et al. 2021, equation 7), but measured
    at x0. The critic sees what `PerceptualLoss` sees, after a random shift, erased square and change of colour (Zhao et
    al., "Differentiable Augmentation", 2020), without which it would learn few pictures by heart.

    Raises PokediffError when the network cannot be loaded.
    """

    def __init__(self, config: CriticConfig, accelerator: Accelerator, seed: int = 0, text_dim: int = 0) -> None:
        self.config, self.accelerator = config, accelerator
        lpips = frozen_lpips(config.features, accelerator.device)
        self.scale = lpips.scaling_layer
        torch.manual_seed(seed)
        self.critic = Critic(lpips.net, text_dim if config.captions else None).to(accelerator.device)
        self.learnt = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.learnt, config.learning_rate, betas=(0.0, 0.99))

    def __call__(
        self,
        predicted: torch.Tensor,
        x0: torch.Tensor,
        loss: torch.Tensor,
        _unpaired: torch.Tensor | None = None,
        texts: Texts | None = None,
    ) -> torch.Tensor:
        """(B,) zeros, with the critic's gradient with respect to `predicted`; trains the critic one step. `texts` are
        the captions (B, D) of the predicted pictures and of the real ones.
        """
        number = math.ceil(self.config.share * len(x0))
        color = torch.rand(number, 3, 1, 1, device=x0.device)
        augment = RandomAugmentation(number, x0.device)
        real = self.scale(augment(on_plain_color(x0[:number], color)))
        leaf = predicted[:number].detach().requires_grad_()
        fake = self.scale(augment(on_plain_color(leaf, color)))
        captions = [text[:number] for text in texts] if texts and self.config.captions else []
        self.learn(real, fake.detach(), captions)

        (wanted,) = torch.autograd.grad(-self.critic(fake, *captions[:1]).sum(), leaf)
        (others,) = torch.autograd.grad(loss.sum(), predicted, retain_graph=True)
        share = self.config.weight * min(1.0, int(self.critic.updates) / RISE)
        wanted = wanted * (share * others[:number].norm() / wanted.norm().clamp(min=1e-12))
        value = (predicted[:number] * wanted).sum(dim=(1, 2, 3))
        return F.pad(value - value.detach(), (0, len(x0) - number))

    @property
    def margins(self) -> dict[str, float]:
        """For the log: how far apart the critic's scores are."""
        buffers = dict(self.critic.named_buffers())
        return {f"critic_{name}": float(buffers[name]) for name in ("margin", "caption_margin") if name in buffers}

    def learn(self, real: torch.Tensor, fake: torch.Tensor, captions: Sequence[torch.Tensor] = ()) -> None:
        """One step of the critic: real pictures above 1, predicted ones below -1. With the `captions` of predicted and
        real ones, real pictures with the caption of their neighbour below -1, too (the matching-aware discriminator of
        Reed et al., "Generative Adversarial Text to Image Synthesis", 2016).
        """
        both = torch.cat([real, fake])
        if captions:
            asked, true = captions
            own = torch.cat([true, asked])
            wrong = own.roll(1, 0)
            scores, mismatched = self.critic(both, own, wrong).chunk(2)
            differs = (own != wrong).any(1)[: len(real)]
            is_real, is_fake = scores.chunk(2)
            mismatched = mismatched[: len(real)]
            self.critic.caption_margin.lerp_((is_real.mean() - mismatched.mean()).detach().float(), 0.02)
            false = (F.relu(1 + is_fake).mean() + (F.relu(1 + mismatched) * differs).mean()) / 2
        else:
            is_real, is_fake = self.critic(both).chunk(2)
            false = F.relu(1 + is_fake).mean()
        hinge = F.relu(1 - is_real).mean() + false
        gradients = [self.accelerator.reduce(one, "mean") for one in torch.autograd.grad(hinge, self.learnt)]
        if not all(bool(torch.isfinite(one).all()) for one in gradients):
            return  # the same on all processes; the denoiser's step will be skipped, too
        for parameter, gradient in zip(self.learnt, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.critic.updates += 1
        self.critic.margin.lerp_((is_real.mean() - is_fake.mean()).detach().float(), 0.02)


class RandomAugmentation:
    """The same random shift, erased square and change of brightness and contrast for several batches (N, 3, S, S)."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.shift = torch.rand(number, 2, device=device) - 0.5
        self.hole = torch.rand(number, 2, device=device)
        self.light = torch.rand(number, 2, 1, 1, 1, device=device) - 0.5

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        brightness, contrast = 0.4 * self.light[:, 0], 1 + 0.6 * self.light[:, 1]
        middle = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - middle) * contrast + middle + brightness
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round the places
            grid = F.affine_grid(self._shifted(x), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        place = torch.linspace(0, 1, x.shape[-1], device=x.device)
        across, down = ((place[None] - self.hole[:, axis, None]).abs() < 0.15 for axis in (0, 1))
        return x * ~(down[:, None, :, None] & across[:, None, None, :])

    def _shifted(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 2, 3) affine maps that move a picture by up to an eighth of its side."""
        maps = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
        maps[:, :, 2] = self.shift / 2
        return maps
