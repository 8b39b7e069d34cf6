"""sample(config): prompts to a folder of pictures and animations of the denoising."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pokediff.baselines.interface import DrawsAtOnce, is_baseline
from pokediff.config import SampleConfig, from_values
from pokediff.data.colors import cut_backdrop
from pokediff.data.images import BadImage, composite, fit_square, from_model, parse_color, read_image
from pokediff.data.vocabulary import prompt_note, read_words
from pokediff.drawing.export import is_exported, load_exported
from pokediff.drawing.jobs import MAX_SEED, Job, make_jobs, read_prompts, slug
from pokediff.drawing.pixelart import PIXEL_COLORS, finish, is_pixel_prompt, read_palette
from pokediff.drawing.sheets import FACTS, Frame, checkpoint_folder, share_drawing, weights_sha256
from pokediff.drawing.table import draw_table, is_table, read_table
from pokediff.errors import PokediffError
from pokediff.files import new_folder, read_json, require_file
from pokediff.model.denoiser import compile_network
from pokediff.model.pipeline import OnStep, PokeDiffPipeline, quiet
from pokediff.model.samplers import slerp
from pokediff.progress import ProgressBar
from pokediff.training.launch import join

NOTES = 5  # of prompts, that are printed
BEST_OF = 8  # drawings that are begun for a picture: a quarter as many torn ones (docs/benchmarks.md)
Model = PokeDiffPipeline | DrawsAtOnce
T = TypeVar("T")


def sample(config: SampleConfig) -> Path:
    """Draw, and write what `sheets` lists. Returns the folder: `config.out`, or a new one in outputs/.

    Several processes share the pictures. Ctrl-C keeps those that are done, with a sheet and a sample.json of them, and
    is raised again; the same settings again draw the others.
    Raises PokediffError for a prompt, checkpoint, image, palette, background or folder that cannot be used.
    """
    quiet()
    if is_table(config):
        return sample_table(config)
    main = join().is_main_process
    prompts = tuple(read_prompts(config))
    seed = of_first_process(choose_seed(config, prompts))
    config = replace(config, prompt=prompts, prompts_file=None, seed=seed)
    jobs = make_jobs(prompts, config)
    if config.background:
        parse_color(config.background)
    if config.palette:
        read_palette(config.palette)
    pipeline = load_pipeline(config)
    config = resolved(config, pipeline)
    init = read_init_image(config)
    own = Path("outputs") / f"{slug(prompts[0])}-{seed}"
    out = Path(config.out) if config.out else of_first_process(new_folder(own) if main else own)
    if main:
        print_notes(pipeline, config, prompts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only the first")  # as the note says
        number = share_drawing(out, config, pipeline, jobs, partial(batches, pipeline, jobs, config, init))
    if main:
        print(f"{number} picture{'s' * (number > 1)}, seed {seed}: {out}")
    return out


def choose_seed(config: SampleConfig, prompts: Sequence[str]) -> int:
    """That of the settings, of a drawing of these prompts in OUT that was interrupted, or a random one."""
    if config.seed is not None:
        return config.seed
    earlier = interrupted(Path(config.out)) if config.out else None
    if earlier is not None and earlier.prompt == tuple(prompts) and earlier.seed is not None:
        return earlier.seed
    return random.SystemRandom().randint(0, MAX_SEED)


def interrupted(out: Path) -> SampleConfig | None:
    """The settings of the drawing in a folder when pictures are missing."""
    try:
        config = read_settings(out / FACTS)
        number = len(make_jobs(config.prompt, config))
    except (OSError, PokediffError, AssertionError):
        return None
    return config if any(not (out / f"{index:04}.png").is_file() for index in range(number)) else None


def of_first_process(value: T) -> T:
    """The value that the first process has."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def sample_table(config: SampleConfig) -> Path:
    """Draw the prompts of a CSV file, as `table` describes. Returns the folder."""
    rows = read_table(config)  # before the model
    pipeline = load_pipeline(config)
    main, config = join().is_main_process, resolved(config, pipeline)
    if main:
        print_notes(pipeline, config, [row.prompt for row in rows])
    out = Path(config.out or Path("outputs") / Path(str(config.prompts_file)).stem)
    facts = {"weights": weights_sha256(checkpoint_folder(config.lora or config.checkpoint), config.sampling.chooses)}

    new, there = draw_table(config, out, facts, lambda jobs: next(draw(pipeline, jobs, config, every=False)))
    if main:
        print(f"{new} picture{'s' * (new != 1)} drawn, {there} were there: {out}")
    return out


def prompt_notes(pipeline: Model, folder: Path, prompts: Sequence[str]) -> list[str]:
    """A line for each prompt that will not draw what it says; `folder` is that of the checkpoint."""
    if isinstance(pipeline, DrawsAtOnce) or pipeline.tokenizer is None:  # text encoders of their own kinds
        return []
    words, most = read_words(folder), pipeline.text_encoder.config.max_position_embeddings
    notes = (prompt_note(prompt, words, pipeline.tokenizer.tokenize, most) for prompt in dict.fromkeys(prompts))
    return [note for note in notes if note]


