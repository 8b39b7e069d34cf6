"""The measures of a report: each adds figures, and their pictures, tables and curves.

A figure that cannot be measured is a row with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from pokediff.config import EvaluateConfig
from pokediff.data.captions import style_phrase
from pokediff.data.dataset import Pictures
from pokediff.data.images import composite
from pokediff.drawing.pixelart import PIXEL_COLORS, finish, is_pixel_prompt
from pokediff.errors import PokediffError
from pokediff.evaluation import copies, distances, looks, prompts
from pokediff.evaluation.classifiers import two_sample_hits
from pokediff.evaluation.distances import Estimate, jackknife, manifold, mean_estimate, share_estimate
from pokediff.evaluation.features import CachedFeatures, Lpips, clip_similarity
from pokediff.evaluation.generators import Generated
from pokediff.evaluation.reference import Reference
from pokediff.evaluation.report import Report

KID_UNIT = 1000  # kernel distances are reported times 1000, as in the literature
COPIES, PROMPT = "Does it copy?", "Does it follow the prompt?"
COPY_NOTE = "share whose nearest training picture is three times nearer than that of any other family"


# ------------------------------------------------------------------------------------------------------- distributions


def measure_distances(
    report: Report, net: CachedFeatures, generated: Generated, reference: Reference, config: EvaluateConfig
) -> None:
    """Kernel and Fréchet distance, two-sample accuracy, precision to coverage, and copies, in one feature network."""
    section = distance_section(net.name)
    fake, true = net(generated.pixels), net(reference.pixels)
    rng = np.random.default_rng(config.seed)
    noise = rng.integers(0, 256, (min(len(true), 200), *reference.pixels.shape[1:]), dtype=np.uint8)
    noise[..., 3] = 255
    _kernel_distance(report, section, net.note, fake, true, net(noise), reference, config)
    _two_samples(report, section, fake, true, reference, config.seed)
    _neighbours(report, section, fake, true, reference, config.seed)

    known = net(reference.same_style.straight())
    families = [record.family_key for record in reference.same_style.records]
    found, held_out = (copies.nearest_in_features(part, known, families).copies for part in (fake, true))
    name = f"copies in features {net.name.split(':')[0]}"
    report.add(COPIES, name, share_estimate(found), len(fake), real=float(held_out.mean()), note=COPY_NOTE)


def distance_section(features: str) -> str:
    return f"Distance of distributions, features {features.split(':')[0]}"


def _kernel_distance(
    report: Report,
    section: str,
    note: str,
    fake: np.ndarray,
    true: np.ndarray,
    noise: np.ndarray,
    reference: Reference,
    config: EvaluateConfig,
) -> None:
    n, one = f"{len(fake)} generated, {len(true)} real", np.repeat(true[:1], len(true), axis=0)
    estimate = distances.kid_bootstrap(fake, true, seed=config.seed)
    report.add(
        section,
        "kernel distance (KID, unbiased) x 1000",
        Estimate(*(KID_UNIT * value for value in asdict(estimate).values())),
        n,
        real=KID_UNIT * float(np.mean([distances.kid(true[a], true[b]) for a, b in reference.halves])),
        worthless=KID_UNIT * min(distances.kid(noise, true), distances.kid(one, true)),
        note=f"{note}; real: two halves of the real families; worthless: the better of noise and one picture repeated",
    )
    for subsets, wanted, protocol in (
        (config.kid_subsets, config.kid_subset_size, "as papers report it; its interval is one standard deviation"),
        (20, 50, "PikaPikaGen's protocol (it had Inception features); its interval is one standard deviation"),
    ):
        size = min(wanted, len(fake), len(true))
        mean, deviation = distances.kid_subsets(fake, true, subsets, size, seed=config.seed)
        spread = Estimate(KID_UNIT * mean, KID_UNIT * (mean - deviation), KID_UNIT * (mean + deviation))
        report.add(section, f"the same over {subsets} subsets of {size}, x 1000", spread, n, note=protocol)


def _two_samples(
    report: Report, section: str, fake: np.ndarray, true: np.ndarray, reference: Reference, seed: int
) -> None:
    families = reference.families
    hits = two_sample_hits(true, fake, families, [f"generated {i}" for i in range(len(fake))], seed)
    real = [two_sample_hits(true[a], true[b], families[a], families[b], seed).mean() for a, b in reference.halves[:5]]
    report.add(
        section,
        "accuracy of a two-sample classifier (C2ST)",
        share_estimate(hits),
        f"{len(hits) // 2} generated, {len(hits) // 2} real",
        real=float(np.mean(real)),
        worthless=1.0,
        note="linear, cross-validated by families; 0.5: cannot be told apart; real: two halves of the real families",
    )


def _neighbours(
    report: Report, section: str, fake: np.ndarray, true: np.ndarray, reference: Reference, seed: int
) -> None:
    """Fréchet distance, precision, recall, density, coverage, all at equal numbers."""
    same = min(len(fake), len(true))
    n = f"{same} generated, {same} real"
    equal, true_equal = fake[np.random.default_rng(seed).permutation(len(fake))[:same]], true[:same]
    report.add(
        section,
        "Fréchet distance (FID)",
        jackknife(lambda index: distances.frechet(equal[index], true_equal[index]), same, seed=seed),
        n,
        real=float(np.mean([distances.frechet(true[a], true[b]) for a, b in reference.halves])),
        note="biased upwards by about 1/n: compare at equal n only; real has half the pictures, so more bias",
    )
    first, second = reference.halves[0]
    half = min(len(first), len(second))
    for kind, real in manifold(true[first[:half]], true[second[:half]]).items():

        def statistic(index: np.ndarray, kind: str = kind) -> float:
            return manifold(true_equal[index], equal[index])[kind]

        estimate = jackknife(statistic, same, seed=seed, most=np.inf if kind == "density" else 1.0)
        note = "real: one half of the real families in place of the generated pictures"
        report.add(section, kind, estimate, n, real=real, note=note)


# -------------------------------------------------------------------------------------------------------------- pixels


def measure_looks(report: Report, fake: np.ndarray, true: np.ndarray) -> None:
    """Properties of the pixels that are visible at a glance, drawn and real."""
    for name, measure in looks.LOOKS.items():
        estimate = mean_estimate(measure(fake))
        report.add("How the pictures are made", name, estimate, len(fake), real=float(measure(true).mean()))


def measure_copies(report: Report, generated: Generated, reference: Reference) -> None:
    """The nearest training picture of every generated one, in pixels, and how near real held-out pictures come."""
    records, known = reference.training.records, reference.training_pixels
    families = [record.family_key for record in records]
    found = copies.nearest_in_pixels(generated.pixels, known, families)
    held_out = copies.nearest_in_pixels(reference.pixels, known, families)
    n, threshold = len(generated.pixels), float(np.percentile(held_out.distance, 1))
    real = float(held_out.copies.mean())
    report.add(COPIES, "copies in pixels", share_estimate(found.copies), n, real=real, note=COPY_NOTE)
    near, note = share_estimate(found.distance < threshold), f"distance in pixels below {threshold:.4f}"
    name = "nearer to a training picture than 99 % of real held-out ones"
    report.add(COPIES, name, near, n, real=0.01, note=f"{note}; small figures are nearer to all pictures")
    mean, real = mean_estimate(found.distance), float(held_out.distance.mean())
    report.add(COPIES, "distance to the nearest training picture", mean, n, real=real)
    worst = found.ratio.argsort()[:20]
    pairs = np.stack([picture for i in worst for picture in (generated.pixels[i], known[found.index[i]])])
    words = "Left the generated picture, right its nearest training picture; the most suspicious first."
    report.pictures["The twenty nearest to a training picture"] = (words, pairs, 10)
    report.tables["nearest training pictures"] = [
        {
            "generated": int(i),
            "prompt": generated.prompts[i],
            "training picture": records[found.index[i]].file_name,
            "name": records[found.index[i]].name or "",
            "distance": round(float(found.distance[i]), 4),
            "ratio": round(float(found.ratio[i]), 3),
            "copy": bool(found.copies[i]),
        }
        for i in worst
    ]
    report.curves["copies"] = {
        "generated": np.sort(found.ratio).round(4).tolist(),
        "real": np.sort(held_out.ratio).round(4).tolist(),
    }


# ------------------------------------------------------------------------------------------------------------- prompts


def measure_colors(
    report: Report, grid: Sequence[prompts.ColorPrompt], drawn: np.ndarray, reference: Reference
) -> None:
    """How often the colour of the prompt is a main colour of the drawing."""
    columns = list(dict.fromkeys(cell.color for cell in grid))
    first, either = looks.color_hits(drawn, [cell.color for cell in grid])
    named, colors = looks.named_colors(reference.pixels, reference.real.records)
    real = [hits.mean() for hits in looks.color_hits(named, colors)] if len(named) else [None, None]
    note = "real: pictures that have the colour that the Pokédex names" if len(named) else "no real colours are named"
    for name, hits, value in zip(("the main one", "one of the two main ones"), (first, either), real, strict=True):
        report.add(PROMPT, f"colour of the prompt is {name}", share_estimate(hits), len(hits), real=value, note=note)
    mine = {color: np.array([cell.color == color for cell in grid]) for color in columns}
    report.tables["colours of the prompt"] = [
        {
            "colour": color,
            "n": int(mine[color].sum()),
            "main": round(float(first[mine[color]].mean()), 3),
            "one of two": round(float(either[mine[color]].mean()), 3),
        }
        for color in columns
    ]
    words = f"A row for each style and subject, a column for each colour: {', '.join(columns)}."
    report.pictures["Every colour by every subject"] = (words, drawn, len(columns))


def measure_styles(report: Report, grid: Sequence[prompts.ColorPrompt], drawn: np.ndarray, real: Pictures) -> None:
    """Each style against real pictures: opacity, number of colours, length of runs of one colour."""
    columns = {
        "opaque": looks.opaque_share,
        "half-transparent": looks.half_transparent_share,
        "colours": looks.palette_size,
        "run length": looks.run_length,
    }
    rows = []
    for style in dict.fromkeys(cell.style for cell in grid):
        mine = np.array([cell.style == style for cell in grid])
        pictures = real.where(lambda record, style=style: record.style == style)  # type: ignore[misc]
        true = pictures.straight() if len(pictures) else None
        hits = looks.color_hits(drawn[mine], [cell.color for cell in grid if cell.style == style])[0]
        row: dict[str, object] = {"style": style, "n": int(mine.sum()), "main colour": f"{hits.mean():.2f}"}
        for name, measure in columns.items():
            theirs = "none" if true is None else f"{measure(true).mean():.3g}"
            row[f"{name} (real)"] = f"{measure(drawn[mine]).mean():.3g} ({theirs})"
        rows.append({**row, "n real": len(pictures)})
        if is_pixel_prompt(phrase := style_phrase(style)):
            finished = np.stack([finish(picture, PIXEL_COLORS, hard_alpha=True) for picture in drawn[mine]])
            for name, measure in (("colours", looks.palette_size), ("length of runs of one colour", looks.run_length)):
                value = None if true is None else float(measure(true).mean())
                for words, shown in ((phrase, drawn[mine]), (f"{phrase}, as `sample` saves it", finished)):
                    report.add("Pixel art", f"{name}, {words}", mean_estimate(measure(shown)), len(shown), real=value)
    report.tables["styles"] = rows


def measure_paraphrases(report: Report, rare: np.ndarray, common: np.ndarray) -> None:
    """Distance between drawings of a rare and a common colour word from the same noise."""
    other = np.roll(common, prompts.SEEDS_PER_PAIR, axis=0)  # another colour, another noise
    ratio = looks.picture_distance(rare, common) / looks.picture_distance(rare, other).mean()
    note = "distance of the pictures over the distance to those of another colour and seed; 0 is the same picture"
    name = "rare colour word against the common one, same seed"
    report.add(PROMPT, name, mean_estimate(ratio), len(ratio), worthless=1.0, note=note)


def measure_variety(report: Report, drawn: np.ndarray, true: np.ndarray, config: EvaluateConfig) -> None:
    """How different are the pictures of one prompt? Mean pairwise LPIPS within each prompt's pictures."""
    section, name = "Diversity", "LPIPS between pictures of one prompt"
    words = "Inception Score is not measured: it rewards resemblance to ImageNet's classes"
    if config.lpips is None:
        report.skip(section, name, f"no network was given (--lpips squeeze:FILE). {words}")
        return
    lpips = Lpips(config.lpips)
    seeds = prompts.SEEDS_PER_PROMPT
    a, b = np.triu_indices(seeds, 1)
    groups = [drawn[start : start + seeds] for start in range(0, len(drawn), seeds)]
    within = np.array([lpips(group[a], group[b], config.background).mean() for group in groups])
    order = np.random.default_rng(0).permutation(len(true))
    unlike = lpips(true[order[:-1]], true[order[1:]], config.background).mean()
    note = f"real: between any two real pictures, so an upper bound; 0 is one picture repeated. {words}"
    report.add(section, name, mean_estimate(within), f"{len(groups)} prompts of {seeds}", real=float(unlike), note=note)


