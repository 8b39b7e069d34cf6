"""The files of a drawing: pictures, a sheet, animations, frames, and sample.json with its settings.

0000.png ...        pictures of native size
large/0000.png ...  enlarged copies of at least LARGE_SIDE px
grid.png            all pictures on one sheet
denoising.gif       the first batch: left the noisy picture x, right the predicted clean picture x0
interpolation.gif   of an interpolation, there and back
frames/0000/00-x.png, 00-x0.png ...   with save_frames
sheet.png, sheet.*  with sheet: the files of atlas.py
image.png, mask.png copies of the inputs of img2img and inpainting
sample.json         settings, prompt and seed of each picture, files; `--from-json` draws the same pictures

Several processes share the pictures; the first one writes all else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pokediff.baselines.interface import DrawsAtOnce, is_baseline
from pokediff.config import SampleConfig, plain
from pokediff.data.images import composite, encode_png, enlarge, grid, read_image, save_animation
from pokediff.drawing.atlas import atlas_files, write_atlas
from pokediff.drawing.jobs import Job
from pokediff.errors import PokediffError
from pokediff.files import own_folder, read_json, write_whole
from pokediff.model.checkpoint import base_of, find_folder
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.paths import shipped
from pokediff.training.launch import join

LARGE_SIDE = 256  # minimum side in px of a copy in large/
SHOWN_SIDE = 128  # minimum side in px of a picture on a sheet or in an animation
ON_SHEET = 1024  # at most so many pictures, the first ones, are on grid.png
IDENTITY = ("settings", "weights_sha256", "packages")  # of sample.json: what decides how a picture looks
FACTS = "sample.json"
# The files that a drawing may write and remove; a foreign sample.json cannot name others.
OWN_FILES = re.compile(
    r"(large/)?\d{4,}\.png|grid\.png|sheet(\.\w+)+|(denoising|interpolation|image|mask)\.\w+|frames/\d{4,}/\d+-x0?\.png|sample\.json"
)


@dataclass(frozen=True)
class Frame:
    """A step as it is shown: straight RGBA uint8 (B, S, S, 4) of the size of its denoiser. Sigma 0 marks the last one,
    whose x0 are the finished pictures, and `jobs` what was drawn, with the seeds that were chosen.
    """

    x: np.ndarray
    x0: np.ndarray
    sigma: float
    jobs: Sequence[Job] = ()


def write_drawing(
    out: Path,
    config: SampleConfig,
    pipeline: PokeDiffPipeline | DrawsAtOnce,
    jobs: Sequence[Job],
    batches: Iterable[tuple[np.ndarray, Sequence[Frame]]],
) -> int:
    """Write a drawing to the folder `out`, batch by batch as `batches` gives them. Returns the number of pictures. An
    earlier drawing in the folder is replaced.

    Args:
        config: its settings, resolved: with prompts, a seed and a whole `sampling`.
        jobs: prompt and seed of every picture.
        batches: finished pictures, straight RGBA uint8 (B, S, S, 4), and the frames of their denoising: those of the
            first batch are animated, and all are kept in frames/ if `save_frames` says so; () for none.

    Exceptions and errors are those of `share_drawing`.
    """
    with own_folder(out, FACTS):
        facts = facts_of(pipeline, config)
        begin(out, config, jobs, facts)
        return write_batches(out, config, jobs, facts, _numbered(batches))


def _numbered(
    batches: Iterable[tuple[np.ndarray, Sequence[Frame]]],
) -> Iterator[tuple[Sequence[int], np.ndarray, Sequence[Frame]]]:
    first = 0
    for pictures, frames in batches:
        yield range(first, first + len(pictures)), pictures, frames
        first += len(pictures)


def share_drawing(
    out: Path,
    config: SampleConfig,
    pipeline: PokeDiffPipeline | DrawsAtOnce,
    jobs: Sequence[Job],
    draw: Callable[[Sequence[Sequence[int]]], Iterable[tuple[np.ndarray, Sequence[Frame]]]],
) -> int:
    """As `write_drawing`, by all processes together, and only what an interrupted drawing of the same settings has left
    out. Any other drawing in the folder is replaced, by the list of files in its sample.json. Returns the number of
    pictures.

    Args:
        draw: pictures and frames of this process's batches, each given as the numbers of its jobs.

    An exception in `draw`, Ctrl-C too, passes through; the pictures that are done are kept, with their sheet and
    sample.json.

    Raises PokediffError for a folder of other files or of another process, and when it would overwrite a foreign file
    or an input of img2img.
    """
    from accelerate.utils import broadcast_object_list

    state = join()
    with own_folder(out, FACTS) if state.is_main_process else nullcontext():
        facts: dict[str, Any] = {}
        todo: list[list[int]] = []
        if state.is_main_process:
            facts = {**facts_of(pipeline, config), "processes": state.num_processes}
            animated = config.animations if isinstance(pipeline, PokeDiffPipeline) else ()
            todo = batches_of(begin(out, config, jobs, facts, keep=True), out, config, animated, len(jobs))
        mine = broadcast_object_list([todo])[0][state.process_index :: state.num_processes]
        drawn = ((batch, *pictures) for batch, pictures in zip(mine, draw(mine), strict=True))
        if state.is_main_process:
            return write_batches(out, config, jobs, facts, drawn, state.wait_for_everyone)
        for batch, pictures, frames in drawn:
            write_batch(out, config, jobs, batch, pictures, frames)
        state.wait_for_everyone()
    return len(jobs)


def begin(out: Path, config: SampleConfig, jobs: Sequence[Job], facts: dict[str, Any], keep: bool = False) -> list[int]:
    """Make a folder ready for a drawing. Returns the pictures that are not there, by number; with `keep`, those of the
    same settings stay.
    """
    names, missing = file_names(config, len(jobs)), list(range(len(jobs)))
    if keep and is_same(out, facts):
        missing = [index for index in missing if not (out / f"{index:04}.png").is_file()]
        print(f"{len(jobs) - len(missing)} of {len(jobs)} pictures are in {out} already")
    else:
        if listed_files(out):
            print(f"the earlier drawing in {out} is replaced")
        claim(out, names, [path for path in (config.image, config.mask) if path])
    write_facts(out, facts, dict(enumerate(jobs)), names)  # first, since it marks the other files as ours
    copy_inputs(out, config)
    return missing


def is_same(out: Path, facts: dict[str, Any]) -> bool:
    """Whether the drawing in a folder has these settings, weights and libraries: a missing picture fits the others."""
    try:
        earlier = read_json(out / FACTS)
        return all(_of_pictures(earlier[name]) == _of_pictures(facts[name]) for name in IDENTITY)
    except (OSError, PokediffError, KeyError, TypeError):
        return False


def _of_pictures(facts: Any) -> Any:
    """Without what only says how they are drawn, as JSON would give it back."""
    kept = {key: value for key, value in facts.items() if key != "batch_size"} if isinstance(facts, dict) else facts
    return json.loads(json.dumps(kept))


def batches_of(
    missing: Sequence[int], out: Path, config: SampleConfig, animations: Sequence[str], number: int
) -> list[list[int]]:
    """The missing pictures of `number` in batches. The first batch is animated, so it is drawn as a whole where one of
    its pictures or an animation is missing.
    """
    size = config.batch_size
    whole = all((out / f"denoising.{kind}").is_file() for kind in animations)
    first = [list(range(min(size, number)))] if not whole or any(index < size for index in missing) else []
    later = [index for index in missing if index >= size]
    return first + [later[start : start + size] for start in range(0, len(later), size)]


def write_batches(
    out: Path,
    config: SampleConfig,
    jobs: Sequence[Job],
    facts: dict[str, Any],
    drawn: Iterable[tuple[Sequence[int], np.ndarray, Sequence[Frame]]],
    wait: Callable[[], None] = lambda: None,
) -> int:
    """Write batches as they are drawn, `wait` for those of other processes, and write what belongs to all pictures."""
    began, names = time.monotonic(), file_names(config, len(jobs))
    try:
        for batch, pictures, frames in drawn:
            write_batch(out, config, jobs, batch, pictures, frames)
        wait()
    finally:
        there = [index for index in range(len(jobs)) if (out / f"{index:04}.png").is_file()]
        done = {index: drawn_job(out, index, jobs[index]) for index in there}
        if done:
            write_sheet(out, read_pictures(out, list(done)[:ON_SHEET], config), config)
            whole = next((index for index in range(len(jobs)) if index not in done), len(jobs))
            write_atlas(out, config, list(done.values())[:whole])
            names = [name for name in names if (out / name).is_file()]
            write_facts(out, facts | {"seconds": round(time.monotonic() - began, 2)}, done, names)
        else:
            remove(out, names)
    return len(done)


# ------------------------------------------------------------------------------------------------------- the folder


def file_names(config: SampleConfig, number: int) -> list[str]:
    """All files that a drawing of `number` pictures may write, relative to its folder."""
    names = ["grid.png", *(f"denoising.{kind}" for kind in config.animations)]
    names += ["interpolation.gif"] if config.interpolate else []
    names += atlas_files(config)
    names += [copied_name(kind, path) for kind, path in (("image", config.image), ("mask", config.mask)) if path]
    for index in range(number):
        names += [f"{index:04}.png", f"large/{index:04}.png"]
        names += [f"frames/{index:04}/{k:02}-{what}.png" for k in range(config.save_frames) for what in ("x", "x0")]
    return [*names, FACTS]


def claim(out: Path, names: Sequence[str], inputs: Sequence[str]) -> None:
    """Make the folder `out` ready for the files `names`: remove the earlier drawing in it.

    Raises PokediffError, and removes nothing, when another file has one of these names, or one of `inputs` would go.
    """
    earlier, folder = listed_files(out), out.resolve()
    for path in (Path(name).resolve() for name in inputs):
        if path.is_relative_to(folder) and path.relative_to(folder).as_posix() in {*earlier, *names}:
            raise PokediffError(f"drawing would overwrite its input {path}: choose another --out than {out}")
    if foreign := [name for name in names if name not in earlier and (out / name).exists()]:
        raise PokediffError(
            f"{out / foreign[0]} exists and was not written by an earlier drawing: choose another --out"
        )
    remove(out, [name for name in earlier if name != FACTS])  # it marks the folder as ours, and is replaced


def listed_files(out: Path) -> list[str]:
    """The files of the drawing in a folder, by its sample.json; [] when there is none."""
    try:
        names = read_json(out / FACTS)["files"]
        return [name for name in names if OWN_FILES.fullmatch(name)]
    except (OSError, PokediffError, KeyError, TypeError):
        return []


def remove(out: Path, names: Sequence[str]) -> None:
    """Remove files of ours, and the folders that they leave empty."""
    for name in names:
        (out / name).unlink(missing_ok=True)
    folders = {parent for name in names for parent in Path(name).parents if parent != Path()}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):  # not there, or not empty
            (out / folder).rmdir()


# --------------------------------------------------------------------------------------------------------- pictures


def write_batch(
    out: Path,
    config: SampleConfig,
    jobs: Sequence[Job],
    batch: Sequence[int],
    pictures: np.ndarray,
    frames: Sequence[Frame],
) -> None:
    """The pictures of these numbers, their frames, and an animation of the first batch."""
    drawn = (frames and frames[-1].jobs) or [jobs[index] for index in batch]
    for offset, (index, picture, job) in enumerate(zip(batch, pictures, drawn, strict=True)):
        if config.save_frames and frames:
            write_frames(out / "frames" / f"{index:04}", frames, offset, config)
        write_picture(out, index, picture, config, job)
    if batch[0] == 0 and len(frames) > 1:
        animate(out, frames, config)


def on_background(rgba: np.ndarray, config: SampleConfig) -> np.ndarray:
    return composite(rgba, config.background) if config.background else rgba


def write_picture(out: Path, index: int, picture: np.ndarray, config: SampleConfig, job: Job) -> None:
    """One straight RGBA picture (S, S, 4), scaled by `enlarge`, and its copy in large/ unless it is large itself. The
    copy first: a picture that is there is one that is done. The job is in the text of both files.
    """
    picture = on_background(enlarge(picture, config.enlarge), config)
    if (factor := -(-LARGE_SIDE // len(picture))) > 1:
        (out / "large").mkdir(exist_ok=True)
        write_whole(out / "large" / f"{index:04}.png", encode_png(enlarge(picture, factor), job.facts()))
    write_whole(out / f"{index:04}.png", encode_png(picture, job.facts()))


def drawn_job(out: Path, index: int, job: Job) -> Job:
    """The job of a picture that is there, with the seed in its file: where the scorer chose, and perhaps another
    process drew, that is another one.
    """
    with Image.open(out / f"{index:04}.png") as picture:
        seed = str(picture.info.get("seed", job.seed))
    return dataclasses.replace(job, seed=int(seed)) if seed.isdecimal() else job


def read_pictures(out: Path, numbers: Sequence[int], config: SampleConfig) -> np.ndarray:
    """What `write_picture` wrote, in its original size (N, S, S, 4)."""
    step = config.enlarge
    return np.stack([read_image((out / f"{index:04}.png").read_bytes())[::step, ::step] for index in numbers])


def write_frames(folder: Path, frames: Sequence[Frame], index: int, config: SampleConfig) -> None:
    """`save_frames` steps of picture `index`, evenly spread from noise to picture: NN-x.png and NN-x0.png, all of the
    size of the picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    side = frames[-1].x0.shape[1] * config.enlarge
    number = min(config.save_frames, len(frames))
    for k, step in enumerate(np.linspace(0, len(frames) - 1, number).round().astype(int)):
        for name, pictures in (("x", frames[step].x), ("x0", frames[step].x0)):
            shown = enlarge(pictures[index], side // pictures.shape[1])
            write_whole(folder / f"{k:02}-{name}.png", encode_png(on_background(shown, config)))


def write_sheet(out: Path, pictures: np.ndarray, config: SampleConfig) -> None:
    """Pictures (N, S, S, 4) side by side, grid.png; an interpolation there and back, interpolation.gif."""
    factor = shown_factor(pictures.shape[1])
    sheet = enlarge(grid(pictures, sheet_columns(config, len(pictures)), 1), factor)
    write_whole(out / "grid.png", encode_png(on_background(sheet, config)))
    if config.interpolate:
        shown = composite(enlarge(pictures, factor), config.background or "white")
        save_animation(out / "interpolation.gif", [*shown, *shown[-2:0:-1]], seconds=len(shown) / 8, hold=0.25)


def animate(out: Path, frames: Sequence[Frame], config: SampleConfig) -> None:
    """The noisy picture x beside the predicted clean one x0, step by step, for all pictures of a batch."""
    side = frames[-1].x0.shape[1]
    side *= shown_factor(side)
    shown = []
    for frame in frames:
        pair = np.concatenate([frame.x, frame.x0], axis=2)  # (B, S, 2S, 4)
        pair = enlarge(pair, side // pair.shape[1])  # the steps of a base are smaller than the pictures
        columns = max(1, round((len(pair) / 2) ** 0.5))
        shown.append(composite(grid(pair, columns, 8), config.background or "white"))
    for kind in config.animations:
        save_animation(out / f"denoising.{kind}", shown)


def sheet_columns(config: SampleConfig, pictures: int) -> int:
    """A sheet about as wide as high; the pictures of one of several prompts stay in one row."""
    side, each = max(1, round(pictures**0.5)), config.num_images_per_prompt
    return side if pictures <= each else each * max(1, round(side / each))


def shown_factor(side: int) -> int:
    """The factor by which sheets and animations enlarge a picture of `side` px."""
    return max(1, SHOWN_SIDE // side)


# ---------------------------------------------------------------------------------------------------------- settings


def copied_name(kind: str, path: str) -> str:
    """image.png: the name under which an input lies beside the pictures."""
    return f"{kind}{Path(path).suffix.lower() or '.png'}"


def copy_inputs(out: Path, config: SampleConfig) -> None:
    for kind, path in (("image", config.image), ("mask", config.mask)):
        if path:
            shutil.copyfile(path, out / copied_name(kind, path))


def facts_of(pipeline: PokeDiffPipeline | DrawsAtOnce, config: SampleConfig) -> dict[str, Any]:
    """What sample.json says beside its pictures."""
    # What "auto" was here: another machine would choose otherwise and draw other pictures.
    precision: Any = "bf16" if pipeline.in_bf16(config.sampling.precision) else "fp32"
    settings = dataclasses.replace(
        config,
        out=None,
        sampling=dataclasses.replace(config.sampling, precision=precision),
        image=copied_name("image", config.image) if config.image else None,
        mask=copied_name("mask", config.mask) if config.mask else None,
    )
    return {
        "settings": plain(settings),
        "weights_sha256": weights_sha256(checkpoint_folder(config.lora or config.checkpoint), config.sampling.chooses),
        "device": str(pipeline.device),
        "packages": {name: version(name) for name in ("pokediff", "torch", "diffusers")},
    }


def write_facts(out: Path, facts: dict[str, Any], jobs: Mapping[int, Job], files: Sequence[str]) -> None:
    """Write sample.json: the pictures by number."""
    pictures = [{"file": f"{k:04}.png", **job.facts()} for k, job in jobs.items()]
    text = json.dumps({**facts, "pictures": pictures, "files": list(files)}, indent=2, ensure_ascii=False)
    write_whole(out / FACTS, text + "\n")


def checkpoint_folder(name: str | None) -> Path:
    """The folder of a checkpoint by folder, name of a shipped one, or hub repository, or of a baseline; None: the
    shipped pokediff.
    """
    if name and is_baseline(name):
        return Path(name)
    return find_folder(name or shipped("checkpoints", "pokediff"), {})


def weights_sha256(folder: Path, with_scorer: bool = False) -> str:
    """Of all weights that a checkpoint or baseline draws with: its networks and text encoder, its scorer where that
    chooses, and those of its base.
    """
    parts = [".", "cascade/*", "text_encoder", *(["scorer"] if with_scorer else [])]
    places = [f"{place}/*.{kind}" for place in parts for kind in ("safetensors", "onnx")]
    files = sorted(path for place in places for path in folder.glob(place))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    if not is_baseline(folder) and (base := base_of(folder)):
        digests.append(weights_sha256(base, with_scorer))
    return hashlib.sha256("".join(digests).encode()).hexdigest()
