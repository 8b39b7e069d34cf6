"""train_stage(run, name): the accelerate loop of one stage, which trains one denoiser of a cascade.

Everything random in step n is drawn from (seed, n), never from what happened before: a run that was killed and resumed
is bit for bit the run that was not, without a random state to save. What a run writes is in runs.py.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from pokediff.config import Sampling, StageConfig, TrainConfig, plain
from pokediff.data.dataset import Pictures, TrainingBatches, caption_vectors, load_pictures
from pokediff.data.images import CHANNELS, composite, encode_png, enlarge, from_model, grid, save_animation
from pokediff.data.records import write_whole
from pokediff.errors import PokediffError
from pokediff.evaluation.validation_metrics import COPYING, ValidationMetrics
from pokediff.model.cascade import Cascade
from pokediff.model.denoiser import Denoiser, compile_network, flops_per_image, has_bf16
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training import runs
from pokediff.training.clock import Limit, Window, agreed, interruptible
from pokediff.training.distillation import Distillation
from pokediff.training.objectives import (
    Batch,
    Objective,
    denoising,
    mix,
    on_device,
    training_batch,
    validation_batches,
)
from pokediff.training.runs import Progress

BAD_STEPS = 3  # non-finite steps in a row that end the run
VALIDATION_PICTURES = 512
AUGMENT_DIM = {False: 3, True: 8}  # labels: mirrored and shifted; with dataset.warp also scaled, rotated, stretched


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


@dataclass
class Stage:
    """One denoiser, and everything that its training needs."""

    name: str
    config: StageConfig
    training: Pictures
    validation: list[Batch]
    batches: TrainingBatches
    denoiser: Denoiser
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    pipeline: PokeDiffPipeline  # the cascade so far, with the averaged weights of this stage
    digest: str
    facts: dict[str, Any]
    metrics: ValidationMetrics | None = None
    progress: Progress = field(default_factory=Progress)


def prepare(run: Run, name: str, resume: str) -> Stage:
    """Load data and weights of a stage. Raises PokediffError for what is out of reach or does not fit together."""
    config, stage, accelerator = run.config, run.config.stages[name], run.accelerator
    pictures = load_pictures(
        config.data,
        stage.image_size,
        stage.styles or config.dataset.styles,
        report=run.say,
        progress=run.bar,
        limit=run.sample,
    )
    training, validation = pictures.split("train"), pictures.split("validation").spread(VALIDATION_PICTURES)
    training = training.with_shared_captions()
    if not len(training) or not len(validation):
        found = f"{len(training)} training and {len(validation)} validation pictures"
        raise PokediffError(f"{' '.join(config.data)}: {found}; both are needed, so add pictures of other families")
    vectors = caption_vectors(config.data, training, config.text_encoder, progress=run.bar)
    validation_vectors = caption_vectors(config.data, validation, config.text_encoder)
    augment_dim = AUGMENT_DIM[config.dataset.warp > 0]
    batches = TrainingBatches(
        training,
        vectors,
        replace(config.dataset, styles=stage.styles or config.dataset.styles),
        batch_size=stage.batch_size,
        caption_dropout=config.diffusion.caption_dropout,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        augment_dim=augment_dim,
    )
    torch.manual_seed(config.seed)
    denoiser = make_denoiser(config, stage, vectors.table.shape[1], augment_dim)
    start_weights(run, name, denoiser)
    denoiser.null_text.copy_(vectors.table[0])
    denoiser = denoiser.to(accelerator.device, memory_format=torch.channels_last).train()
    average = AveragedModel(denoiser, multi_avg_fn=ema_with_warmup(stage.ema_decay)).eval()
    pipeline = with_denoiser(run, name, average.module)
    prepared = Stage(
        name,
        stage,
        training,
        validation_batches(validation, validation_vectors, config, stage),
        batches,
        denoiser,
        average,
        make_optimizer(denoiser, stage),
        make_objective(run, name),
        pipeline,
        pictures.digest,
        facts_of(run, pictures, training, validation, denoiser),
    )
    if config.metrics.every and run.main:
        prepared.metrics = ValidationMetrics(config.metrics, training, validation)
    if folder := runs.find_state(run.out, name, resume):
        prepared.progress = runs.load_state(
            folder, config, name, pictures.digest, denoiser, average, prepared.optimizer
        )
        run.say(f"{name}: resumed from {folder}")
    return prepared


def train_stage(run: Run, stage: Stage) -> str | None:
    """Train until max_steps, the time limit, copying (with early_stop), or a signal. Returns why the stage is finished,
    "steps" or "copies", or None when it can be resumed.

    Raises PokediffError for a loss that stays non-finite; the last state is intact.
    """
    config, accelerator, progress = stage.config, run.accelerator, stage.progress
    if run.config.compile:
        compile_network(stage.denoiser)
    denoiser, optimizer = accelerator.prepare(stage.denoiser, stage.optimizer)
    loader = torch.utils.data.DataLoader(
        stage.batches,
        batch_size=None,
        sampler=range(progress.step, config.max_steps),
        num_workers=run.config.workers,
        prefetch_factor=4 if run.config.workers else None,
    )
    actions = periodic_actions(run, stage)
    window, bad = Window(), 0
    with (
        interruptible() as interrupted,
        tqdm(total=config.max_steps, initial=progress.step, desc=stage.name, unit="step", disable=not run.main) as bar,
    ):
        window.resume()
        for step, pictures in zip(range(progress.step, config.max_steps), loader, strict=True):
            window.waited()
            loss, norm = train_step(run, stage, denoiser, optimizer, pictures, step)
            if norm is None:
                bad += 1
                run.say(f"step {step}: loss {loss.item()} or its gradient is not finite, step skipped")
            else:
                bad = 0
                window.add(loss, norm)
            if bad == BAD_STEPS:
                raise PokediffError(
                    f"the loss was not finite {BAD_STEPS} steps in a row, at step {step} of {stage.name}; the newest "
                    f"state in {run.out / 'state' / stage.name} is intact. Try --stages.{stage.name}.learning-rate "
                    f"{config.learning_rate / 3:.2g}, --precision fp32, or a smaller max-grad-norm, with --resume auto"
                )
            progress.step, progress.images_seen = step + 1, progress.images_seen + config.batch_size
            window.done(config.batch_size)
            bar.update()
            copying = run.config.metrics.early_stop and progress.copying_since is not None
            late = run.limit.reached() or copying or interrupted()
            stop = agreed(accelerator, late) or progress.step == config.max_steps
            if stop or progress.step % run.config.log_every == 0:
                values = {**window.close(accelerator), "lr": learning_rate(config, step)}
                progress.training_loss = values.get("loss", progress.training_loss)
                bar.set_postfix(loss=f"{progress.training_loss or math.nan:.4f}", img_s=f"{values['images_per_s']:.0f}")
                accelerator.log({f"{stage.name}/{key}": value for key, value in values.items()}, step=progress.step)
            for every, action in actions:
                if run.main and (stop or progress.step % every == 0):
                    action()
            if stop:
                break
            window.resume()
    accelerator.wait_for_everyone()
    run.say(
        f"{stage.name}: {progress.step} steps, {progress.images_seen:,} pictures, validation loss "
        f"{progress.loss_text()}: {run.out}"
    )
    if progress.step == config.max_steps:
        return "steps"
    return "copies" if run.config.metrics.early_stop and progress.copying_since is not None else None


def train_step(
    run: Run, stage: Stage, denoiser: Any, optimizer: Any, pictures: Any, step: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One optimizer step. Returns the loss and the gradient's norm; None for a norm that is not finite, when nothing
    was changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage.config, step)
    torch.manual_seed(mix(run.config.seed, step, 1 + run.accelerator.process_index))  # dropout
    batch = training_batch(pictures, run.config, stage.config, run.accelerator, step)
    with run.accelerator.autocast():
        loss = stage.objective(denoiser, batch).mean()
    run.accelerator.backward(loss)
    norm = run.accelerator.clip_grad_norm_(denoiser.parameters(), stage.config.max_grad_norm)
    finite = bool(torch.isfinite(loss) and torch.isfinite(norm))
    if finite:
        optimizer.step()
        stage.average.update_parameters(stage.denoiser)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm if finite else None


def periodic_actions(run: Run, stage: Stage) -> list[tuple[int, Callable[[], None]]]:
    """(every n steps, what the main process does), in this order."""
    config, progress = stage.config, stage.progress

    def keep_best(measure: str, value: float) -> None:
        if run.config.metrics.best_by == measure and progress.is_best(value):
            runs.publish_part(stage.pipeline, run.out / "best", stage.name, base="..")

    def check_loss() -> None:
        losses = validate(stage, run.accelerator)
        seen = {"images_seen": progress.images_seen}
        run.accelerator.log({f"{stage.name}/{k}": v for k, v in {**losses, **seen}.items()}, step=progress.step)
        progress.note(progress.training_loss, losses["validation_loss"])
        if (lowest := progress.overfitting_since()) is not None:
            run.say(f"{stage.name}: validation loss rises since step {lowest} while training loss falls: overfitting")
        keep_best("validation_loss", losses["validation_loss"])

    def measure_pictures() -> None:
        assert stage.metrics is not None
        measured = stage.metrics(stage.pipeline, config.image_size)
        run.accelerator.log({f"{stage.name}/{k}": v for k, v in measured.items()}, step=progress.step)
        if measured["copy_ratio"] > COPYING and progress.copying_since is None:
            progress.copying_since = progress.step
            run.say(f"{stage.name}: {measured['copy_ratio']:.0%} of the pictures are close to a training picture")
        keep_best("kernel_distance", measured.get("kernel_distance", math.nan))

    def checkpoint() -> None:
        # The state last: a run killed between the two is resumed before this step and writes both again.
        facts = {**stage.facts, **progress.facts()}
        runs.publish(stage.pipeline, run.out, stage.name, run.config, facts)
        runs.save_state(
            run.out, run.config, stage.name, stage.digest, stage.denoiser, stage.average, stage.optimizer, progress
        )

    actions = [(config.validate_every, check_loss)]
    if stage.metrics is not None:
        actions.append((run.config.metrics.every, measure_pictures))
    actions.append((config.preview_every, partial(preview, run, stage)))
    actions.append((config.checkpoint_every, checkpoint))
    return actions


# ---------------------------------------------------------------------------------------------------------- the parts


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


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, flat, then (with decay_steps) linear to zero at max_steps: a function of the step alone."""
    rise = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    fall = min(1.0, (stage.max_steps - step) / stage.decay_steps) if stage.decay_steps else 1.0
    return stage.learning_rate * rise * fall


