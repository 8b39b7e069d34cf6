"""What the demo does, without its page: it bounds every request, draws in one thread, looks up the nearest training
pictures, and writes the files that are taken home.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pokediff.config import SampleConfig, from_values
from pokediff.data.dataset import load_pictures
from pokediff.data.images import BadImage, composite, encode_png, enlarge, premultiply, read_image, unpremultiply
from pokediff.data.records import Record, write_whole
from pokediff.drawing import sample as sampling
from pokediff.drawing.attribution import Influence, watch_words
from pokediff.drawing.sample import Frame, Job
from pokediff.errors import PokediffError
from pokediff.evaluation.copies import nearest_in_pixels
from pokediff.model.pipeline import SAMPLERS, PokeDiffPipeline, quiet, settled

T = TypeVar("T")
HELD_OUT = 300  # unseen real pictures whose distance to the training pictures says what is near
KEEP_MINUTES = 60  # how long the files of a drawing stay
DECODING = Lock()  # a picture at the limit takes some 250 MB while it is decoded: one at a time


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. The page shows these bounds; the server holds them."""

    prompt: int = 300  # characters
    prompts: int = 64  # in a batch
    pictures: int = 16  # in one drawing
    batch: int = 128  # pictures in a batch
    steps: int = 100
    guidance: float = 10.0
    seed: int = 2**32 - 1
    enlarge: int = 16
    way: int = 48  # pictures between two prompts
    upload_mb: int = 8
    upload_pixels: int = 16_000_000


LIMITS = Limits()


@dataclass(frozen=True)
class Neighbour:
    """The training picture that is nearest to a drawn one."""

    picture: np.ndarray  # straight RGBA uint8 (H, W, 4)
    record: Record
    distance: float  # 0 to 1, on the figures alone
    verdict: str  # new, close or copy


