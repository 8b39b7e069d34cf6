"""One job for each picture, from the prompts and the settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pokediff.config import SampleConfig
from pokediff.errors import PokediffError
from pokediff.files import read_text, require_file

MAX_SEED = 2**32 - 1  # of a random seed


@dataclass(frozen=True)
class Job:
    """One picture to draw: a prompt and a seed, or an interpolation from them to another prompt and seed."""

    prompt: str
    seed: int
    to: tuple[str, int] | None = None
    share: float = 0.0  # of `to`, 0 to 1

    @property
    def nearest_prompt(self) -> str:
        """The prompt that an interpolation is nearer to."""
        return self.to[0] if self.to is not None and self.share >= 0.5 else self.prompt

    def facts(self) -> dict[str, Any]:
        """Its row in sample.json."""
        facts: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed}
        if self.to is not None:
            facts |= {"to_prompt": self.to[0], "to_seed": self.to[1], "share": round(self.share, 4)}
        return facts


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the settings and of the prompts file. Raises PokediffError when there are none."""
    prompts = list(config.prompt)
    if config.prompts_file:
        path = Path(config.prompts_file)
        require_file(path, "prompts file")
        lines = (line.strip() for line in read_text(path).splitlines())
        prompts += [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise PokediffError('no prompt: give one in quotes ("a blue water turtle") or --prompts-file FILE')
    return prompts


def make_jobs(prompts: Sequence[str], config: SampleConfig) -> list[Job]:
    """All jobs of a drawing, in order: the k-th picture has seed + k. `config.seed` must be set.

    Interpolation: `interpolate` pictures from each prompt to the next, without repeating the ends; with one prompt,
    from each of its seeds to the next. Variations: the first picture of each prompt, then pictures whose noise is
    interpolated (slerp) by `variation` towards that of their own seed.

    Raises PokediffError for an interpolation of one picture.
    """
    assert config.seed is not None
    number, seed = config.num_images_per_prompt, config.seed
    if config.interpolate:
        if len(prompts) < 2 and number < 2:
            raise PokediffError("interpolate: give two prompts, or --num-images-per-prompt 2 for two seeds of one")
        stops = prompts if len(prompts) > 1 else list(prompts) * number
        ends = [(prompt, seed + k) for k, prompt in enumerate(stops)]
        shares = np.linspace(0, 1, config.interpolate).tolist()
        return [
            Job(*here, to=there, share=share)
            for leg, (here, there) in enumerate(pairwise(ends))
            for share in (shares if leg == 0 else shares[1:])
        ]
    texts = [prompt for prompt in prompts for _ in range(number)]
    if not config.variation:
        return [Job(text, seed + k) for k, text in enumerate(texts)]
    shares = [config.variation if k % number else 0.0 for k in range(len(texts))]
    return [Job(text, seed, to=(text, seed + k), share=shares[k]) for k, text in enumerate(texts)]


def slug(prompt: str) -> str:
    """A name for files and folders from a prompt: its words in lower case, of any alphabet."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "sample"
