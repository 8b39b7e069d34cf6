"""Fewer steps: a student learns to go in one step where its teacher goes in several.

Progressive distillation (Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models",
algorithm 2), with any number of the teacher's steps for one of the student's, and the teacher's guidance learned with
them (Meng et al. 2023, "On Distillation of Guided Diffusion Models"), so that the student needs none.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from pokediff.config import DEFAULT_STEPS, DatasetConfig, DiffusionConfig, DistillConfig, ModelConfig, TrainConfig
from pokediff.data.images import CHANNELS
from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline, same_noise, to_x0


class Distillation:
    """What a student's prediction is measured by; called as `pipeline.diffusion_loss` without its schedule.

    Raises PokediffError for a teacher of other noise, picture size or channels than the student, or with an upscaler.
    """

    def __init__(self, config: DistillConfig, schedule: DDPMScheduler, device: torch.device) -> None:
        self.config, self.kind = config, schedule.config.prediction_type
        teacher = PokeDiffPipeline.from_pretrained(config.teacher, text_encoder=None, tokenizer=None).to(device)
        refuse_upscaler(teacher, config.teacher)
        if not same_noise(schedule, teacher.scheduler):
            raise PokediffError(f"distill.teacher: {config.teacher} has another noise schedule (diffusion.*)")
        self.teacher = teacher
        self.teacher.unet.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        self.half = teacher.in_bf16("auto")
        self.timesteps = trailing(len(schedule), config.steps * config.substeps).to(device)
        alphas_cumprod = schedule.alphas_cumprod.to(device)[self.timesteps]
        end = torch.ones(1, device=device)  # behind the last step there is no noise
        self.alpha = torch.cat([alphas_cumprod, end]).sqrt()
        self.std = (1 - torch.cat([alphas_cumprod, end])).sqrt()
        # The student keeps the teacher's refiner, which draws the steps from so little noise without it.
        begins = (self.std / self.alpha)[: -1 : config.substeps]  # sigma, (steps,)
        refines = begins < teacher.config.refine_below if teacher.refiner is not None else torch.zeros_like(begins) > 0
        self.asked = int((~refines).sum())
        if teacher.refiner is not None:
            teacher.refiner.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def __call__(
        self,
        unet: Any,
        x0: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        augment: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B,) squared errors of x0, weighted max(1, alpha^2 / std^2) (equation 9). `timesteps` (B,) say where on the
        student's way: each is rounded up to the beginning of the step that it lies in.
        """
        if self.teacher.unet.config.image_size != x0.shape[-1] or self.teacher.unet.config.in_channels != x0.shape[1]:
            raise PokediffError(f"distill.teacher: {self.config.teacher} draws other sizes or channels (dataset.*)")
        total = int(self.timesteps[0]) + 1
        first = (self.asked * (total - 1 - timesteps) // total) * self.config.substeps  # (B,) into self.timesteps
        alpha, std = self._at(first)
        noisy = (alpha * x0 + std * noise).contiguous(memory_format=torch.channels_last)
        target = self.target(noisy, first, text, augment)
        seen = to_x0(self.kind, unet(noisy, self.timesteps[first], text, augment).float(), noisy, std / alpha)
        return ((seen - target) ** 2 * (alpha / std).square().clamp(min=1)).mean(dim=(1, 2, 3))

    @torch.no_grad()
    def target(
        self, noisy: torch.Tensor, first: torch.Tensor, text: torch.Tensor, augment: torch.Tensor | None
    ) -> torch.Tensor:
        """The x0 with which one DDIM step ends where the teacher's steps end (equation 8)."""
        z = noisy
        for index in range(self.config.substeps):
            alpha, std = self._at(first + index)
            x0 = self.predict(z, first + index, text, augment)
            z_noise = (z - alpha * x0) / std
            alpha, std = self._at(first + index + 1)
            z = alpha * x0 + std * z_noise  # DDIM without new noise (Song et al. 2021, equation 12)
        begin_alpha, begin_std = self._at(first)
        ratio = std / begin_std
        return (z - ratio * noisy) / (alpha - ratio * begin_alpha)

    def predict(
        self, z: torch.Tensor, index: torch.Tensor, text: torch.Tensor, augment: torch.Tensor | None
    ) -> torch.Tensor:
        """The teacher's guided x0."""
        alpha, std = self._at(index)
        scale, unet, refiner = self.config.guidance_scale, self.teacher.unet, self.teacher.refiner
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.half):
            timestep = self.timesteps[index]
            output = unet(z, timestep, text, augment).float()
            if scale != 1:
                away = unet(z, timestep, unet.null_text.expand_as(text), augment).float()
                output = away + scale * (output - away)
            x0 = to_x0(self.teacher.prediction_type(unet), output, z, std / alpha)
            refines = (std / alpha < self.teacher.config.refine_below).flatten()
            if refiner is not None and refines.any():
                parts = (values[refines] for values in (z, timestep, text))
                output = refiner(*parts, None if augment is None else augment[refines]).float()
                kind = self.teacher.prediction_type(refiner)
                x0[refines] = to_x0(kind, output, z[refines], (std / alpha)[refines])
        return x0.clamp(-1, 1)

    def _at(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and std (B, 1, 1, 1) at positions in self.timesteps."""
        return self.alpha[index][:, None, None, None], self.std[index][:, None, None, None]


def recipe(checkpoint: str | Path, steps: int, data: str) -> TrainConfig:
    """Settings to teach a network of the same shape to draw in so many steps. A checkpoint that was distilled itself
    teaches with the steps that it learned.

    Raises PokediffError when there is no checkpoint, it enlarges, or it draws in fewer than twice as many steps.
    """
    teacher = PokeDiffPipeline.from_pretrained(checkpoint, text_encoder=None, tokenizer=None)
    refuse_upscaler(teacher, checkpoint)
    shape, channels = teacher.unet.config, {number: name for name, number in CHANNELS.items()}
    known = 16 if teacher.config.num_steps == DEFAULT_STEPS else teacher.config.num_steps
    if known < 2 * steps:
        raise PokediffError(f"{checkpoint} draws in {teacher.config.num_steps} steps: choose at most {known // 2}")
    sigma_min, sigma_max, noise_shift = shape.noise_range
    return TrainConfig(
        data=data,
        out=f"checkpoints/{Path(checkpoint).resolve().name}-{steps}-steps",
        text_encoder=teacher.config.text_encoder_name,
        dataset=DatasetConfig(image_size=shape.image_size, channels=channels[shape.in_channels]),
        model=ModelConfig(**{field.name: _tuple(shape[field.name]) for field in fields(ModelConfig)}),
        diffusion=DiffusionConfig(
            prediction_type=teacher.scheduler.config.prediction_type,
            num_train_timesteps=shape.num_train_timesteps,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            noise_shift=noise_shift,
            caption_dropout=0.05,
        ),
        distill=DistillConfig(str(checkpoint), steps, known // steps, teacher.config.guidance_scale),
        max_steps=1800,
        batch_size=32,
        learning_rate=3e-4,
        warmup_steps=50,
        decay_steps=1700,
        ema_decay=0.998,
        validate_every=200,
        preview_every=600,
        checkpoint_every=200,
    )


def refuse_upscaler(teacher: PokeDiffPipeline, name: str | Path) -> None:
    """What enlarges is not what is slow: a student of the base can be given the same upscaler."""
    if teacher.upscaler is not None:
        raise PokediffError(f"{name} enlarges the pictures of another checkpoint: distill that one")


def _tuple(value: Any) -> Any:
    """As it was before it was JSON."""
    return tuple(value) if isinstance(value, list) else value


def trailing(total: int, steps: int) -> torch.Tensor:
    """The timesteps of `steps` evaluations, from the noisiest, as diffusers spaces them "trailing"."""
    return (total - torch.arange(steps) * total / steps).round().long() - 1
