"""The steps of a drawing: planned (`Evaluation`, grouped by size in a `Leg`) and executed (`Step`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import SchedulerMixin

from pokediff.config import Sampling
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.diffusion import schedule_sigmas
from pokediff.model.samplers import check_scheduler, make_scheduler, skipped_steps


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a denoiser."""

    size: int  # px
    timestep: float
    sigma: float
    denoiser: str  # its name in the cascade


@dataclass(frozen=True)
class Leg:
    """The evaluations at one size."""

    size: int  # px
    scheduler: SchedulerMixin  # with its timesteps set
    skipped: int  # number of its first timesteps that are not run
    reach: float  # fraction of the noise schedule on which the denoisers of this size are trained
    evaluations: tuple[Evaluation, ...]  # one for each timestep that is run


@dataclass(frozen=True)
class Step:
    """One evaluation of a denoiser, or the end: sigma 0, denoiser None, x = x0 = the pictures.

    x, x0 are (B, C, S, S) of the size S of the denoiser; enlargement is left to the display.
    """

    index: int  # 0, 1, 2 ...
    timestep: float  # 999 (noise) ... 0
    sigma: float  # standard deviation of the noise relative to the picture's unit scale
    x: torch.Tensor  # the noisy picture, unit variance
    x0: torch.Tensor  # the clean picture as predicted from it, in [-1, 1]
    denoiser: str | None = None  # its name in the cascade
    low_res: torch.Tensor | None = None  # (B, C, S/f, S/f): the pictures that an upscaler enlarges


def plan(
    cascade: Cascade, schedule: SchedulerMixin, sampling: Sampling, strength: float, device: torch.device
) -> list[Leg]:
    """The legs of a drawing, from the base to `sampling.size`.

    The first leg takes `num_inference_steps`, of which the fraction `strength` is run. Every further leg runs the end
    of the noise schedule that its denoisers are trained on, at most the fraction `strength`, in their default number of
    steps.

    Raises PokediffError for a scheduler, sampler, size, number of steps or strength that cannot be used.
    """
    if not 0 < strength <= 1:
        raise PokediffError(f"strength must be above 0 and at most 1, not {strength}")
    check_scheduler(schedule)
    sigmas, legs = schedule_sigmas(schedule), list[Leg]()
    log_sigmas = sigmas.log().numpy()
    for size in cascade.legs(sampling.size or cascade.default_size):
        leading = cascade.leading(size, sampling.fast)
        reach = float((sigmas < leading.below).double().mean())
        steps, run = sampling.num_inference_steps or leading.config.steps, strength
        if legs:
            own = leading.config.steps
            steps = min(math.ceil(own / min(strength, reach)), len(sigmas))
            run = own / steps
        scheduler = make_scheduler(schedule, sampling.sampler, steps, device)
        skipped = skipped_steps(scheduler, run)
        rows = []
        for timestep in map(float, scheduler.timesteps[skipped:]):
            # some samplers use timesteps between two whole ones
            sigma = float(np.exp(np.interp(timestep, np.arange(len(log_sigmas)), log_sigmas)))
            rows.append(Evaluation(size, timestep, sigma, cascade.expert(size, sigma, sampling.fast)))
        legs.append(Leg(size, scheduler, skipped, reach, tuple(rows)))
    return legs
