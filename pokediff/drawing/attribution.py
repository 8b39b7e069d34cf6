"""Attribution: the effect of each word of a prompt on the picture.

The influence of a word is the change of x0 when it is left out (Zeiler & Fergus, "Visualizing and Understanding
Convolutional Networks", 2014, section 4.2, where parts of the input are covered). The denoisers receive the prompt as
one pooled vector, so there are no cross-attention maps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pokediff.config import Sampling
from pokediff.data.images import from_model
from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline

MAX_WORDS = 24
SIGMAS = (8.0, 3.0, 1.0, 0.3)  # at which the words are left out
WORD = re.compile(r"\w+(?:[-'’]\w+)*")  # hyphens and apostrophes belong to a word


@dataclass(frozen=True)
class Influence:
    """Of W words at L noise levels, the noisiest first. S is the size of the base, P that of the drawing."""

    words: tuple[str, ...]
    sigmas: tuple[float, ...]  # (L,)
    x0: np.ndarray  # (L, S, S, 4) straight RGBA uint8: x0 predicted with the whole prompt
    maps: np.ndarray  # (W, L, S, S) float32: how far x0 moves without the word, 0 to 2 (the range of model space)
    picture: np.ndarray  # (P, P, 4) straight RGBA uint8: the drawing

    @property
    def shares(self) -> np.ndarray:
        """(W, L): the mean of a word's map over that of all words'; 1 / W each where no word changes anything."""
        means = self.maps.mean(axis=(2, 3))
        total = means.sum(0, keepdims=True)
        return np.where(total > 0, means / np.maximum(total, 1e-12), 1 / max(1, len(self.words)))


def words_of(prompt: str) -> list[str]:
    """The words of a prompt in their order."""
    return WORD.findall(prompt)


def without(prompt: str, index: int) -> str:
    """The prompt without its word number `index`, everything else unchanged."""
    word = list(WORD.finditer(prompt))[index]
    return re.sub(r"\s+", " ", prompt[: word.start()] + prompt[word.end() :]).strip()


def word_influence(pipeline: PokeDiffPipeline, prompt: str, seed: int, sampling: Sampling | None = None) -> Influence:
    """Draw `prompt` with `seed`, and at the steps nearest to SIGMAS predict x0 again without each word.

    Guidance is used for the drawing, not for the comparison. Only the steps of the smallest size are compared,
    where the prompt determines the picture. Raises PokediffError for a prompt without words or with more than
    MAX_WORDS of them.
    """
    *_, found = watch_words(pipeline, prompt, seed, sampling)
    assert found is not None  # the last one
    return found


def watch_words(
    pipeline: PokeDiffPipeline, prompt: str, seed: int, sampling: Sampling | None = None
) -> Iterator[Influence | None]:
    """`word_influence` in small parts: None after every evaluation, so that other requests can run, then the result."""
    words = words_of(prompt)
    if not 1 <= len(words) <= MAX_WORDS:
        raise PokediffError(f"the prompt must have 1 to {MAX_WORDS} words, not {len(words)}")
    text = pipeline.encode_prompt([prompt, *(without(prompt, index) for index in range(len(words)))])  # (1 + W, D)
    steps = []
    for step in pipeline.denoise(text[:1], [seed], sampling):
        steps.append(step)
        yield None
    last = steps.pop()
    steps = [step for step in steps if step.x.shape == steps[0].x.shape]
    chosen = [min(steps, key=lambda step: abs(np.log(step.sigma / sigma))) for sigma in SIGMAS]
    chosen = list({step.index: step for step in chosen}.values())  # of few steps, one may be nearest to two sigmas
    predicted = []
    for step in chosen:
        predicted.append(pipeline.predict_x0(step, text))
        yield None
    x0 = torch.stack(predicted, dim=1)  # (1 + W, L, C, S, S)
    maps = (x0[1:] - x0[:1]).square().mean(dim=2).sqrt()
    yield Influence(
        tuple(words),
        tuple(step.sigma for step in chosen),
        from_model(x0[0]),
        maps.float().cpu().numpy(),
        from_model(last.x0)[0],
    )
