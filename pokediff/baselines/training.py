"""train_baseline(config): one training loop for every system.

Everything random in a step is drawn from (seed, step). A run takes minutes and cannot be resumed; the best weights so
far are always whole files in its folder, with log.jsonl, tensorboard/ and previews/ beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pokediff.baselines.attention import attention_plot
from pokediff.baselines.augment import Augmentation
from pokediff.baselines.generator import Baseline, save_baseline
from pokediff.baselines.loop import Values, log, make_accelerator, train_steps, training_batches
from pokediff.baselines.lora import train_lora
from pokediff.baselines.systems import GENERATOR, SYSTEMS, Batch, System
from pokediff.baselines.words import PAD
from pokediff.config import BaselineConfig, dump_yaml
from pokediff.data.dataset import CaptionVectors, Pictures, TrainingBatches, load_pictures
from pokediff.data.images import composite, encode_png, enlarge, grid, pairs, to_model
from pokediff.errors import PokediffError
from pokediff.evaluation.measures import reconstruction_errors
from pokediff.files import own_folder, refuse_inside, write_whole
from pokediff.model.pipeline import quiet
from pokediff.progress import ProgressBar
from pokediff.training.objectives import mix
from pokediff.training.runs import log_images, start_trackers

VALIDATION_PICTURES = 128
SHOWN = 4  # training and validation pictures each on the sheet of pairs
SHOWN_SIDE = 128  # px


@dataclass
class Player:
    """The parameters of a network, their optimizer, and what halves its learning rate."""

    parameters: list[torch.nn.Parameter]
    optimizer: Any
    plateau: ReduceLROnPlateau | None


@dataclass
class Training:
    """A run of one system."""

    config: BaselineConfig
    out: Path
    accelerator: Accelerator
    system: System
    batches: TrainingBatches
    validation: Pictures
    players: dict[str, Player]
    best: float = math.inf
    best_step: int = 0
    bad: int = 0  # validations since the best one

    @property
    def baseline(self) -> Baseline:
        """What is being trained, for drawing."""
        return Baseline(self.config, self.system, self.accelerator.device)


def train_baseline(config: BaselineConfig) -> Path:
    """Train a system until max_steps, the time limit, `patience` or Ctrl-C. Returns its folder, a baseline.

    Raises PokediffError for missing data, words or feature networks, a folder that is not empty, and a loss that is not
    finite.
    """
    quiet()
    if find_spec("torchmetrics") is None or find_spec("matplotlib") is None:
        raise PokediffError('training a baseline needs torchmetrics and matplotlib: pip install "pokediff[eval]"')
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out or f"checkpoints/{config.system}")
    refuse_inside(out, config.data)
    with own_folder(out):
        return train_lora(config) if config.system == "sdxl-lora" else train_system(config, out)


def train_system(config: BaselineConfig, out: Path) -> Path:
    training = prepare(config, out)
    augment = Augmentation(config.augment)
    train_steps(
        config,
        training.accelerator,
        out,
        lambda step: train_step(training, make_batch(training, step, augment), step),
        [(config.validate_every, partial(validate, training)), (config.preview_every, partial(preview, training))],
        lambda: config.patience is not None and training.bad >= config.patience,
    )
    training.accelerator.end_training()
    ProgressBar.write(f"{config.system}: lowest validation loss {training.best:.4f} at step {training.best_step}")
    ProgressBar.write(f"draw with: pokediff sample PROMPT --checkpoint {out}")
    return out


def prepare(config: BaselineConfig, out: Path) -> Training:
    """Load networks and data, in this order: what cannot be loaded is told before minutes of decoding."""
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    system = SYSTEMS[config.system](config, config.words).to(accelerator.device)
    pictures = load_pictures(config.data, config.image_size, config.dataset, ProgressBar.write, ProgressBar)
    train, validation = pictures.split("train").with_shared_captions(), pictures.split("validation")
    if not len(train) or not len(validation):
        raise PokediffError(
            f"{' '.join(config.data)}: {len(train)} training and {len(validation)} validation pictures; both are needed"
        )
    batches = training_batches(config, train, caption_ids(train, system))
    players = {name: make_player(name, list(params), config) for name, params in system.players().items()}
    for player in players.values():
        player.optimizer = accelerator.prepare(player.optimizer)
    out.mkdir(parents=True, exist_ok=True)
    (out / "previews").mkdir()
    write_whole(out / "config.yaml", dump_yaml(config))
    start_trackers(accelerator, out, config.wandb)
    number = sum(p.numel() for p in system.parameters()) / 1e6
    counts = f"{len(train)} training, {len(validation)} validation pictures"
    ProgressBar.write(f"{config.system}: {number:.1f} M parameters, {counts}")
    return Training(config, out, accelerator, system, batches, validation.spread(VALIDATION_PICTURES), players)


def make_player(name: str, parameters: list[torch.nn.Parameter], config: BaselineConfig) -> Player:
    rate = config.learning_rate * (1.0 if name == GENERATOR else config.discriminator_rate)
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=config.betas)
    plateau = None if config.plateau is None else ReduceLROnPlateau(optimizer, factor=0.5, patience=config.plateau)
    return Player(parameters, optimizer, plateau)


def caption_ids(pictures: Pictures, system: System) -> CaptionVectors:
    """Token ids in the place of text vectors: row 0 is the first caption, for there is no empty one."""
    texts = list(dict.fromkeys(caption for several in pictures.captions for caption in several))
    row_of = {text: row for row, text in enumerate(texts)}
    rows = tuple(np.array([row_of[caption] for caption in several]) for several in pictures.captions)
    return CaptionVectors(system.ids(texts), rows)


# ---------------------------------------------------------------------------------------------------------- the step


def make_batch(training: Training, step: int, augment: Augmentation) -> Batch:
    """Pictures, token ids and noise of a step."""
    config, device = training.config, training.accelerator.device
    dealt = training.batches[step]
    torch.manual_seed(mix(config.seed, step, 0))
    x0 = augment(to_model(dealt.pixels, config.dataset.channels), step)
    noise = torch.randn(len(x0), *training.system.noise_shape)
    ids = dealt.text[:, : int((dealt.text != PAD).sum(1).max())]  # padding for longer captions than these costs time
    return Batch(x0.to(device), ids.to(device), noise.to(device))


def train_step(training: Training, batch: Batch, step: int) -> Values:
    """One step of every player. Returns the terms of their losses, `total` (of the last player, the generator) and its
    `grad_norm`.
    """
    config, accelerator, system = training.config, training.accelerator, training.system.train()
    if system.words is not None:
        system.words.requires_grad_(config.thaw_step is not None and step >= config.thaw_step)
    terms: dict[str, torch.Tensor] = {}
    with accelerator.autocast():
        given = system(batch)
    for name, player in training.players.items():
        others = [p for other in training.players.values() if other is not player for p in other.parameters]
        with frozen(others if name == GENERATOR else []), accelerator.autocast():
            losses = system.losses(name, batch, given)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            accelerator.backward(total)
        norm = accelerator.clip_grad_norm_(player.parameters, config.max_grad_norm or math.inf)
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        terms |= {key: loss.detach() for key, loss in losses.items()}
    return terms | {"total": total.detach(), "grad_norm": norm}


@contextmanager
def frozen(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """No gradients for these parameters: the generator's loss passes through the discriminator and leaves it alone."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


