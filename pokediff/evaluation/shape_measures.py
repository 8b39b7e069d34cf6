"""Measures of prompt adherence in subject, style and shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pokediff.data.captions import style_phrase
from pokediff.evaluation import copies, recognition
from pokediff.evaluation.classifiers import LABELS, Judge
from pokediff.evaluation.distances import mean_estimate, share_estimate
from pokediff.evaluation.generators import Generated
from pokediff.evaluation.recognition import Concepts
from pokediff.evaluation.reference import Reference
from pokediff.evaluation.report import Report

RECOGNITION, SILHOUETTES, JUDGE = "Recognition", "Silhouettes", "A second judge"


def measure_recognition(
    report: Report,
    concepts: Concepts,
    drawn: np.ndarray,
    prompted: np.ndarray,
    features: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Top-1 and top-5 accuracy of the nearest concept centroid.

    drawn: straight RGBA uint8 (N, H, W, 4); prompted: (N,) their concepts.
    """
    true = concepts.pictures.straight()
    real_features, total = features(true), len(concepts.names)
    centres = recognition.centroids(real_features, concepts.of, concepts.sources, total)
    found = recognition.ranks(features(drawn), prompted, centres)
    real = recognition.real_ranks(real_features, concepts)
    note = (
        f"of {total} concepts, {len(set(prompted.tolist()))} drawn as {style_phrase(concepts.style)}; "
        f"real: {len(real)} real pictures of these, each against the other sources; worthless: chance"
    )
    for k, name in ((1, "the nearest concept is that of the prompt"), (5, "it is among the nearest five")):
        value = float((real < k).mean()) if len(real) else None
        report.add(RECOGNITION, name, share_estimate(found < k), len(found), real=value, worthless=k / total, note=note)
    families = [record.family_key for record in concepts.pictures.records]
    near = copies.nearest_in_pixels(drawn, true, families)
    note = "of these drawings, among the training pictures of all concepts: copies are recognised, too"
    report.add(RECOGNITION, "copies among them", share_estimate(near.copies), len(drawn), note=note)
    shown = np.linspace(0, len(drawn) - 1, min(64, len(drawn))).astype(int)
    names = ", ".join(concepts.names[prompted[i]] for i in shown)
    report.pictures["Named things"] = (f"From left to right: {names}.", drawn[shown], 16)
    report.tables["recognition"] = [
        {"concept": concepts.names[concept], "places": ", ".join(str(1 + rank) for rank in found[prompted == concept])}
        for concept in dict.fromkeys(prompted.tolist())
    ]


def measure_silhouettes(report: Report, drawn: Generated, reference: Reference) -> None:
    """Overlap of silhouettes: other animals from one seed, and one animal from other seeds."""
    words, noises = recognition.silhouette_overlaps(drawn.pixels)
    real = recognition.real_overlaps(reference.pixels, reference.real.records)
    n = f"{len(noises)} animals, {len(words)} seeds"
    note = "mean IoU; real: any two real pictures; a model that ignores the animal has 1 in the first row"
    report.add(SILHOUETTES, "other animal, same seed", mean_estimate(words), n, real=real, worthless=1.0, note=note)
    report.add(SILHOUETTES, "same animal, other seed", mean_estimate(noises), n, real=real, note=note)
    seeds = len(words)
    first = np.concatenate([np.arange(0, min(8, seeds)) + seeds * animal for animal in range(len(noises))])
    words_shown = f"A row for each of {', '.join(recognition.ANIMALS)}; a column for each seed."
    report.pictures["Animals by seeds"] = (words_shown, drawn.pixels[first], min(8, seeds))


def judged(reference: Reference, styles: Sequence[str], split: str, each: int) -> list[int]:
    """Positions in `reference.everything` of at most `each` held-out pictures of every style whose words are those of
    `styles`, to be judged; their first captions are the prompts.
    """
    held_out = {record.file_name for record in reference.everything.split(split).records}  # type: ignore[arg-type]
    of: dict[str, list[int]] = {style_phrase(style): [] for style in styles}
    for index, record in enumerate(reference.everything.records):
        phrase = LABELS["style"](record)
        if phrase in of and record.file_name in held_out:
            of[phrase].append(index)
    return [
        positions[i]
        for positions in of.values()
        for i in np.linspace(0, len(positions) - 1, min(each, len(positions))).round().astype(int)
    ]


def measure_judge(
    report: Report,
    drawn: np.ndarray,
    positions: Sequence[int],
    styles: Sequence[str],
    reference: Reference,
    cache: Path | None = None,
) -> None:
    """Accuracy of a classifier trained on real pictures: style and kind of the picture whose caption was the prompt.

    drawn: straight RGBA uint8 (N, H, W, 4), one for each of `positions` (see `judged`).
    """
    phrases = {style_phrase(style) for style in styles}
    training = reference.training.where(lambda record: LABELS["style"](record) in phrases)
    try:
        judge = Judge(training.straight(), training.records, cache=cache)
    except ValueError as error:
        report.skip(JUDGE, "style and kind", str(error))
        return
    held_out = reference.everything.pick(positions)
    said, said_of_real = judge(drawn), judge(held_out.straight())
    rows = []
    for name, known in judge.classes.items():
        truth = np.array([LABELS[name](record) for record in held_out.records])
        judgeable = np.isin(truth, known)
        hits, real = (labels[name][judgeable] == truth[judgeable] for labels in (said, said_of_real))
        if not len(hits):
            continue
        words = f"{len(known)} classes, trained on {len(training)} real pictures; real: the pictures of the captions"
        figures = {"real": float(real.mean()), "worthless": 1 / len(known)}
        report.add(JUDGE, f"it sees the {name} of the caption", share_estimate(hits), len(hits), **figures, note=words)
        for label in known:
            mine = truth[judgeable] == label
            if mine.any():
                shares = {"drawn": round(float(hits[mine].mean()), 3), "real": round(float(real[mine].mean()), 3)}
                rows.append({"judged": name, "class": label, "n": int(mine.sum()), **shares})
    report.tables["second judge"] = rows
