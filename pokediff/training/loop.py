"""train_stage(run, stage): the accelerate loop of one stage, which trains one denoiser of a cascade.

Everything random in step n is drawn from (seed, n), never from what happened before: a run that was killed and resumed
is bit for bit the run that was not, without a random state to save. What a run writes is in runs.py.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from pokediff.config import Sampling, StageConfig
from pokediff.data.images import composite, encode_png, enlarge, from_model, grid, pairs, save_animation, to_model
from pokediff.errors import PokediffError
from pokediff.evaluation.validation_metrics import COPYING
from pokediff.files import write_whole
from pokediff.model.denoiser import compile_network, flops_per_image
from pokediff.model.pipeline import BATCH_SIZE, PokeDiffPipeline
from pokediff.progress import ProgressBar
from pokediff.training import runs
from pokediff.training.build import Run, Stage, drawn_with, make_drawings, make_pairs, wanted_drawings
from pokediff.training.clock import Window, agreed, interruptible
from pokediff.training.distillation import Distillation, student_batch
from pokediff.training.objectives import Batch, Pairs, mix, training_batch
from pokediff.training.preference import Preference, with_pairs

FILES_SECONDS = 1.0  # to write a checkpoint, a state and an animation
BAD_STEPS = 3  # non-finite steps in a row that end the run


def train_stage(run: Run, stage: Stage, closing: float = 0.0) -> str:
    """Train until max_steps, copying (of a base, with early_stop), the end of `patience`, the time limit, or a signal.
    Returns why it stops: one of clock.STOPS, the same on all processes. `closing` are the seconds that what follows the
    last step will take, until it is measured: the limit is that of the whole.

    Raises PokediffError for a loss that stays non-finite; the last state is intact.
    """
    config, accelerator, progress = stage.config, run.accelerator, stage.progress
    if run.config.compile:
        compile_network(stage.denoiser)
    denoiser, optimizer = accelerator.prepare(stage.denoiser, stage.optimizer)
    steps = range(progress.step, config.max_steps)
    loader = torch.utils.data.DataLoader(
        stage.batches,
        batch_size=None,
        sampler=steps,
        num_workers=run.config.workers,
        prefetch_factor=4 if run.config.workers else None,
    )
    if steps:
        stage.drawings, stage.pairs = make_drawings(run, stage), make_pairs(run, stage)
    actions = periodic_actions(run, stage)
    costs = [closing / len(actions)] * len(actions)  # seconds
    window, bad, stop = Window(), 0, "steps"
    with (
        interruptible() as interrupted,
        ProgressBar(
            total=config.max_steps, initial=progress.step, desc=stage.name, unit="step", disable=not run.main
        ) as bar,
    ):
        window.resume()
        for step, pictures in zip(steps, loader, strict=True):
            window.waited()
            loss, norm = train_step(run, stage, denoiser, optimizer, pictures, step)
            bad = 0 if norm is not None else bad + 1
            if bad:
                run.say(f"step {step}: loss {loss.item()} or its gradient is not finite, step skipped")
            if bad == BAD_STEPS:
                raise PokediffError(
                    f"the loss was not finite {BAD_STEPS} steps in a row, at step {step} of {stage.name}; the newest "
                    f"state in {run.out / 'state' / stage.name} is intact. Try --stages.{stage.name}.learning-rate "
                    f"{config.learning_rate / 3:.2g}, --precision fp32, or a smaller max-grad-norm, with --resume auto"
                )
            progress.step, progress.images_seen = step + 1, progress.images_seen + config.batch_size
            window.done(config.batch_size, loss, norm)
            bar.update()
            due = [progress.step % every == 0 for every, _, _ in actions]
            ahead = sum(costs) + sum(cost for cost, now in zip(costs, due, strict=True) if now)
            reasons = {
                "steps": progress.step == config.max_steps,
                "copies": run.config.metrics.early_stop and progress.copying_since is not None,
                "patience": progress.is_out_of(config.patience, config.validate_every),
                "signal": interrupted(),
                "time": run.limit.reached(ahead),
            }
            stop = agreed(accelerator, next((reason for reason, holds in reasons.items() if holds), ""))
            if stop or progress.step % run.config.log_every == 0:
                values = {**window.close(accelerator), "lr": learning_rate(config, step)}
                values |= stage.critic.margins if stage.critic else {}
                if isinstance(stage.objective, Preference):
                    values["preference_agreement"] = stage.objective.agreement
                window = Window()
                progress.training_loss = values.get("loss", progress.training_loss)
                bar.set_postfix(loss=f"{progress.training_loss or math.nan:.4f}", img_s=f"{values['images_per_s']:.0f}")
                runs.log(run, stage, values)
            for number, (_, phase, action) in enumerate(actions):
                if run.main and (stop or due[number]):
                    bar.set_description(f"{stage.name}: {phase}")
                    began = time.monotonic()
                    action()
                    costs[number] = time.monotonic() - began
            bar.set_description(stage.name)
            if stop:
                break
            window.resume()
    if not steps and run.main:  # all steps done by the state that was loaded, perhaps of another folder
        runs.publish(run, stage)
    accelerator.wait_for_everyone()
    loss_text = runs.loss_text(progress.validation_loss)
    run.say(f"{stage.name}: {progress.step} steps, {progress.images_seen:,} pictures, validation loss {loss_text}")
    if stop == "patience":
        run.say(f"{stage.name}: ended after {config.patience} validations without a lower validation loss")
    return stop


def train_step(
    run: Run, stage: Stage, denoiser: Any, optimizer: Any, pictures: Any, step: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One optimizer step. Returns the loss and the gradient's norm; None for a norm that is not finite, when nothing
    was changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage.config, step)
    torch.manual_seed(mix(run.config.seed, step, 1 + run.accelerator.process_index))  # dropout
    batch = step_batch(run, stage, pictures, step)
    with run.accelerator.autocast():
        loss = stage.objective(denoiser, batch).mean()
    run.accelerator.backward(loss)
    norm = run.accelerator.clip_grad_norm_(denoiser.parameters(), stage.config.max_grad_norm)
    finite = bool(torch.isfinite(norm))  # the same on all processes, which the loss is not
    if finite:
        optimizer.step()
        stage.average.update_parameters(stage.denoiser)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm if finite else None


def step_batch(run: Run, stage: Stage, pictures: Any, step: int) -> Batch:
    """The batch of a step, with what the stage's objective needs beside the pictures."""
    config, accelerator, objective = run.config, run.accelerator, stage.objective
    place = (config.seed, step, accelerator.process_index, accelerator.num_processes)
    batch = training_batch(pictures, config, stage.config, accelerator, step, stage.drawn_at, stage.drawings)
    if isinstance(objective, Distillation) and stage.drawings is not None:
        return student_batch(batch, stage.drawings, list(objective.timesteps), *place)
    if isinstance(objective, Preference):
        pairs = Pairs(batch.x0, batch.x0, batch.text) if stage.pairs is None else stage.pairs  # None: an estimate
        return with_pairs(batch, pairs, objective.steps, *place)
    return batch


