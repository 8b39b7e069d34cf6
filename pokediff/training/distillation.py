"""Few-step students: in a few steps of its own one draws the picture that a cascade draws in all of its.

The cascade draws pictures beforehand. The pair of its first noise and its picture is what a student learns, as in the
distillation of rectified flow (Liu et al., "Flow Straight and Fast", 2022, section 2.3): guidance, sampler and number
of steps are in the picture, so no teacher runs in training. What a student gets is what it meets in a drawing, the
noise after its own steps so far (Yin et al., "Improved Distribution Matching Distillation", 2024, section 4.5). LPIPS
and a critic that sees real pictures keep the average of what it is unsure of from being a blur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from pokediff.config import (
    DatasetConfig,
    DiffusionConfig,
    DistillConfig,
    ModelConfig,
    StageConfig,
    TrainConfig,
    from_values,
)
from pokediff.data.images import CHANNELS
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade, guidance_at, guided
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import Extra
from pokediff.model.pipeline import PokeDiffPipeline, quiet
from pokediff.model.plan import Evaluation
from pokediff.training.objectives import Batch, Drawings, mix

GUIDANCE = 1.25  # of a student while drawing: it has learnt its teacher's, and is a little pale (docs/LOG.md)
HELD_OUT = 8  # one drawing of so many is for validation, at most MOST_HELD_OUT
MOST_HELD_OUT = 256


class Distillation:
    """The objective of a student: the squared error of x0 against the drawing from the same noise, with LPIPS against
    it, and a critic that compares with real pictures.

    Args:
        name: the student's in the cascade.
        steps: the evaluations of a drawing with it; those before its own are run by `cascade`, without gradients.
        perceptual, critic: further losses.

    Raises PokediffError when none of the steps is the student's.
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Evaluation],
        cascade: Cascade,
        schedule: DDPMScheduler,
        perceptual: Extra | None = None,
        critic: Extra | None = None,
    ) -> None:
        self.name, self.steps, self.perceptual, self.critic = name, list(steps), perceptual, critic
        self.timesteps = {round(step.timestep): k for k, step in enumerate(steps) if step.denoiser == name}
        if not self.timesteps:
            raise PokediffError(f"{name}: in {len(steps)} steps none is its own; give more model.steps")
        self.scales = [guidance_at(cascade[step.denoiser], step.sigma) for step in steps]
        self.null_text = cascade[name].null_text
        names = {step.denoiser for step in steps} - {name}
        self.others: dict[str, Denoiser] = {
            other: cascade[other].to(memory_format=torch.channels_last).requires_grad_(False).eval() for other in names
        }
        alphas_cumprod = schedule.alphas_cumprod[[round(step.timestep) for step in steps]]
        self.alpha, self.std = alphas_cumprod.sqrt().tolist(), (1 - alphas_cumprod).sqrt().tolist()

    def __call__(self, student: Any, batch: Batch) -> torch.Tensor:
        """(B,) losses at the student's step nearest to the first of the batch's timesteps, which are all the same.
        Validation, without gradients, is the squared error alone.
        """
        timestep = min(self.timesteps, key=lambda own: abs(own - int(batch.timesteps[0])))
        target = batch.x0 if batch.target is None else batch.target
        noisy = self.before(student, self.timesteps[timestep], batch)
        x0 = student(noisy, torch.full_like(batch.timesteps, timestep), batch.text, batch.augment)
        loss = (x0 - target).square().mean(dim=(1, 2, 3))  # the error is much the same at all of its steps
        if torch.is_grad_enabled():
            loss = loss if self.perceptual is None else loss + self.perceptual(x0, target, loss, None, None)
            loss = loss if self.critic is None else loss + self.critic(x0, batch.x0, loss, None, batch.texts)
        return loss

    @torch.no_grad()
    def before(self, student: Any, index: int, batch: Batch) -> torch.Tensor:
        """x (B, C, S, S) before step `index` of a drawing from the batch's noise."""
        x = batch.noise.contiguous(memory_format=torch.channels_last)
        for here, after in pairwise(range(index + 1)):
            step = self.steps[here]
            denoiser, scale = self.others.get(step.denoiser, student), self.scales[here]
            negative = self.null_text.to(batch.text).expand_as(batch.text)
            timesteps = torch.full_like(batch.timesteps, round(step.timestep))
            x0 = guided(denoiser, scale, x, timesteps, batch.text, negative, batch.augment).float().clamp(-1, 1)
            noise = (x - self.alpha[here] * x0) / self.std[here]
            x = self.alpha[after] * x0 + self.std[after] * noise  # DDIM (Song et al. 2021, equation 12)
        return x


