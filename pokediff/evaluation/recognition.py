"""Does the prompt change the shape? Recognition of concepts (names in several sources), and silhouettes.

A concept is a name that at least FEWEST_SOURCES sources of a data set draw: the cow of five emoji fonts. Its centroid
in a feature network is the mean over the sources' means, and a picture is recognised when the nearest of all centroids
is that of the concept in its prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pokediff.data.captions import style_phrase, with_article
from pokediff.data.dataset import Pictures
from pokediff.data.records import Record

FEWEST_SOURCES = 5
CONCEPTS_DRAWN, SEEDS_PER_CONCEPT = 80, 2
KINDS = ("animal", "monster")  # of the concepts, where the data set says kinds
ANIMALS = ("cat", "fish", "bird", "snake", "ghost", "dragon", "turtle", "robot")
SEEDS_PER_ANIMAL = 16


# ------------------------------------------------------------------------------------------------------- recognition


@dataclass(frozen=True)
class Concepts:
    """The pictures of all concepts of a data set, and which concept each shows."""

    names: tuple[str, ...]  # C concepts
    pictures: Pictures  # N
    of: np.ndarray  # (N,) the concept of each picture
    sources: np.ndarray  # (N,) source of the picture
    style: str  # of the prompts, as the data set calls it

    def drawn(self) -> list[int]:
        """The concepts that are drawn, at most CONCEPTS_DRAWN, evenly spaced, those first that exist in `style`."""
        styles = np.array([record.style for record in self.pictures.records])
        known = sorted(set(self.of[styles == self.style].tolist())) or list(range(len(self.names)))
        return [known[i] for i in np.linspace(0, len(known) - 1, min(CONCEPTS_DRAWN, len(known))).round().astype(int)]

    def prompts(self) -> tuple[list[str], np.ndarray]:
        """The prompts, SEEDS_PER_CONCEPT of each concept drawn, and the concept of each."""
        of = np.repeat(self.drawn(), SEEDS_PER_CONCEPT)
        return [thing_prompt(self.names[concept], self.style) for concept in of], of


def thing_prompt(name: str, style: str) -> str:
    """ "flat emoji of a cow"."""
    return f"{style_phrase(style)} of {with_article(name.lower())}"


def find_concepts(pictures: Pictures, style: str | None = None) -> Concepts | None:
    """The concepts among these pictures; None when there are fewer than two. `style` None: that of most pictures."""
    sources: dict[str, set[str]] = {}
    kinds: dict[str, Counter] = {}
    for record in pictures.records:
        if record.name and record.source and not record.is_species:
            sources.setdefault(record.name, set()).add(record.source)
            kinds.setdefault(record.name, Counter())[record.kind] += 1
    common = {name for name, several in sources.items() if len(several) >= FEWEST_SOURCES}
    alive = {name for name in common if kinds[name].most_common(1)[0][0] in KINDS}
    names = sorted(alive if len(alive) > 1 else common)
    if len(names) < 2:
        return None
    kept = pictures.where(lambda record: record.name in names)
    most = Counter(record.style for record in kept.records if record.style).most_common(1)
    return Concepts(
        tuple(names),
        kept,
        np.array([names.index(str(record.name)) for record in kept.records]),
        np.array([str(record.source) for record in kept.records]),
        style or (most[0][0] if most else ""),
    )


def centroids(features: np.ndarray, of: np.ndarray, sources: np.ndarray, number: int) -> np.ndarray:
    """(number, D) mean over sources of the mean features of each concept; NaN for a concept without pictures.

    features (N, D), of and sources (N,).
    """
    result = np.full((number, features.shape[1]), np.nan)
    for concept in range(number):
        mine = of == concept
        means = [features[mine & (sources == source)].mean(0) for source in np.unique(sources[mine])]
        if means:
            result[concept] = np.mean(means, axis=0)
    return result


def ranks(features: np.ndarray, prompted: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N,) rank of the centroid of the prompt's concept among all centroids, by nearness to a picture; 0: recognised.

    Nearness is the cosine after subtracting the mean of all centroids. features (N, D), prompted (N,), centres (C, D).
    """
    middle = np.nanmean(centres, axis=0)
    x, y = features - middle, centres - middle
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    similarity = np.where(np.isnan(y).any(1), -np.inf, x @ np.nan_to_num(y).T)  # (N, C)
    return (similarity > similarity[np.arange(len(x)), prompted][:, None]).sum(1)


def real_ranks(features: np.ndarray, concepts: Concepts) -> np.ndarray:
    """The ranks of the real pictures in the prompts' style, each against centroids of all other sources.

    features: (N, D) of `concepts.pictures`.
    """
    drawn = set(concepts.drawn())
    chosen = np.array(
        [
            record.style == concepts.style and concept in drawn
            for record, concept in zip(concepts.pictures.records, concepts.of, strict=True)
        ]
    )
    found = []
    for source in np.unique(concepts.sources[chosen]):
        mine = chosen & (concepts.sources == source)
        others = concepts.sources != source
        centres = centroids(features[others], concepts.of[others], concepts.sources[others], len(concepts.names))
        found.append(ranks(features[mine], concepts.of[mine], centres))
    return np.concatenate(found) if found else np.zeros(0, int)


# ------------------------------------------------------------------------------------------------------- silhouettes


def animal_prompts(style: str) -> list[str]:
    """SEEDS_PER_ANIMAL of each of ANIMALS, in turn: (animals, seeds) in one row."""
    return [thing_prompt(animal, style) for animal in ANIMALS for _ in range(SEEDS_PER_ANIMAL)]


def animal_seeds() -> list[int]:
    """The same seeds for every animal."""
    return list(range(SEEDS_PER_ANIMAL)) * len(ANIMALS)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...,) intersection over union of boolean masks (..., H, W); 1 for two empty ones."""
    union = (a | b).sum((-1, -2))
    return np.where(union > 0, (a & b).sum((-1, -2)) / np.maximum(union, 1), 1.0)


def silhouette_overlaps(pictures: np.ndarray, animals: int = len(ANIMALS)) -> tuple[np.ndarray, np.ndarray]:
    """Mean overlap of silhouettes: of different animals from one seed (seeds,), and of one animal from different seeds
    (animals,). A model that follows the word has a low first and, unless it collapses, a second that is not high.

    pictures: straight RGBA uint8 (animals * seeds, H, W, 4), all seeds of the first animal first.
    """
    masks = pictures[..., 3] >= 128
    masks = masks.reshape(animals, -1, *masks.shape[1:])
    seeds = masks.shape[1]
    words = np.stack([overlap(masks[a], masks[b]) for a, b in combinations(range(animals), 2)])  # (pairs, seeds)
    noises = np.stack([overlap(masks[:, a], masks[:, b]) for a, b in combinations(range(seeds), 2)])  # (pairs, animals)
    return words.mean(0), noises.mean(0)


def real_overlaps(pictures: np.ndarray, records: Sequence[Record], pairs: int = 2000, seed: int = 0) -> float:
    """Mean overlap of the silhouettes of two real pictures of different families.

    pictures: straight RGBA uint8 (N, H, W, 4).
    """
    masks = pictures[..., 3] >= 128
    a, b = np.random.default_rng(seed).integers(0, len(masks), (2, pairs))
    families = np.array([record.family_key for record in records])
    other = families[a] != families[b]
    return float(overlap(masks[a[other]], masks[b[other]]).mean())