class Studio:
    """Checkpoints and, where it is on this machine, the data set they were trained on.

    `folder` is where files for people to take home are written, each drawing in a folder of its own.
    """

    def __init__(self, checkpoints: Sequence[str | Path], folder: Path, data: str | Path | None = None) -> None:
        quiet()
        self.folder = folder
        names = [Path(path).name for path in checkpoints]
        self.checkpoints = {
            name if names.count(name) == 1 else str(path): str(Path(path).resolve() if Path(path).is_dir() else path)
            for name, path in zip(names, checkpoints, strict=True)
        }
        # Networks run in this thread alone: torch keeps a pool of helpers for every thread that ever asked.
        self._thread = ThreadPoolExecutor(1, "network")
        self._pipelines: dict[str, PokeDiffPipeline] = {}
        self.data = Path(data) if data and Path(data).is_dir() else None
        self._training: _Training | None = None
        self.pipeline(next(iter(self.checkpoints)))
        if self.data is not None:
            Thread(target=self._read_training, args=(self.data,), daemon=True).start()

    # ------------------------------------------------------------------------------------------------- networks

    def in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in the network thread."""
        return self._thread.submit(work).result()

    def _steps(self, make: Callable[[], Iterator[T]]) -> Iterator[T]:
        """What an iterator yields, each item made in the network thread; between two of them others may have it."""
        end: Any = object()
        iterator = self.in_thread(make)
        while (item := self.in_thread(lambda: next(iterator, end))) is not end:
            yield item

    def pipeline(self, name: str) -> PokeDiffPipeline:
        """The checkpoint of that name, loaded once. Raises PokediffError for one that was not offered."""
        if name not in self.checkpoints:
            raise PokediffError(f"there is no checkpoint {name!r} here, there are {', '.join(self.checkpoints)}")
        return self.in_thread(lambda: self._load(name))

    def _load(self, name: str) -> PokeDiffPipeline:
        if name not in self._pipelines:
            self._pipelines[name] = sampling.load_pipeline(SampleConfig(checkpoint=self.checkpoints[name]))
        return self._pipelines[name]

    def suited(self, name: str) -> tuple[int, float]:
        """The number of steps and the guidance that suit a checkpoint."""
        config = self.pipeline(name).config
        return config.num_steps, config.guidance_scale

    # ------------------------------------------------------------------------------------------------- requests

    def settings(self, checkpoint: str | None = None, **values: Any) -> SampleConfig:
        """Settings of a drawing from what a page or a program sent; `checkpoint` is a name of ours.

        Raises PokediffError for what is no setting, or beyond LIMITS.
        """
        name = checkpoint or next(iter(self.checkpoints))
        self.pipeline(name)
        values = {key: value for key, value in values.items() if value is not None}
        config = from_values({**values, "checkpoint": self.checkpoints[name]}, SampleConfig, "settings")
        if not config.prompt or not any(prompt.strip() for prompt in config.prompt):
            raise PokediffError("Write what to draw first.")
        config = settled(config, self.pipeline(name))
        guidance = 1.0 if config.guidance_scale is None else config.guidance_scale
        bounded = {
            "prompts": (len(config.prompt), LIMITS.prompts),
            "characters in a prompt": (max(map(len, (*config.prompt, config.negative_prompt))), LIMITS.prompt),
            "pictures of a prompt": (config.num_images, LIMITS.pictures),
            "pictures": (len(config.prompt) * config.num_images, LIMITS.batch),
            "steps": (config.num_steps or 0, LIMITS.steps),
            "guidance": (guidance, LIMITS.guidance),
            "seed": (config.seed, LIMITS.seed),
            "times enlarged": (config.enlarge, LIMITS.enlarge),
            "pictures on the way": (config.interpolate, LIMITS.way),
        }
        for what, (value, most) in bounded.items():
            if not value <= most:  # so that a value that is no number fails too
                raise PokediffError(f"At most {most} {what}, not {value}.")
        if not guidance >= 0:
            raise PokediffError("Guidance must not be negative.")
        if config.background:
            sampling.parse_color(config.background)
        return config

    def name_of(self, config: SampleConfig) -> str:
        return next(name for name, path in self.checkpoints.items() if path == config.checkpoint)

    def draw(self, config: SampleConfig, jobs: Sequence[Job] | None = None) -> Iterator[Frame]:
        """Every step of one batch of pictures, the last one finished (specks, palette, edges)."""
        pipeline = self.pipeline(self.name_of(config))
        jobs = sampling.make_jobs(config.prompt, config) if jobs is None else jobs
        finishing = sampling.make_finish(config)
        beginning = sampling.read_beginning(config, pipeline.image_size)
        total = sampling.count_frames(pipeline, config)
        for index, frame in enumerate(self._steps(lambda: sampling.draw(pipeline, jobs, config, beginning))):
            if index + 1 == total:
                frame = dataclasses.replace(frame, x0=np.stack([finishing(picture) for picture in frame.x0]))
            yield frame

    def frames(self, config: SampleConfig) -> int:
        """How many frames `draw` yields."""
        return sampling.count_frames(self.pipeline(self.name_of(config)), config)

    def schedule(self, config: SampleConfig) -> tuple[list[float], list[str]]:
        """The noise at every evaluation, and the network that is asked."""
        pipeline, way = self.pipeline(self.name_of(config)), (config.sampler, config.num_steps)
        return pipeline.sigmas(*way), pipeline.asked(*way)

    # The next three yield None while there is nothing to show: whoever asked may leave, or stop it, at any of them.

    def draw_all(self, config: SampleConfig, batch_size: int = 8) -> Iterator[tuple[list[Job], np.ndarray] | None]:
        """Many pictures, batch by batch: all jobs done so far and their pictures (N, H, W, 4)."""
        jobs, done = sampling.make_jobs(config.prompt, config), list[np.ndarray]()
        for start in range(0, len(jobs), batch_size):
            for frame in self.draw(config, jobs[start : start + batch_size]):
                last = frame
                yield None
            done.extend(last.x0)
            yield jobs[: len(done)], np.stack(done)

    def influence(self, config: SampleConfig) -> Iterator[Influence | None]:
        """Which word drew what, of the first prompt."""
        pipeline = self.pipeline(self.name_of(config))
        options = {name: getattr(config, name) for name in ("num_steps", "guidance_scale", "sampler")}
        return self._steps(lambda: watch_words(pipeline, config.prompt[0], config.seed, **options))

    def compare(self, config: SampleConfig, samplers: Sequence[str], steps: Sequence[int]) -> Iterator[Compared | None]:
        """The first prompt and seed by several samplers and numbers of steps, one after another."""
        if not samplers or not steps or len(samplers) * len(steps) > 4 * len(SAMPLERS):
            raise PokediffError(f"Choose a sampler and a number of steps, at most {4 * len(SAMPLERS)} pairs.")
        for sampler in samplers:
            for number in steps:
                one = self.settings(
                    self.name_of(config),
                    prompt=config.prompt[:1],
                    seed=config.seed,
                    guidance_scale=config.guidance_scale,
                    sampler=sampler,
                    num_steps=number,
                )
                begin = time.monotonic()
                for frame in self.draw(one):
                    last = frame
                    yield None
                yield Compared(sampler, number, last.x0[0], time.monotonic() - begin)

    # -------------------------------------------------------------------------------------------------- uploads

    def read_upload(self, path: str | Path) -> np.ndarray:
        """An uploaded picture as `decode` gives it. Raises PokediffError as that does, or if it is no longer there."""
        try:
            if Path(path).stat().st_size > LIMITS.upload_mb * 2**20:
                raise PokediffError(f"The file is larger than {LIMITS.upload_mb} MB.")
            return self.decode(Path(path).read_bytes())
        except OSError:
            raise PokediffError("The file did not arrive; try again.") from None

    @staticmethod
    def decode(data: bytes) -> np.ndarray:
        """A picture file as straight RGBA uint8, at most 512 px a side. Raises PokediffError for what is no picture,
        cut, or too large.
        """
        if len(data) > LIMITS.upload_mb * 2**20:
            raise PokediffError(f"The file is larger than {LIMITS.upload_mb} MB.")
        with DECODING:
            try:
                picture = read_image(data, LIMITS.upload_pixels)
            except BadImage as error:
                raise PokediffError(f"This file cannot be used: {error}.") from None
            factor = 512 / max(picture.shape[:2])
            if factor >= 1:
                return picture
            size = (max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
            small = Image.fromarray(premultiply(picture)).resize(size, Image.Resampling.BOX)
            return unpremultiply(np.asarray(small))

    def keep_input(self, picture: np.ndarray, mask: np.ndarray | None = None) -> tuple[Path, Path | None]:
        """Write a picture and a mask (H, W) bool to begin with, where `settings` can name them."""
        out = self.new_folder()
        write_whole(out / "image.png", encode_png(picture))
        if mask is None:
            return out / "image.png", None
        grey = np.repeat(np.where(mask, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
        write_whole(out / "mask.png", encode_png(np.concatenate([grey, np.full_like(grey[..., :1], 255)], axis=-1)))
        return out / "image.png", out / "mask.png"

    # ---------------------------------------------------------------------------------------------------- files

    def new_folder(self) -> Path:
        """An empty folder with a name that nobody can guess. What is older than KEEP_MINUTES goes."""
        for old in self.folder.glob("drawing-*"):
            with suppress(FileNotFoundError):  # another request was faster
                if old.stat().st_mtime < time.time() - 60 * KEEP_MINUTES:
                    shutil.rmtree(old, ignore_errors=True)
        out = self.folder / f"drawing-{secrets.token_urlsafe(12)}"
        out.mkdir(parents=True)
        return out

    def write(self, config: SampleConfig, frames: Sequence[Frame], jobs: Sequence[Job] | None = None) -> list[Path]:
        """The pictures, how they emerged as GIF and MP4, and sample.json, with which `sample.py --from-json` draws them
        again; a beginning and a mask lie beside it.
        """
        jobs = sampling.make_jobs(config.prompt, config) if jobs is None else jobs
        out, pictures = self.new_folder(), frames[-1].x0
        for name, path in (("image", config.image), ("mask", config.mask)):
            if path is not None:
                shutil.copyfile(path, out / f"{name}.png")
        named = {name: f"{name}.png" if getattr(config, name) else None for name in ("image", "mask")}
        config = dataclasses.replace(config, image=named["image"], mask=named["mask"])
        for index, picture in enumerate(pictures):
            sampling.write_picture(out / f"{index:04}.png", picture, config)
        sampling.write_sheet(out, pictures, config)
        if len(frames) > 1:
            sampling.animate(out, frames, dataclasses.replace(config, animations=("gif", "mp4")))
        pipeline = self.pipeline(self.name_of(config))
        if Path(config.checkpoint or "") == sampling.DEFAULT_CHECKPOINT:
            config = dataclasses.replace(config, checkpoint=None)  # wherever that lies on the machine it is taken to
        sampling.write_facts(out, pipeline, config, config.prompt, jobs)
        return sorted(out.iterdir(), key=lambda path: (path.suffix == ".json", path.name))

    def write_zip(self, config: SampleConfig, jobs: Sequence[Job], pictures: np.ndarray) -> Path:
        """One ZIP of pictures, a labelled sheet, and sample.json, which says what is what."""
        files = {path.name: path for path in self.write(config, [Frame(pictures, pictures, 0.0)], jobs)}
        out = files["sample.json"].parent
        with zipfile.ZipFile(out / "pictures.zip", "w") as bundle:
            for name, path in files.items():
                if name != "grid.png":  # the sheet says more
                    bundle.write(path, name)
            bundle.writestr("sheet.png", encode_png(labelled_sheet(pictures, [job.prompt for job in jobs])))
        return out / "pictures.zip"

    # ------------------------------------------------------------------------------------------------ neighbours

    def neighbours(self, pictures: np.ndarray) -> list[Neighbour] | str:
        """The nearest training picture of each (N, H, W, 4), or a sentence that says why there is none."""
        if self.data is None:
            return (
                "The pictures this model was trained on are not on this machine, so nothing can be said about copies."
            )
        if self._training is None:
            return "The training pictures are still being read; draw again in a moment."
        return self._training(pictures)

    def _read_training(self, data: Path) -> None:
        try:
            size = min(32, self.pipeline(next(iter(self.checkpoints))).image_size)
            self._training = _Training(data, size)
        except Exception as error:  # whatever it is, the page shall not promise them for ever
            print(f"no comparison with training pictures: {error}")
            self.data = None


@dataclass(frozen=True)
class Compared:
    """One prompt and seed, drawn one way."""

    sampler: str
    steps: int
    picture: np.ndarray  # (H, W, 4)
    seconds: float


class _Training:
    """The training pictures, and how near unseen real ones come to them."""

    def __init__(self, data: Path, size: int) -> None:
        pictures = load_pictures(data, size, None, report=lambda _: None)
        training, held_out = pictures.split("train"), pictures.split("test").spread(HELD_OUT)
        self.records = training.records
        self.pixels = unpremultiply(training.pixels[:])
        self.families = [record.family_key for record in self.records]
        self.near = 0.0
        if len(held_out):
            found = nearest_in_pixels(unpremultiply(held_out.pixels[:]), self.pixels, self.families)
            self.near = float(np.percentile(found.distance, 1))

    def __call__(self, pictures: np.ndarray) -> list[Neighbour]:
        found = nearest_in_pixels(pictures, self.pixels, self.families)
        return [
            Neighbour(
                self.pixels[index],
                self.records[index],
                float(distance),
                "copy" if copied else "close" if distance < self.near else "new",
            )
            for index, distance, copied in zip(found.index, found.distance, found.copies, strict=True)
        ]


def new_seed() -> int:
    return secrets.randbelow(LIMITS.seed + 1)


def labelled_sheet(pictures: np.ndarray, labels: Sequence[str], columns: int = 4) -> np.ndarray:
    """Pictures (N, H, W, 4) on white, each above its label, straight RGBA (H', W', 4)."""
    side, text = 160, 40
    factor = max(1, side // pictures.shape[1])
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text + 8)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = index % columns * (side + 8) + 4, index // columns * (side + text + 8) + 4
        shown = composite(enlarge(picture, factor))
        sheet.paste(Image.fromarray(shown), (left + (side - shown.shape[1]) // 2, top))
        canvas.multiline_text((left, top + side + 2), _wrapped(label, font, side), fill="black", font=font, spacing=2)
    return np.asarray(sheet.convert("RGBA"))


def _wrapped(text: str, font: Any, width: int, lines: int = 3) -> str:
    """`text` in at most so many lines that are not wider than `width` px."""
    made = [""]
    for word in text.split():
        longer = f"{made[-1]} {word}".strip()
        if font.getlength(longer) <= width or not made[-1]:
            made[-1] = longer
        else:
            made.append(word)
    return "\n".join([*made[: lines - 1], made[lines - 1] + " …"] if len(made) > lines else made)
