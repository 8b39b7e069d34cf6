"""The components of a stage: data, denoiser, initial weights, cascade, objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch.optim.swa_utils import AveragedModel

from pokediff.config import PreferenceConfig, Sampling, StageConfig, TrainConfig, plain
from pokediff.data.dataset import AUGMENT_LABELS, Pictures, TrainingBatches, caption_vectors, load_pictures
from pokediff.data.images import CHANNELS
from pokediff.errors import PokediffError
from pokediff.evaluation.validation_metrics import ValidationMetrics
from pokediff.model.cascade import Cascade
from pokediff.model.denoiser import Denoiser, flops_per_image
from pokediff.model.pipeline import BATCH_SIZE, PokeDiffPipeline
from pokediff.model.text import ClipTextEncoder, load_text_encoder
from pokediff.progress import ProgressBar
from pokediff.training.clock import Limit
from pokediff.training.distillation import Distillation, held_out, student_validation
from pokediff.training.objectives import Batch, Drawings, Objective, Pairs, denoising, validation_batches
from pokediff.training.perceptual import AdversarialLoss, PerceptualLoss
from pokediff.training.preference import Preference, draw_pairs, used_timesteps
from pokediff.training.runs import Progress, load_state, source_parts

VALIDATION_PICTURES = 512
PREVIEW_PAIRS = 4  # training pictures and validation pictures whose captions previews draw


@dataclass
class Run:
    """State shared by the stages of a run."""

    config: TrainConfig
    out: Path
    accelerator: Accelerator
    schedule: DDPMScheduler
    pipeline: PokeDiffPipeline | None  # the cascade so far
    limit: Limit
    sample: int | None = None  # load about that many pictures only (a trial)
    silent: bool = False

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        if self.main and not self.silent:
            ProgressBar.write(text)

    def bar(self, items: Iterable, **options: Any) -> Any:
        return ProgressBar(items, **options) if self.main and not self.silent else items


@dataclass
class Stage:
    """One denoiser, and everything that its training needs."""

    name: str
    config: StageConfig
    validation: list[Batch]
    batches: TrainingBatches
    denoiser: Denoiser
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    pipeline: PokeDiffPipeline  # the cascade so far, with the averaged weights of this stage
    shown: tuple[Pictures, Pictures]  # training and validation pictures, of the previews
    facts: dict[str, Any]  # numbers of parameters, pictures and GFLOP, for log and model card
    critic: AdversarialLoss | None = None
    drawings: Drawings | None = None  # for the critic, or to learn from
    pairs: Pairs | None = None  # of drawings, one of which is rated higher
    metrics: ValidationMetrics | None = None
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def drawn_at(self) -> int | None:
        """The timestep at which an upscaler of one step is used; None for other denoisers."""
        if self.config.model.upscale == 1 or self.config.model.steps > 1:
            return None
        return round(self.pipeline.evaluations(self.sampling)[-1].timestep)

    @property
    def sampling(self) -> Sampling:
        """Sampling settings of previews and metrics during training."""
        return Sampling(size=self.config.image_size, fast=self.config.fast)


def prepare(run: Run, name: str, state: Path | None = None) -> Stage:
    """Load data and weights of a stage. Raises PokediffError for missing or incompatible ones."""
    config, stage, accelerator = run.config, run.config.stages[name], run.accelerator
    dataset = replace(config.dataset, styles=stage.styles or config.dataset.styles)
    pictures = load_pictures(config.data, stage.image_size, dataset, run.say, run.bar, limit=run.sample)
    training, validation = pictures.split("train"), pictures.split("validation").spread(VALIDATION_PICTURES)
    training = training.with_shared_captions()
    if not len(training) or not len(validation):
        found = f"{len(training)} training and {len(validation)} validation pictures"
        raise PokediffError(f"{' '.join(config.data)}: {found}; both are needed, so add pictures of other families")
    vectors = caption_vectors(config.data, training, config.text_encoder, run.bar, run.say)
    validation_vectors = caption_vectors(config.data, validation, config.text_encoder, report=lambda _: None)
    batches = TrainingBatches(
        training,
        vectors,
        dataset,
        batch_size=stage.batch_size,
        caption_dropout=config.diffusion.caption_dropout,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        augment_dim=AUGMENT_LABELS if dataset.warp else 3,
    )
    if stage.distill:
        require_teacher(run, name)
    torch.manual_seed(config.seed)
    denoiser = make_denoiser(config, stage, vectors.table.shape[1], batches.augment_dim)
    if state is None:
        start_weights(run, name, denoiser)
    denoiser.null_text.copy_(vectors.table[0])
    denoiser = denoiser.to(accelerator.device, memory_format=torch.channels_last).train()
    critic = AdversarialLoss(stage.critic, accelerator, config.seed, vectors.table.shape[1]) if stage.critic else None
    average = AveragedModel(denoiser, multi_avg_fn=ema_with_warmup(stage.ema_decay)).eval()
    facts = {
        "data_sha256": pictures.digest,
        "pictures": len(pictures),
        "training_pictures": len(training),
        "validation_pictures": len(validation),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "gflops": round(flops_per_image(denoiser) / 1e9, 3),
    }
    pipeline = with_denoiser(run, name, average.module)
    prepared = Stage(
        name,
        stage,
        validation_batches(validation, validation_vectors, config, stage),
        batches,
        denoiser,
        average,
        make_optimizer(denoiser, stage),
        make_objective(run, name, pipeline, critic),
        pipeline,
        (training.spread(PREVIEW_PAIRS), validation.spread(PREVIEW_PAIRS)),
        facts,
        critic,
    )
    if config.metrics.every and run.main and not run.silent:
        prepared.metrics = ValidationMetrics(config.metrics, training, validation)
    if state is not None:
        load_state(run, prepared, state)
        run.say(f"{name}: resumed from {state}")
    return prepared


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


def require_teacher(run: Run, name: str) -> None:
    """Raise PokediffError when the cascade so far has no teacher of the student's size."""
    stage, cascade = run.config.stages[name], {} if run.pipeline is None else dict(run.pipeline.cascade.items())
    assert stage.distill is not None
    teacher = stage.distill.teacher
    if teacher not in cascade:
        raise PokediffError(f"{name}: its teacher {teacher} is not in the cascade ({', '.join(cascade) or 'empty'})")
    if cascade[teacher].config.image_size != stage.image_size:
        raise PokediffError(f"{name}: its teacher {teacher} does not draw {stage.image_size} px")


