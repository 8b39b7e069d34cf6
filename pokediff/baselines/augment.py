"""Random changes of training pictures, by torchvision, in phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pokediff.config import AugmentationConfig
from pokediff.errors import PokediffError


class Augmentation:
    """The changes of the last phase that has begun, another for each picture; none before the first.

    Raises PokediffError without torchvision.
    """

    def __init__(self, phases: Sequence[AugmentationConfig]) -> None:
        self.phases = [(phase.from_step, make_change(phase)) for phase in phases]

    def __call__(self, x0: torch.Tensor, step: int) -> torch.Tensor:
        """Pictures (N, C, S, S) in [-1, 1], premultiplied, at a step; from torch's global random numbers."""
        begun = [change for from_step, change in self.phases if step >= from_step]
        return torch.stack([begun[-1](x) for x in x0]) if begun else x0


def make_change(phase: AugmentationConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of one picture (C, S, S)."""
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise PokediffError('augment: torchvision is not installed: pip install "pokediff[eval]"') from None
    moved = (phase.translation, phase.translation)
    place = v2.Compose(
        [
            v2.RandomHorizontalFlip(phase.flip),
            # -1 is a transparent pixel
            v2.RandomAffine(phase.rotation, moved, phase.scale, interpolation=v2.InterpolationMode.BILINEAR, fill=-1),
        ]
    )
    color = v2.ColorJitter(phase.brightness, phase.contrast, phase.saturation, phase.hue)
    erase = v2.RandomErasing(phase.erase, value="random")

    def change(x: torch.Tensor) -> torch.Tensor:
        x = (place(x) + 1) / 2
        alpha = x[3:] if len(x) == 4 else torch.ones_like(x[:1])
        straight = (x[:3] / alpha.clamp(min=1 / 255)).clamp(0, 1)
        x = torch.cat([color(straight) * alpha, x[3:]])
        x = erase(2 * x - 1).clamp(-1, 1)
        if len(x) == 4:
            x[:3] = torch.minimum(x[:3], x[3:])  # premultiplied: no colour exceeds its alpha
        return x

    return change
