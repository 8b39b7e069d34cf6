"""A look inside: which word drew what.

A word's influence is what changes when it is left out (Zeiler & Fergus, "Visualizing and Understanding Convolutional
Networks", 2014, section 4.2, who cover parts of the input). The text reaches our network as one vector, so there is no
map of attention to a word to be shown; what is shown here is what the prediction loses with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pokediff.data.images import from_model
from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline

MAX_WORDS = 24
LEVELS = (8.0, 3.0, 1.0, 0.3)  # sigmas at which the words are left out


@dataclass(frozen=True)
class Influence:
    """Of W words at L noise levels, the noisiest first."""

    words: tuple[str, ...]
    sigmas: tuple[float, ...]  # (L,)
    x0: np.ndarray  # (L, H, W, 4) straight RGBA uint8: what the whole prompt lets the network see there
    maps: np.ndarray  # (W, L, H, W) float32: how far x0 moves without the word, 0 to 2, the range of model space
    picture: np.ndarray  # (H, W, 4) straight RGBA uint8: what comes out

    @property
    def shares(self) -> np.ndarray:
        """(W, L): the mean of a word's map over that of all words'; 1 / W each where no word matters."""
        means = self.maps.mean(axis=(2, 3))
        total = means.sum(0, keepdims=True)
        return np.where(total > 0, means / np.maximum(total, 1e-12), 1 / max(1, len(self.words)))


def words_of(prompt: str) -> list[str]:
    """The words of a prompt in their order; hyphens and apostrophes belong to a word."""
    return re.findall(r"\w+(?:[-'’]\w+)*", prompt)


def without(prompt: str, index: int) -> str:
    """The prompt without its word number `index`, all else as it stands."""
    word = list(re.finditer(r"\w+(?:[-'’]\w+)*", prompt))[index]
    return re.sub(r"\s+", " ", prompt[: word.start()] + prompt[word.end() :]).strip()


def word_influence(pipeline: PokeDiffPipeline, prompt: str, seed: int, **options: Any) -> Influence:
    """Draw `prompt` with `seed`, and at the steps nearest to the sigmas of LEVELS predict x0 again without each word.

    `options` are those of `denoise`. Guidance takes part in the drawing, not in the comparison.
    Raises PokediffError for a prompt without words or with more than MAX_WORDS of them.
    """
    *_, found = watch_words(pipeline, prompt, seed, **options)
    assert found is not None  # the last one
    return found


def watch_words(pipeline: PokeDiffPipeline, prompt: str, seed: int, **options: Any) -> Iterator[Influence | None]:
    """`word_influence` in small parts: None after every evaluation, so that others may go between, then the result."""
    words = words_of(prompt)
    if not 1 <= len(words) <= MAX_WORDS:
        raise PokediffError(f"this wants a prompt of 1 to {MAX_WORDS} words, not {len(words)}")
    prompts = [prompt, *(without(prompt, index) for index in range(len(words)))]
    text = pipeline.encode_prompt(prompts)  # (1 + W, D)
    steps = []
    for step in pipeline.denoise(text[:1], [seed], **options):
        steps.append(step)
        yield None
    last = steps.pop()
    steps = [step for step in steps if step.low_res is None]  # words decide what is drawn before it is enlarged
    chosen = [min(steps, key=lambda step: abs(np.log(step.sigma / level))) for level in LEVELS]
    chosen = list({step.index: step for step in chosen}.values())  # few steps: two levels may share one
    predicted = []
    for step in chosen:
        predicted.append(pipeline.predict_x0(step, text))
        yield None
    seen = torch.stack(predicted, dim=1)  # (1 + W, L, C, H, W)
    maps = (seen[1:] - seen[:1]).square().mean(dim=2).sqrt()
    yield Influence(
        tuple(words),
        tuple(step.sigma for step in chosen),
        from_model(seen[0]),
        maps.float().cpu().numpy(),
        from_model(last.x0)[0],
    )