def start_weights(run: Run, name: str, denoiser: Denoiser) -> None:
    """Copy initial weights, if any: from `start_from` of the stage or the run, or from a student's teacher."""
    config, stage = run.config, run.config.stages[name]
    for source in start_sources(config, name):
        folder, wanted = source_parts(source)
        cascade = PokeDiffPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None).cascade
        if wanted and wanted not in cascade:
            raise PokediffError(f"start_from: {folder} has no {wanted}; it has {', '.join(cascade)}")
        if not wanted and name not in cascade and not stage.start_from:
            continue
        wanted = wanted or (name if name in cascade else next(iter(cascade)))
        copy_weights(run, name, denoiser, source, cascade[wanted])
    if stage.distill and run.pipeline and not (stage.start_from or config.start_from):
        copy_weights(run, name, denoiser, stage.distill.teacher, run.pipeline.cascade[stage.distill.teacher])


def start_sources(config: TrainConfig, name: str) -> list[str]:
    """FOLDER or FOLDER:DENOISER each, from which a stage starts: its own, that of its preferences, or the run's."""
    stage = config.stages[name]
    if stage.start_from:
        return list(stage.start_from)
    if stage.preference:
        return [f"{stage.preference.checkpoint}:{name}"]
    return [config.start_from] if config.start_from else []


def copy_weights(run: Run, name: str, denoiser: Denoiser, source: str, other: Denoiser) -> None:
    run.say(f"{name}: {denoiser.start_from(other) / 1e6:.2f} M weights from {source}")


def with_denoiser(run: Run, name: str, denoiser: Any) -> PokeDiffPipeline:
    """The cascade so far with `denoiser` as its part `name`. Raises PokediffError when it does not fit."""
    if run.pipeline is None:
        pipeline = new_pipeline(Cascade({name: denoiser}), run.schedule, run.config)
    else:
        own, base = denoiser.config, run.pipeline.base.config
        for key, ours, theirs in (
            ("dataset.channels", own.in_channels, base.in_channels),
            ("text_encoder", run.config.text_encoder, run.pipeline.config.text_encoder_name),
            ("text_encoder", own.text_dim, base.text_dim),
            ("diffusion", tuple(own.noise_range), tuple(base.noise_range)),
        ):
            if ours != theirs:
                raise PokediffError(f"{name}: {key} differs from that of the cascade ({ours} and {theirs})")
        cascade = run.pipeline.cascade.updated(Cascade({name: denoiser}))
        pipeline = run.pipeline.with_components(cascade=cascade)
    try:  # a refiner needs a base, an upscaler a smaller size
        pipeline.evaluations(Sampling(size=denoiser.config.image_size, fast=denoiser.config.fast))
    except PokediffError as error:
        raise PokediffError(
            f"{name} cannot draw with the cascade so far, {', '.join(pipeline.cascade)}: {error}"
        ) from None
    return pipeline.to(denoiser.device)