def measure_clip(report: Report, generated: Generated, config: EvaluateConfig) -> None:
    """CLIP score, and how often a picture finds its own caption among all captions of the prompts."""
    name = "CLIP score and retrieval"
    if config.clip is None:
        report.skip(PROMPT, name, "no CLIP was given (--clip openai/clip-vit-base-patch32, or a folder)")
        return
    similarity = clip_similarity(config.clip, generated.pixels, generated.prompts, config.background)
    texts = list(dict.fromkeys(generated.prompts))
    own = np.array([texts.index(prompt) for prompt in generated.prompts])
    score = similarity[np.arange(len(own)), own]
    note = f"{config.clip}; cosine of picture and caption, relative only: it sees enlarged sprites"
    report.add(PROMPT, "CLIP score", mean_estimate(score), len(own), note=note)
    rank = (similarity > score[:, None]).sum(1)
    for k in (1, 5):
        value, note = share_estimate(rank < k), f"of {len(texts)} captions"
        report.add(PROMPT, f"retrieval R@{k}", value, len(own), worthless=k / len(texts), note=note)


def reconstruction_errors(fake: np.ndarray, true: np.ndarray, background: str) -> dict[str, np.ndarray]:
    """L1 and L2 in [0, 1], PSNR and SSIM of pairs, straight RGBA uint8 (N, S, S, 4), on a background; each (N,).

    Raises PokediffError without torchmetrics.
    """
    import torch

    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError:
        raise PokediffError('SSIM needs torchmetrics: pip install "pokediff[eval]"') from None
    on_background = (composite(rgba, background) for rgba in (fake, true))
    x, y = (torch.from_numpy(rgb).permute(0, 3, 1, 2).double() / 255 for rgb in on_background)
    squared = ((x - y) ** 2).mean((1, 2, 3))
    pairs = zip(x.split(16), y.split(16), strict=True)  # SSIM holds ten blurred copies: 500 of 128 px take 40 GB
    return {
        "L1": (x - y).abs().mean((1, 2, 3)).numpy(),
        "L2": squared.numpy(),
        "PSNR, dB": -10 * squared.clamp(min=1e-10).log10().numpy(),
        "SSIM": torch.cat([torch.as_tensor(ssim(*pair, data_range=1.0, reduction="none")) for pair in pairs]).numpy(),
    }


def measure_reconstruction(report: Report, generated: Generated, reference: Reference, config: EvaluateConfig) -> None:
    """Distance to the very picture whose caption was the prompt, for systems that regress it."""
    section, names = "Reconstruction", "L1, L2, PSNR, SSIM"
    found = reference.captioned(generated.prompts)
    if not found:
        report.skip(section, names, "no prompt is a caption of the reference")
        return
    fake, true = generated.pixels[[i for i, _ in found]], reference.pixels[[j for _, j in found]]
    try:
        values = reconstruction_errors(fake, true, config.background)
    except PokediffError as error:
        report.skip(section, names, str(error))
        return
    if config.lpips is not None:
        try:
            values["LPIPS"] = Lpips(config.lpips)(fake, true, config.background)
        except PokediffError as error:
            report.skip(section, "LPIPS", str(error))
    note = "not meaningful for a sampler, which is right to draw another creature; for systems that regress a picture"
    for name, value in values.items():
        report.add(section, name, mean_estimate(value), len(found), note=note)
