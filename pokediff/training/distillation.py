"""Progressive distillation: one step of the student reproduces several steps of the teacher.

Progressive distillation (Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models",
algorithm 2) with any number of teacher steps for one of the student's, and with the teacher's guidance
(Meng et al. 2023, "On Distillation of Guided Diffusion Models"), so that the student needs none.
"""

from __future__ import annotations

from dataclasses import fields, replace
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
from pokediff.model.denoiser import has_bf16
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training.objectives import Batch


class Distillation:
    """The objective of a student: the squared error to the x0 implied by the end of the teacher's steps.

    The teacher is a whole cascade at the student's size: a step below the sigma of a refiner is the refiner's, and the
    student, which has the same refiner, is not trained on it. Raises PokediffError when the cascade has no denoiser
    with the teacher's name, or it has another size than the student.
    """

    def __init__(self, config: DistillConfig, cascade: Cascade, steps: int, size: int, schedule: DDPMScheduler) -> None:
        if config.teacher not in cascade:
            raise PokediffError(f"distill.teacher: {config.teacher} is not in the cascade ({', '.join(cascade)})")
        if cascade[config.teacher].config.image_size != size:
            raise PokediffError(f"distill.teacher: {config.teacher} does not draw {size} px")
        self.config, self.cascade, self.size = config, cascade, size
        for _, denoiser in cascade.items():
            denoiser.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        device = cascade[config.teacher].device
        self.half = has_bf16(device)
        self.timesteps = trailing(len(schedule), steps * config.teacher_steps_per_step).to(device)
        alphas_cumprod = schedule.alphas_cumprod.to(device)[self.timesteps]
        end = torch.ones(1, device=device)  # no noise after the last step
        self.alpha = torch.cat([alphas_cumprod, end]).sqrt()
        self.std = (1 - torch.cat([alphas_cumprod, end])).sqrt()
        sigmas = (self.std / self.alpha)[: -1 : config.teacher_steps_per_step].tolist()
        self.steps = sum(cascade.expert(size, sigma) == config.teacher for sigma in sigmas)  # of the student itself

    def __call__(self, student: Any, batch: Batch) -> torch.Tensor:
        """(B,) squared errors of x0, weighted max(1, alpha^2 / std^2) (Salimans & Ho, equation 9). Each of the batch's
        timesteps is rounded up to the beginning of the student's step that it lies in.
        """
        total = int(self.timesteps[0]) + 1
        first = (self.steps * (total - 1 - batch.timesteps) // total) * self.config.teacher_steps_per_step  # (B,)
        alpha, std = self._at(first)
        noisy = (alpha * batch.x0 + std * batch.noise).contiguous(memory_format=torch.channels_last)
        target = self.target(noisy, first, batch)
        x0 = student(noisy, self.timesteps[first], batch.text, batch.augment)
        return ((x0 - target) ** 2 * (alpha / std).square().clamp(min=1)).mean(dim=(1, 2, 3))

    @torch.no_grad()
    def target(self, noisy: torch.Tensor, first: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The x0 with which one DDIM step ends where the teacher's steps end (equation 8). noisy (B, C, S, S), first
        (B,) positions in `timesteps`.
        """
        z = noisy
        for index in range(self.config.teacher_steps_per_step):
            alpha, std = self._at(first + index)
            x0 = self.teacher_x0(z, first + index, batch)
            z_noise = (z - alpha * x0) / std
            alpha, std = self._at(first + index + 1)
            z = alpha * x0 + std * z_noise  # DDIM without new noise (Song et al. 2021, equation 12)
        begin_alpha, begin_std = self._at(first)
        ratio = std / begin_std
        return (z - ratio * noisy) / (alpha - ratio * begin_alpha)

    def teacher_x0(self, z: torch.Tensor, index: torch.Tensor, batch: Batch) -> torch.Tensor:
        """x0 of the teacher's cascade, guided, in [-1, 1]; each row by the denoiser for its noise."""
        alpha, std = self._at(index)
        sigmas = (std / alpha).flatten().tolist()
        names = [self.cascade.expert(self.size, sigma) for sigma in sigmas]
        own = zip(names, sigmas, strict=True)
        scales = [guidance_at(self.cascade[name], sigma, self.config.guidance_scale) for name, sigma in own]
        x0 = torch.empty_like(z)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.half):
            for name in sorted(set(names)):
                rows = torch.tensor([other == name for other in names], device=z.device)
                denoiser = self.cascade[name]
                scale: Any = z.new_tensor(scales)[rows][:, None, None, None]
                scale = 1.0 if (scale == 1).all() else scale
                text = batch.text[rows]
                augment = None if batch.augment is None else batch.augment[rows]
                negative = denoiser.null_text.expand_as(text)
                x0[rows] = guided(denoiser, scale, z[rows], self.timesteps[index[rows]], text, negative, augment)
        return x0.clamp(-1, 1)

    def _at(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and std (B, 1, 1, 1) at positions in `timesteps`."""
        return self.alpha[index][:, None, None, None], self.std[index][:, None, None, None]


def distillation_recipe(checkpoint: str | Path, steps: int, data: tuple[str, ...]) -> TrainConfig:
    """The configuration of a run that distils a few-step base and writes that denoiser alone, as a part.

    Raises PokediffError when there is no checkpoint.
    """
    pipeline = PokeDiffPipeline.from_pretrained(checkpoint, text_encoder=None, tokenizer=None)
    teacher = next(name for name, denoiser in pipeline.cascade.items() if not denoiser.config.fast)
    config, channels = pipeline.cascade[teacher].config, {number: name for name, number in CHANNELS.items()}
    own = from_values({field.name: config[field.name] for field in fields(ModelConfig)}, ModelConfig, str(checkpoint))
    sigma_min, sigma_max, noise_shift = config.noise_range
    scale = config.guidance_scale or 1.0
    stage = StageConfig(
        image_size=config.image_size,
        model=replace(own, steps=steps, guidance_scale=1.0, high_noise_guidance=1.0),
        distill=DistillConfig(teacher, max(2, 16 // steps), scale),
        fast=True,
        max_steps=1800,
        learning_rate=3e-4,
        warmup_steps=50,
        decay_steps=1700,
        ema_decay=0.998,
        validate_every=200,
        preview_every=600,
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


def trailing(total: int, steps: int) -> torch.Tensor:
    """The timesteps of `steps` evaluations, from the noisiest, as diffusers spaces them "trailing"."""
    return (total - torch.arange(steps) * total / steps).round().long() - 1
