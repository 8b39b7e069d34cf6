"""The cascade: an ordered list of small denoisers, each with a size, a range of noise and a variant.

A picture is drawn down the list (Ho et al., "Cascaded Diffusion Models", 2022): a base draws it small, upscalers draw
it again, larger. Within a size, a denoiser trained on little noise alone takes over from the one above (eDiff-I, Balaji
et al. 2022). Which one is used where is decided here and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from pokediff.errors import PokediffError
from pokediff.model.denoiser import Denoiser
from pokediff.model.inspection import LIST, check_cascade

DEFAULT_SIZE = 64  # px, of a cascade that has it
HIGH_NOISE = 10.0  # sigma above which shapes are decided
ROUNDING = 1e-6  # of sigma: a scheduler's alphas are float32, by which 100 is 100.00002


class Cascade(ModelMixin):
    """Denoisers by name, in the order in which they are trained. On disk: a folder of each, and their list."""

    __module__ = "pokediff"  # as `Denoiser`

    def __init__(self, denoisers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.denoisers = nn.ModuleDict(dict(denoisers))

    def __getitem__(self, name: str) -> Denoiser:
        return self.denoisers[name]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.denoisers)

    def __len__(self) -> int:
        return len(self.denoisers)

    def items(self) -> Iterator[tuple[str, Denoiser]]:
        return iter(self.denoisers.items())  # type: ignore[arg-type]

    def forward(self, name: str, *inputs: torch.Tensor | None) -> torch.Tensor:
        """x0 by the denoiser `name`; arguments as in `Denoiser.forward`. Hooks of CPU offload run here."""
        return self.denoisers[name](*inputs)

    # ------------------------------------------------------------------------------------- which denoiser is used where

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in px that it draws, ascending."""
        return tuple(sorted({denoiser.config.image_size for _, denoiser in self.items()}))

    @property
    def default_size(self) -> int:
        return DEFAULT_SIZE if DEFAULT_SIZE in self.sizes else self.sizes[-1]

    @property
    def has_fast(self) -> bool:
        """Whether it has few-step denoisers."""
        return any(denoiser.config.fast for _, denoiser in self.items())

    def expert(self, size: int, sigma: float, fast: bool = False) -> str:
        """The name of the denoiser for this size and noise: of those used at `sigma`, the one trained on the least
        noise; with `fast` a few-step one before another.

        Raises PokediffError when there is none.
        """
        used = self._of_size(size, fast)
        able = [name for name in used if sigma < self[name].below]
        if not able:
            raise PokediffError(f"no denoiser of {size} px for sigma {sigma:.3g}")
        return min(able, key=lambda name: (self[name].below, self[name].config.fast != fast))

    def leading(self, size: int, fast: bool = False) -> Denoiser:
        """The denoiser of this size for the most noise, which determines number of steps and initial sigma of the size.

        Raises PokediffError for a size that the cascade does not draw, and for `fast` when it has no such denoiser.
        """
        names = self._of_size(size, fast)
        if not names:
            raise PokediffError(f"size {size}: this checkpoint draws {', '.join(map(str, self.sizes))} px")
        if fast and not self.has_fast:
            raise PokediffError("fast: this checkpoint has no few-step denoisers")
        return self[max(names, key=lambda name: (self[name].below, self[name].config.fast == fast))]

    def legs(self, size: int) -> tuple[int, ...]:
        """The sizes that are drawn in order up to `size`, e.g. (32, 64, 128)."""
        upscale = self.leading(size).config.upscale
        return (size,) if upscale == 1 else (*self.legs(size // upscale), size)

    def _of_size(self, size: int, fast: bool) -> list[str]:
        """The denoisers of a size: without `fast` no few-step one in whose place there is another."""
        own = {name: denoiser for name, denoiser in self.items() if denoiser.config.image_size == size}
        places = {denoiser.below for denoiser in own.values() if not denoiser.config.fast}
        return [name for name, part in own.items() if fast or not part.config.fast or part.below not in places]

    def updated(self, other: Cascade) -> Cascade:
        """This cascade with the denoisers of `other` in place of those of the same name, new ones at the end."""
        return Cascade({**dict(self.items()), **dict(other.items())})

    # -------------------------------------------------------------------------------------------------------- on disk

    def save_pretrained(self, save_directory: str | Path, variant: str | None = None, **kwargs: Any) -> None:
        """Write FOLDER/config.json, the list, and FOLDER/<name>/ of each denoiser."""
        if variant is not None:
            raise PokediffError("variant: a checkpoint has one set of weights; choose their dtype when loading")
        folder = Path(save_directory)
        for name, denoiser in self.items():
            denoiser.save_pretrained(folder / name, **kwargs)
        write_list(folder, list(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Cascade:
        """Read what `save_pretrained` wrote, safetensors only; `kwargs` are those of a diffusers model.

        Raises PokediffError when the list names a folder outside, or a denoiser does not pass `inspection`.
        """
        kwargs["use_safetensors"] = True
        folder = Path(pretrained_model_name_or_path)
        names = check_cascade(folder)
        return cls({name: Denoiser.from_pretrained(folder / name, **kwargs) for name in names})


def write_list(folder: Path, names: list[str]) -> None:
    """Write the list of a cascade's folder."""
    listed = {"_class_name": "Cascade", "denoisers": names}
    (folder / LIST).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def guidance_at(
    denoiser: Any, sigma: float, scale: float | None = None, interval: tuple[float, float] | None = None
) -> float:
    """The guidance scale of a denoiser at a noise level; `scale` None: its default. 1 outside of `interval`.

    Guidance, scale - 1, is `high_noise_guidance` times as strong above HIGH_NOISE. There it decides the shape, below it
    sharpens and saturates: strong guidance everywhere costs quality, at high noise alone it is free (docs/LOG.md;
    compare Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).
    """
    config = denoiser.config
    low, high = interval or (0.0, math.inf)
    if config.guidance_scale is None or not low * (1 - ROUNDING) <= sigma <= high * (1 + ROUNDING):
        return 1.0
    scale = config.guidance_scale if scale is None else scale
    stronger = scale > 1 and sigma > HIGH_NOISE
    return 1 + (scale - 1) * (config.get("high_noise_guidance", 1.0) if stronger else 1.0)


def guided(
    denoiser: Callable[..., torch.Tensor],
    scale: float | torch.Tensor,
    x: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    negative: torch.Tensor,
    augment: torch.Tensor | None = None,
    low_res: torch.Tensor | None = None,
) -> torch.Tensor:
    """x0 of `text` moved away from x0 of `negative` (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022).

    text and negative (B, D), the rest as in `Denoiser.forward`; `scale` is a number, or (B, 1, 1, 1). With the number 1
    the denoiser runs once.
    """
    if isinstance(scale, float | int) and scale == 1:
        return denoiser(x, timestep, text, augment, low_res)

    def twice(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else torch.cat([values, values])

    timesteps = timestep.expand(len(x))
    both = denoiser(twice(x), twice(timesteps), torch.cat([text, negative]), twice(augment), twice(low_res))
    wanted, unwanted = both.chunk(2)
    return torch.lerp(unwanted, wanted, scale)


def in_fours(run: Callable[..., torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
    """run(*given) over four rows at a time, the last ones filled up by repetition: a CPU's float32 kernels depend on
    the number of rows and round differently, so this gives the same bits at any batch size.
    """
    number = len(given[0])
    rows = torch.arange(-(-number // 4) * 4) % number
    parts = zip(*(values[rows].split(4) for values in given), strict=True)
    return torch.cat([run(*part) for part in parts])[:number]
