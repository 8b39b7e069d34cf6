"""The denoiser: a conditional U-Net that returns x0, in one file.

A space-to-depth stem folds the picture so that most of the body runs at 16x16, 8x8, 4x4 whatever the picture's size:
convolutions on a CPU are cheapest there (docs/LOG.md). Timestep, pooled text vector and augmentation are one
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
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from pokediff.errors import PokediffError
from pokediff.model.diffusion import cosine_sigmas


class Denoiser(ModelMixin, ConfigMixin):
    """Predicts x0 from a noisy picture, a timestep, a text vector and, in an upscaler, the small picture.

    Its config.json holds these arguments, by which a cascade selects it:

    Args:
        image_size: side of the pictures in px, a multiple of 16.
        in_channels: C; 4 premultiplied RGBA, 3 RGB, 1 grey.
        text_dim: D, length of a text vector.
        augment_dim: A, number of augmentation labels.
        below: used where sigma is below this; None: at every sigma.
        steps: default number of sampler steps at its size.
        guidance_scale: default guidance scale; None: no guidance, for a refiner or upscaler of a picture that follows
            the prompt.
        high_noise_guidance: factor of guidance above sigma HIGH_NOISE, see `cascade.guidance_at`.
        fast: a few-step denoiser, used with `Sampling.fast`.
        upscale: f > 1 enlarges a picture f times; f divides the patch.
        patch: p in px, folded into channels by the stem; None: image_size / 16.
        norm_free: the first level has no norms, and its skip connections are added.
        sigma_data, gate: see `_precondition` and `forward`.
        noise_range: (sigma_min, sigma_max, noise_shift), with num_train_timesteps the meaning of a timestep.

    The others as in `config.ModelConfig`.
    """

    # Checkpoints store this public name of the class, so that the file may move.
    __module__ = "pokediff"

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 4,
        text_dim: int = 384,
        augment_dim: int = 3,
        widths: tuple[int, ...] = (96, 160, 192),
        blocks: tuple[int, ...] = (2, 2, 1),
        attention: tuple[bool, ...] = (False, True, True),
        head_dim: int = 32,
        embedding_dim: int = 256,
        dropout: float = 0.0,
        patch: int | None = None,
        norm_free: bool = False,
        upscale: int = 1,
        sigma_data: float = 1.0,
        gate: bool = False,
        below: float | None = None,
        steps: int = 15,
        guidance_scale: float | None = None,
        high_noise_guidance: float = 1.0,
        fast: bool = False,
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
        self.augment = nn.Linear(augment_dim, embedding_dim, bias=False)  # all zero: the picture as it is
        self.register_buffer("null_text", torch.zeros(text_dim))  # the vector of the empty prompt

        def level(index: int, inputs: int) -> nn.ModuleList:
            attends, norm = head_dim if attention[index] else None, not (norm_free and index == 0)
            drop = dropout if index else 0.0  # where maps are small; the first level draws edges, which it would blur
            parts = (Block(inputs, widths[index], embedding_dim, drop, attends, norm) for _ in range(blocks[index]))
            return nn.ModuleList(parts)

        small = in_channels * (self.patch // upscale) ** 2 if upscale > 1 else 0  # channels of the small picture
        self.stem = nn.Conv2d(folded + small, widths[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for index, width in enumerate(widths):
            self.down.append(level(index, width))
            if index + 1 < len(widths):
                self.downsample.append(nn.Conv2d(width, widths[index + 1], 2, stride=2))
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for index in reversed(range(len(widths))):
            added = norm_free and index == 0
            self.up.append(level(index, widths[index] if added else 2 * widths[index]))
            if index > 0:
                self.upsample.append(nn.Conv2d(widths[index], 4 * widths[index - 1], 1))
        self.out_norm = nn.Identity() if norm_free else ChannelNorm(widths[0])
        self.out = _zero(nn.Conv2d(widths[0], folded, 3, padding=1))
        if gate:
            self.x0_head = _zero(nn.Conv2d(widths[0], folded + self.patch**2, 3, padding=1))

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | float,
        text: torch.Tensor | None = None,
        augment: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0 (B, C, H, W), about [-1, 1], float32 outside autocast and half precision.

        Args:
            x: (B, C, H, W) noisy pictures of unit variance, alpha x0 + std noise.
            timestep: (B,) or a number, 0 to num_train_timesteps - 1; real numbers are allowed.
            text: (B, D) unit vectors; None for the empty prompt.
            augment: (B, A) augmentation labels; None for pictures as they are.
            low_res: (B, C, H/f, W/f) small pictures, which an upscaler needs and other denoisers ignore.

        With `gate`, two x0 are predicted and mixed for every pixel: EDM's, which carries the input over, and one that
        does not look at it, better where a picture is plain (docs/LOG.md, the grain at 64 px).
        """
        batch = x.shape[0]
        timestep = torch.as_tensor(timestep, device=x.device).expand(batch)
        text = self.null_text.expand(batch, -1) if text is None else text
        waves = get_timestep_embedding(
            timestep, self.config.embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        embedding = self.time_mlp(waves.to(x.dtype))
        embedding = embedding + self.text_mlp(text * math.sqrt(text.shape[1]))  # to unit variance
        if augment is not None:
            embedding = embedding + self.augment(augment)
        embedding = F.silu(embedding)  # (B, E)

        h = F.pixel_unshuffle(x, self.patch)  # (B, C*p*p, S/p, S/p)
        if self.config.upscale > 1:
            if low_res is None:
                raise ValueError("an upscaler needs low_res")
            # beside the pixels that it will become (Saharia et al., SR3, 2021)
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
                added = self.config.norm_free and index == len(self.up) - 1
                h = block(h + skips.pop() if added else torch.cat([h, skips.pop()], dim=1), embedding)
            if index < len(self.upsample):
                h = F.pixel_shuffle(self.upsample[index](h), 2).contiguous(memory_format=torch.channels_last)
        features = F.silu(self.out_norm(h))
        # No norm before the output that subtracts the noise: it would rescale the noise.
        last = h if self.config.gate and not self.config.norm_free else features
        carried = self._precondition(F.pixel_shuffle(self.out(last), self.patch).float(), x.float(), timestep)
        if not self.config.gate:
            return carried
        x0, gate = F.pixel_shuffle(self.x0_head(features), self.patch).float().tensor_split([x.shape[1]], dim=1)
        return torch.lerp(carried, x0, gate.sigmoid())

    def _precondition(self, h: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """x0 from the body's output h: c_skip x + c_out h (Karras et al. 2022, table 1), x of unit variance.

        sigma_data = 1 makes h the negative of v (Salimans & Ho 2022). A body whose first level has few channels for the
        pixels of a patch cannot pass all noise from input to output, as v-prediction requires at every sigma; with a
        small sigma_data only small sigmas require it.
        """
        # float32: ONNX Runtime has no other tan
        sigma = cosine_sigmas(timestep.float(), self.config.num_train_timesteps, *self.config.noise_range)
        sigma, s = sigma[:, None, None, None], self.config.sigma_data
        root = (sigma**2 + s**2) ** 0.5
        return s**2 / root**2 * (1 + sigma**2) ** 0.5 * x + sigma * s / root * h  # x is alpha (x0 + sigma noise)

    @property
    def below(self) -> float:
        """The sigma below which it is used; infinite for a base."""
        return math.inf if self.config.below is None else self.config.below

    @torch.no_grad()
    def start_from(self, other: Denoiser) -> int:
        """Copy the weights of `other` where names and shapes agree, those of a level to the level whose maps have the
        same side: a denoiser of larger pictures, or with one level more above, takes all the levels that it shares.
        Returns the number of weights copied.
        """
        shift = int(math.log2(self._sides[0] / other._sides[0]))  # levels of this one above the first of the other
        # on the way up levels are counted from the deepest
        shifts = {"down": shift, "up": len(self._sides) - len(other._sides) - shift}

        def here(name: str) -> str:
            return re.sub(r"^(down|up)(sample|)\.(\d+)", lambda m: f"{m[1]}{m[2]}.{int(m[3]) + shifts[m[1]]}", name)

        own, taken = self.state_dict(), 0
        for name, values in other.state_dict().items():
            if (mine := own.get(here(name))) is not None and mine.shape == values.shape:
                mine.copy_(values)
                taken += values.numel()
        return taken

    @property
    def _sides(self) -> list[int]:
        """The side of the maps of each level, from the first."""
        return [self.config.image_size // self.patch // 2**level for level in range(len(self.config.widths))]


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


def compile_network(network: nn.Module) -> None:
    """torch.compile, in place. Raises PokediffError where the compiler that it needs on a CPU is missing."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if next(network.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise PokediffError(f"compile: there is no C++ compiler {compiler} here; leave --compile out")
    network.compile()


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is emulated, five times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def flops_per_image(denoiser: Denoiser) -> float:
    """Floating-point operations of one picture through the network once (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    config = denoiser.config
    x = torch.zeros(1, config.in_channels, config.image_size, config.image_size, device=denoiser.device)
    low_res = F.avg_pool2d(x, config.upscale)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(x, 0.0, low_res=low_res)
    return counter.get_total_flops()


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
