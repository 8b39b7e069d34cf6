"""The mathematics of diffusion: the noise schedule and the loss.

x = alpha x0 + std noise with alpha^2 + std^2 = 1, and sigma = std / alpha. Timestep 0 has the least noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SchedulerMixin

from pokediff.config import DiffusionConfig


def cosine_sigmas(timestep: torch.Tensor, steps: int, sigma_min: float, sigma_max: float, shift: float) -> torch.Tensor:
    """sigma at timesteps 0 to steps - 1 of the shifted cosine schedule, shift * tan(u) with u evenly spaced
    (Hoogeboom et al., "simple diffusion", 2023).

    The schedule ends at sigma_max. diffusers' own cosine schedule continues to sigma = 20,000, where samplers that keep
    x at the scale of sigma lose all digits.
    """
    first, last = math.atan(sigma_min / shift), math.atan(sigma_max / shift)
    return shift * torch.tan(first + (last - first) * timestep / (steps - 1))


def cosine_timestep(sigma: float, steps: int, sigma_min: float, sigma_max: float, shift: float) -> float:
    """The inverse of `cosine_sigmas`: the timestep, a real number, with noise `sigma`."""
    first, last = math.atan(sigma_min / shift), math.atan(sigma_max / shift)
    return (math.atan(sigma / shift) - first) / (last - first) * (steps - 1)


def make_noise_schedule(noise: DiffusionConfig) -> DDPMScheduler:
    """The schedule as a diffusers scheduler, from which every sampler is made (`from_config`)."""
    timesteps = torch.arange(noise.num_train_timesteps, dtype=torch.float64)
    alphas_cumprod = 1 / (1 + cosine_sigmas(timesteps, len(timesteps), *noise.range) ** 2)
    betas = 1 - alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    return DDPMScheduler(
        num_train_timesteps=noise.num_train_timesteps,
        trained_betas=betas.tolist(),
        prediction_type="v_prediction",  # samplers receive x0 as v (`samplers.to_v`), which all of them support
        timestep_spacing="trailing",  # sampling starts at the last timestep, pure noise (Lin et al. 2023, section 3.3)
        clip_sample=False,
    )


def schedule_sigmas(schedule: SchedulerMixin) -> torch.Tensor:
    """sigma at every timestep of a scheduler, float64 (T,)."""
    alphas_cumprod = schedule.alphas_cumprod.double()
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def same_noise(one: SchedulerMixin, other: SchedulerMixin) -> bool:
    """Whether both schedulers have the same noise at every timestep."""
    ours, theirs = (scheduler.alphas_cumprod.cpu() for scheduler in (one, other))
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)


Texts = tuple[torch.Tensor, torch.Tensor]  # captions (B, D) of predicted and of true pictures
# (predicted x0, true x0, loss so far (B,), which are `unpaired` (B,) or None, captions) to another loss (B,)
Extra = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Texts | None], torch.Tensor]


def denoising_loss(
    schedule: DDPMScheduler,
    denoiser: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *condition: torch.Tensor | None,
    extras: Sequence[Extra] = (),
    start: torch.Tensor | None = None,
    unpaired: torch.Tensor | None = None,
    texts: Texts | None = None,
) -> torch.Tensor:
    """(B,) mean squared error of x0, weighted 1 + 1 / sigma^2: the error of v (Salimans & Ho 2022, appendix D).

    x0 and noise (B, C, H, W), timesteps (B,); `condition` are the denoiser's other inputs: text, augment, low_res.
    What each of `extras` gives for the predicted x0, the true one, the loss so far and the `texts` of both is added.
    The noise is added to `start`, where given, in place of x0. Of pictures that are `unpaired` (B,) only low_res, the
    last condition, is known: the error is that of x0 averaged down to it.
    """
    noisy = schedule.add_noise(x0 if start is None else start, noise, timesteps)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    predicted = denoiser(noisy, timesteps, *condition)
    error = (predicted - x0).square().mean(dim=(1, 2, 3))
    if unpaired is not None and (low_res := condition[-1]) is not None:
        small = F.avg_pool2d(predicted, x0.shape[-1] // low_res.shape[-1])
        error = torch.where(unpaired, (small - low_res).square().mean(dim=(1, 2, 3)), error)
    loss = error / (1 - schedule.alphas_cumprod.to(error.device)[timesteps])  # 1 - a = sigma^2 / (1 + sigma^2)
    for extra in extras:
        loss = loss + extra(predicted, x0, loss, unpaired, texts)
    return loss
