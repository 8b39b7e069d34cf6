"""What a stage is built of: its denoiser, where its weights start, the cascade around it, its objective."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from tqdm import tqdm

from pokediff.config import StageConfig, TrainConfig, plain
from pokediff.data.dataset import Pictures
from pokediff.data.images import CHANNELS
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.denoiser import Denoiser, flops_per_image
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training import runs
from pokediff.training.clock import Limit
from pokediff.training.distillation import Distillation
from pokediff.training.objectives import Objective, denoising


@dataclass
class Run:
    """What the stages of a run share."""

    config: TrainConfig
    out: Path
    accelerator: Accelerator
    schedule: DDPMScheduler
    pipeline: PokeDiffPipeline | None  # the cascade so far
    limit: Limit
    sample: int | None = None  # load that many pictures only (a trial)
    silent: bool = False

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        if self.main and not self.silent:
            tqdm.write(text)

    def bar(self, items: Iterable, **options: Any) -> Any:
        return tqdm(items, **options) if self.main and not self.silent else items


def make_denoiser(config: TrainConfig, stage: StageConfig, text_dim: int, augment_dim: int) -> Denoiser:
    return Denoiser(
        image_size=stage.image_size,
        in_channels=CHANNELS[config.dataset.channels],
        text_dim=text_dim,
        augment_dim=augment_dim,
        **plain(stage.model),
        fast=stage.fast,
        noise_range=config.diffusion.range,
        num_train_timesteps=config.diffusion.num_train_timesteps,
    )


def start_weights(run: Run, name: str, denoiser: Denoiser) -> None:
    """Copy the weights to start from: of `start_from`, of a student's teacher, or none."""
    stage = run.config.stages[name]
    if source := stage.start_from or run.config.start_from:
        folder, _, wanted = source.partition(":")
        cascade = PokeDiffPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None).cascade
        if wanted and wanted not in cascade:
            raise PokediffError(f"start_from: {folder} has no {wanted}; it has {', '.join(cascade)}")
        other = cascade[wanted or (name if name in cascade else next(iter(cascade)))]
    elif stage.distill and run.pipeline is not None and stage.distill.teacher in run.pipeline.cascade:
        source, other = stage.distill.teacher, run.pipeline.cascade[stage.distill.teacher]
    else:
        return
    run.say(f"{name}: {denoiser.start_from(other) / 1e6:.2f} M weights from {source}")


def with_denoiser(run: Run, name: str, denoiser: Any) -> PokeDiffPipeline:
    """The cascade so far with `denoiser` as its part `name`. Raises PokediffError when it does not fit."""
    if run.pipeline is None:
        return runs.new_pipeline(Cascade({name: denoiser}), run.schedule, run.config).to(denoiser.device)
    own, base = denoiser.config, run.pipeline.base.config
    for key, ours, theirs in (
        ("dataset.channels", own.in_channels, base.in_channels),
        ("text_encoder", own.text_dim, base.text_dim),
        ("diffusion", tuple(own.noise_range), tuple(base.noise_range)),
    ):
        if ours != theirs:
            raise PokediffError(f"{name}: {key} differs from that of the cascade ({ours} and {theirs})")
    small = own.image_size // own.upscale
    if own.upscale > 1 and small not in run.pipeline.sizes:
        raise PokediffError(f"{name}: nothing in the cascade draws {small} px, the size that it enlarges")
    parts: dict[str, Any] = {"scheduler": run.pipeline.scheduler, "tokenizer": run.pipeline.tokenizer}
    parts["text_encoder"] = run.pipeline.text_encoder
    settings = {key: run.pipeline.config[key] for key in PokeDiffPipeline.settings}
    cascade = run.pipeline.cascade.updated(Cascade({name: denoiser}))
    return PokeDiffPipeline(cascade, **parts, **settings).to(denoiser.device)


def make_optimizer(denoiser: Denoiser, stage: StageConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) are not decayed."""
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.99), fused=True)


def make_objective(run: Run, name: str) -> Objective:
    """What is minimised: the denoising error, or the distance to a teacher."""
    stage = run.config.stages[name]
    if stage.distill is None:
        return denoising(run.schedule)
    if run.pipeline is None:
        raise PokediffError(f"{name}: distill needs a cascade that holds the teacher {stage.distill.teacher}")
    cascade = copy.deepcopy(run.pipeline.cascade).to(run.accelerator.device)
    return Distillation(stage.distill, cascade, stage.model.steps, stage.image_size, run.schedule)


def facts_of(
    run: Run, pictures: Pictures, training: Pictures, validation: Pictures, denoiser: Denoiser
) -> dict[str, Any]:
    """What is known of a stage before its first step."""
    return {
        "data_sha256": pictures.digest,
        "pictures": len(pictures),
        "training_pictures": len(training),
        "validation_pictures": len(validation),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "gflops": round(flops_per_image(denoiser) / 1e9, 3),
    }