def periodic_actions(run: Run, stage: Stage) -> list[tuple[int, str, Callable[[], None]]]:
    """(every n steps, the name of the phase, what the main process does), in this order."""
    config, progress = stage.config, stage.progress

    def keep_best(measure: str, value: float) -> None:
        if run.config.metrics.best_by == measure and progress.is_best(value):
            runs.publish_denoiser(stage, run.out / "best", base="..")

    def check_loss() -> None:
        losses = validate(run, stage)
        runs.log(run, stage, {**losses, "images_seen": progress.images_seen})
        progress.note(progress.training_loss, losses["validation_loss"])
        if (lowest := progress.overfitting_since()) is not None:
            run.say(
                f"{stage.name}: validation loss has risen since step {lowest} while training loss fell: overfitting"
            )
        keep_best("validation_loss", losses["validation_loss"])

    def measure_pictures() -> None:
        assert stage.metrics is not None
        with phase_bar(run, stage, 2 * run.config.metrics.number) as bar:
            measured = stage.metrics(stage.pipeline, stage.sampling, bar)
        runs.log(run, stage, measured)
        # A refiner or upscaler copies what its base draws, so stopping it would not help.
        if measured["copy_ratio"] > COPYING and progress.copying_since is None and config.model.below is None:
            progress.copying_since = progress.step
            run.say(f"{stage.name}: {measured['copy_ratio']:.0%} of the pictures are close to a training picture")
        keep_best("kernel_distance", measured.get("kernel_distance", math.nan))

    def checkpoint() -> None:
        # The state last: a run killed between the two is resumed before this step and writes both again.
        runs.publish(run, stage)
        runs.save_state(run, stage)

    actions = [(config.validate_every, "validation", check_loss)]
    if stage.metrics is not None:
        actions.append((run.config.metrics.every, "metrics", measure_pictures))
    actions.append((config.preview_every, "preview", partial(preview, run, stage)))
    actions.append((config.checkpoint_every, "checkpoint", checkpoint))
    return actions