# ------------------------------------------------------------------------------------------- validation and previews


def validation_batches(training: Training) -> Iterator[Batch]:
    """The validation pictures with their first captions, and always the same noise."""
    system, pictures, device = training.system, training.validation, training.accelerator.device
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(pictures), 32):
        part = slice(start, start + 32)
        x0 = to_model(torch.from_numpy(np.ascontiguousarray(pictures.pixels[part])), training.config.dataset.channels)
        ids = system.ids([several[0] for several in pictures.captions[part]])
        noise = torch.randn(len(x0), *system.noise_shape, generator=generator)
        yield Batch(x0.to(device), ids.to(device), noise.to(device))


@torch.no_grad()
def validate(training: Training, step: int) -> None:
    """The errors on validation pictures: of the losses, and L1, L2, PSNR and SSIM on white for what draws at once.

    Halves learning rates, and keeps the best weights: by L1 or cross-entropy where they are losses, as the projects
    did, else by the sum.
    """
    system = training.system.eval()
    sums: dict[str, float] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the latent variant's timesteps
        for batch in validation_batches(training):
            with training.accelerator.autocast():
                errors = system.errors(batch, system(batch))
            for name, value in errors.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(batch.x0)
    values = {name: total / len(training.validation) for name, total in sums.items()}
    leading = next((values[name] for name in ("l1", "bce") if name in values), sum(values.values()))
    measured = {f"validation_loss_{name}": value for name, value in values.items()}
    if system.steps is None:
        texts = [several[0] for several in training.validation.captions]
        drawn = training.baseline.generate(texts, range(len(texts)))
        found = reconstruction_errors(drawn, training.validation.straight(), "white")
        measured |= {f"validation_{name.partition(',')[0]}": float(of_all.mean()) for name, of_all in found.items()}
    rate = training.players[GENERATOR].optimizer.param_groups[0]["lr"]
    log(training.config, training.accelerator, training.out, step, {"validation_loss": leading, **measured, "lr": rate})
    for player in training.players.values():
        if player.plateau is not None:
            player.plateau.step(leading)
    training.bad += 1
    if better := leading < training.best:
        training.best, training.best_step, training.bad = leading, step, 0
    if better or training.config.keep == "last":
        save_baseline(training.out, training.config, system)


@torch.no_grad()
def preview(training: Training, step: int) -> None:
    """Three sheets: the fixed prompts; pairs, the real picture above the drawn one, of training and of validation
    captions; and what the first prompt's words are looked at for.
    """
    config, baseline = training.config, training.baseline
    drawn = baseline.generate(config.preview_prompts, range(len(config.preview_prompts)))
    sheets = {"prompts": grid(drawn, columns=4)}
    sets = [training.batches.pictures.spread(SHOWN), training.validation.spread(SHOWN)]
    texts = [several[0] for part in sets for several in part.captions]
    real = np.concatenate([part.straight() for part in sets])
    both = pairs(real, baseline.generate(texts, range(len(texts))), columns=len(texts))
    sheets["pairs"] = grid(both, columns=len(texts))
    factor = max(1, SHOWN_SIDE // config.image_size)
    for name, sheet in sheets.items():
        shown = composite(enlarge(sheet, factor))
        write_whole(training.out / "previews" / f"{name}-{step:08}.png", encode_png(shown))
        log_images(training.accelerator, {name: shown}, step)
    with suppress(PokediffError):  # of a system without attention
        plot = attention_plot(baseline.attention(config.preview_prompts[0]))
        plot.savefig(training.out / "previews" / f"attention-{step:08}.png", dpi=80)
