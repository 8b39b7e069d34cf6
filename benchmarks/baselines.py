"""Train every older system and ours from nothing for the same time, and put all of them into one table.

    python benchmarks/baselines.py --data ../shared/data/pokemon --mnist ../shared/mnist \
        --features ../shared/weights/mobilenet_v2_feat1280.safetensors \
        --squeeze ../shared/weights/lpips_squeeze_v0.1.safetensors

Writes OUT/<system>/ (the trained systems), OUT/reports/<system>/ (`pokediff evaluate`), tables.md, sheet.png and
digits.png. What is already there is not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from pokediff.baselines.generator import Baseline
from pokediff.config import BaselineConfig, EvaluateConfig, Sampling, dump_yaml, load_yaml
from pokediff.data.dataset import load_pictures
from pokediff.data.images import composite, encode_png, enlarge, to_model, unpremultiply
from pokediff.drawing.sample import load_checkpoint
from pokediff.evaluation.evaluate import evaluate
from pokediff.model.diffusion import schedule_sigmas

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "baselines"
SIZE = 32
PICTURE_SYSTEMS = {
    "pokediff-new": "pokediff from nothing, as long",
    "pikapikagenerator-regressor": "PikaPikaGenerator",
    "pikapikagenerator": "PikaPikaGenerator with its discriminator",
    "pikapikagen-1": "PikaPikaGen 1: L1",
    "pikapikagen-2": "PikaPikaGen 2: edges, perceptual",
    "pikapikagen-3": "PikaPikaGen 3: augmentation",
    "pikapikagen-4": "PikaPikaGen 4: DCGAN",
    "pikapikagen-5": "PikaPikaGen 5: two stages",
    "latent": "latent diffusion, learnt together",
}
SECOND_PHASE = 0.55  # of the time, when experiment 3 weakens its augmentation (110 of 200 epochs)
DIGIT_SYSTEMS = {
    "digits-a": "model A: ten numbers a digit",
    "digits-b": "model B: one number a digit",
    "digits-transformer": "transformer, 1+1 layers",
    "digits-transformer-6": "transformer, 6+6 layers",
}
PROMPTS = (
    "official artwork of a blue water turtle creature",
    "official artwork of a red fire dragon creature",
    "official artwork of a green grass four-legged creature",
    "official artwork of a yellow electric mouse creature",
    "official artwork of a purple ghost creature",
    "official artwork of a brown bird creature",
    "official artwork of a pink fairy creature",
    "official artwork of a gray rock creature",
)


# ----------------------------------------------------------------------------------------------------------- training


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pokediff", *map(str, words)], check=True)


def train_all(options: argparse.Namespace) -> None:
    """Train what is missing in OUT, every system for --minutes."""
    limit = ("--max-minutes", options.minutes, "--threads", options.threads)
    for name in options.only or PICTURE_SYSTEMS:
        out = options.out / name
        if (out / "finished").is_file():
            continue
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
        if name == "pokediff-new":
            stages = ("--stages", "base-32", "refiner-32", "--fit-limit", "--no-compile")
            run("train", "--config", "pokemon", "--data", options.data, "--out", out, *stages, *limit)
        else:
            run("baseline", "--config", recipe(name, options), "--out", out, *limit)
        (out / "finished").touch()


def recipe(name: str, options: argparse.Namespace) -> Path:
    """The system's configuration with our data and feature network, as a file."""
    config = load_yaml(CONFIGS / f"{name}.yaml", BaselineConfig)
    squeeze = f"squeeze:{options.squeeze}"
    config = replace(config, data=(str(options.data),), lpips=squeeze, features=squeeze)
    if len(config.augment) > 1:  # its second phase begins after a number of steps, here after a part of the time
        first, second = config.augment
        steps = round(SECOND_PHASE * options.minutes * 60 * options.augmented_speed / config.batch_size)
        config = replace(config, augment=(first, replace(second, from_step=steps)))
    path = options.out / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(config))
    return path


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Anchor:
    """A generator that looks at no prompt: one picture for all, or a random training picture."""

    pictures: np.ndarray  # straight RGBA uint8 (N, S, S, 4)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> np.ndarray:
        return np.stack([self.pictures[np.random.default_rng(seed).integers(len(self.pictures))] for seed in seeds])