def new_pipeline(cascade: Cascade, schedule: DDPMScheduler, config: TrainConfig) -> PokeDiffPipeline:
    """A pipeline of these denoisers. Only the built-in text encoder is part of it; others are loaded by name."""
    encoder = load_text_encoder(config.text_encoder) if config.text_encoder.startswith("builtin") else None
    model, tokenizer = (encoder.model, encoder.tokenizer) if isinstance(encoder, ClipTextEncoder) else (None, None)
    sampler = DPMSolverMultistepScheduler.from_config(schedule.config)
    return PokeDiffPipeline(cascade, sampler, model, tokenizer, config.text_encoder, config.pixel_art)


def make_optimizer(denoiser: Denoiser, stage: StageConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) are not decayed."""
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.99), fused=True)


def make_objective(run: Run, name: str, pipeline: PokeDiffPipeline, critic: AdversarialLoss | None = None) -> Objective:
    """The objective of the stage: denoising loss, with pairs of drawings beside it for one with preferences, or, of a
    student, distillation; with LPIPS and a critic if it has them. `pipeline` is the cascade with the stage's denoiser.
    """
    stage = run.config.stages[name]
    perceptual = PerceptualLoss(stage.perceptual, run.accelerator.device) if stage.perceptual else None
    if stage.distill:
        steps = pipeline.evaluations(Sampling(size=stage.image_size, fast=True))
        return Distillation(name, steps, pipeline.cascade, run.schedule, perceptual, critic)
    objective = denoising(run.schedule, [extra for extra in (perceptual, critic) if extra is not None])
    if (wanted := stage.preference) is None:
        return objective
    before = preferring(wanted).to(run.accelerator.device)
    reference = before.cascade[name].to(memory_format=torch.channels_last)
    return Preference(objective, run.schedule, reference, used_timesteps(before, name), wanted.beta, wanted.weight)


def wanted_drawings(config: StageConfig) -> int:
    """How many drawings a stage learns from."""
    if config.distill:
        return config.distill.drawings
    return config.critic.drawings if config.critic else 0


def make_drawings(run: Run, stage: Stage) -> Drawings | None:
    """The small pictures that `critic.drawings` asks for, or those that a student learns, drawn by the cascade so far,
    of captions as in the batches: the same on all processes and whenever the run is resumed. None where none are asked
    for. A part of a student's becomes the stage's validation.
    """
    number = wanted_drawings(stage.config)
    if number == 0 or run.pipeline is None:
        return None
    drawings = draw_captions(run, stage, number if run.sample is None else min(number, BATCH_SIZE))
    if isinstance(stage.objective, Distillation):
        drawings, kept = held_out(drawings)
        stage.validation = student_validation(kept, list(stage.objective.timesteps))
    return drawings


def make_pairs(run: Run, stage: Stage) -> Pairs | None:
    """The pairs that `preference` asks for, of captions as in the batches; None for a stage without."""
    wanted = stage.config.preference
    if wanted is None:
        return None
    pipeline = preferring(wanted).to(run.accelerator.device)
    text = stage.batches.captions(wanted.pairs if run.sample is None else min(wanted.pairs, BATCH_SIZE))
    return draw_pairs(pipeline, text, wanted.best_of, partial(run.bar, desc="pairs of drawings", unit="batch"))


def preferring(wanted: PreferenceConfig) -> PokeDiffPipeline:
    """The cascade whose drawings are compared."""
    return PokeDiffPipeline.from_pretrained(wanted.checkpoint, text_encoder=None, tokenizer=None)


def drawn_with(config: StageConfig) -> Sampling:
    """The settings of the drawings that a stage learns from."""
    size = config.image_size // config.model.upscale
    return Sampling(size=size, guidance_scale=config.distill.guidance_scale if config.distill else None)


def draw_captions(run: Run, stage: Stage, number: int) -> Drawings:
    """`number` small pictures, with seeds from 0; the last ones without a prompt, as many as are trained so."""
    assert run.pipeline is not None
    sampling = drawn_with(stage.config)
    text, pictures, noise = stage.batches.captions(number), [], []
    text[number - int(run.config.diffusion.caption_dropout * number) :] = run.pipeline.base.null_text.cpu()
    for rows in run.bar(torch.arange(number).split(BATCH_SIZE), desc=f"drawings of {sampling.size} px", unit="batch"):
        _, drawn_from = run.pipeline.make_noise(rows.tolist(), sampling.size)
        *_, last = run.pipeline.denoise(text[rows], rows.tolist(), sampling, noise=drawn_from)
        pictures.append(last.x0.float().cpu())
        noise.append(drawn_from[-1])
    return Drawings(torch.cat(pictures), text, torch.cat(noise))


def ema_with_warmup(decay: float) -> Callable[..., None]:
    """Exponential moving average whose memory grows with the run: min(decay, (1 + n) / (10 + n)) after n updates."""

    @torch.no_grad()
    def update(averages: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
