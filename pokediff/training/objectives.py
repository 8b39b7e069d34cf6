"""Objectives: functions of a denoiser and a batch that return the loss of each picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler

from pokediff.config import StageConfig, TrainConfig
from pokediff.data import dataset
from pokediff.data.images import to_model
from pokediff.model.diffusion import Extra, Texts, cosine_timestep, denoising_loss
from pokediff.model.interface import enlarge

UNPAIRED = 0.25  # of a batch, with drawings; half of what a critic of share 0.5 sees


@dataclass(frozen=True)
class Pairs:
    """Two drawings of each of N captions (preference.py)."""

    better: torch.Tensor  # (N, C, S, S) in [-1, 1]
    worse: torch.Tensor  # (N, C, S, S)
    text: torch.Tensor  # (N, D)
    timesteps: torch.Tensor | None = None  # (N,) int64, in a batch

    def to(self, device: torch.device) -> Pairs:
        """A copy on the device."""
        return on_device(self, device)


@dataclass(frozen=True)
class Batch:
    """Training tensors."""

    x0: torch.Tensor  # (B, C, S, S) in [-1, 1]
    noise: torch.Tensor  # (B, C, S, S), unit variance
    timesteps: torch.Tensor  # (B,) int64
    text: torch.Tensor  # (B, D)
    augment: torch.Tensor | None = None  # (B, A)
    low_res: torch.Tensor | None = None  # (B, C, S/f, S/f), of an upscaler
    start: torch.Tensor | None = None  # (B, C, S, S): what the noise is added to, if not x0
    unpaired: torch.Tensor | None = None  # (B,) bool: x0 is another picture than the one in low_res
    target: torch.Tensor | None = None  # (B, C, S, S): what a student draws from the noise, in place of x0
    caption: torch.Tensor | None = None  # (B, D): of x0, where `text` is that of another picture
    pairs: Pairs | None = None  # B pairs, which get the noise of the pictures

    @property
    def texts(self) -> Texts:
        """What was asked for, and what x0 shows."""
        return self.text, self.text if self.caption is None else self.caption

    def to(self, device: torch.device) -> Batch:
        """A copy on the device."""
        return on_device(self, device)


def on_device(tensors: Any, device: torch.device) -> Any:
    """A copy of a dataclass of tensors, or None, on the device."""
    return replace(tensors, **{name: value.to(device) for name, value in vars(tensors).items() if value is not None})


@dataclass(frozen=True)
class Drawings:
    """Pictures that a cascade has drawn: small ones for an upscaler's critic, or those that a student learns."""

    pictures: torch.Tensor  # (N, C, S/f, S/f) in [-1, 1]
    text: torch.Tensor  # (N, D)
    noise: torch.Tensor | None = None  # (N, C, S, S): the noise that a student draws them from

    def part(self, rows: slice) -> Drawings:
        return Drawings(self.pictures[rows], self.text[rows], None if self.noise is None else self.noise[rows])


Objective = Callable[[Any, Batch], torch.Tensor]  # (denoiser, batch) to (B,) losses


def denoising(schedule: DDPMScheduler, extras: Sequence[Extra] = ()) -> Objective:
    """The error of x0 (`diffusion.denoising_loss`). Validation, without gradients, leaves out the other losses, so that
    runs with and without them compare.
    """

    def objective(denoiser: Any, batch: Batch) -> torch.Tensor:
        return denoising_loss(
            schedule, denoiser, batch.x0, batch.noise, batch.timesteps, batch.text, batch.augment, batch.low_res,
            extras=extras if torch.is_grad_enabled() else (),
            start=batch.start, unpaired=batch.unpaired, texts=batch.texts,
        )  # fmt: skip

    return objective


def trained_timesteps(config: TrainConfig, stage: StageConfig) -> int:
    """How many timesteps, from the least noise, a stage is trained on: all, or those below `model.below`."""
    total, below = config.diffusion.num_train_timesteps, stage.model.below
    if below is None or below >= config.diffusion.sigma_max:
        return total
    return min(total, 1 + math.ceil(cosine_timestep(below, total, *config.diffusion.range)))


