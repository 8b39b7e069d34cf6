"""Preferences: of two drawings of a caption a denoiser learns the one that is rated higher.

A checkpoint begins several drawings of each caption beforehand, and its scorer rates them where the base hands over;
the best and the worst are finished, a pair. Noise is added to both, and the error of x0 shall fall for the better one
and rise for the worse one, against a copy that is not trained: Diffusion-DPO (Wallace et al., "Diffusion Model
Alignment Using Direct Preference Optimization", 2024, equation 14). The error of real pictures beside it keeps the
denoiser one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from pokediff.config import Sampling
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import cosine_timestep, denoising_loss
from pokediff.model.pipeline import BATCH_SIZE, PokeDiffPipeline
from pokediff.training.objectives import Batch, Objective, Pairs, mix


class Preference:
    """The objective: the error of real pictures, and of each picture's pair how much more it has fallen for the worse
    drawing than for the better one, as a soft hinge in units of the error.

    Args:
        real: the objective of the real pictures; validation, without gradients, is it alone.
        reference: the denoiser as it was, which is not trained.
        steps: the timesteps at which it draws, and pairs are compared.
        beta: the hinge is soft over errors of 1 / beta.
        weight: of the hinge.

    `agreement` is the share of the last batch's pairs whose better drawing has gained more.
    """

    def __init__(
        self,
        real: Objective,
        schedule: DDPMScheduler,
        reference: Denoiser,
        steps: range,
        beta: float,
        weight: float = 1.0,
    ) -> None:
        self.real, self.schedule, self.steps, self.beta, self.weight = real, schedule, steps, beta, weight
        self.reference = reference.requires_grad_(False).eval()
        self.agreement = math.nan

    def __call__(self, denoiser: Any, batch: Batch) -> torch.Tensor:
        """(B,) losses."""
        loss, pairs = self.real(denoiser, batch), batch.pairs
        if pairs is None or not torch.is_grad_enabled():
            return loss
        assert pairs.timesteps is not None
        both = torch.cat([pairs.better, pairs.worse])
        noise, timesteps, text = (torch.cat([x, x]) for x in (batch.noise, pairs.timesteps, pairs.text))
        error = denoising_loss(self.schedule, denoiser, both, noise, timesteps, text)
        with torch.no_grad():
            before = denoising_loss(self.schedule, self.reference, both, noise, timesteps, text)
        better, worse = (error - before).chunk(2)
        self.agreement = (better < worse).float().mean().item()
        return loss + self.weight * F.softplus(better - worse, beta=self.beta)


def draw_pairs(
    pipeline: PokeDiffPipeline,
    text: torch.Tensor,
    best_of: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Pairs:
    """For each of N text vectors (N, D) the drawing that the scorer rates highest of `best_of`, and the lowest, at the
    smallest size. Raises PokediffError for a checkpoint without scorer.
    """
    size, captions = pipeline.sizes[0], max(1, BATCH_SIZE // 2)
    sampling = pipeline.resolved(Sampling(size=size, best_of=best_of))
    better, worse = list[torch.Tensor](), list[torch.Tensor]()
    for rows in progress(torch.arange(len(text)).split(captions)):
        tried, ratings = pipeline.rated_seeds(text[rows], rows.tolist(), sampling)
        chosen = torch.cat([ratings.argmax(1), ratings.argmin(1)]).tolist()
        seeds = [several[index] for several, index in zip(tried * 2, chosen, strict=True)]
        *_, last = pipeline.denoise(text[rows].repeat(2, 1), seeds, Sampling(size=size))
        for pictures, part in zip((better, worse), last.x0.float().cpu().chunk(2), strict=True):
            pictures.append(part)
    return Pairs(torch.cat(better), torch.cat(worse), text)


def with_pairs(batch: Batch, pairs: Pairs, steps: range, seed: int, step: int, rank: int, world: int) -> Batch:
    """The batch with a pair for each of its pictures, mirrored as often as not, at timesteps of `steps`. A function of
    (seed, step), whatever the number of processes.
    """
    number = len(batch.x0)
    generator = torch.Generator().manual_seed(mix(seed, step, 0, 1))  # not that of the noise
    mine = slice(rank * number, (rank + 1) * number)
    rows = torch.randint(0, len(pairs.text), (world * number,), generator=generator)[mine]
    mirrored = (torch.rand(world * number, generator=generator)[mine] < 0.5)[:, None, None, None]
    timesteps = torch.randint(steps.start, steps.stop, (world * number,), generator=generator)[mine]
    better, worse = (torch.where(mirrored, x[rows].flip(-1), x[rows]) for x in (pairs.better, pairs.worse))
    return replace(batch, pairs=Pairs(better, worse, pairs.text[rows], timesteps).to(batch.x0.device))


def used_timesteps(pipeline: PokeDiffPipeline, name: str) -> range:
    """The timesteps at which a denoiser draws: those above the next one of its size."""
    own = pipeline.cascade[name]
    next_below = [
        other.below
        for _, other in pipeline.cascade.items()
        if other.config.image_size == own.config.image_size and other.below < own.below
    ]
    total = own.config.num_train_timesteps
    first = math.floor(cosine_timestep(max(next_below), total, *own.config.noise_range)) if next_below else 0
    return range(first, total)
