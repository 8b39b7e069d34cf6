"""train_stage(run, name): the accelerate loop of one stage, which trains one denoiser of a cascade.

Everything random in step n is drawn from (seed, n), never from what happened before: a run that was killed and resumed
is bit for bit the run that was not, without a random state to save. What a run writes is in runs.py.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from pokediff.config import Sampling, StageConfig
from pokediff.data.dataset import Pictures, TrainingBatches, caption_vectors, load_pictures
from pokediff.data.images import composite, encode_png, enlarge, from_model, grid, save_animation
from pokediff.data.records import write_whole
from pokediff.errors import PokediffError
from pokediff.evaluation.validation_metrics import COPYING, ValidationMetrics
from pokediff.model.denoiser import Denoiser, compile_network, has_bf16
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training import runs
from pokediff.training.build import (
    Run,
    facts_of,
    make_denoiser,
    make_objective,
    make_optimizer,
    start_weights,
    with_denoiser,
)
from pokediff.training.clock import Window, agreed, interruptible
from pokediff.training.objectives import (
    Batch,
    Objective,
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
