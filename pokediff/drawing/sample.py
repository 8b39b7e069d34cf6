"""sample(config): prompts to a folder of pictures, and how they emerged from noise."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pokediff.config import SampleConfig, from_values, plain
from pokediff.data.colors import cut_backdrop
from pokediff.data.images import (
    BadImage,
    composite,
    encode_png,
    enlarge,
    fit_square,
    from_model,
    grid,
    parse_color,
    read_image,
    save_animation,
)
from pokediff.data.records import read_text, write_whole
from pokediff.drawing.export import is_exported, load_exported
from pokediff.drawing.pixelart import finish, read_palette
from pokediff.errors import PokediffError
from pokediff.model.denoiser import compile_network
from pokediff.model.pipeline import PokeDiffPipeline, quiet, settled, slerp

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent.parent.parent / "checkpoints" / "pokediff-32"
OWN_FILES = re.compile(r"\d{4,}\.png|grid\.png|(denoising|interpolation)\.\w+|frames/.+")  # what a drawing writes
SHOWN_SIDE = 128  # px that a picture has at least on a sheet or in an animation


@dataclass(frozen=True)
class Job:
    """One picture to draw: a prompt and a seed, or the way from them to another prompt and seed."""

    prompt: str
    seed: int
    to: tuple[str, int] | None = None
    share: float = 0.0  # of the way


@dataclass(frozen=True)
class Frame:
    """What people see of one step: straight RGBA uint8 (B, H, W, 4)."""

    x: np.ndarray
    x0: np.ndarray
    sigma: float


def sample(config: SampleConfig) -> Path:
    """Draw, and write 0000.png ..., grid.png, denoising.gif, sample.json and, if asked, frames/ and interpolation.gif.
    Returns the folder.

    Ctrl-C keeps the pictures that are done, with a sheet and a sample.json of them, and is raised again.
    Raises PokediffError for a checkpoint, prompts file, image, palette or background that cannot be used.
    """
    quiet()
    prompts = read_prompts(config)
    jobs = make_jobs(prompts, config)
    if config.background:
        parse_color(config.background)
    finishing = make_finish(config)
    pipeline = load_pipeline(config)
    config = settled(config, pipeline)
    out = Path(config.out or Path("outputs") / slug(prompts[0]))
    out.mkdir(parents=True, exist_ok=True)
    begin_with = read_beginning(config, pipeline.image_size)
    refuse_own_files(out, config)
    clear_earlier(out)
    write_facts(out, pipeline, config, prompts, jobs)  # before the first picture: what stands there is ours to clear
    done: list[np.ndarray] = []
    started, interrupted = time.monotonic(), False
    try:
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            steps = draw(pipeline, part, config, begin_with)
            total = count_frames(pipeline, config)
            frames = list(tqdm(steps, total=total, desc=f"{len(part)} pictures", unit="step", leave=False))
            frames[-1] = dataclasses.replace(frames[-1], x0=np.stack([finishing(picture) for picture in frames[-1].x0]))
            for offset, picture in enumerate(frames[-1].x0):
                write_picture(out / f"{start + offset:04}.png", picture, config)
                done.append(picture)
                if config.save_frames:
                    write_frames(out / "frames" / f"{start + offset:04}", frames, offset, config)
            if start == 0:
                animate(out, frames, config)
    except KeyboardInterrupt:
        interrupted = True
    if done:
        write_sheet(out, np.stack(done), config)
        seconds = time.monotonic() - started
        write_facts(out, pipeline, config, prompts, jobs[: len(done)], seconds)
        print(f"{len(done)} picture{'s' * (len(done) > 1)} in {seconds:.1f} s: {out}")
    else:
        clear_earlier(out)
    if interrupted:
        raise KeyboardInterrupt
    return out


def refuse_own_files(out: Path, config: SampleConfig) -> None:
    """Raise PokediffError when a picture to begin with has a place in `out` where we write, or remove what was."""
    folder = out.resolve()
    for path in (Path(name).resolve() for name in (config.image, config.mask) if name):
        if path.is_relative_to(folder) and OWN_FILES.fullmatch(path.relative_to(folder).as_posix()):
            raise PokediffError(f"{path} would be replaced by what is drawn from it: choose another --out than {out}")


def clear_earlier(out: Path) -> None:
    """Remove what an earlier run left in this folder, by its sample.json: old and new must not mix."""
    try:
        earlier = json.loads((out / "sample.json").read_text(encoding="utf-8"))["pictures"]
        names = [Path(row["file"]).name for row in earlier]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return
    for name in names:
        (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "frames" / Path(name).stem, ignore_errors=True)
    animated = ("denoising.gif", "denoising.mp4", "denoising.apng", "interpolation.gif")
    for name in ("grid.png", *animated, "sample.json"):
        (out / name).unlink(missing_ok=True)


def make_jobs(prompts: Sequence[str], config: SampleConfig) -> list[Job]:
    """What is drawn, in order: the k-th picture has seed + k; what lies between two has a share of both."""
    if config.interpolate:
        if len(prompts) < 2 and config.num_images < 2:
            raise PokediffError("interpolate needs two prompts, or two images (seeds) of one")
        stops = prompts if len(prompts) > 1 else list(prompts) * config.num_images
        ends = [(prompt, config.seed + k) for k, prompt in enumerate(stops)]
        shares = np.linspace(0, 1, config.interpolate).tolist()
        return [
            Job(*here, to=there, share=share)
            for leg, (here, there) in enumerate(pairwise(ends))
            for share in (shares if leg == 0 else shares[1:])
        ]
    jobs = [
        Job(prompt, config.seed + k) for k, prompt in enumerate(p for p in prompts for _ in range(config.num_images))
    ]
    if not config.variation:
        return jobs
    return [
        Job(
            job.prompt, config.seed, to=(job.prompt, job.seed), share=config.variation if k % config.num_images else 0.0
        )
        for k, job in enumerate(jobs)
    ]


def make_finish(config: SampleConfig) -> Callable[[np.ndarray], np.ndarray]:
    """What is done to every finished picture."""
    palette = read_palette(config.palette) if config.palette else None
    return lambda picture: finish(picture, palette, config.hard_alpha, config.clean and not config.mask)


def read_beginning(config: SampleConfig, size: int) -> dict[str, Any]:
    """What --image, --mask and --strength mean to `denoise`. Raises PokediffError for what cannot be read."""
    if not config.image:
        return {}
    image = cut_backdrop(_read(config.image))  # a creature of ours stands on nothing
    if not config.mask:
        return {"image": fit_square(image, size), "strength": config.strength}
    mask = _read(config.mask)
    if mask.shape != image.shape:
        shapes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (mask, image)]
        raise PokediffError(f"the mask is {shapes[0]} px, the image {shapes[1]}")
    white = np.where(composite(mask, "black").mean(-1, keepdims=True) >= 128, 255, 0).repeat(4, -1).astype(np.uint8)
    return {"image": fit_square(image, size), "mask": fit_square(white, size)[..., 3] >= 128}


def _read(path: str) -> np.ndarray:
    try:
        return read_image(Path(path).read_bytes())
    except OSError as error:
        raise PokediffError(f"{path}: {error.strerror}") from None
    except BadImage as error:
        raise PokediffError(f"{path}: {error}") from None


def draw(
    pipeline: PokeDiffPipeline, jobs: Sequence[Job], config: SampleConfig, begin_with: dict[str, Any]
) -> Iterator[Frame]:
    """Every step of one batch, the pictures last, as the network leaves them."""
    text = pipeline.encode_prompt([job.prompt for job in jobs])  # (B, D)
    seeds = [job.seed for job in jobs]
    _, noise = pipeline.make_noise(seeds)  # each (B, C, H, W)
    for k, job in enumerate(jobs):
        if job.to is not None:
            prompt, seed = job.to
            text[k] = slerp(text[k : k + 1], pipeline.encode_prompt([prompt]), job.share)[0]
            for start, end in zip(noise, pipeline.make_noise([seed])[1], strict=True):
                start[k] = slerp(start[k : k + 1], end, job.share)[0]
    steps = pipeline.denoise(
        text,
        seeds,
        noise=noise,
        **begin_with,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        negative_prompt=config.negative_prompt,
        sampler=config.sampler,
        precision=config.precision,
    )
    for step in steps:
        yield Frame(from_model(step.x), from_model(step.x0), step.sigma)


def count_frames(pipeline: PokeDiffPipeline, config: SampleConfig) -> int:
    """How many frames `draw` yields."""
    strength = config.strength if config.image and not config.mask else 1.0
    return pipeline.count_steps(config.sampler, config.num_steps, strength)


def write_sheet(out: Path, pictures: np.ndarray, config: SampleConfig) -> None:
    """All pictures (N, H, W, 4) side by side, grid.png; the way between prompts there and back, interpolation.gif."""
    factor = show_factor(pictures.shape[1])
    sheet = enlarge(grid(pictures, sheet_columns(config, len(pictures)), 1), factor)
    write_whole(out / "grid.png", encode_png(composite(sheet, config.background) if config.background else sheet))
    if config.interpolate:
        shown = composite(enlarge(pictures, factor), config.background or "white")
        save_animation(out / "interpolation.gif", [*shown, *shown[-2:0:-1]], seconds=len(shown) / 8, hold=0.25)


def animate(out: Path, frames: Sequence[Frame], config: SampleConfig) -> None:
    """The noisy picture x beside the predicted clean one x0, step by step, for all pictures of a batch."""
    factor = show_factor(frames[0].x.shape[1])
    shown = []
    for frame in frames:
        pair = np.concatenate([frame.x, frame.x0], axis=2)  # (B, H, 2W, 4)
        columns = max(1, round((len(pair) / 2) ** 0.5))
        shown.append(composite(enlarge(grid(pair, columns), factor), config.background or "white"))
    for kind in config.animations:
        save_animation(out / f"denoising.{kind}", shown)


def sheet_columns(config: SampleConfig, pictures: int) -> int:
    """A sheet about as wide as high, on which the pictures of one prompt of several stay in one row."""
    side = max(1, round(pictures**0.5))
    return side if pictures <= config.num_images else config.num_images * max(1, round(side / config.num_images))


def show_factor(side: int) -> int:
    """How much sheets and animations enlarge a picture of `side` px."""
    return max(1, SHOWN_SIDE // side)


def write_picture(path: Path, picture: np.ndarray, config: SampleConfig) -> None:
    """One straight RGBA picture (H, W, 4) as PNG, enlarged and on the background that the settings ask for."""
    picture = enlarge(picture, config.enlarge)
    write_whole(path, encode_png(composite(picture, config.background) if config.background else picture))


def write_frames(folder: Path, frames: Sequence[Frame], index: int, config: SampleConfig) -> None:
    """`save_frames` steps of picture `index`, evenly spread from noise to picture: NN-x.png and NN-x0.png."""
    folder.mkdir(parents=True, exist_ok=True)
    number = min(config.save_frames, len(frames))
    for k, step in enumerate(np.linspace(0, len(frames) - 1, number).round().astype(int)):
        write_picture(folder / f"{k:02}-x.png", frames[step].x[index], config)
        write_picture(folder / f"{k:02}-x0.png", frames[step].x0[index], config)


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the settings and of the prompts file. Raises PokediffError when there are none."""
    prompts = list(config.prompt)
    if config.prompts_file:
        path = Path(config.prompts_file)
        if not path.is_file():
            raise PokediffError(f"prompts file {path} not found")
        lines = (line.strip() for line in read_text(path).splitlines())
        prompts += [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise PokediffError('nothing to draw: give --prompt "a blue water turtle" or --prompts-file')
    return prompts


def read_settings(path: str | Path) -> SampleConfig:
    """The settings of an earlier run, from its sample.json."""
    path = Path(path)
    if not path.is_file():
        raise PokediffError(f"{path} not found")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise PokediffError(f"{path} is no sample.json") from None
    return from_values(settings, SampleConfig, str(path))


def write_facts(
    out: Path,
    pipeline: PokeDiffPipeline,
    config: SampleConfig,
    prompts: Sequence[str],
    jobs: Sequence[Job],
    seconds: float | None = None,
) -> None:
    """sample.json, everything needed to make the same pictures again: `sample.py --from-json sample.json`."""
    # What "auto" meant here: another machine would choose otherwise and draw other pictures.
    precision: Any = "bf16" if pipeline.in_bf16(config.precision) else "fp32"
    settings = dataclasses.replace(config, prompt=tuple(prompts), prompts_file=None, precision=precision)
    facts = {
        "settings": plain(settings),
        "pictures": [{"file": f"{k:04}.png", **facts_of(job)} for k, job in enumerate(jobs)],
        "weights_sha256": weights_sha256(config.checkpoint or DEFAULT_CHECKPOINT),
        "device": str(pipeline.device),
        "packages": {name: version(name) for name in ("pokediff", "torch", "diffusers")},
        "seconds": seconds and round(seconds, 2),
    }
    write_whole(out / "sample.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def weights_sha256(checkpoint: str | Path) -> str | None:
    """Of all networks of a checkpoint, its text encoder included; None for a repository of the hub."""
    suffixes = ("safetensors", "onnx")  # one folder deep: below lie other checkpoints of a run
    files = sorted(path for suffix in suffixes for path in Path(checkpoint).glob(f"*/*.{suffix}"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else None


def facts_of(job: Job) -> dict[str, Any]:
    facts: dict[str, Any] = {"prompt": job.prompt, "seed": job.seed}
    if job.to is not None:
        facts |= {"to_prompt": job.to[0], "to_seed": job.to[1], "share": round(job.share, 4)}
    return facts


def load_pipeline(config: SampleConfig) -> PokeDiffPipeline:
    """The checkpoint that the settings name, on their device; compiled if they say so. Exported ones run on the CPU."""
    checkpoint = config.checkpoint or DEFAULT_CHECKPOINT
    if is_exported(checkpoint):
        return load_exported(checkpoint)
    pipeline = PokeDiffPipeline.from_pretrained(checkpoint).to(pick_device(config.device))
    if config.compile:
        for network in pipeline.networks.values():
            compile_network(network)
    return pipeline


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the fastest there is. Raises PokediffError when it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PokediffError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from None
    return device


def slug(prompt: str) -> str:
    """A folder name out of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "sample"
