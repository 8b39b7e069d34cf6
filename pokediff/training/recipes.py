"""recipe_for(folder): training settings for a folder of pictures, from their size and style."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pokediff.config import ModelConfig, StageConfig, TrainConfig, ValidationMetricsConfig, from_values, load_yaml
from pokediff.data.images import BadImage, is_pixel_art, read_image
from pokediff.data.records import Record, picture_bytes, read_records
from pokediff.errors import PokediffError
from pokediff.model.checkpoint import find_folder
from pokediff.model.denoiser import Denoiser
from pokediff.model.pipeline import PokeDiffPipeline, quiet
from pokediff.paths import shipped

SAMPLE = 64  # pictures read to determine size and style
SIZES = (32, 64, 128)
FEWEST_PICTURES = 40  # fewer leave too few for validation
# Optimizer steps of the base for each picture: every picture is drawn some 300 times (docs/LOG.md, a folder of 200).
STEPS_PER_PICTURE, FEWEST_STEPS, MOST_STEPS = 10, 1500, 30_000
STAGE_SHARE = {"base": 1.0, "refiner": 0.5, "upscaler": 0.5}  # steps of a stage beside those of the base
DEFAULT_MINUTES = 30.0


def recipe_for(
    folder: str | Path,
    max_minutes: float | None = None,
    size: int | None = None,
    start_from: str | None = None,
    report: Callable[[str], Any] = print,
) -> TrainConfig:
    """The shipped recipe for a folder: its whole cascade up to the size of the pictures, from the weights and with the
    text encoder of `start_from`, a folder or the name of a shipped checkpoint (default: creatures, which owes nothing
    to pictures that are not openly licensed).

    Pictures up to 40 px are drawn at 32 px, up to 80 px at 64, others at 128, but at no more than `start_from` draws,
    which `report` is told. Few pictures are soon memorised, so the rate is low, the small maps have dropout, and
    training stops when the model begins to copy. All stages together fit into `max_minutes` (default DEFAULT_MINUTES).

    Raises PokediffError when the folder does not exist or holds fewer than FEWEST_PICTURES, or `start_from` is no
    checkpoint or does not draw that size.
    """
    quiet()
    folder = Path(folder)
    records = read_records(folder, report=lambda _: None)
    if len(records) < FEWEST_PICTURES:
        raise PokediffError(
            f"{folder} has {len(records)} pictures; training needs at least {FEWEST_PICTURES}, better hundreds"
        )
    side, pixel_art = look_at(records)
    base = load_yaml(shipped("configs", "pokemon.yaml"), TrainConfig)
    start = find_folder(start_from or shipped("checkpoints", "creatures"), {})
    known = PokeDiffPipeline.from_pretrained(start, text_encoder=None, tokenizer=None)
    if size is None:
        fitting = next((drawn for drawn in SIZES if side <= 1.25 * drawn), SIZES[-1])
        size = min(fitting, max(known.sizes))
        if size < fitting:
            report(f"size {size}, the largest of {start.name}; for {fitting}: another --start-from (docs/training.md)")
    steps = min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_PICTURE * len(records)))
    needed = {name: stage for name, stage in base.stages.items() if stage.image_size <= size}
    if missing := [name for name in needed if name not in known.cascade]:
        sizes = " or ".join(map(str, known.sizes))
        raise PokediffError(f"{start} has no {missing[0]}: give --size {sizes}, or another --start-from")
    stages = {
        name: own_stage(stage, known.cascade[name], int(STAGE_SHARE[name.split("-")[0]] * steps))
        for name, stage in needed.items()
    }
    return replace(
        base,
        data=(folder.as_posix(),),
        out=f"checkpoints/{folder.resolve().name}",
        start_from=start.as_posix(),
        text_encoder=known.config.text_encoder_name,
        dataset=replace(base.dataset, styles=None),
        metrics=ValidationMetricsConfig(every=max(1, steps // 5), number=32, early_stop=True),
        stages=stages,
        max_minutes=max_minutes or DEFAULT_MINUTES,
        fit_limit=True,
        compile=False,  # takes minutes, too long for a short run
        pixel_art=pixel_art,
        preview_prompts=preview_prompts(records),
    )


def own_stage(stage: StageConfig, start: Denoiser, steps: int) -> StageConfig:
    """A stage of the shipped recipe for a short training from the weights of `start`: its network, range of noise and
    guidance, and the recipe's number of steps.
    """
    network = {item.name: start.config[item.name] for item in fields(ModelConfig)}
    network |= {"dropout": 0.1 if start.config.below is None else 0.0, "steps": stage.model.steps}
    return replace(
        stage,
        model=from_values(network, ModelConfig, "start_from"),
        styles=None,
        max_steps=steps,
        learning_rate=3e-4,
        warmup_steps=min(100, steps // 10),
        decay_steps=steps // 2,
        ema_decay=0.995,
        validate_every=max(100, steps // 10),
        preview_every=max(100, steps // 4),
        checkpoint_every=max(100, steps // 10),
    )


def look_at(records: Sequence[Record]) -> tuple[float, bool]:
    """Of some of the pictures that can be opened: the median of their longer sides in px, and whether most are pixel
    art, with few colours and hard edges.
    """
    sides, pixel_art = [], []
    for record in records[:: max(1, len(records) // SAMPLE)]:
        try:
            data = picture_bytes(record)
            with Image.open(BytesIO(data)) as picture:
                sides.append(max(picture.size))
            pixel_art.append(is_pixel_art(read_image(data)))
        except (OSError, BadImage):
            continue
    return (statistics.median(sides), bool(np.mean(pixel_art) > 0.5)) if sides else (64.0, False)


def preview_prompts(records: Sequence[Record]) -> tuple[str, ...]:
    """Prompts of the previews: captions written by people if there are any, else colours."""
    written = list(dict.fromkeys(record.captions[0] for record in records if record.captions))
    if len(written) >= 6:
        return ("", *(written[index] for index in np.linspace(0, len(written) - 1, 7).round().astype(int)))
    return ("", *(f"a {color} creature" for color in ("red", "blue", "green", "yellow", "gray", "brown", "purple")))


def what_to_expect(steps: int, wanted: int) -> str:
    """The expected quality after `steps` of the `wanted` steps of the base, for the last lines of `train FOLDER`."""
    wanted = max(wanted, FEWEST_STEPS)
    after = f"After {steps:,} of {wanted:,} steps"
    if steps < wanted / 10:
        return f"{after}, too few, drawings hardly differ from those that the training started from."
    if steps < wanted:
        return f"{after} expect your colours and outlines; shapes need more."
    return f"After {steps:,} steps expect your style, sizes and colours; faces and limbs need thousands of pictures."
