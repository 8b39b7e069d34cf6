"""The conditional U-Net, in one file.

A space-to-depth stem folds the picture so that most of the body runs at 16x16, 8x8, 4x4 whatever the picture's size:
on a CPU that is where a convolution earns most (docs/LOG.md). Timestep, pooled text vector and augmentation are one
embedding that scales and shifts the norms of every block (FiLM, Perez et al. 2018; as in ADM, Dhariwal & Nichol 2021).
Norms are LayerNorm over channels: on channels_last maps that is a plain row norm.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from pokediff.errors import PokediffError

AUGMENT_DIM = 3  # mirrored (0 or 1), shift to the right and downwards as a share of max_shift


class Unet(ModelMixin, ConfigMixin):
    """Predicts v, noise or x0 (whatever it was trained for) from a noisy picture, a timestep and a text vector.

    Args: image_size in px, a multiple of 16; in_channels C (4 premultiplied RGBA, 3 RGB, 1 grey); text_dim D;
    patch p in px (None: image_size / 16); plain: the first level has no norms and its skips are added; sigma_data None
    or a number s: then the body is preconditioned (`_precondition`) and the network predicts x0, for which it has to
    know its noise_range (sigma_min, sigma_max, noise_shift) and num_train_timesteps; upscale f: above 1 it enlarges a
    picture so many times, and f has to divide the patch; the rest as in `config.ModelConfig`.
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
        patch: int | None = None,
        plain: bool = False,
        upscale: int = 1,
        sigma_data: float | None = None,
        noise_range: tuple[float, float, float] = (0.006, 100.0, 1.0),
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.patch = patch or image_size // 16
        folded = in_channels * self.patch**2

        self.time_mlp = nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.text_mlp = nn.Sequential(
            nn.Linear(text_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.augment = nn.Linear(AUGMENT_DIM, embedding_dim, bias=False)  # all zero: nothing was done to the picture
        self.register_buffer("null_text", torch.zeros(text_dim))  # the vector of the empty prompt

        def level(index: int, inputs: int) -> nn.ModuleList:
            attends, norm = head_dim if attention[index] else None, not (plain and index == 0)
            parts = (Block(inputs, widths[index], embedding_dim, dropout, attends, norm) for _ in range(blocks[index]))
            return nn.ModuleList(parts)

        shown = in_channels * (self.patch // upscale) ** 2 if upscale > 1 else 0  # of the small picture
        self.stem = nn.Conv2d(folded + shown, widths[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for index, width in enumerate(widths):
            self.down.append(level(index, width))
            if index + 1 < len(widths):
                self.downsample.append(nn.Conv2d(width, widths[index + 1], 2, stride=2))
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for index in reversed(range(len(widths))):
            added = plain and index == 0
            self.up.append(level(index, widths[index] if added else 2 * widths[index]))
            if index > 0:
                self.upsample.append(nn.Conv2d(widths[index], 4 * widths[index - 1], 1))
        self.out_norm = nn.Identity() if plain else ChannelNorm(widths[0])
        self.out = _zero(nn.Conv2d(widths[0], folded, 3, padding=1))
        if sigma_data is not None:
            self.painted = _zero(nn.Conv2d(widths[0], folded + self.patch**2, 3, padding=1))

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | float,
        text: torch.Tensor | None = None,
        augment: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, C, H, W); timestep (B,) or a number, 0 to 999; text (B, D) unit vectors, None for the empty prompt;
        augment (B, AUGMENT_DIM), None for pictures as they are; low_res (B, C, H/f, W/f), what a network with upscale f
        enlarges. Returns (B, C, H, W).
        """
        batch = x.shape[0]
        timestep = torch.as_tensor(timestep, device=x.device).expand(batch)
        text = self.null_text.expand(batch, -1) if text is None else text
        embedding = self.time_mlp(sinusoidal(timestep, self.config.embedding_dim))
        embedding = embedding + self.text_mlp(text * math.sqrt(text.shape[1]))  # to unit variance
        if augment is not None:
            embedding = embedding + self.augment(augment)
        embedding = F.silu(embedding)  # (B, E)

        h = F.pixel_unshuffle(x, self.patch)  # (B, C*p*p, S/p, S/p)
        if low_res is not None:  # as many pixels for each of the stem's as it is smaller (Saharia et al., SR3, 2021)
            h = torch.cat([h, F.pixel_unshuffle(low_res, self.patch // self.config.upscale)], dim=1)
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
                added = self.config.plain and index == len(self.up) - 1
                h = block(h + skips.pop() if added else torch.cat([h, skips.pop()], dim=1), embedding)
            if index < len(self.upsample):
                h = F.pixel_shuffle(self.upsample[index](h), 2).contiguous(memory_format=torch.channels_last)
        seen = F.silu(self.out_norm(h))
        if self.config.sigma_data is None:
            return F.pixel_shuffle(self.out(seen), self.patch)
        carried = F.pixel_shuffle(self.out(seen if self.config.plain else h), self.patch).float()
        painted, share = F.pixel_shuffle(self.painted(seen), self.patch).float().tensor_split([x.shape[1]], dim=1)
        return torch.lerp(self._precondition(carried, x.float(), timestep), painted, share.sigmoid())

    def _precondition(self, h: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """x0 from the body's output: c_skip x + c_out h (Karras et al. 2022, table 1).

        A body whose first level has few channels for the pixels of a patch cannot carry all the noise from its input to
        its output, as a v or noise target asks at every level: grain is left. With a small s it is asked for noise only
        where there is little of it. Two more things matter (docs/LOG.md, the grain at 64 px): no norm before `out`, for
        one over channels would scale the noise that is to be taken away, everywhere otherwise; and where a picture is
        plain, its background above all, x0 is better `painted` than carried over from the input. How much of which, the
        network says for every pixel.
        """
        # float32, for ONNX Runtime has no other tan
        sigma = cosine_sigmas(timestep.float(), self.config.num_train_timesteps, *self.config.noise_range)
        sigma, s = sigma[:, None, None, None], self.config.sigma_data
        root = (sigma**2 + s**2) ** 0.5
        return s**2 / root**2 * (1 + sigma**2) ** 0.5 * x + sigma * s / root * h  # x has unit variance: x / alpha

    @torch.no_grad()
    def start_from(self, other: Unet) -> int:
        """Take the weights of `other` where the two are alike, level for level from the deepest up: of a network of
        smaller pictures all that lies below its first level fits. Returns how many numbers were taken.
        """
        deeper = len(self.config.widths) - len(other.config.widths)

        def here(name: str) -> str:  # on the way up levels are counted from the deepest anyway
            return re.sub(r"^(down|downsample)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) + deeper}", name)

        own, taken = self.state_dict(), 0
        for name, values in other.state_dict().items():
            if (mine := own.get(here(name))) is not None and mine.shape == values.shape:
                mine.copy_(values)
                taken += values.numel()
        return taken


class Block(nn.Module):
    """Norm, SiLU, conv; norm scaled and shifted by the embedding, SiLU, conv; added to the input. Then attention."""

    def __init__(
        self, inputs: int, width: int, embedding_dim: int, dropout: float, head_dim: int | None, norm: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(inputs) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * width)
        self.norm2 = ChannelNorm(width) if norm else nn.Identity()
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


def cosine_sigmas(timestep: torch.Tensor, steps: int, sigma_min: float, sigma_max: float, shift: float) -> torch.Tensor:
    """Noise to signal at timesteps 0 to steps - 1 of the shifted cosine schedule (Hoogeboom et al., "simple diffusion",
    2023): shift * tan(u), u evenly spaced. The end is cut at sigma_max, where diffusers' own cosine schedule goes to
    20,000: samplers that keep x at the scale of sigma lose all digits there.
    """
    first, last = math.atan(sigma_min / shift), math.atan(sigma_max / shift)
    return shift * torch.tan(first + (last - first) * timestep / (steps - 1))


def cosine_timestep(sigma: float, steps: int, sigma_min: float, sigma_max: float, shift: float) -> float:
    """The timestep of `cosine_sigmas` at which the noise is `sigma`."""
    first, last = math.atan(sigma_min / shift), math.atan(sigma_max / shift)
    return (math.atan(sigma / shift) - first) / (last - first) * (steps - 1)


def compile_network(network: nn.Module) -> None:
    """torch.compile, in place. Raises PokediffError where the compiler that it needs on a CPU is missing."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if next(network.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise PokediffError(f"compile: there is no C++ compiler {compiler} here; leave --compile out")
    network.compile()


def flops_per_image(unet: Unet) -> float:
    """Floating-point operations of one picture through the network once (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    side, upscale = unet.config.image_size, unet.config.upscale
    x = torch.zeros(1, unet.config.in_channels, side, side, device=unet.device)
    low_res = F.avg_pool2d(x, upscale) if upscale > 1 else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, 0.0, low_res=low_res)
    return counter.get_total_flops()


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
