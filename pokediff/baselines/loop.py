"""The loop of every baseline's training: steps until a limit, log lines, and what is done every n steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from pokediff.config import BaselineConfig
from pokediff.data.dataset import AUGMENT_LABELS, CaptionVectors, Pictures, TrainingBatches
from pokediff.errors import PokediffError
from pokediff.model.denoiser import has_bf16
from pokediff.progress import ProgressBar
from pokediff.training.clock import Limit, Window, interruptible

Values = dict[
    str, torch.Tensor
]  # of a step: terms of the losses, `total`, and `grad_norm` (not finite: a step skipped)


def make_accelerator(config: BaselineConfig, accumulate: int = 1) -> Accelerator:
    """In the precision of `config`; auto is bfloat16 where the device has it, float16 on other GPUs.

    Raises PokediffError for float16 on a CPU, and for several processes.
    """
    if PartialState().num_processes > 1:
        raise PokediffError("a baseline is trained by one process")
    device = PartialState().device
    if config.precision == "fp16" and device.type == "cpu":
        raise PokediffError("precision: fp16 needs a GPU; use auto, bf16 or fp32")
    auto = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "no"
    precision = {"auto": auto, "fp32": "no"}.get(config.precision, config.precision)
    AcceleratorState._reset_state()  # of an earlier training in this process, which may have had another precision
    return Accelerator(mixed_precision=precision, gradient_accumulation_steps=accumulate)


def training_batches(config: BaselineConfig, pictures: Pictures, texts: CaptionVectors) -> TrainingBatches:
    """Batches as of `pokediff train`, with what `texts` holds in the place of vectors, and without empty captions."""
    return TrainingBatches(
        pictures,
        texts,
        config.dataset,
        batch_size=config.batch_size,
        caption_dropout=0.0,
        seed=config.seed,
        augment_dim=AUGMENT_LABELS,  # not used: these networks are not told how a picture was changed
    )


def train_steps(
    config: BaselineConfig,
    accelerator: Accelerator,
    out: Path,
    train_step: Callable[[int], Values],
    actions: Sequence[tuple[int, Callable[[int], None]]],
    ended: Callable[[], bool] = lambda: False,
) -> bool:
    """Train until max_steps, max_minutes, Ctrl-C or `ended`. Every n steps, and after the last, `actions` are called
    with the number of steps done. Returns whether Ctrl-C ended it.

    Raises PokediffError for a loss or gradient that is not finite.
    """
    window, limit = Window(), Limit(config.max_minutes)
    pictures = config.batch_size * accelerator.gradient_accumulation_steps
    with interruptible() as interrupted, ProgressBar(total=config.max_steps, desc=config.system, unit="step") as bar:
        for done in range(1, config.max_steps + 1):
            window.resume()
            values = train_step(done - 1)
            total, norm = values.pop("total"), values.pop("grad_norm")
            # Float16 gradients may overflow: then their scaler skips the step.
            if not (total.isfinite() and (norm.isfinite() or accelerator.scaler)):
                raise PokediffError(f"the loss is not finite at step {done}: try a smaller --learning-rate")
            window.done(pictures, total, norm if norm.isfinite() else None)
            bar.update()
            stop = done == config.max_steps or limit.reached() or interrupted()
            if stop or done % config.log_every == 0:
                means = window.close(accelerator)
                del means["data_wait_share"]  # batches are made within the step
                log(config, accelerator, out, done, {name: value.item() for name, value in values.items()} | means)
                bar.set_postfix(loss=f"{means.get('loss', math.nan):.4f}", img_s=f"{means['images_per_s']:.0f}")
                window = Window()
            for every, action in actions:
                if stop or done % every == 0:
                    action(done)
            if stop or ended():
                break
        return interrupted()


def log(config: BaselineConfig, accelerator: Accelerator, out: Path, step: int, values: dict[str, float]) -> None:
    """A line of log.jsonl, in the form of `pokediff train`; the trackers get the same."""
    accelerator.log(values, step=step)
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": config.system, "step": step, **values}) + "\n")
