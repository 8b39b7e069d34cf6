"""evaluate(config): draw for held-out captions, measure, write report.json, report.md, report.html.

Everything that takes long is kept in OUT and found again by the next run: pictures/ by the settings that drew them,
cache/ by the pictures that were looked at.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pokediff.config import EvaluateConfig, plain
from pokediff.data.dataset import Pictures, caption_vectors, load_pictures
from pokediff.data.images import composite, encode_png, read_image, unpremultiply
from pokediff.data.records import write_whole
from pokediff.errors import PokediffError
from pokediff.evaluation import copies, distances, prompts
from pokediff.evaluation.distances import (
    Estimate,
    jackknife,
    kid_bootstrap,
    kid_subsets,
    manifold,
    mean_estimate,
    share_estimate,
)
from pokediff.evaluation.features import FeatureNet, Lpips, clip_similarity, load_features
from pokediff.evaluation.report import Report, write_report
from pokediff.model.denoiser import flops_per_image
from pokediff.model.pipeline import PokeDiffPipeline, diffusion_loss, quiet, settled

KID_UNIT = 1000  # kernel distances are reported times 1000, as the literature does
HALVES = 10  # random ways to part the real families into two halves
NOISE_LEVELS = 10
MIN_REAL = 4 * (distances.NEIGHBOURS + 1)  # halves of them must have neighbours


@dataclass(frozen=True)
class Generated:
    """Pictures straight RGBA uint8 (N, S, S, 4), their prompts, and what it cost to draw them."""

    pixels: np.ndarray
    prompts: tuple[str, ...]
    seconds_per_image: float | None = None


def evaluate(config: EvaluateConfig) -> Path:
    """Measure a checkpoint or a folder of pictures. Returns the folder of the report.

    Raises PokediffError when data, checkpoint or pictures cannot be used; a figure that cannot be measured is a row of
    the report with the reason.
    """
    from accelerate import Accelerator

    quiet()
    state = Accelerator().state  # PartialState alone overlooks the processes of a CPU
    out = Path(config.out or Path("reports") / Path(config.checkpoint or config.images or "pokediff-32").name)
    out.mkdir(parents=True, exist_ok=True)
    generator = None if config.images else Generator.load(config)
    config = generator.config if generator else config  # with the checkpoint's own steps and guidance
    given = read_generated(Path(config.images)) if config.images else None
    size = generator.pipeline.image_size if generator else given.pixels.shape[1]  # type: ignore[union-attr]

    everything = load_pictures(config.data, size, progress=tqdm)
    styles = config.styles or (("artwork",) if any(r.style == "artwork" for r in everything.records) else None)
    real = everything.split(config.split).where(lambda record: styles is None or record.style in styles)
    training = everything.split("train")
    if len(real) < MIN_REAL:
        found = f"only {len(real)} pictures of {', '.join(styles or ['any style'])} in the {config.split} split"
        raise PokediffError(f"{config.data}: {found}; {MIN_REAL} are the least that says anything")
    check_disjoint(real, training, config.split)

    report = Report({**plain(config), "styles": list(styles or []), "size": size})
    known = {record.style for record in everything.records}
    drawn_styles = config.styles or tuple(style for style in prompts.GRID_STYLES if style in known) or ("artwork",)
    asked, pairs = prompts.color_grid(drawn_styles), prompts.paraphrase_pairs(drawn_styles[0])
    if generator:
        generated = generator.draw(out / "pictures", held_out_captions(real, config.number))
        colors = generator.draw(out / "colors", [ask.prompt for ask in asked])
        rare = generator.draw(out / "rare-words", [pair[0] for pair in pairs])
        common = generator.draw(out / "plain-words", [pair[1] for pair in pairs])
        again = generator.draw(out / "one-prompt", prompts.repeated(real.captions))
    else:
        assert given is not None
        generated = given
    if not state.is_main_process:
        return out
    report.settings |= {
        "n_real": len(real),
        "n_generated": len(generated.pixels),
        "n_training": len(training),
        "processes": state.num_processes,
        "data_sha256": everything.digest,
        "system": generator.facts if generator else {"images": config.images},
    }
    same_style = training.where(lambda record: styles is None or record.style in styles)
    for name in config.features:
        measure_features(report, name, generated, real, same_style, config, out / "cache")
    measure_looks(report, generated.pixels, straight(real), real)
    measure_copies(report, generated, real, training)
    measure_clip(report, generated, config)
    if generator:
        measure_colors(report, asked, colors.pixels)
        measure_styles(report, asked, colors.pixels, everything.split(config.split))
        measure_paraphrases(report, rare.pixels, common.pixels)
        measure_variety(report, again.pixels, straight(real), config)
        measure_loss(report, generator, real, same_style, config)
        measure_cost(report, generator, generated)
    measure_reconstruction(report, generated, real, config)
    rows = np.linspace(0, len(generated.pixels) - 1, min(64, len(generated.pixels))).astype(int)
    report.pictures["What it draws"] = (
        "One picture for each of these held-out captions, none chosen.",
        generated.pixels[rows],
        16,
    )
    shown = straight(real.spread(64))
    report.pictures["Real held-out pictures"] = ("Of the same families.", shown, 16)
    report.tables["captions of the pictures shown"] = [{"caption": generated.prompts[i]} for i in rows[:16]]
    write_report(out, report)
    return out


# ------------------------------------------------------------------------------------------------ what is compared


def held_out_captions(real: Pictures, number: int) -> list[str]:
    """The captions of the held-out pictures in turn, the first of each, then the second ..."""
    longest = max(len(several) for several in real.captions)
    turns = [several[turn] for turn in range(longest) for several in real.captions if turn < len(several)]
    return turns[:number]


def check_disjoint(real: Pictures, training: Pictures, split: str) -> None:
    """Raises PokediffError when a training picture, or a relative, has leaked into the reference."""
    if split == "train":
        raise PokediffError("the reference cannot be the training split: copying would be rewarded")
    families = {record.family_key for record in training.records}
    leaked = [record.file_name for record in real.records if record.family_key in families]
    hashes = {hashlib.sha256(picture.tobytes()).digest() for picture in training.pixels}
    leaked += [
        record.file_name
        for record, picture in zip(real.records, real.pixels, strict=True)
        if hashlib.sha256(picture.tobytes()).digest() in hashes
    ]
    if leaked:
        raise PokediffError(f"{len(leaked)} reference pictures are in the training split too, the first is {leaked[0]}")


def straight(pictures: Pictures) -> np.ndarray:
    """Straight RGBA uint8 (N, S, S, 4)."""
    return np.stack([unpremultiply(picture) for picture in pictures.pixels])


def read_generated(folder: Path) -> Generated:
    """Pictures that anything made: a folder with sample.json, or with metadata.jsonl (`file_name`, `text`)."""
    if (folder / "sample.json").is_file():
        rows = json.loads((folder / "sample.json").read_text(encoding="utf-8"))["pictures"]
        pairs = [(row["file"], row["prompt"]) for row in rows]
    elif (folder / "metadata.jsonl").is_file():
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [(row["file_name"], row.get("text") or row.get("prompt") or "") for row in map(json.loads, lines)]
    else:
        raise PokediffError(f"{folder} has neither sample.json nor metadata.jsonl: which prompt drew which picture?")
    pixels = [read_image((folder / file).read_bytes()) for file, _ in pairs]
    sizes = {picture.shape[:2] for picture in pixels}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise PokediffError(f"{folder}: the pictures must be squares of one size, there are {sorted(sizes)[:4]}")
    return Generated(np.stack(pixels), tuple(prompt for _, prompt in pairs))


class Generator:
    """A checkpoint with the settings it draws with; what it drew is kept."""

    def __init__(self, pipeline: PokeDiffPipeline, config: EvaluateConfig, facts: dict[str, Any]) -> None:
        self.pipeline, self.config, self.facts = pipeline, config, facts

    @classmethod
    def load(cls, config: EvaluateConfig) -> Generator:
        from accelerate import PartialState

        from pokediff.drawing.sample import DEFAULT_CHECKPOINT, pick_device, weights_sha256

        folder = config.checkpoint or str(DEFAULT_CHECKPOINT)
        pipeline = PokeDiffPipeline.from_pretrained(folder).to(pick_device(config.device or str(PartialState().device)))
        config = settled(config, pipeline)
        facts = {"checkpoint": Path(folder).name, "weights_sha256": weights_sha256(folder)}
        facts |= {name: pipeline.config[name] for name in ("refine_below", "upscale_below")}
        return cls(pipeline, config, facts)

    @property
    def options(self) -> dict[str, Any]:
        config = self.config
        return {
            "num_steps": config.num_steps,
            "guidance_scale": config.guidance_scale,
            "sampler": config.sampler,
            "precision": config.precision,
        }

    def draw(self, folder: Path, asked: Sequence[str]) -> Generated:
        """One picture for each prompt, the k-th from seed k; what an earlier run with these settings left is kept.

        Each of several processes draws its share.
        """
        from accelerate import PartialState

        state, seeds = PartialState(), range(len(asked))
        key = {"system": self.facts, "options": self.options, "prompts": list(asked), "seeds": [0, len(asked)]}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        mark = folder / "settings.json"
        earlier = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
        state.wait_for_everyone()
        if state.is_main_process and earlier.get("digest") != digest:
            shutil.rmtree(folder, ignore_errors=True)  # drawn otherwise
            folder.mkdir(parents=True)
            earlier = {"digest": digest, **key}
            write_whole(mark, json.dumps(earlier, indent=1, ensure_ascii=False) + "\n")
        state.wait_for_everyone()
        paths = [folder / f"{index:05}.png" for index in range(len(asked))]
        todo = [index for index, path in enumerate(paths) if not path.is_file()]
        state.wait_for_everyone()  # until all have looked: the shares must fit together
        mine = todo[state.process_index :: state.num_processes]
        batches = [
            mine[start : start + self.config.batch_size] for start in range(0, len(mine), self.config.batch_size)
        ]
        spent: list[float] = []
        for batch in tqdm(batches, desc=f"drawing {len(mine)}", unit="batch", disable=not state.is_main_process):
            begin = time.monotonic()
            drawn = self.pipeline.generate([asked[i] for i in batch], [seeds[i] for i in batch], **self.options)
            spent.append((time.monotonic() - begin) / len(batch))
            if len(spent) == 1 and len(batches) > 4 and state.is_main_process:
                tqdm.write(f"{len(mine)} pictures, about {spent[0] * len(mine) / 60:.1f} min")
            for index, picture in zip(batch, drawn, strict=True):
                write_whole(paths[index], encode_png(picture))
        state.wait_for_everyone()
        pixels = np.stack([read_image(path.read_bytes()) for path in paths])
        if spent and state.is_main_process:
            earlier["seconds_per_image"] = float(np.median(spent))
            write_whole(mark, json.dumps(earlier, indent=1, ensure_ascii=False) + "\n")
        return Generated(pixels, tuple(asked), earlier.get("seconds_per_image"))


# ---------------------------------------------------------------------------------------------------- what is measured


def cached_features(net: FeatureNet, rgba: np.ndarray, background: str, cache: Path) -> np.ndarray:
    """`net(rgba)`, kept under a name made of everything it depends on."""
    from safetensors.numpy import load_file, save

    key = hashlib.sha256(f"{net.name} {background} {rgba.shape}".encode() + rgba.tobytes()).hexdigest()[:24]
    path = cache / f"{key}.safetensors"
    if path.is_file():
        return load_file(path)["features"]
    features = net(rgba, background)
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({"features": features}))
    return features


def measure_features(
    report: Report,
    name: str,
    generated: Generated,
    real: Pictures,
    training: Pictures,
    config: EvaluateConfig,
    cache: Path,
) -> None:
    """Kernel and Fréchet distance, precision to coverage, and copies in feature space."""
    section = f"Distance of distributions, features {name.split(':')[0]}"
    try:
        net = load_features(name)
    except PokediffError as error:
        report.add(section, "all of it", None, "", note=f"not measured: {error}")
        return

    def features(rgba: np.ndarray) -> np.ndarray:
        return cached_features(net, rgba, config.background, cache)

    real_pixels = straight(real)
    fake, true = features(generated.pixels), features(real_pixels)
    n = f"{len(fake)} generated, {len(true)} real"
    halves = [np.flatnonzero(part) for part in real_halves(real)]
    pairs = list(zip(halves[::2], halves[1::2], strict=True))
    rng = np.random.default_rng(config.seed)
    noise = rng.integers(0, 256, (min(len(true), 200), *real_pixels.shape[1:]), dtype=np.uint8)
    noise[..., 3] = 255
    noise_features, one = features(noise), np.repeat(true[:1], len(true), axis=0)

    estimate = kid_bootstrap(fake, true, seed=config.seed)
    report.add(
        section,
        "kernel distance (KID, unbiased) x 1000",
        Estimate(*(KID_UNIT * value for value in asdict(estimate).values())),
        n,
        floor=KID_UNIT * float(np.mean([distances.kid(true[a], true[b]) for a, b in pairs])),
        ceiling=KID_UNIT * min(distances.kid(noise_features, true), distances.kid(one, true)),
        note=f"{net.note}; real: two halves of the real families; worthless: the better of noise and one picture again "
        "and again",
    )
    for subsets, wanted, whose in (
        (config.kid_subsets, config.kid_subset_size, "the form papers give; its interval is one standard deviation"),
        (20, 50, "PikaPikaGen's protocol (it had Inception features); its interval is one standard deviation"),
    ):
        size = min(wanted, len(fake), len(true))
        mean, deviation = kid_subsets(fake, true, subsets, size, seed=config.seed)
        spread = Estimate(KID_UNIT * mean, KID_UNIT * (mean - deviation), KID_UNIT * (mean + deviation))
        report.add(section, f"the same over {subsets} subsets of {size}, x 1000", spread, n, note=whose)
    same = min(len(fake), len(true))
    chosen = np.random.default_rng(config.seed).permutation(len(fake))[:same]
    equal = fake[chosen]
    report.add(
        section,
        "Fréchet distance (FID)",
        jackknife(lambda index: distances.frechet(equal[index], true[index]), same, seed=config.seed),
        f"{same} generated, {same} real",
        floor=float(np.mean([distances.frechet(true[a], true[b]) for a, b in pairs])),
        note="biased upwards by about 1/n: compare at equal n only; the floor has half the pictures, so more bias",
    )
    part = real_parts(real)
    for kind, real_value in manifold(true[part[0]], true[part[1]]).items():

        def statistic(index: np.ndarray, kind: str = kind) -> float:
            return manifold(true[index], equal[index])[kind]

        report.add(
            section,
            kind,
            jackknife(statistic, same, seed=config.seed, most=np.inf if kind == "density" else 1.0),
            f"{same} generated, {same} real",
            floor=real_value,
            note="real: one half of the real families as if it were generated",
        )
    known = features(straight(training))
    found = copies.nearest_in_features(fake, known, [record.family_key for record in training.records])
    held_out = copies.nearest_in_features(true, known, [record.family_key for record in training.records])
    report.add(
        "Does it copy?",
        f"copies in features {name.split(':')[0]}",
        share_estimate(found.copies),
        len(fake),
        floor=float(held_out.copies.mean()),
        note="share whose nearest training picture is three times nearer than that of any other family",
    )


def real_halves(real: Pictures) -> list[np.ndarray]:
    """HALVES pairs of masks (N,), the families of each pair parted at random into two halves."""
    families = np.array([record.family_key for record in real.records])
    names = np.unique(families)
    masks = []
    for seed in range(HALVES):
        chosen = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
        mask = np.isin(families, chosen)
        masks += [mask, ~mask]
    return masks


def real_parts(real: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the real families, of one size."""
    first, second = (np.flatnonzero(mask) for mask in real_halves(real)[:2])
    size = min(len(first), len(second))
    return first[:size], second[:size]


