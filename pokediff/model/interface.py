"""What a caller gives a pipeline, checked and brought into one form, and what it gets back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from PIL import Image

from pokediff.config import Sampling
from pokediff.data.images import Channels, fit_square, from_model, to_model
from pokediff.errors import PokediffError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class PokeDiffPipelineOutput(BaseOutput):
    """images: RGBA PIL images, an array (N, S, S, 4) or a tensor (N, 4, S, S) in [0, 1], or the "latents" (N, C, S, S)
    in [-1, 1]; seeds: one each.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    seeds: list[int]


def make_sampling(sampling: Sampling | None, options: dict[str, Any]) -> Sampling:
    """`sampling` with the fields in `options` changed. Raises PokediffError for a field that it does not have."""
    options = dict(options)
    if "num_steps" in options:  # its name until 0.2
        options["num_inference_steps"] = options.pop("num_steps")
    unknown = options.keys() - Sampling.__dataclass_fields__.keys()
    if unknown:
        raise PokediffError(
            f"unknown option {', '.join(sorted(unknown))}; options: {', '.join(Sampling.__dataclass_fields__)}"
        )
    return replace(sampling or Sampling(), **options)


def make_seeds(
    seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None, number: int
) -> list[int] | list[torch.Generator]:
    """`number` seeds or generators: consecutive seeds from `seed` (None: a random one), or diffusers' `generator`.

    A fresh generator draws what its seed draws; one generator for several pictures draws their noise in turn.
    """
    if generator is None:
        first = random.SystemRandom().randrange(2**32) if seed is None else seed
        return list(range(first, first + number))
    generators = [generator] * number if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != number:
        raise PokediffError(f"{number} pictures need {number} generators, or one, not {len(generators)}")
    return generators


def candidates(seed: int | torch.Generator, number: int) -> list[int]:
    """`number` seeds for one picture: `seed` and others a million apart, or as the generator draws them. Not further,
    since torch's generator on the CPU uses the lower 32 bits alone.
    """
    if isinstance(seed, torch.Generator):
        return torch.randint(2**63 - 1, (number,), generator=seed, device=seed.device).tolist()
    return [(int(seed) + 1_000_000 * index) % 2**63 for index in range(number)]


def make_generators(seeds: Sequence[int] | Sequence[torch.Generator]) -> list[torch.Generator]:
    return [seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed)) for seed in seeds]


def make_noises(generators: Sequence[torch.Generator], channels: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Gaussian noise (N, C, S, S) of every size S, on the CPU: of the first size from the generators themselves, of
    each further size from separate generators, so that the first does not depend on the number of sizes.
    """
    sources, noises = list(generators), []
    for number, size in enumerate(sizes):
        if number > 0:
            sources = make_generators([-((1 + g.initial_seed()) * number % 2**63) for g in generators])
        shape = (channels, size, size)
        noises.append(torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in sources]))
    return noises


def make_prompts(
    prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None, copies: int
) -> tuple[list[str], list[str]]:
    """Every prompt `copies` times, and the negative prompts of them: one for all, or one for each prompt.

    Raises PokediffError when there is no prompt, no copy is wanted, or their numbers differ.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts:
        raise PokediffError("no prompt given")
    if copies < 1:
        raise PokediffError(f"num_images_per_prompt must be positive, not {copies}")
    negatives = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise PokediffError(f"{len(prompts)} prompts need {len(prompts)} negative_prompt, or one, not {len(negatives)}")
    return [text for text in prompts for _ in range(copies)], [text for text in negatives for _ in range(copies)]


def fit_images(image: Image.Image | None, mask: Image.Image | None, size: int) -> dict[str, np.ndarray]:
    """The arguments `image` and `mask` of `denoise`, (S, S, 4) and (S, S), of PIL images of any size.

    Pictures are fitted into a square; the mask is true where it is white.
    """
    if image is None:
        if mask is not None:
            raise PokediffError("a mask needs an image")
        return {}
    fitted = {"image": fit_square(np.array(image.convert("RGBA")), size)}
    if mask is not None:
        white = np.array(mask.convert("L"))
        fitted["mask"] = fit_square(np.dstack([white] * 4), size)[..., 3] >= 128
    return fitted


def known_pixels(
    image: np.ndarray | None, mask: np.ndarray | None, number: int, size: int, channels: Channels
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`image` in model space (N, C, S, S), and the mask of pixels to draw (N, 1, S, S) bool; None without one.

    Raises PokediffError for a mask without an image, and for another size than (S, S).
    """
    if image is None:
        if mask is not None:
            raise PokediffError("a mask needs an image")
        return None, None
    for name, values, rest in (("image", image, (4,)), ("mask", mask, ())):
        if values is not None and values.shape[values.ndim - len(rest) - 2 :] != (size, size, *rest):
            raise PokediffError(f"{name}: {values.shape}, not (..., {', '.join(map(str, (size, size, *rest)))})")
    known = to_model(torch.from_numpy(np.broadcast_to(image, (number, size, size, 4)).copy()), channels)
    if mask is None:
        return known, None
    return known, torch.from_numpy(np.broadcast_to(mask, (number, size, size)).copy())[:, None] > 0


def take(options: dict[str, Any], part: slice) -> dict[str, Any]:
    """The arguments of `denoise` for some of the pictures: the rows `part` of arguments given per picture."""
    single = {"image": 3, "mask": 2, "negative_prompts": 0}  # dimensions of one for all
    taken = dict(options)
    for name, dims in single.items():
        if (value := options.get(name)) is not None and np.ndim(value) > dims:
            taken[name] = value[part]
    if options.get("noise") is not None:
        taken["noise"] = [values[part] for values in options["noise"]]
    return taken


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise PokediffError(f"{name}: {value!r} is none of {', '.join(choices)}")


def enlarge(x: torch.Tensor, size: int) -> torch.Tensor:
    """(N, C, S, S) to (N, C, size, size), every pixel a square."""
    return x if x.shape[-1] == size else F.interpolate(x, scale_factor=size / x.shape[-1], mode="nearest")


def convert(pictures: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Pictures (N, C, S, S) in [-1, 1] as `PokeDiffPipelineOutput.images`."""
    if output_type == "latent":
        return pictures
    straight = from_model(pictures)
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in straight]
    scaled = straight.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2)