def student_batch(
    batch: Batch, drawings: Drawings, timesteps: Sequence[int], seed: int, step: int, rank: int, world: int
) -> Batch:
    """The batch with drawings to learn, each mirrored as often as not, at one of the student's timesteps. Its x0 stay
    the real pictures, for a critic. A function of (seed, step), whatever the number of processes.
    """
    number = len(batch.x0)
    generator = torch.Generator().manual_seed(mix(seed, step, 0))
    mine = slice(rank * number, (rank + 1) * number)
    rows = torch.randint(0, len(drawings.text), (world * number,), generator=generator)[mine]
    mirrored = torch.rand(world * number, generator=generator)[mine] < 0.5
    learnt = drawn_batch(drawings, rows, timesteps[step % len(timesteps)])

    def some_mirrored(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mirrored[:, None, None, None], values.flip(-1), values)

    assert learnt.target is not None
    pairs = replace(learnt, noise=some_mirrored(learnt.noise), target=some_mirrored(learnt.target))
    return replace(pairs.to(batch.x0.device), x0=batch.x0, caption=batch.text)


def student_validation(drawings: Drawings, timesteps: Sequence[int]) -> list[Batch]:
    """The drawings, in batches of at most 64, at every timestep of the student."""
    parts = torch.arange(len(drawings.text)).split(64)
    return [drawn_batch(drawings, rows, timestep) for timestep in timesteps for rows in parts]


def drawn_batch(drawings: Drawings, rows: torch.Tensor, timestep: int) -> Batch:
    """The drawings in these rows, to be learnt at a timestep."""
    assert drawings.noise is not None
    target = drawings.pictures[rows]
    timesteps = torch.full((len(rows),), timestep)
    return Batch(target, drawings.noise[rows], timesteps, drawings.text[rows], target=target)


def held_out(drawings: Drawings) -> tuple[Drawings, Drawings]:
    """The drawings to learn from, and those for validation, one at least."""
    number = min(MOST_HELD_OUT, max(1, len(drawings.text) // HELD_OUT))
    return drawings.part(slice(number, None)), drawings.part(slice(number))


def distillation_recipe(checkpoint: str | Path, steps: int, data: tuple[str, ...]) -> TrainConfig:
    """The configuration of a run that distils a few-step base and writes that denoiser alone, as a part. Base and
    refiner, which stays as it is, take `steps` steps together.

    Raises PokediffError when there is no checkpoint.
    """
    quiet()
    pipeline = PokeDiffPipeline.from_pretrained(checkpoint, text_encoder=None, tokenizer=None)
    teacher = next(name for name, denoiser in pipeline.cascade.items() if not denoiser.config.fast)
    config, channels = pipeline.cascade[teacher].config, {number: name for name, number in CHANNELS.items()}
    own = from_values({field.name: config[field.name] for field in fields(ModelConfig)}, ModelConfig, str(checkpoint))
    sigma_min, sigma_max, noise_shift = config.noise_range
    guidance = GUIDANCE if own.guidance_scale is not None and own.guidance_scale > 1 else own.guidance_scale
    stage = StageConfig(
        image_size=config.image_size,
        model=replace(own, steps=steps, guidance_scale=guidance, high_noise_guidance=1.0, dropout=0.0),
        distill=DistillConfig(teacher),
        fast=True,
        max_steps=1000,
        learning_rate=5e-4,
        warmup_steps=50,
        decay_steps=700,
        ema_decay=0.998,
        validate_every=200,
        preview_every=500,
        checkpoint_every=200,
    )
    return TrainConfig(
        data=data,
        out=f"checkpoints/{Path(checkpoint).resolve().name}-fast",
        base=str(checkpoint),
        text_encoder=pipeline.config.text_encoder_name,
        dataset=DatasetConfig(channels=channels[config.in_channels]),
        diffusion=DiffusionConfig(config.num_train_timesteps, sigma_min, sigma_max, noise_shift, caption_dropout=0.05),
        stages={f"{teacher}-fast": stage},
    )