def anchors(options: argparse.Namespace) -> dict[str, Anchor]:
    """What nothing costs, from the training artwork."""
    training = load_pictures(options.data, SIZE).split("train").where(lambda record: record.style == "artwork")
    pixels = training.pixels[:]  # premultiplied
    white = np.full((1, SIZE, SIZE, 4), 255, np.uint8)
    mean = unpremultiply(pixels.mean(0, keepdims=True).round().astype(np.uint8))
    median = unpremultiply(np.median(pixels, axis=0, keepdims=True).round().astype(np.uint8))
    return {
        "a white page": Anchor(white),
        "the mean picture": Anchor(mean),
        "the median picture": Anchor(median),
        "another real picture": Anchor(training.straight()),
    }


def measure_all(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """report.json of every system, of the shipped model and of the anchors, by the name in the table."""
    systems: dict[str, tuple[str | None, Anchor | None]] = {
        "pokediff, as shipped": (str(ROOT / "checkpoints" / "pokediff"), None)
    }
    systems |= {
        title: (str(options.out / name), None)
        for name, title in PICTURE_SYSTEMS.items()
        if (options.out / name / "finished").is_file()
    }
    systems |= {title: (None, anchor) for title, anchor in anchors(options).items()}
    found = {}
    for title, (checkpoint, anchor) in systems.items():
        out = options.out / "reports" / title.replace(" ", "-").replace(":", "").replace(",", "")
        if not (out / "report.json").is_file():
            config = EvaluateConfig(
                checkpoint=checkpoint or title,
                data=(str(options.data),),
                out=str(out),
                features=(f"mobilenet_v2:{options.features}",),
                lpips=f"squeeze:{options.squeeze}",
                sampling=Sampling(size=SIZE),
            )
            share_cache(out, options.out / "cache")
            evaluate(config, anchor)
        found[title] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def share_cache(out: Path, cache: Path) -> None:
    """Features of real pictures, and the judge, are the same in all reports."""
    cache.mkdir(exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "cache").exists():
        (out / "cache").symlink_to(cache.resolve())


COLUMNS = {  # title of the column: the figure's name, and how it is written
    "kernel distance": ("kernel distance (KID, unbiased) x 1000", "interval"),
    "the same, 20 × 50": ("the same over 20 subsets of 50, x 1000", "plus"),
    "coverage": ("coverage", "2"),
    "copies": ("copies in pixels", "%"),
    "colour obeyed": ("colour of the prompt is the main one", "%"),
    "told from real": ("accuracy of a two-sample classifier (C2ST)", "2"),
    "L1": ("L1", "3"),
    "SSIM": ("SSIM", "2"),
    "PSNR": ("PSNR, dB", "1"),
    "LPIPS": ("LPIPS", "2"),
    "variety": ("LPIPS between pictures of one prompt", "2"),
    "s": ("seconds a picture", "3"),
}


def cell(figures: dict[str, dict[str, Any]], name: str, form: str) -> str:
    figure = figures.get(name)
    if figure is None or figure["value"] is None:
        return "–"
    value, low, high = figure["value"], figure["low"], figure["high"]
    if form == "interval":
        return f"{value:.0f} [{low:.0f}, {high:.0f}]"
    if form == "plus":
        return f"{value:.0f} ± {(high - low) / 2:.0f}"
    return f"{100 * value:.0f} %" if form == "%" else re.sub(r"^(-?)0\.", r"\1.", f"{value:.{form}f}")


def picture_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| | " + " | ".join([*COLUMNS, "parameters"]) + " |", "|" + " --- |" * (len(COLUMNS) + 2)]
    for title, report in reports.items():
        figures = {figure["name"]: figure for figure in report["figures"]}
        numbers = [f["value"] for name, f in figures.items() if name.startswith("parameters") and f["value"]]
        total = f"{sum(numbers):.1f} M" if numbers else "–"
        cells = [cell(figures, name, form) for name, form in COLUMNS.values()]
        lines.append(f"| {title} | " + " | ".join([*cells, total]) + " |")
    return lines


def sheet(options: argparse.Namespace) -> None:
    """One row for each system, the same eight prompts, seeds 0 to 7: OUT/sheet.png."""
    rows = []
    folders = [options.out / name for name in PICTURE_SYSTEMS if (options.out / name / "finished").is_file()]
    for folder in (ROOT / "checkpoints" / "pokediff", *folders):
        generator = load_checkpoint(str(folder))
        drawn = generator.generate(PROMPTS, range(len(PROMPTS)), Sampling(size=SIZE))
        rows.append(np.concatenate(list(drawn), axis=1))
    page = composite(enlarge(np.concatenate(rows, axis=0), 3))
    (options.out / "sheet.png").write_bytes(encode_png(page))


def latent_table(options: argparse.Namespace) -> list[str]:
    """What is lost where, on held-out artwork: in the autoencoder's round trip, and by the denoiser's error of the
    latents, at some noise levels.
    """
    pictures = load_pictures(options.data, SIZE).split("test").where(lambda record: record.style == "artwork")
    x0 = to_model(torch.from_numpy(pictures.pixels[:]), "rgba")
    baseline = load_checkpoint(str(options.out / "latent"), "cpu")
    assert isinstance(baseline, Baseline)
    network, system = baseline.system.network, baseline.system
    with torch.inference_mode():
        posterior = network.autoencoder.encode(x0).latent_dist
        latents, text = posterior.mean, system.text(system.ids([several[0] for several in pictures.captions]))
        rows = {
            "standard deviation of the latents": latents.std(0).mean(),
            "standard deviation of their noise": posterior.std.mean(),
            "PSNR of the autoencoder's round trip, dB": psnr(network.autoencoder.decode(latents).sample, x0),
        }
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        for sigma in (0.3, 1.0, 3.0):
            timestep = int((schedule_sigmas(network.schedule) - sigma).abs().argmin())
            noisy = network.schedule.add_noise(latents, noise, torch.full((len(x0),), timestep))
            guess = network.denoiser(noisy, timestep, text)
            explained = 1 - ((guess - latents) ** 2).mean() / latents.var(0).mean()
            rows[f"variance of the latents explained at sigma {sigma:g}"] = explained
            rows[f"PSNR of the picture decoded from it, sigma {sigma:g}, dB"] = psnr(
                network.autoencoder.decode(guess).sample, x0
            )
    return [
        "| latent variant | |",
        "| --- | --- |",
        *(f"| {name} | {float(value):.3g} |" for name, value in rows.items()),
    ]


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """dB, of pictures in [-1, 1]."""
    return float((-10 * (((x.clamp(-1, 1) - y) / 2) ** 2).mean((1, 2, 3)).log10()).mean())


# -------------------------------------------------------------------------------------------------------------- digits


def train_digits(options: argparse.Namespace) -> None:
    for name in DIGIT_SYSTEMS:
        out = options.out / name
        if (out / "finished").is_file():
            continue
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
        config, layers = name.removesuffix("-6"), ("--network.layers", "6") if name.endswith("-6") else ()
        threads = ("--threads", options.threads)
        run("baseline", "--config", config, "--data", options.mnist, "--out", out, *layers, *threads)
        (out / "finished").touch()
    out = options.out / "digits-diffusion"
    if not (out / "finished").is_file():
        shutil.rmtree(out, ignore_errors=True)
        limit = ("--max-minutes", options.digit_minutes, "--fit-limit", "--threads", options.threads)
        run("train", "--config", "digits", "--data", options.mnist, "--out", out, *limit)
        (out / "finished").touch()


def digit_table(options: argparse.Namespace) -> list[str]:
    """Cross-entropy on the test pictures, whether the digit is right, and how much its drawings differ."""
    everything = load_pictures(options.mnist, 28)
    test, training = everything.split("test"), everything.split("train")
    judge = linear_judge(training)
    x, labels = grey(test), np.array([int(several[0]) for several in test.captions])
    means = np.stack([grey(training)[labels_of(training) == digit].mean(0) for digit in range(10)])
    rows = {"the ten mean pictures": means, "one mean picture": np.repeat(grey(training).mean(0)[None], 10, 0)}
    lines = ["| | cross-entropy | right digit | different pictures | difference within a digit | parameters |"]
    lines.append("|" + " --- |" * 6)
    for title, pictures in rows.items():
        lines.append(f"| {title} | {cross_entropy(pictures, x, labels):.4f} | | | | |")
    for name, title in DIGIT_SYSTEMS.items():
        generator = load_checkpoint(str(options.out / name))
        assert isinstance(generator, Baseline)
        ids = generator.system.ids([str(digit) for digit in range(10)])
        with torch.inference_mode():  # before rounding to 256 levels
            drawn = generator.system.draw(ids, torch.zeros(10, 0)).pictures[-1][:, 0].numpy() / 2 + 0.5
        apart = len({(255 * picture).round().astype(np.uint8).tobytes() for picture in drawn})
        right = (judge(drawn) == np.arange(10)).mean()
        values = f"{cross_entropy(drawn, x, labels):.4f} | {right:.0%} | {apart} of 10 | 0 | {generator.parameters:,}"
        lines.append(f"| {title} | {values} |")
    pipeline = load_checkpoint(str(options.out / "digits-diffusion"))
    prompts = [f"digit {digit}" for digit in range(10) for _ in range(20)]
    drawn = pipeline.generate(prompts, range(200))[..., 0] / 255
    small = np.stack([cv2.resize(picture, (28, 28), interpolation=cv2.INTER_AREA) for picture in drawn])
    right = (judge(small) == np.repeat(np.arange(10), 20)).mean()
    apart = len({picture.tobytes() for picture in drawn})
    groups = drawn.reshape(10, 20, -1)
    within = np.mean([np.abs(group[:, None] - group[None]).mean(-1)[np.triu_indices(20, 1)].mean() for group in groups])
    number = sum(p.numel() for _, denoiser in pipeline.cascade.items() for p in denoiser.parameters())
    lines.append(f"| our diffusion | not meaningful | {right:.0%} | {apart} of 200 | {within:.3f} | {number:,} |")
    real = [grey(test)[labels == digit][:20].reshape(20, -1) for digit in range(10)]
    within = np.mean([np.abs(group[:, None] - group[None]).mean(-1)[np.triu_indices(20, 1)].mean() for group in real])
    lines.append(f"| real test pictures | | {(judge(x) == labels).mean():.0%} | all | {within:.3f} | |")
    return lines


def digit_sheet(options: argparse.Namespace) -> None:
    """The ten digits, a row for models A and B and three for our diffusion: OUT/digits.png."""
    rows = []
    for name, form, number in (("digits-a", "{}", 1), ("digits-b", "{}", 1), ("digits-diffusion", "digit {}", 3)):
        model = load_checkpoint(str(options.out / name))
        for row in range(number):
            drawn = model.generate([form.format(digit) for digit in range(10)], range(10 * row, 10 * row + 10))
            rows.append(np.concatenate([cv2.resize(picture, (64, 64), interpolation=0) for picture in drawn], axis=1))
    (options.out / "digits.png").write_bytes(encode_png(np.concatenate(rows)))


def grey(pictures: Any) -> np.ndarray:
    """(N, 28, 28) in [0, 1]."""
    return pictures.pixels[:][..., 0].astype(np.float32) / 255


def labels_of(pictures: Any) -> np.ndarray:
    return np.array([int(several[0]) for several in pictures.captions])


def cross_entropy(pictures: np.ndarray, x: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross-entropy of the ten pictures (10, 28, 28) against real ones of their digits."""
    guess = torch.from_numpy(pictures[labels]).float().clamp(1e-7, 1 - 1e-7)
    return F.binary_cross_entropy(guess, torch.from_numpy(x)).item()


def linear_judge(pictures: Any) -> Any:
    """A linear classifier of digits (N, 28, 28) in [0, 1], trained on real ones."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(grey(pictures)).flatten(1), torch.from_numpy(labels_of(pictures))
    model = torch.nn.Linear(784, 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(5):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return lambda drawn: model(torch.from_numpy(np.ascontiguousarray(drawn)).float().flatten(1)).argmax(1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--features", type=Path, required=True, help="MobileNetV2, safetensors")
    parser.add_argument("--squeeze", type=Path, required=True, help="SqueezeNet of LPIPS, safetensors")
    parser.add_argument("--out", type=Path, default=Path("outputs/baselines"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--digit-minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--augmented-speed", type=float, default=50, help="images/s of experiment 3 on this machine")
    parser.add_argument("--only", nargs="*", help="train these picture systems alone, and make no table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train_all(options)
    if options.only is not None:
        return
    lines = [*picture_table(measure_all(options)), "", *latent_table(options)]
    sheet(options)
    if options.mnist:
        train_digits(options)
        lines += ["", *digit_table(options)]
        digit_sheet(options)
    (options.out / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
