"""recipe_for(folder): settings for a folder of somebody's own pictures, chosen for its size."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from PIL import Image

from pokediff.config import QuickLookConfig, TrainConfig, load_yaml
from pokediff.data.records import read_records
from pokediff.errors import PokediffError

ROOT = Path(__file__).resolve().parent.parent.parent
LOOKED_AT = 64  # pictures whose size is asked for
# Steps for N pictures: enough that each is drawn some 300 times in all (docs/LOG.md, the folder of 200), within bounds.
STEPS_PER_PICTURE, FEWEST_STEPS, MOST_STEPS = 10, 1500, 30_000
RECIPES = {32: "pokemon-32.yaml", 64: "pokemon-64-direct.yaml"}
FEWEST_PICTURES = 40  # with fewer there is nothing left to validate on


def recipe_for(folder: str | Path) -> TrainConfig:
    """A proven recipe of the size that fits the pictures, starting as the shipped model where it is at hand.

    32 px for pictures up to 40 px, else 64. A model that knows creatures needs a few minutes to learn a style; from
    nothing it would need hours and thousands of pictures. Few pictures are soon known by heart, so the network sees
    them with dropout, at a lower rate, and training stops when it begins to copy.

    Raises PokediffError when the folder is not there or holds fewer than FEWEST_PICTURES.
    """
    folder = Path(folder)
    records = read_records(folder)
    if len(records) < FEWEST_PICTURES:
        raise PokediffError(
            f"{folder} has {len(records)} pictures; {FEWEST_PICTURES} are needed, some hundreds are good"
        )
    size = 32 if _usual_side(folder, [record.file_name for record in records]) <= 40 else 64
    base = load_yaml(ROOT / "configs" / RECIPES[size], TrainConfig)
    shipped = ROOT / "checkpoints" / "pokediff-32"  # for 64 px all but the first level
    start = shipped.as_posix() if (shipped / "model_index.json").is_file() else None
    steps = min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_PICTURE * len(records)))
    return replace(
        base,
        data=folder.as_posix(),
        out=f"checkpoints/{folder.resolve().name}",
        start_from=start,
        dataset=replace(base.dataset, styles=None),
        model=replace(base.model, dropout=0.1),
        evaluation=QuickLookConfig(every=steps // 5, number=32, early_stop=True),
        max_steps=steps,
        learning_rate=3e-4 if start else base.learning_rate,
        warmup_steps=100,
        decay_steps=steps // 2,
        ema_decay=0.995,
        validate_every=max(100, steps // 10),
        preview_every=max(100, steps // 5),
        checkpoint_every=max(100, steps // 10),
        preview_prompts=(
            "",
            "a red creature",
            "a blue creature",
            "a green creature",
            "a yellow creature",
            "a gray creature",
        ),
    )


def _usual_side(folder: Path, names: list[str]) -> float:
    """The median of the longer sides, in px, of some of the pictures; 64 when none can be opened."""
    sides = []
    for name in names[:: max(1, len(names) // LOOKED_AT)]:
        try:
            with Image.open(folder / name) as picture:
                sides.append(max(picture.size))
        except OSError:
            continue
    return statistics.median(sides) if sides else 64