# ---------------------------------------------------------------------------------------------------------- the parts


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, flat, then (with decay_steps) linear to zero at max_steps: a function of the step alone."""
    rise = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    fall = min(1.0, (stage.max_steps - step) / stage.decay_steps) if stage.decay_steps else 1.0
    return stage.learning_rate * rise * fall


@contextmanager
def phase_bar(run: Run, stage: Stage, pictures: int) -> Iterator[Callable[[Any], None]]:
    """A bar for the drawing of some pictures; gives what to call at every step."""
    steps = -(-pictures // BATCH_SIZE) * (len(stage.pipeline.evaluations(stage.sampling)) + 1)
    with ProgressBar(total=steps, desc="drawing", unit="step", leave=False, disable=not run.main or run.silent) as bar:
        yield lambda _: bar.update() and None


@torch.inference_mode()
def validate(run: Run, stage: Stage) -> dict[str, float]:
    """Mean loss of the averaged weights on the validation families, and by thirds of the timesteps."""
    losses, accelerator = [], run.accelerator
    for batch in run.bar(stage.validation, desc="validation", unit="batch", leave=False):
        with accelerator.autocast():
            losses.append(stage.objective(stage.average.module, batch.to(accelerator.device)).cpu())
    loss, timesteps = torch.cat(losses), torch.cat([batch.timesteps for batch in stage.validation])
    result = {"validation_loss": loss.mean().item()}
    total = int(timesteps.max()) + 1
    for third, name in enumerate(("low_noise", "mid_noise", "high_noise")):
        rows = timesteps * 3 // total == third
        if rows.any():
            result[f"validation_loss_{name}"] = loss[rows].mean().item()
    return result


def preview(run: Run, stage: Stage) -> None:
    """Draw from the averaged weights: a sheet of the preview prompts (PNG), their denoising (GIF), a sheet of pairs."""
    folder, size = run.out / "previews", stage.config.image_size
    folder.mkdir(exist_ok=True)
    prompts = list(run.config.preview_prompts)
    total = len(stage.pipeline.evaluations(stage.sampling)) + 1
    states = stage.pipeline.denoise(prompts, range(len(prompts)), stage.sampling)
    states = run.bar(states, total=total, desc="preview", unit="step", leave=False)
    sheets = [grid(enlarge(from_model(state.x0), size // state.x0.shape[-1]), columns=4) for state in states]
    factor, name = max(1, 128 // size), f"{stage.name}-{stage.progress.step:08}"
    save_animation(folder / f"{name}.gif", [composite(enlarge(sheet, factor)) for sheet in sheets])
    images = {}
    for kind, sheet in (("", sheets[-1]), ("-pairs", preview_pairs(run, stage))):
        write_whole(folder / f"{name}{kind}.png", encode_png(enlarge(sheet, factor)))
        images[f"{stage.name}/previews{kind}"] = composite(enlarge(sheet, factor))
    runs.log_images(run.accelerator, images, stage.progress.step)


def preview_pairs(run: Run, stage: Stage) -> np.ndarray:
    """Pictures above those drawn for their first captions: training pictures in the first two rows, validation
    pictures in the last two. A straight RGBA sheet.
    """
    rows = []
    for pictures in stage.shown:
        captions = [several[0] for several in pictures.captions]
        with phase_bar(run, stage, len(captions)) as bar:
            drawn = stage.pipeline.generate(captions, range(len(captions)), stage.sampling, on_step=bar)
        real = from_model(to_model(torch.from_numpy(pictures.pixels[:]), run.config.dataset.channels))
        rows.append(pairs(real, drawn, columns=4))
    return grid(np.concatenate(rows), columns=4)


def closing_seconds(run: Run, stage: Stage, step: float) -> float:
    """An estimate of the seconds of validation, metrics, previews and files, from those of a training step."""
    pictures = len(run.config.preview_prompts) + sum(len(shown) for shown in stage.shown)
    pictures += 2 * run.config.metrics.number if run.config.metrics.every else 0
    checked = sum(len(batch.timesteps) for batch in stage.validation)
    drawing = pictures * drawing_seconds(stage, stage.pipeline, stage.sampling, step)
    return FILES_SECONDS + checked * step / (forward_passes(stage) * stage.config.batch_size) + drawing


def opening_seconds(run: Run, stage: Stage, step: float) -> float:
    """An estimate of the seconds of `make_drawings` and `make_pairs`, from those of a training step."""
    if (wanted := stage.config.preference) is not None:
        small = Sampling(size=stage.config.image_size)
        whole, begun = (drawing_seconds(stage, stage.pipeline, small, step, only) for only in (None, stage.name))
        return wanted.pairs * (wanted.best_of * begun + 2 * whole)
    number = wanted_drawings(stage.config)
    if number == 0 or run.pipeline is None:
        return 0.0
    return number * drawing_seconds(stage, run.pipeline, drawn_with(stage.config), step)


def drawing_seconds(
    stage: Stage, pipeline: PokeDiffPipeline, sampling: Sampling, step: float, only: str | None = None
) -> float:
    """An estimate of the seconds of one picture, or of the steps of the denoiser `only`, from those of a training step:
    `forward_passes` of a picture.
    """
    passes = Counter[str]()
    for each in pipeline.evaluations(sampling):
        if only is None or each.denoiser == only:
            passes[each.denoiser] += 1 if pipeline.guidance(each.denoiser, each.sigma, sampling) == 1 else 2
    flops = sum(number * flops_per_image(pipeline.cascade[name]) for name, number in passes.items())
    return flops / (stage.facts["gflops"] * 1e9) * step / (forward_passes(stage) * stage.config.batch_size)


def forward_passes(stage: Stage) -> int:
    """How many forward passes a picture costs in a training step: three and, with pairs, as many for each of two
    drawings, which the reference sees, too.
    """
    return 3 if stage.config.preference is None else 11


def seconds_per_step(run: Run, stage: Stage) -> float:
    """Seconds of a step here, on a copy of the denoiser that is not compiled: the best of two after one to warm up."""
    trial, seconds = copy.deepcopy(stage.denoiser), []
    for step in range(3):
        started = time.monotonic()
        batch = step_batch(run, stage, stage.batches[step], step)
        with run.accelerator.autocast():
            loss = stage.objective(trial, batch).mean()
        loss.backward()
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return 1.1 * min(seconds[1:])  # clipping, optimizer and average
