"""The conditional U-Net, in one file.

A space-to-depth stem folds the picture so that the body runs at 16x16, 8x8, 4x4 whatever the picture's size: on a CPU
that is where a convolution earns most (docs/LOG.md). Timestep, pooled text vector and augmentation are one embedding
that scales and shifts the norms of every block (FiLM, Perez et al. 2018; as in ADM, Dhariwal & Nichol 2021). Norms are
LayerNorm over channels: on channels_last maps that is a plain row norm.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

AUGMENT_DIM = 3  # mirrored (0 or 1), shift to the right and downwards as a share of max_shift


class Unet(ModelMixin, ConfigMixin):
    """Predicts v, noise or x0 (whatever it was trained for) from a noisy picture, a timestep and a text vector.

    Args: image_size in px, a multiple of 16; in_channels C (4 premultiplied RGBA, 3 RGB, 1 grey); text_dim D;
    the rest as in `config.ModelConfig`.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 4,
        text_dim: int = 384,
        widths: tuple[int, ...] = (96, 160, 192),
        blocks: tuple[int, ...] = (2, 2, 1),
        attention: tuple[bool, ...] = (False, True, True),
        head_dim: int = 32,
        embedding_dim: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch = image_size // 16
        folded = in_channels * self.patch**2

        self.time_mlp = nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.text_mlp = nn.Sequential(
            nn.Linear(text_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.augment = nn.Linear(AUGMENT_DIM, embedding_dim, bias=False)  # all zero: nothing was done to the picture
        self.register_buffer("null_text", torch.zeros(text_dim))  # the vector of the empty prompt

        def level(inputs: list[int], width: int, attends: bool) -> nn.ModuleList:
            return nn.ModuleList(Block(i, width, embedding_dim, dropout, head_dim if attends else None) for i in inputs)

        self.stem = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for index, width in enumerate(widths):
            self.down.append(level([width] * blocks[index], width, attention[index]))
            if index + 1 < len(widths):
                self.downsample.append(nn.Conv2d(width, widths[index + 1], 2, stride=2))
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for index in reversed(range(len(widths))):
            self.up.append(level([2 * widths[index]] * blocks[index], widths[index], attention[index]))
            if index > 0:
                self.upsample.append(nn.Conv2d(widths[index], 4 * widths[index - 1], 1))
        self.out_norm = ChannelNorm(widths[0])
        self.out = _zero(nn.Conv2d(widths[0], folded, 3, padding=1))

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | float,
        text: torch.Tensor | None = None,
        augment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, C, H, W); timestep (B,) or a number, 0 to 999; text (B, D) unit vectors, None for the empty prompt;
        augment (B, AUGMENT_DIM), None for pictures as they are. Returns (B, C, H, W).
        """
        batch = x.shape[0]
        timestep = torch.as_tensor(timestep, device=x.device).expand(batch)
        text = self.null_text.expand(batch, -1) if text is None else text
        embedding = self.time_mlp(sinusoidal(timestep, self.config.embedding_dim))
        embedding = embedding + self.text_mlp(text * math.sqrt(text.shape[1]))  # to unit variance
        if augment is not None:
            embedding = embedding + self.augment(augment)
        embedding = F.silu(embedding)  # (B, E)

        h = F.pixel_unshuffle(x, self.patch)  # (B, C*p*p, 16, 16)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        skips = []
        for index, level in enumerate(self.down):
            for block in cast(nn.ModuleList, level):
                h = block(h, embedding)
                skips.append(h)
            if index < len(self.downsample):
                h = self.downsample[index](h)  # (B, W', S/2, S/2)
        for index, level in enumerate(self.up):
            for block in cast(nn.ModuleList, level):
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
            if index < len(self.upsample):
                h = F.pixel_shuffle(self.upsample[index](h), 2).contiguous(memory_format=torch.channels_last)
        h = self.out(F.silu(self.out_norm(h)))  # (B, C*p*p, 16, 16)
        return F.pixel_shuffle(h, self.patch)


class Block(nn.Module):
    """Norm, SiLU, conv; norm scaled and shifted by the embedding, SiLU, conv; added to the input. Then attention."""

    def __init__(self, inputs: int, width: int, embedding_dim: int, dropout: float, head_dim: int | None) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * width)
        self.norm2 = ChannelNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(width, width, 3, padding=1))  # blocks start as the identity (ADM)
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()
        self.attention = Attention(width, head_dim) if head_dim else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, W, S, S)
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, W, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        h = self.skip(x) + self.conv2(self.dropout(h))
        return h if self.attention is None else h + self.attention(h)


class Attention(nn.Module):
    """Self-attention over the pixels of a map."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = _zero(nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, height, side = x.shape
        rows = self.norm(x.permute(0, 2, 3, 1).reshape(batch, height * side, width))  # (B, S*S, W)
        heads = self.qkv(rows).view(batch, height * side, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        rows = attend(*heads).transpose(1, 2).reshape(batch, height * side, width)
        return self.out(rows).view(batch, height, side, width).permute(0, 3, 1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, heads, tokens, d)."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    # The fused kernel's backward is three times slower than this on a CPU at 16 to 256 tokens.
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return weights.to(value.dtype) @ value


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def sinusoidal(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """(B,) to (B, dim): cosines and sines at geometric frequencies (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=timestep.device) / (dim // 2))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def flops_per_image(unet: Unet) -> float:
    """Floating-point operations of one picture through the network once (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    side = unet.config.image_size
    x = torch.zeros(1, unet.config.in_channels, side, side, device=unet.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, 0.0)
    return counter.get_total_flops()


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
