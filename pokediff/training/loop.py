"""train(config): the accelerate loop.

Everything random in step n is drawn from (seed, n), never from what happened before: a run that was killed and resumed
is bit for bit the run that was not, without a random state to save. What a run writes is in runs.py.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from pokediff.config import DEFAULT_STEPS, TrainConfig, plain
from pokediff.data.dataset import Batch, CaptionVectors, Pictures, TrainingBatches, caption_vectors, load_pictures
from pokediff.data.images import CHANNELS, composite, encode_png, enlarge, from_model, grid, save_animation, to_model
from pokediff.data.records import write_whole
from pokediff.errors import PokediffError
from pokediff.evaluation.validation_metrics import COPYING, QuickLook
from pokediff.model.denoiser import Unet, compile_network, cosine_sigmas, cosine_timestep, flops_per_image
from pokediff.model.pipeline import UPSCALER_SHARE, PokeDiffPipeline, diffusion_loss, has_bf16, quiet, same_noise
from pokediff.model.text import ClipTextEncoder, load_text_encoder
from pokediff.training import runs
from pokediff.training.distillation import Distillation
from pokediff.training.runs import Progress

Objective = Callable[..., torch.Tensor]  # (unet, x0, noise, timesteps, text, augment, low_res) to each picture's loss
BAD_STEPS = 3  # that many non-finite steps in a row end the run
VALIDATION_PICTURES = 512


def train(config: TrainConfig, resume: str = "never") -> Path:
    """Train as `config` says. Returns the run's folder.

    Args:
        resume: "never" refuses a folder that already holds a run; "auto" goes on from its newest state, or starts;
            a path goes on from that state folder.

    Raises:
        PokediffError: data or encoder out of reach, a run in the way, a configuration that does not fit the state, or
            a loss that stays non-finite (the last state is intact).
    """
    quiet()
    out = Path(config.out or "checkpoints/run")
    state_folder = runs.find_state(out, resume)
    accelerator = Accelerator(mixed_precision=mixed_precision(config.precision))
    if accelerator.device.type == "cpu":  # accelerate launch leaves all but one core idle
        torch.set_num_threads(config.threads or max(1, usable_cores() // accelerator.num_processes))
    main = accelerator.is_main_process
    say: Callable[[str], None] = tqdm.write if main else (lambda _: None)
    bar: Callable[..., Any] = tqdm if main else (lambda items, **_: items)

    # ---- data
    pictures = load_pictures(config.data, config.dataset.image_size, config.dataset.styles, report=say, progress=bar)
    training, validation = pictures.split("train"), pictures.split("validation").spread(VALIDATION_PICTURES)
    training = training.with_shared_captions()
    if not len(training) or not len(validation):
        found = f"{len(training)} training and {len(validation)} validation pictures"
        raise PokediffError(f"{config.data}: {found}; both are needed, so add pictures of other families")
    vectors = caption_vectors(config.data, training, config.text_encoder, progress=bar)
    validation_vectors = caption_vectors(config.data, validation, config.text_encoder)
    batches = TrainingBatches(
        training,
        vectors,
        config.dataset,
        batch_size=config.batch_size,
        caption_dropout=config.diffusion.caption_dropout,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )

    # ---- network, its average, optimizer
    torch.manual_seed(config.seed)
    network = make_unet(config, text_dim=vectors.table.shape[1])
    if start := config.start_from or (config.distill and config.distill.teacher):
        taken = network.start_from(load_start(start, config))
        say(f"{taken / 1e6:.2f} M weights taken from {start}")
    network.null_text.copy_(vectors.table[0])
    network = network.to(memory_format=torch.channels_last)
    if config.compile:
        compile_network(network)
    average = AveragedModel(network, multi_avg_fn=ema_with_warmup(config.ema_decay)).to(accelerator.device).eval()
    schedule = make_noise_schedule(config)
    objective = make_objective(config, schedule, accelerator.device)
    pipeline = make_pipeline(average.module, schedule, config)
    unet, optimizer = accelerator.prepare(network, make_optimizer(network, config))
    progress = Progress()
    if state_folder:
        progress = runs.load_state(state_folder, config, pictures.digest, network, average, optimizer)
        say(f"resumed {state_folder}")

    # ---- what this run is, told before the first step
    if main:
        facts = {
            "data": {"folder": config.data, "sha256": pictures.digest, "pictures": len(pictures)},
            "training_pictures": len(training),
            "validation_pictures": len(validation),
            "parameters": sum(p.numel() for p in network.parameters()),
            "flops_per_image_forward": flops_per_image(network),
        }
        runs.describe(out, config, accelerator, facts)
        left, seconds = (
            config.max_steps - progress.step,
            seconds_per_step(accelerator, network, objective, batches, config),
        )
        say(
            f"{facts['parameters'] / 1e6:.2f} M parameters, {facts['flops_per_image_forward'] / 1e9:.2f} GFLOP "
            f"an image, {len(training)} training and {len(validation)} validation pictures\n"
            f"{left} steps of {config.batch_size} pictures, about {duration(seconds * left)} "
            f"({config.batch_size / seconds:.0f} images/s, {accelerator.mixed_precision} on {accelerator.device})"
        )
        runs.start_trackers(accelerator, out, config, progress.step)
    accelerator.wait_for_everyone()

    # ---- the loop
    look = QuickLook(config, training, validation) if main and config.evaluation.every else None
    training_loss_now: float | None = None

    def keep_best(kind: str, scores: dict[str, float]) -> None:
        if kind == config.evaluation.best_by and progress.is_best(scores[kind]):
            runs.publish(pipeline, out / "best", runs.model_card(config, pictures, progress))

    started, bad, window = time.monotonic(), 0, Window()
    steps = range(progress.step, config.max_steps)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=config.workers)
    steps_bar = tqdm(total=config.max_steps, initial=progress.step, unit="step", disable=not main, smoothing=0.05)
    unet.train()
    with interruptible() as interrupted:
        for step, batch in zip(steps, loader, strict=True):
            window.waited()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            torch.manual_seed(mix(config.seed, step, 1 + accelerator.process_index))  # dropout
            loss = training_loss(unet, objective, batch, accelerator, config, step)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            if torch.isfinite(norm):
                optimizer.step()
                average.update_parameters(network)
                window.add(loss, norm)
                bad = 0
            else:
                bad += 1
                say(f"step {step}: loss {loss.item()} or its gradient is not finite, step skipped")
            optimizer.zero_grad(set_to_none=True)
            if bad == BAD_STEPS:
                raise PokediffError(
                    f"the loss was not finite {BAD_STEPS} steps in a row, at step {step}; the newest state in "
                    f"{out / 'state'} is intact. Try --learning-rate {config.learning_rate / 3:.2g}, --precision fp32, "
                    "or a smaller --max-grad-norm, with --resume auto"
                )
            progress.step, progress.images_seen = step + 1, progress.images_seen + config.batch_size
            window.done(config.batch_size)
            steps_bar.update()

            now = progress.step
            late = config.max_minutes is not None and time.monotonic() - started >= 60 * config.max_minutes
            copying = config.evaluation.early_stop and progress.copying_since is not None
            stop = now == config.max_steps or agreed(accelerator, late or copying or interrupted())
            if stop or now % config.log_every == 0:
                values = {**window.close(accelerator), "lr": learning_rate(config, step)}
                training_loss_now = values.get("loss", training_loss_now)
                steps_bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", img_s=f"{values['images_per_s']:.0f}")
                accelerator.log(values, step=now)
            if main and (stop or now % config.validate_every == 0):
                losses = validate(average.module, objective, validation, validation_vectors, config, accelerator)
                accelerator.log({**losses, "images_seen": progress.images_seen}, step=now)
                progress.note(training_loss_now, losses["validation_loss"])
                if (lowest := progress.overfitting_since()) is not None:
                    say(f"step {now}: validation loss rises since step {lowest} while training loss falls: overfitting")
                keep_best("validation_loss", losses)
            if main and look and (stop or now % config.evaluation.every == 0):
                looked = look(pipeline)
                accelerator.log(looked, step=now)
                if looked["copy_ratio"] > COPYING and progress.copying_since is None:
                    progress.copying_since = now
                    say(f"step {now}: {looked['copy_ratio']:.0%} of the pictures come too near to a training picture")
                keep_best("kernel_distance", looked)
            if main and (stop or now % config.preview_every == 0):
                preview(pipeline, config, out / "previews", now)
            if main and (stop or now % config.checkpoint_every == 0):
                # The state last: a run killed between the two is resumed before this step and writes both again.
                runs.publish(pipeline, out, runs.model_card(config, pictures, progress))
                runs.save_state(out / "state", config, pictures.digest, network, average, optimizer, progress)
            if stop:
                break
            window.resume()
    steps_bar.close()
    accelerator.wait_for_everyone()
    say(f"{progress.step} steps, {progress.images_seen:,} pictures, validation loss {progress.loss_text()}: {out}")
    accelerator.end_training()
    return out


# ---------------------------------------------------------------------------------------------------------- the parts


def make_unet(config: TrainConfig, text_dim: int) -> Unet:
    return Unet(
        image_size=config.dataset.image_size,
        in_channels=CHANNELS[config.dataset.channels],
        text_dim=text_dim,
        **plain(config.model),
        noise_range=config.diffusion.range,
        num_train_timesteps=config.diffusion.num_train_timesteps,
    )


def load_start(folder: str, config: TrainConfig) -> Unet:
    """The network of a checkpoint that does what this one shall, or else the one that draws. Raises PokediffError when
    the folder holds none.
    """
    pipeline = PokeDiffPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    same = pipeline.upscaler if config.model.upscale > 1 else pipeline.refiner if config.refine else None
    return pipeline.unet if same is None else same


def make_noise_schedule(config: TrainConfig) -> DDPMScheduler:
    noise = config.diffusion
    timesteps = torch.arange(noise.num_train_timesteps, dtype=torch.float64)
    return DDPMScheduler(
        num_train_timesteps=noise.num_train_timesteps,
        trained_betas=betas_of(cosine_sigmas(timesteps, len(timesteps), *noise.range)),
        prediction_type=noise.prediction_type,
        timestep_spacing="trailing",  # sampling starts at the last timestep, pure noise (Lin et al. 2023, section 3.3)
        clip_sample=False,
    )


def trained_timesteps(config: TrainConfig) -> int:
    """How many timesteps, from the least noise, are learned: all, or those that a refiner is asked at."""
    total = config.diffusion.num_train_timesteps
    if config.refine is None:
        return total
    return min(total, 1 + math.ceil(cosine_timestep(config.refine.below, total, *config.diffusion.range)))


def betas_of(sigmas: torch.Tensor) -> list[float]:
    """The betas of a schedule given by its noise to signal at every timestep."""
    alphas_cumprod = 1 / (1 + sigmas**2)
    return (1 - alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]])).tolist()


def make_optimizer(unet: Unet, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) are not decayed."""
    parameters = [p for p in unet.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def make_objective(config: TrainConfig, schedule: DDPMScheduler, device: torch.device) -> Objective:
    """What is minimised: the denoising error, or the distance to a teacher."""
    return Distillation(config.distill, schedule, device) if config.distill else partial(diffusion_loss, schedule)


def make_pipeline(unet: Any, schedule: DDPMScheduler, config: TrainConfig) -> PokeDiffPipeline:
    """The pipeline that is previewed and saved. Only the built-in encoder travels in it; others are loaded by name."""
    if config.refine:
        return with_base(unet, schedule, config)
    encoder = load_text_encoder(config.text_encoder) if config.text_encoder == "builtin" else None
    model, tokenizer = (encoder.model, encoder.tokenizer) if isinstance(encoder, ClipTextEncoder) else (None, None)
    if config.distill:  # what it was taught: so many DDIM steps, and the teacher's guidance with them
        sampler = DDIMScheduler.from_config(schedule.config)
        teacher = PokeDiffPipeline.from_pretrained(config.distill.teacher, text_encoder=None, tokenizer=None)
        steps, refiner, below = config.distill.steps, teacher.refiner, teacher.config.refine_below
        student = PokeDiffPipeline(unet, sampler, model, tokenizer, config.text_encoder, steps, 1.0, refiner, below)
        return student.to(unet.device)
    sampler = DPMSolverMultistepScheduler.from_config(schedule.config)
    return PokeDiffPipeline(unet, sampler, model, tokenizer, config.text_encoder)


def with_base(unet: Any, schedule: DDPMScheduler, config: TrainConfig) -> PokeDiffPipeline:
    """The base's pipeline, `unet` its refiner or upscaler. Raises PokediffError when the two do not fit together."""
    assert config.refine is not None
    pipeline = PokeDiffPipeline.from_pretrained(config.refine.base)
    base = pipeline.unet.config
    for key, ours, theirs in (
        ("dataset.image_size", unet.config.image_size, base.image_size * config.model.upscale),
        ("dataset.channels", unet.config.in_channels, base.in_channels),
        ("text_encoder", config.text_encoder, pipeline.config.text_encoder_name),
        ("diffusion.prediction_type", config.diffusion.prediction_type, pipeline.prediction_type(unet)),
    ):
        if ours != theirs:
            raise PokediffError(f"{key}: {ours} here, {theirs} in {config.refine.base} (refine.base)")
    if not same_noise(schedule, pipeline.scheduler):
        raise PokediffError(f"refine.base: {config.refine.base} has another noise schedule (diffusion.*)")
    if config.model.upscale > 1:
        pipeline.register_modules(upscaler=unet)
        pipeline.register_to_config(upscale_below=config.refine.below)
        if (steps := pipeline.config.num_steps) != DEFAULT_STEPS:  # a student: it keeps the steps that it was taught
            more = max(1, round(steps * UPSCALER_SHARE / (1 - UPSCALER_SHARE)))
            pipeline.register_to_config(num_steps=steps + more)
    else:
        pipeline.register_modules(refiner=unet)
        pipeline.register_to_config(refine_below=config.refine.below)
    if config.refine.guidance_scale is not None:
        pipeline.register_to_config(guidance_scale=config.refine.guidance_scale)
    return pipeline.to(unet.device)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, flat, then (with decay_steps) linear to zero at max_steps: a function of the step alone."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = min(1.0, (config.max_steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return config.learning_rate * rise * fall


def ema_with_warmup(decay: float) -> Callable[..., None]:
    """Exponential moving average whose memory grows with the run: min(decay, (1 + n) / (10 + n)) after n updates."""

    @torch.no_grad()
    def update(averages: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def mixed_precision(precision: str) -> str:
    """accelerate's word for it. Never fp16: its overflow is the most reported failure of diffusion training."""
    if precision == "auto":
        precision = "bf16" if has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "fp32"
    return "no" if precision == "fp32" else precision


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mix(*numbers: int) -> int:
    """One seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# -------------------------------------------------------------------------------------------------------- the losses


def training_loss(
    unet: Any, objective: Objective, batch: Batch, accelerator: Accelerator, config: TrainConfig, step: int
) -> torch.Tensor:
    """Mean loss of this process's slice of the step's batch."""
    x0 = to_model(batch.pixels.to(accelerator.device), config.dataset.channels)
    generator = torch.Generator(accelerator.device).manual_seed(mix(config.seed, step, 0))
    # Noise and timesteps are drawn for all processes together, then sliced: any number of them trains the same model.
    total = (accelerator.num_processes * x0.shape[0],)
    timesteps = torch.randint(0, trained_timesteps(config), total, generator=generator, device=x0.device)
    noise = torch.randn(total + x0.shape[1:], generator=generator, device=x0.device)
    first = accelerator.process_index * x0.shape[0]
    mine = slice(first, first + x0.shape[0])
    text, augment = batch.text.to(x0.device), batch.augment.to(x0.device)
    low_res = make_low_res(x0, config, generator, total[0], mine)
    return objective(unet, x0, noise[mine], timesteps[mine], text, augment, low_res).mean()


def make_low_res(
    x0: torch.Tensor, config: TrainConfig, generator: torch.Generator, total: int, mine: slice
) -> torch.Tensor | None:
    """(B, C, H/f, W/f): the small pictures that a network with upscale f is shown; None for any other network.

    With noise, of another strength for each: those to be enlarged are drawn ones, whose detail is not to be trusted.
    """
    if config.refine is None or config.model.upscale == 1:
        return None
    small = F.avg_pool2d(x0, config.model.upscale)
    sigma = config.refine.low_res_noise * torch.rand(total, generator=generator, device=generator.device)
    noise = torch.randn((total, *small.shape[1:]), generator=generator, device=generator.device)
    return small + (sigma[:, None, None, None] * noise)[mine].to(small)


@torch.inference_mode()
def validate(
    unet: Any,
    objective: Objective,
    pictures: Pictures,
    vectors: CaptionVectors,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean loss on the validation families, and by thirds of the timesteps; always the same noise and timesteps."""
    unet.eval()
    generator = torch.Generator().manual_seed(0)
    number, total = len(pictures), trained_timesteps(config)
    timesteps = ((torch.arange(number) + 0.5) / number * total).long()[torch.randperm(number, generator=generator)]
    losses = []
    for start in range(0, number, 64):
        part = slice(start, start + 64)
        x0 = to_model(torch.from_numpy(pictures.pixels[part]), config.dataset.channels)
        noise = torch.randn(x0.shape, generator=generator)
        text = vectors.table[[rows[0] for rows in vectors.rows[part]]]
        low_res = make_low_res(x0, config, generator, len(x0), slice(None))
        tensors = (tensor.to(accelerator.device) for tensor in (x0, noise, timesteps[part], text))
        low_res = low_res if low_res is None else low_res.to(accelerator.device)
        with accelerator.autocast():
            losses.append(objective(unet, *tensors, low_res=low_res).cpu())
    loss = torch.cat(losses)
    result = {"validation_loss": loss.mean().item()}
    for third, name in enumerate(("low_noise", "mid_noise", "high_noise")):
        part_of = timesteps * 3 // total == third
        if part_of.any():
            result[f"validation_loss_{name}"] = loss[part_of].mean().item()
    return result


def preview(pipeline: PokeDiffPipeline, config: TrainConfig, folder: Path, step: int) -> None:
    """Draw the preview prompts from the averaged weights: a sheet (PNG) and how it emerged (GIF)."""
    folder.mkdir(exist_ok=True)
    prompts = list(config.preview_prompts)
    sheets = [grid(from_model(state.x0), columns=4) for state in pipeline.denoise(prompts, range(len(prompts)))]
    factor = max(1, 128 // config.dataset.image_size)
    write_whole(folder / f"step-{step:08}.png", encode_png(enlarge(sheets[-1], factor)))
    save_animation(folder / f"step-{step:08}.gif", [composite(enlarge(sheet, factor)) for sheet in sheets])


# ----------------------------------------------------------------------------------------------- clocks and signals


class Window:
    """Averages since the last log line. Validation, previews and checkpoints do not count as training time."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.images, self.seconds, self.waiting = 0, 0.0, 0.0
        self.resume()

    def resume(self) -> None:
        """The clock runs from here."""
        self.mark = time.monotonic()

    def waited(self) -> None:
        """The batch is here: the time since `resume` was spent waiting for data."""
        self.waiting += time.monotonic() - self.mark

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """What a step that was taken measured."""
        self.losses.append(loss.detach())
        self.norms.append(norm.detach())

    def done(self, images: int) -> None:
        """A step is over, taken or skipped."""
        self.images += images
        self.seconds += time.monotonic() - self.mark

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages, the loss over all processes; a new window begins."""
        values = {"images_per_s": self.images / self.seconds, "data_wait_share": self.waiting / self.seconds}
        if self.losses:  # not when every step was skipped; the same on all processes, as they share the gradient
            loss = accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
            values = {"loss": loss, "grad_norm": torch.stack(self.norms).mean().item(), **values}
        self.clear()
        return values


def agreed(accelerator: Accelerator, stop: bool) -> bool:
    """Does any process want to stop?"""
    return bool(accelerator.gather(torch.tensor([stop], device=accelerator.device)).any())


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag, so that a step is finished and a checkpoint written; a second one acts at once.

    What comes within a second of the first is the same wish: a terminal tells all processes, and a launcher tells them
    again.
    """
    received: list[float] = []
    before: dict[signal.Signals | int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: nothing to catch
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)


def seconds_per_step(
    accelerator: Accelerator, unet: Unet, objective: Objective, batches: TrainingBatches, config: TrainConfig
) -> float:
    """How long a step takes here, tried on a copy of the network; the third try counts, the first ones warm up."""
    trial, seconds = copy.deepcopy(unet), 0.0
    if config.compile:  # copies are not; what is compiled here serves the run too
        compile_network(trial)
    for step in range(3):
        begin = time.monotonic()
        with accelerator.autocast():
            training_loss(trial, objective, batches[step], accelerator, config, step).backward()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - begin
    return seconds * 1.1  # clipping, optimizer and average


def duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