def training_batch(
    pictures: dataset.Batch,
    config: TrainConfig,
    stage: StageConfig,
    accelerator: Accelerator,
    step: int,
    drawn_at: int | None = None,
    drawings: Drawings | None = None,
) -> Batch:
    """This process's slice of a step's batch. Noise and timesteps are a function of (seed, step), and drawn for all
    processes together: any number of processes trains the same model.

    With `drawn_at`, the timestep at which an upscaler of one step is used, three of four pictures are what it meets in
    a drawing: the enlarged small picture with the noise of that timestep. The rest keeps it a denoiser, for img2img.
    With `drawings` the first pictures, UNPAIRED of the batch, are drawn small ones, to which no large one belongs.
    """
    x0 = to_model(pictures.pixels.to(accelerator.device), config.dataset.channels)
    generator = torch.Generator(accelerator.device).manual_seed(mix(config.seed, step, 0))
    total, first = accelerator.num_processes * len(x0), accelerator.process_index * len(x0)
    mine = slice(first, first + len(x0))
    timesteps = torch.randint(0, trained_timesteps(config, stage), (total,), generator=generator, device=x0.device)
    noise = torch.randn((total, *x0.shape[1:]), generator=generator, device=x0.device)
    low_res = make_low_res(x0, stage, generator, total, mine)
    text, augment = pictures.text.to(x0.device), pictures.augment.to(x0.device)
    batch = Batch(x0, noise[mine], timesteps[mine], text, augment, low_res)
    if low_res is None or drawn_at is None:
        return batch
    drawn = torch.arange(total, device=x0.device)[mine] % 4 < 3
    start = torch.where(drawn[:, None, None, None], enlarge(low_res, x0.shape[-1]), x0)
    batch = replace(batch, start=start, timesteps=batch.timesteps.masked_fill(drawn, drawn_at))
    if drawings is None:
        return batch
    chosen = torch.randint(0, len(drawings.text), (total,), generator=generator, device=x0.device)[mine]
    return with_drawings(batch, drawings, chosen.cpu(), drawn_at)


def with_drawings(batch: Batch, drawings: Drawings, chosen: torch.Tensor, drawn_at: int) -> Batch:
    """The batch with the `chosen` (B,) drawings in place of its first pictures, UNPAIRED of it, x0 excepted."""
    number = math.ceil(UNPAIRED * len(batch.x0))

    def first(values: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        assert rest is not None  # an upscaler has all of them
        return torch.cat([values.to(rest), rest[number:]])

    small = drawings.pictures[chosen[:number]]
    return replace(
        batch,
        timesteps=first(torch.full((number,), drawn_at), batch.timesteps),
        text=first(drawings.text[chosen[:number]], batch.text),
        caption=batch.text,
        augment=None if batch.augment is None else first(torch.zeros_like(batch.augment[:number]), batch.augment),
        low_res=first(small, batch.low_res),
        start=first(enlarge(small, batch.x0.shape[-1]), batch.start),
        unpaired=torch.arange(len(batch.x0), device=batch.x0.device) < number,
    )


def make_low_res(
    x0: torch.Tensor, stage: StageConfig, generator: torch.Generator, total: int, mine: slice
) -> torch.Tensor | None:
    """(B, C, S/f, S/f): the small pictures for an upscaler by f, each with noise of a random sigma; None for
    other denoisers.
    """
    if stage.model.upscale == 1:
        return None
    small = F.avg_pool2d(x0, stage.model.upscale)
    sigma = stage.low_res_noise * torch.rand(total, generator=generator, device=generator.device)
    noise = torch.randn((total, *small.shape[1:]), generator=generator, device=generator.device)
    return small + (sigma[:, None, None, None] * noise)[mine].to(small)


def validation_batches(
    pictures: dataset.Pictures, vectors: dataset.CaptionVectors, config: TrainConfig, stage: StageConfig
) -> list[Batch]:
    """All validation pictures in batches of 64 on the CPU, always with the same noise and timesteps."""
    generator = torch.Generator().manual_seed(0)
    number, total = len(pictures), trained_timesteps(config, stage)
    timesteps = ((torch.arange(number) + 0.5) / number * total).long()[torch.randperm(number, generator=generator)]
    batches = []
    for start in range(0, number, 64):
        part = slice(start, start + 64)
        x0 = to_model(torch.from_numpy(np.ascontiguousarray(pictures.pixels[part])), config.dataset.channels)
        noise = torch.randn(x0.shape, generator=generator)
        text = vectors.table[[rows[0] for rows in vectors.rows[part]]]
        low_res = make_low_res(x0, stage, generator, len(x0), slice(None))
        batches.append(Batch(x0, noise, timesteps[part], text, None, low_res))
    return batches


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
