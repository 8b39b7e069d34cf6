"""Latent diffusion whose autoencoder is learnt together with the denoiser: the variant that failed.

32x32 pictures become 4x4 maps of 64 channels, a third of the numbers; the denoiser works there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from pokediff.config import BaselineConfig, DiffusionConfig
from pokediff.data.images import CHANNELS
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import denoising_loss, make_noise_schedule, schedule_sigmas
from pokediff.model.samplers import make_scheduler, to_v

SIDE = 4  # of the latent map
KL_WEIGHT = 1e-6  # of latent diffusion (Rombach et al. 2022)


class LatentDiffusion(nn.Module):
    """An autoencoder and a denoiser of its latents, with one loss.

    The gradient of the denoising loss reaches the encoder, as in the project: latents that are easy to predict lower it
    as well as a better denoiser does. Nothing scales them to the unit variance that the noise schedule expects.
    """

    def __init__(self, config: BaselineConfig, text_dim: int) -> None:
        super().__init__()
        levels = (config.image_size // SIDE).bit_length()  # halvings, and the level itself
        channels, width = CHANNELS[config.dataset.channels], config.network.width
        self.shape = (config.network.latent, SIDE, SIDE)
        self.autoencoder = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(min(32 * 2**level, 128) for level in range(levels)),
            layers_per_block=1,
            norm_num_groups=16,
            latent_channels=config.network.latent,
            sample_size=config.image_size,
        )
        self.denoiser = Denoiser(
            image_size=SIDE,
            patch=1,
            in_channels=config.network.latent,
            text_dim=text_dim,
            widths=(width, width),
            blocks=(2, 1),
            attention=(True, True),
            guidance_scale=None,
        )
        self.schedule = make_noise_schedule(DiffusionConfig())

    def losses(self, x0: torch.Tensor, noise: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of pictures (N, C, S, S), noise (N, *shape) and text vectors (N, D): the squared errors of the autoencoder
        and of the denoiser, and the divergence of the latents from unit variance.
        """
        posterior = self.autoencoder.encode(x0).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        timesteps = torch.randint(0, len(self.schedule.alphas_cumprod), (len(x0),), device=x0.device)
        decoded = self.autoencoder.decode(latents).sample
        return {
            "reconstruction": F.mse_loss(decoded.float(), x0),
            "denoising": denoising_loss(self.schedule, self.denoiser, latents, noise, timesteps, text).mean(),
            "kl": KL_WEIGHT * posterior.kl().float().mean(),
        }

    def draw(self, noise: torch.Tensor, text: torch.Tensor, steps: int) -> torch.Tensor:
        """(N, C, S, S) in [-1, 1] from noise (N, *shape), by DPM-Solver++ over the latents."""
        scheduler = make_scheduler(self.schedule, "dpmpp_2m", steps, noise.device)
        sigmas, x = schedule_sigmas(self.schedule), noise
        for timestep in scheduler.timesteps:
            x0 = self.denoiser(x, timestep, text).float()
            x = scheduler.step(to_v(x0, x, float(sigmas[int(timestep)])), timestep, x).prev_sample
        return self.autoencoder.decode(x).sample.clamp(-1, 1)
