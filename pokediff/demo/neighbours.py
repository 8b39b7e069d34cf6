"""The nearest training picture of a drawing, and whether the drawing copies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pokediff.data.dataset import load_pictures
from pokediff.data.records import Record
from pokediff.evaluation.copies import nearest_in_pixels

HELD_OUT = 300  # held-out real pictures, whose distances to the training set define "close"


@dataclass(frozen=True)
class Neighbour:
    """The training picture nearest to a drawn one."""

    picture: np.ndarray  # straight RGBA uint8 (H, W, 4)
    record: Record
    distance: float  # 0 to 1, of the figures alone
    verdict: str  # new, close or copy


class TrainingPictures:
    """The training pictures of a data set, and the distances of held-out ones to them."""

    def __init__(self, data: Path, size: int) -> None:
        pictures = load_pictures(data, size, report=lambda _: None)
        training, held_out = pictures.split("train"), pictures.split("test").spread(HELD_OUT)
        self.records, self.pixels = training.records, training.straight()
        self.families = [record.family_key for record in self.records]
        self.close = 0.0  # distance below which 1 % of the held-out pictures lie
        if len(held_out):
            found = nearest_in_pixels(held_out.straight(), self.pixels, self.families)
            self.close = float(np.percentile(found.distance, 1))

    def nearest(self, pictures: np.ndarray) -> list[Neighbour]:
        """The neighbour of each picture, straight RGBA uint8 (N, H, W, 4)."""
        found = nearest_in_pixels(pictures, self.pixels, self.families)
        return [
            Neighbour(
                self.pixels[index],
                self.records[index],
                float(distance),
                "copy" if copied else "close" if distance < self.close else "new",
            )
            for index, distance, copied in zip(found.index, found.distance, found.copies, strict=True)
        ]