def print_notes(pipeline: Model, config: SampleConfig, prompts: Sequence[str]) -> None:
    """Print at most NOTES lines: of `prompt_notes`, and on a negative prompt without guidance. `config` is resolved."""
    notes = [] if config.lora else prompt_notes(pipeline, checkpoint_folder(config.checkpoint), prompts)
    sampling = config.sampling
    if isinstance(pipeline, PokeDiffPipeline) and sampling.negative_prompt and sampling.guidance_scale == 1:
        notes.insert(0, "the negative prompt has no effect without guidance: give --guidance-scale 2, say")
    for note in notes[:NOTES]:
        print(f"note: {note}", file=sys.stderr)
    if more := len(notes[NOTES:]):
        print(f"note: and {more} more prompts like these", file=sys.stderr)


def resolved(config: SampleConfig, pipeline: Model) -> SampleConfig:
    """`config` with the checkpoint's defaults in place of None. Raises PokediffError for what a baseline cannot do."""
    if isinstance(pipeline, DrawsAtOnce):
        wanted = ("image", "mask", "variation", "interpolate", "save_frames", "compile")
        if given := [name for name in wanted if getattr(config, name)]:
            raise PokediffError(f"{pipeline.name} draws from prompts alone; leave out {', '.join(given)}")
        if pipeline.slow:  # so that Ctrl-C keeps the pictures that are done
            config = replace(config, batch_size=1)
    if pipeline.pixel_art and config.hard_alpha is None and not config.raw:
        config = replace(config, hard_alpha=True)
    sampling = config.sampling
    if sampling.best_of is None and can_choose(config, pipeline):
        sampling = replace(sampling, best_of=BEST_OF)
    return replace(config, sampling=pipeline.resolved(sampling))


def can_choose(config: SampleConfig, pipeline: Model) -> bool:
    """Whether the scorer chooses by default: not where the noise is given, nor where speed was asked for."""
    given = config.image or config.variation or config.interpolate
    return getattr(pipeline, "scorer", None) is not None and not given and not config.sampling.fast


def batches(
    pipeline: Model, jobs: Sequence[Job], config: SampleConfig, init: dict[str, Any], numbers: Sequence[Sequence[int]]
) -> Iterator[tuple[np.ndarray, list[Frame]]]:
    """Pictures and frames of one batch of jobs, given by their numbers, after another, with a progress bar. Only the
    first batch is animated: without `save_frames` the others have their last frame only.
    """
    steps = len(pipeline.evaluations(config.sampling, init.get("strength", 1.0))) + 1
    number, total = sum(map(len, numbers)), steps * len(numbers)
    if isinstance(pipeline, PokeDiffPipeline) and config.sampling.chooses:
        begun = [len(batch) * (config.sampling.best_of or 1) for batch in numbers]
        total += sum(math.ceil(several / config.batch_size) for several in begun) * pipeline.base_steps(config.sampling)
    name, silent = f"{number} picture{'s' * (number > 1)}", not join().is_main_process
    with ProgressBar(total=total, desc=name, unit="step", leave=False, disable=silent) as bar:
        for batch in numbers:
            every, frames = batch[0] == 0 or config.save_frames > 0, []
            mine = [jobs[index] for index in batch]
            for frame in draw(pipeline, mine, config, init, every, lambda _: bar.update() and None):
                frames.append(frame)
                bar.update(1 if every else steps)
            yield frames[-1].x0, frames


def draw(
    pipeline: Model,
    jobs: Sequence[Job],
    config: SampleConfig,
    init: dict[str, Any] | None = None,
    every: bool = True,
    on_choice: OnStep = lambda _: None,
) -> Iterator[Frame]:
    """The steps of one batch; the last one, with sigma 0, holds the finished pictures in x0, as the denoisers left them
    in x. `init` is what `read_init_image` gives (default: read from `config`); with `every` false only the last.
    `on_choice` gets the steps of the drawings among which `best_of` chooses.
    """
    config = resolved(config, pipeline)
    init = read_init_image(config) if init is None else init
    finishing, size = make_finish(config), config.sampling.size

    def last(pictures: np.ndarray) -> Frame:
        finished = [finishing(picture, job.nearest_prompt) for picture, job in zip(pictures, jobs, strict=True)]
        return Frame(pictures, np.stack(finished), 0.0, jobs)

    if isinstance(pipeline, DrawsAtOnce):
        yield last(pipeline.generate([job.prompt for job in jobs], [job.seed for job in jobs], config.sampling))
        return
    jobs, sampling = choose(pipeline, jobs, config, on_choice), replace(config.sampling, best_of=1)
    text, seeds = pipeline.encode_prompt([job.prompt for job in jobs]), [job.seed for job in jobs]  # (B, D)
    _, noise = pipeline.make_noise(seeds, size)  # a (B, C, S, S) for each leg
    for k, job in enumerate(jobs):
        if job.to is not None:
            prompt, seed = job.to
            text[k] = slerp(text[k : k + 1], pipeline.encode_prompt(prompt), job.share)[0]
            for start, end in zip(noise, pipeline.make_noise([seed], size)[1], strict=True):
                start[k] = slerp(start[k : k + 1], end, job.share)[0]
    for step in pipeline.denoise(text, seeds, sampling, noise=noise, **init):
        if step.denoiser is None:
            yield last(from_model(step.x0))
        elif every:
            yield Frame(from_model(step.x), from_model(step.x0), step.sigma)