def ema_with_warmup(decay: float) -> Callable[..., None]:
    """Exponential moving average whose memory grows with the run: min(decay, (1 + n) / (10 + n)) after n updates."""

    @torch.no_grad()
    def update(averages: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def mixed_precision(precision: str) -> str:
    """accelerate's name of it. Never fp16: its overflow is the most reported failure of diffusion training."""
    if precision == "auto":
        precision = "bf16" if has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "fp32"
    return "no" if precision == "fp32" else precision


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@torch.inference_mode()
def validate(stage: Stage, accelerator: Accelerator) -> dict[str, float]:
    """Mean loss of the averaged weights on the validation families, and by thirds of the timesteps."""
    losses = []
    for batch in stage.validation:
        with accelerator.autocast():
            losses.append(stage.objective(stage.average.module, on_device(batch, accelerator.device)).cpu())
    loss, timesteps = torch.cat(losses), torch.cat([batch.timesteps for batch in stage.validation])
    result = {"validation_loss": loss.mean().item()}
    total = int(timesteps.max()) + 1
    for third, name in enumerate(("low_noise", "mid_noise", "high_noise")):
        rows = timesteps * 3 // total == third
        if rows.any():
            result[f"validation_loss_{name}"] = loss[rows].mean().item()
    return result


def preview(run: Run, stage: Stage) -> None:
    """Draw the preview prompts from the averaged weights: a sheet (PNG) and the denoising (GIF)."""
    folder, size = run.out / "previews", stage.config.image_size
    folder.mkdir(exist_ok=True)
    prompts = list(run.config.preview_prompts)
    sampling = Sampling(size=size, fast=stage.config.fast)
    states = stage.pipeline.denoise(prompts, range(len(prompts)), sampling)
    sheets = [grid(enlarge(from_model(state.x0), size // state.x0.shape[-1]), columns=4) for state in states]
    factor, name = max(1, 128 // size), f"{stage.name}-{stage.progress.step:08}"
    write_whole(folder / f"{name}.png", encode_png(enlarge(sheets[-1], factor)))
    save_animation(folder / f"{name}.gif", [composite(enlarge(sheet, factor)) for sheet in sheets])


def seconds_per_step(run: Run, stage: Stage) -> float:
    """Seconds of a step here, on a copy of the denoiser that is not compiled: the best of two after one to warm up."""
    trial, seconds = copy.deepcopy(stage.denoiser), []
    for step in range(3):
        started = time.monotonic()
        batch = training_batch(stage.batches[step], run.config, stage.config, run.accelerator, step)
        with run.accelerator.autocast():
            loss = stage.objective(trial, batch).mean()
        loss.backward()
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return 1.1 * min(seconds[1:])  # clipping, optimizer and average