def measure_looks(report: Report, fake: np.ndarray, true: np.ndarray, real: Pictures) -> None:
    """Properties of the pixels that an eye sees at once, beside those of real pictures."""
    section = "How the pictures are made"
    looks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "share of opaque pixels": prompts.opaque_share,
        "share of half-transparent pixels": prompts.half_transparent_share,
        "mean alpha on the border": prompts.border_alpha,
        "colours of a picture (15 bit)": prompts.palette_size,
        "sharpness (mean difference of neighbours)": prompts.sharpness,
    }
    for name, measure in looks.items():
        report.add(section, name, mean_estimate(measure(fake)), len(fake), floor=float(measure(true).mean()))
    named, colors = prompts.named_colors(true, real.records)
    if len(named):
        first, either = prompts.color_hits(named, colors)
        report.curves["real_color"] = {"n": len(named), "first": float(first.mean()), "either": float(either.mean())}


def measure_copies(report: Report, generated: Generated, real: Pictures, training: Pictures) -> None:
    """The nearest training picture of every generated one, in pixels, and how near real held-out pictures come."""
    families = [record.family_key for record in training.records]
    known = straight(training)
    found = copies.nearest_in_pixels(generated.pixels, known, families)
    held_out = copies.nearest_in_pixels(straight(real), known, families)
    n = len(generated.pixels)
    report.add(
        "Does it copy?",
        "copies in pixels",
        share_estimate(found.copies),
        n,
        floor=float(held_out.copies.mean()),
        note="share whose nearest training picture is three times nearer than that of any other family",
    )
    threshold = float(np.percentile(held_out.distance, 1))
    report.add(
        "Does it copy?",
        "nearer to a training picture than 99 % of real held-out ones",
        share_estimate(found.distance < threshold),
        n,
        floor=0.01,
        note=f"distance in pixels below {threshold:.4f}; pictures with little in them come nearer to everything",
    )
    report.add(
        "Does it copy?",
        "distance to the nearest training picture",
        mean_estimate(found.distance),
        n,
        floor=float(held_out.distance.mean()),
    )
    worst = found.ratio.argsort()[:20]
    pairs = np.stack([picture for i in worst for picture in (generated.pixels[i], known[found.index[i]])])
    report.pictures["The twenty nearest to a training picture"] = (
        "Left the generated picture, right its nearest training picture; the most suspicious first.",
        pairs,
        10,
    )
    report.tables["nearest training pictures"] = [
        {
            "generated": int(i),
            "prompt": generated.prompts[i],
            "training picture": training.records[found.index[i]].file_name,
            "species": training.records[found.index[i]].name or "",
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


def measure_colors(report: Report, asked: Sequence[prompts.Ask], drawn: np.ndarray) -> None:
    """Is the colour that was asked for there?"""
    section, columns = "Does it follow the prompt?", list(dict.fromkeys(ask.color for ask in asked))
    first, either = prompts.color_hits(drawn, [ask.color for ask in asked])
    real = report.curves.get("real_color", {})
    words = "real: pictures that have the colour the Pokédex names" if real else "no real colour names to compare with"
    for name, hits, key in (("the main one", first, "first"), ("one of the two main ones", either, "either")):
        value = share_estimate(hits)
        report.add(section, f"asked colour is {name}", value, len(hits), floor=real.get(key), note=words)
    mine = {color: np.array([ask.color == color for ask in asked]) for color in columns}
    report.tables["colours asked for"] = [
        {
            "colour": color,
            "n": int(mine[color].sum()),
            "main": round(float(first[mine[color]].mean()), 3),
            "one of two": round(float(either[mine[color]].mean()), 3),
        }
        for color in columns
    ]
    words = f"A row for each style and type, a column for each colour: {', '.join(columns)}."
    report.pictures["Every colour by every type"] = (words, drawn, len(columns))


def measure_styles(report: Report, asked: Sequence[prompts.Ask], drawn: np.ndarray, real: Pictures) -> None:
    """Does each style look as it does: colour obeyed, how much is opaque, hazy, and of how many colours (real)?"""
    rows = []
    for style in dict.fromkeys(ask.style for ask in asked):
        mine = np.array([ask.style == style for ask in asked])
        true = real.where(lambda record, style=style: record.style == style)  # type: ignore[misc]
        looks = {
            "opaque": prompts.opaque_share,
            "half-transparent": prompts.half_transparent_share,
            "colours": prompts.palette_size,
        }
        hits = prompts.color_hits(drawn[mine], [ask.color for ask in asked if ask.style == style])[0]
        row: dict[str, Any] = {"style": style, "n": int(mine.sum()), "main colour": f"{hits.mean():.2f}"}
        for name, measure in looks.items():
            theirs = f"{measure(straight(true)).mean():.3g}" if len(true) else "none"
            row[f"{name} (real)"] = f"{measure(drawn[mine]).mean():.3g} ({theirs})"
        rows.append({**row, "n real": len(true)})
    report.tables["styles"] = rows


def measure_paraphrases(report: Report, rare: np.ndarray, plain: np.ndarray) -> None:
    """Does a rare colour word draw what the plain one draws from the same noise?"""
    other = np.roll(plain, prompts.SEEDS_PER_PAIR, axis=0)  # another colour, another noise
    ratio = prompts.picture_distance(rare, plain) / prompts.picture_distance(rare, other).mean()
    words = "distance of the pictures over the distance to those of another colour and seed; 0 is the same picture"
    name = "rare colour word against the plain one, same seed"
    report.add("Does it follow the prompt?", name, mean_estimate(ratio), len(ratio), ceiling=1.0, note=words)


def measure_variety(report: Report, drawn: np.ndarray, true: np.ndarray, config: EvaluateConfig) -> None:
    """How different are the pictures of one prompt? Mean pairwise LPIPS within each prompt's pictures."""
    section, name = "Diversity", "LPIPS between pictures of one prompt"
    words = "Inception Score is not measured: it asks whether pictures look like ImageNet's classes"
    if config.lpips is None:
        report.add(section, name, None, "", note=f"not measured: no network was given (--lpips squeeze:FILE). {words}")
        return
    try:
        lpips = Lpips(config.lpips)
    except PokediffError as error:
        report.add(section, name, None, "", note=f"not measured: {error}. {words}")
        return
    seeds = prompts.SEEDS_PER_PROMPT
    a, b = np.triu_indices(seeds, 1)
    groups = [drawn[start : start + seeds] for start in range(0, len(drawn), seeds)]
    within = np.array([lpips(group[a], group[b], config.background).mean() for group in groups])
    order = np.random.default_rng(0).permutation(len(true))
    unlike = lpips(true[order[:-1]], true[order[1:]], config.background).mean()
    note = f"real: between any two real pictures, so an upper bound; 0 is one picture again and again. {words}"
    report.add(
        section, name, mean_estimate(within), f"{len(groups)} prompts of {seeds}", floor=float(unlike), note=note
    )


def measure_clip(report: Report, generated: Generated, config: EvaluateConfig) -> None:
    """CLIP score, and how often a picture finds its own caption among all captions asked for."""
    section = "Does it follow the prompt?"
    if config.clip is None:
        words = "not measured: no CLIP was given (--clip openai/clip-vit-base-patch32, or a folder)"
        report.add(section, "CLIP score and retrieval", None, "", note=words)
        return
    try:
        similarity = clip_similarity(config.clip, generated.pixels, generated.prompts, config.background)
    except PokediffError as error:
        report.add(section, "CLIP score and retrieval", None, "", note=f"not measured: {error}")
        return
    texts = list(dict.fromkeys(generated.prompts))
    own = np.array([texts.index(prompt) for prompt in generated.prompts])
    score = similarity[np.arange(len(own)), own]
    words = f"{config.clip}; cosine of picture and caption, relative only: it sees enlarged sprites"
    report.add(section, "CLIP score", mean_estimate(score), len(own), note=words)
    rank = (similarity > score[:, None]).sum(1)
    for k in (1, 5):
        value = share_estimate(rank < k)
        report.add(
            section, f"retrieval R@{k}", value, len(own), ceiling=k / len(texts), note=f"of {len(texts)} captions"
        )


def measure_reconstruction(report: Report, generated: Generated, real: Pictures, config: EvaluateConfig) -> None:
    """Distance to the very picture whose caption was the prompt, for systems that regress it."""
    import torch

    section = "Reconstruction"
    place = {caption: index for index, several in enumerate(real.captions) for caption in several}
    found = [(i, place[prompt]) for i, prompt in enumerate(generated.prompts) if prompt in place]
    words = "not meaningful for a sampler, which is right to draw another creature; for systems that regress a picture"
    if not found:
        report.add(
            section, "L1, L2, PSNR, SSIM", None, "", note="not measured: no prompt is a caption of the reference"
        )
        return
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError:
        report.add(section, "L1, L2, PSNR, SSIM", None, "", note="not measured: pip install pokediff[eval]")
        return
    fake, true = generated.pixels[[i for i, _ in found]], straight(real)[[j for _, j in found]]
    on_background = (composite(rgba, config.background) for rgba in (fake, true))
    x, y = (torch.from_numpy(rgb).permute(0, 3, 1, 2).double() / 255 for rgb in on_background)
    squared = ((x - y) ** 2).mean((1, 2, 3))
    pairs = zip(x.split(16), y.split(16), strict=True)  # it holds ten blurred copies: 500 of 128 px would want 40 GB
    values = {
        "L1": (x - y).abs().mean((1, 2, 3)),
        "L2": squared,
        "PSNR, dB": -10 * squared.clamp(min=1e-10).log10(),
        "SSIM": torch.cat([torch.as_tensor(ssim(*pair, data_range=1.0, reduction="none")) for pair in pairs]),
    }
    for name, value in values.items():
        report.add(section, name, mean_estimate(value.numpy()), len(found), note=words)
    if config.lpips is not None:
        try:
            apart = Lpips(config.lpips)(fake, true, config.background)
            report.add(section, "LPIPS", mean_estimate(apart), len(found), note=words)
        except PokediffError as error:
            report.add(section, "LPIPS", None, "", note=f"not measured: {error}")


def measure_loss(
    report: Report, generator: Generator, real: Pictures, training: Pictures, config: EvaluateConfig
) -> None:
    """Denoising loss by noise level, on training and on held-out pictures: the gap is what was learnt by heart.

    Of the networks that draw; one that enlarges has no shapes to learn by heart.
    """
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler

    from pokediff.data.images import to_model

    pipeline = generator.pipeline
    schedule, device = DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.device
    levels = np.linspace(0, len(schedule) - 1, NOISE_LEVELS + 2).round().astype(int)[1:-1]
    sets = {"held-out": real.spread(256), "training": training.spread(256)}
    curves: dict[str, list[Estimate]] = {}
    means: dict[str, np.ndarray] = {}  # of each picture over the levels
    for name, pictures in sets.items():
        vectors = caption_vectors(config.data, pictures, pipeline.config.text_encoder_name)
        text = vectors.table[[rows[0] for rows in vectors.rows]]
        x0 = F.avg_pool2d(to_model(torch.from_numpy(pictures.pixels[:]), pipeline.channels), pipeline.upscale)
        losses = []
        for level in levels:
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(int(level)))
            steps, network = torch.full((len(x0),), int(level)), pipeline.network_at(int(level))
            schedule.register_to_config(prediction_type=pipeline.prediction_type(network))
            with torch.inference_mode():
                parts = [
                    diffusion_loss(schedule, network, *(values[i].to(device) for values in (x0, noise, steps, text)))
                    for i in torch.arange(len(x0)).split(32)
                ]
            losses.append(torch.cat(parts).double().cpu().numpy())
        curves[name] = [mean_estimate(loss) for loss in losses]
        means[name] = np.mean(losses, axis=0)
    sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()[levels]
    report.curves["loss"] = {
        "sigma": [round(float(sigma), 5) for sigma in sigmas],
        **{name: [asdict(estimate) for estimate in estimates] for name, estimates in curves.items()},
    }
    for name, values in means.items():
        note = "of the networks that draw the small picture" if pipeline.upscale > 1 else ""
        report.add("Loss where it matters", f"denoising loss, {name}", mean_estimate(values), len(values), note=note)
    gap = float(means["held-out"].mean() - means["training"].mean())
    error = math.hypot(*(float(values.std() / len(values) ** 0.5) for values in means.values()))
    report.add(
        "Loss where it matters",
        "gap",
        Estimate(gap, gap - 1.96 * error, gap + 1.96 * error),
        " and ".join(str(len(values)) for values in means.values()),
        floor=0.0,
        note="held-out less training; grows with what is learnt by heart",
    )


def measure_cost(report: Report, generator: Generator, generated: Generated) -> None:
    """What a picture costs on this machine."""
    pipeline, section = generator.pipeline, "Cost"
    note = f"median, in batches of {generator.config.batch_size}, on {pipeline.device}, when they were drawn"
    report.add(section, "seconds an image", generated.seconds_per_image, len(generated.pixels), note=note)
    asked = pipeline.asked(generator.config.sampler, generator.config.num_steps)
    guided = generator.config.guidance_scale != 1
    for name, network in pipeline.networks.items():
        of = "" if name == "unet" else f" of the {name}"
        evaluations = asked.count(name) * (2 if guided and name == "unet" else 1)
        report.add(section, f"evaluations{of or ' of the network'}", evaluations, 1)
        report.add(section, f"parameters{of}, M", sum(p.numel() for p in network.parameters()) / 1e6, 1)
        report.add(section, f"GFLOP an evaluation{of}", flops_per_image(network) / 1e9, 1)
    report.add(section, "peak memory, MB", peak_memory_mb(), 1, note="of this whole process, features and all")


def peak_memory_mb() -> float | None:
    """The most memory this process has held; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