def choose(pipeline: Model, jobs: Sequence[Job], config: SampleConfig, on_step: OnStep = lambda _: None) -> list[Job]:
    """The jobs, each with the best of its `best_of` seeds; `config` is resolved."""
    if isinstance(pipeline, DrawsAtOnce) or not config.sampling.chooses:
        return list(jobs)
    prompts, seeds, size = [job.prompt for job in jobs], [job.seed for job in jobs], config.batch_size
    best = pipeline.best_seeds(prompts, seeds, config.sampling, batch_size=size, on_step=on_step)
    return [replace(job, seed=seed) for job, seed in zip(jobs, best, strict=True)]


def make_finish(config: SampleConfig) -> Callable[[np.ndarray, str], np.ndarray]:
    """The post-processing of a picture, straight RGBA (S, S, 4), and its prompt. A prompt for pixel art ends in hard
    alpha and few colours, unless told otherwise. Inpainting changes nothing by itself outside the mask: it removes no
    specks and keeps the colours.
    """
    palette = read_palette(config.palette) if config.palette else None

    def finish_one(picture: np.ndarray, prompt: str) -> np.ndarray:
        if config.raw:
            return picture
        pixel = is_pixel_prompt(prompt) and not config.mask
        colors = PIXEL_COLORS if pixel and palette is None else palette
        hard = pixel if config.hard_alpha is None else config.hard_alpha
        return finish(picture, colors, hard, config.clean and not config.mask)

    return finish_one


def read_init_image(config: SampleConfig) -> dict[str, Any]:
    """The arguments image, mask and strength of `denoise`, of the size in `config`; {} without an image. A plain
    backdrop is removed.

    Raises PokediffError for an image or mask that cannot be read, or a mask of another shape than the image.
    """
    if not config.image:
        return {}
    side = config.sampling.size
    assert side is not None, "resolve the settings first"
    image = cut_backdrop(_read(config.image))
    if not config.mask:
        return {"image": fit_square(image, side), "strength": config.strength}
    mask = _read(config.mask)
    if mask.shape != image.shape:
        shapes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (mask, image)]
        raise PokediffError(f"the mask is {shapes[0]} px, the image {shapes[1]}")
    white = np.where(composite(mask, "black").mean(-1, keepdims=True) >= 128, 255, 0).repeat(4, -1).astype(np.uint8)
    return {"image": fit_square(image, side), "mask": fit_square(white, side)[..., 3] >= 128}


def _read(path: str) -> np.ndarray:
    try:
        return read_image(Path(path).read_bytes())
    except OSError as error:
        raise PokediffError(f"{path}: {error.strerror}") from None
    except BadImage as error:
        raise PokediffError(f"{path}: {error}") from None


# -------------------------------------------------------------------------------------------- checkpoints and settings


def load_pipeline(config: SampleConfig) -> Model:
    """The checkpoint, or LoRA, of the settings on their device, compiled with `config.compile`."""
    if config.lora:
        from pokediff.baselines.lora import load_lora

        return load_lora(Path(config.lora), pick_device(config.device), config.checkpoint)
    pipeline = load_checkpoint(config.checkpoint, config.device)
    if config.compile and isinstance(pipeline, PokeDiffPipeline):
        for _, denoiser in pipeline.cascade.items():
            compile_network(denoiser)
    return pipeline


def load_checkpoint(name: str | None = None, device: str | None = None) -> Model:
    """A checkpoint by folder, name of a shipped one, or hub repository (default: the shipped pokediff), or a baseline,
    on a device (default: the fastest). An exported one runs on the CPU. Raises PokediffError when it cannot be loaded.
    """
    folder = checkpoint_folder(name)
    if is_baseline(folder):
        from pokediff.baselines.generator import load_baseline

        return load_baseline(folder, pick_device(device))
    if is_exported(folder):
        return load_exported(folder)
    return PokeDiffPipeline.from_pretrained(folder).to(pick_device(device))


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the fastest that is available. Raises PokediffError when it is not."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise PokediffError(f"device {name!r} is not available here: use {' or '.join(there)}") from None
    return device


def read_settings(path: str | Path) -> SampleConfig:
    """The settings of an earlier drawing, from its sample.json; an image that lies beside it is found there.

    Raises PokediffError when there is no such file, or it is not a sample.json.
    """
    path = Path(path)
    require_file(path)
    try:
        settings = read_json(path)["settings"]
    except (KeyError, TypeError):
        raise PokediffError(f"{path} is not a sample.json") from None
    config = from_values(settings, SampleConfig, str(path))
    beside = {name: path.parent / value for name in ("image", "mask") if (value := getattr(config, name))}
    beside_it = {name: file.as_posix() for name, file in beside.items() if file.is_file()}
    return replace(config, out=None, **beside_it)  # where to write is for the user to say, not for the file
