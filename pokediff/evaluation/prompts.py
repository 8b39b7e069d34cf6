"""Does it draw what was asked for? Colours, opaque pixels and palettes need no network and cannot be fooled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pokediff.data.captions import STYLES
from pokediff.data.colors import COLOR_ANCHORS, main_colors
from pokediff.data.images import composite, premultiply
from pokediff.data.records import Record

GRID_STYLES = ("artwork", "home", "dream-world", "sprite-gen5")  # one for each way to ask for a style
TYPES = ("fire", "water", "grass", "electric", "ghost", "rock")
SEEDS_PER_PAIR = 4
PROMPTS_REPEATED, SEEDS_PER_PROMPT = 16, 5
PARAPHRASES = {  # a word, and the plain one that should draw nearly the same
    "crimson": "red",
    "scarlet": "red",
    "azure": "blue",
    "emerald": "green",
    "golden": "yellow",
    "violet": "purple",
    "charcoal": "black",
    "chocolate": "brown",
}


@dataclass(frozen=True)
class Ask:
    style: str  # as a data set calls it
    color: str
    prompt: str


def color_grid(styles: Sequence[str]) -> list[Ask]:
    """Every basic colour by every type of TYPES by every style."""
    return [
        Ask(style, color, f"{_phrase(style)} of {_article(color)} {color} {kind} creature")
        for style, kind, color in itertools.product(styles, TYPES, COLOR_ANCHORS)
    ]


def paraphrase_pairs(style: str) -> list[tuple[str, str]]:
    """(prompt with the rare word, prompt with the plain one), each pair SEEDS_PER_PAIR times."""
    form = f"{_phrase(style)} of {{}} {{}} creature"
    pairs = [(form.format(_article(a), a), form.format(_article(b), b)) for a, b in PARAPHRASES.items()]
    return [pair for pair in pairs for _ in range(SEEDS_PER_PAIR)]


def repeated(captions: Sequence[Sequence[str]]) -> list[str]:
    """Captions of PROMPTS_REPEATED pictures, spread evenly, each SEEDS_PER_PROMPT times."""
    places = np.linspace(0, len(captions) - 1, min(PROMPTS_REPEATED, len(captions))).round().astype(int)
    return [captions[place][0] for place in places for _ in range(SEEDS_PER_PROMPT)]


def color_hits(pictures: np.ndarray, colors: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool each: is the colour the main one, is it one of the two main ones (CIELAB, opaque pixels)?

    pictures: straight RGBA uint8 (N, H, W, 4).
    """
    found = [main_colors(picture) for picture in pictures]
    pairs = list(zip(found, colors, strict=True))
    return np.array([names[:1] == (color,) for names, color in pairs]), np.array([color in n for n, color in pairs])


def named_colors(pictures: np.ndarray, records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    """The real pictures whose colour people wrote down (the Pokédex; not for shiny ones), and these colours."""
    known = [i for i, record in enumerate(records) if record.color in COLOR_ANCHORS and not record.shiny]
    return pictures[known], [str(records[i].color) for i in known]


def opaque_share(pictures: np.ndarray) -> np.ndarray:
    """(N,) share of pixels with alpha of at least one half."""
    return (pictures[..., 3] >= 128).mean((1, 2))


def half_transparent_share(pictures: np.ndarray) -> np.ndarray:
    """(N,) share of pixels that are neither there nor not there: 10 % to 90 % alpha."""
    alpha = pictures[..., 3] / 255
    return ((alpha > 0.1) & (alpha < 0.9)).mean((1, 2))


def border_alpha(pictures: np.ndarray) -> np.ndarray:
    """(N,) mean alpha, 0 to 1, of the outermost rows and columns."""
    alpha = pictures[..., 3] / 255
    edge = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], axis=1)
    return edge.mean(1)


def palette_size(pictures: np.ndarray, levels: int = 32) -> np.ndarray:
    """(N,) different colours of opaque pixels, each channel in `levels` steps."""
    step = 256 // levels
    return np.array([len(np.unique(picture[picture[..., 3] >= 128][:, :3] // step, axis=0)) for picture in pictures])


def picture_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) root mean square difference of premultiplied pixels, 0 to 1."""
    difference = (premultiply(a).astype(np.float32) - premultiply(b).astype(np.float32)) / 255
    return np.sqrt((difference**2).mean((1, 2, 3)))


def sharpness(pictures: np.ndarray) -> np.ndarray:
    """(N,) mean absolute difference of neighbouring pixels on white, 0 to 1: blurred pictures score low."""
    rgb = np.stack([composite(picture) for picture in pictures]).astype(np.float32) / 255
    return (np.abs(np.diff(rgb, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(rgb, axis=2)).mean((1, 2, 3))) / 2


def _phrase(style: str) -> str:
    return STYLES.get(style, style.replace("-", " "))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
