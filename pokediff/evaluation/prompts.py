"""The sets of prompts that an evaluation draws."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pokediff.data.captions import style_phrase
from pokediff.data.colors import COLOR_ANCHORS
from pokediff.data.records import Record

GRID_STYLES = ("artwork", "home", "dream-world", "sprite-gen5")  # preferred: one for each style of the recipes
TYPES = ("fire", "water", "grass", "electric", "ghost", "rock")
SEEDS_PER_PAIR = 4
PROMPTS_REPEATED, SEEDS_PER_PROMPT = 16, 5
PARAPHRASES = {  # a rare colour word, and the common one that should draw nearly the same
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
class ColorPrompt:
    style: str  # as a data set calls it
    color: str
    prompt: str


def grid_styles(records: Sequence[Record]) -> tuple[str, ...]:
    """At most four styles of a data set with distinct prompt words: those of GRID_STYLES, else the most frequent."""
    count = Counter(record.style for record in records if record.style)
    preferred = [style for style in GRID_STYLES if style in count]
    if preferred:
        return tuple(preferred)
    by_phrase = {style_phrase(style): style for style, _ in reversed(count.most_common())}
    styles = sorted(by_phrase.values(), key=lambda style: -count[style])[: len(GRID_STYLES)]
    return tuple(styles) or ("artwork",)


def subjects(records: Sequence[Record]) -> tuple[str, ...]:
    """The subjects of the colour grid: TYPES of creatures, or the kinds of things in a data set without species."""
    kinds = sorted({record.kind for record in records if record.kind})
    if kinds and not any(record.is_species for record in records):
        return tuple(kinds[: len(TYPES)])
    return tuple(f"{kind} creature" for kind in TYPES)


def color_grid(styles: Sequence[str], things: Sequence[str] | None = None) -> list[ColorPrompt]:
    """Every basic colour by every thing (default: creatures of TYPES) by every style."""
    things = [f"{kind} creature" for kind in TYPES] if things is None else things
    return [
        ColorPrompt(style, color, f"{style_phrase(style)} of {_article(color)} {color} {thing}")
        for style, thing, color in itertools.product(styles, things, COLOR_ANCHORS)
    ]


def paraphrase_pairs(style: str) -> list[tuple[str, str]]:
    """(prompt with the rare word, prompt with the common one), each pair SEEDS_PER_PAIR times."""
    form = f"{style_phrase(style)} of {{}} {{}} creature"
    pairs = [(form.format(_article(a), a), form.format(_article(b), b)) for a, b in PARAPHRASES.items()]
    return [pair for pair in pairs for _ in range(SEEDS_PER_PAIR)]


def repeated(captions: Sequence[Sequence[str]]) -> list[str]:
    """Captions of PROMPTS_REPEATED pictures, spread evenly, each SEEDS_PER_PROMPT times."""
    places = np.linspace(0, len(captions) - 1, min(PROMPTS_REPEATED, len(captions))).round().astype(int)
    return [captions[place][0] for place in places for _ in range(SEEDS_PER_PROMPT)]


def held_out_captions(captions: Sequence[Sequence[str]], number: int) -> list[str]:
    """`number` captions: the first of each picture, then the second of each, and so on."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*captions))
    return list(itertools.islice((caption for caption in turns if caption is not None), number))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
