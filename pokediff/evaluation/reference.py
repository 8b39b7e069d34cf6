"""The reference of an evaluation: real pictures of held-out families."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pokediff.config import EvaluateConfig
from pokediff.data.dataset import Pictures, load_pictures
from pokediff.errors import PokediffError
from pokediff.evaluation.distances import NEIGHBOURS
from pokediff.progress import ProgressBar

HALVES = 10  # random partitions of the real families into two halves
FEWEST_REAL = 4 * (NEIGHBOURS + 1)  # each half must have more than NEIGHBOURS


@dataclass(frozen=True)
class Reference:
    everything: Pictures  # the data sets, all styles and splits
    styles: tuple[str, ...] | None  # of the comparison; None: all
    real: Pictures  # held out, of these styles
    training: Pictures  # of all styles

    @cached_property
    def pixels(self) -> np.ndarray:
        """The held-out pictures, straight RGBA uint8 (N, S, S, 4)."""
        return self.real.straight()

    @cached_property
    def training_pixels(self) -> np.ndarray:
        """The training pictures of all styles, straight RGBA uint8 (M, S, S, 4)."""
        return self.training.straight()

    @cached_property
    def same_style(self) -> Pictures:
        """The training pictures of the styles of the comparison."""
        styles = self.styles
        return self.training if styles is None else self.training.where(lambda record: record.style in styles)

    @cached_property
    def families(self) -> np.ndarray:
        """(N,) of the held-out pictures."""
        return np.array([record.family_key for record in self.real.records])

    def captioned(self, prompts: Sequence[str]) -> list[tuple[int, int]]:
        """(position of the prompt, position in `real` of a picture that has it as a caption), for prompts with one."""
        place = {caption: index for index, several in enumerate(self.real.captions) for caption in several}
        return [(index, place[prompt]) for index, prompt in enumerate(prompts) if prompt in place]

    @cached_property
    def halves(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """HALVES pairs of index arrays: the held-out families parted at random."""
        names = np.unique(self.families)
        pairs = []
        for seed in range(HALVES):
            chosen = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
            mask = np.isin(self.families, chosen)
            pairs.append((np.flatnonzero(mask), np.flatnonzero(~mask)))
        return pairs


def load_reference(config: EvaluateConfig, size: int) -> Reference:
    """The data sets at `size` px. Raises PokediffError when they hold too few held-out pictures, or a training picture
    or its family is among them.
    """
    everything = load_pictures(config.data, size, progress=ProgressBar)
    artwork = any(record.style == "artwork" for record in everything.records)
    styles = config.styles or (("artwork",) if artwork else None)
    real = everything.split(config.split).where(lambda record: styles is None or record.style in styles)
    if len(real) < FEWEST_REAL:
        raise PokediffError(
            f"{' and '.join(config.data)}: {len(real)} pictures of {', '.join(styles or ['any style'])} in the "
            f"{config.split} split; an evaluation needs {FEWEST_REAL}"
        )
    reference = Reference(everything, styles, real, everything.split("train"))
    check_disjoint(real, reference.training)
    return reference


def check_disjoint(real: Pictures, training: Pictures) -> None:
    """Raises PokediffError when a picture or family of the reference is in the training split."""
    families = {record.family_key for record in training.records}
    hashes = {hashlib.sha256(picture.tobytes()).digest() for picture in training.pixels}
    leaked = [
        record.file_name
        for record, picture in zip(real.records, real.pixels, strict=True)
        if record.family_key in families or hashlib.sha256(picture.tobytes()).digest() in hashes
    ]
    if leaked:
        raise PokediffError(
            f"{len(leaked)} pictures of the reference are in the training split, too, the first is {leaked[0]}"
        )
