"""The demo without its page: limit every request, draw in one thread, look up training pictures."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from pokediff.baselines.generator import Attention, Baseline
from pokediff.baselines.interface import DrawsAtOnce
from pokediff.config import SampleConfig, Sampling, from_values
from pokediff.data.images import parse_color
from pokediff.demo.neighbours import Neighbour, TrainingPictures
from pokediff.drawing import sample as sampling
from pokediff.drawing.attribution import Influence, watch_words
from pokediff.drawing.sample import Frame, Job, Model
from pokediff.errors import PokediffError
from pokediff.model.pipeline import Evaluation, PokeDiffPipeline, quiet
from pokediff.model.samplers import SAMPLERS

T = TypeVar("T")
NEIGHBOUR_SIZE = 32  # px at which drawn and training pictures are compared, or the smallest size of the checkpoint


@dataclass(frozen=True)
class Limits:
    """Limits of one request. The page shows them; the server enforces them."""

    prompt: int = 300  # characters
    prompts: int = 64  # in a batch
    pictures: int = 16  # in one drawing
    batch: int = 128  # pictures in a batch
    steps: int = 100
    guidance: float = 10.0
    seed: int = 2**32 - 1
    enlarge: int = 16
    interpolation: int = 48  # pictures between two prompts
    best_of: int = 16  # drawings of each picture


LIMITS = Limits()


@dataclass(frozen=True)
class Compared:
    """One prompt and seed, drawn one way."""

    config: SampleConfig
    picture: np.ndarray  # straight RGBA uint8 (H, W, 4)
    seconds: float


class Studio:
    """Checkpoints and, where it is on this machine, the data set that they were trained on.

    Args:
        checkpoints: folders; the first is loaded at once, the others when they are first used.
        data: folder of the data set; without one, no nearest training pictures.
        size: initially selected size in px (default: that of the checkpoint).
    """

    def __init__(
        self, checkpoints: Sequence[str | Path], data: str | Path | None = None, size: int | None = None
    ) -> None:
        quiet()
        names = [Path(path).name for path in checkpoints]
        self.checkpoints = {
            name if names.count(name) == 1 else str(path): str(Path(path).resolve())
            for name, path in zip(names, checkpoints, strict=True)
        }
        self.first, self.size = next(iter(self.checkpoints)), size
        # Denoisers run in this thread alone: torch keeps a pool of helper threads for every thread that calls it.
        self._thread = ThreadPoolExecutor(1, "denoisers")
        self._pipelines: dict[str, Model] = {}
        self.pipeline(self.first).resolved(Sampling(size=size))  # raises for a size that it does not draw
        self.data = Path(data) if data and Path(data).is_dir() else None
        self.training: TrainingPictures | None = None
        if self.data is not None:
            Thread(target=self._read_training, args=(self.data,), daemon=True).start()

    # ------------------------------------------------------------------------------------------------- denoisers

    def in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`, which runs in the denoisers' thread."""
        return self._thread.submit(work).result()

    def _steps(self, make: Callable[[], Iterator[T]]) -> Iterator[T]:
        """The items of an iterator, each made in the denoisers' thread; between two of them other requests run."""
        end: Any = object()
        iterator = self.in_thread(make)
        while (item := self.in_thread(lambda: next(iterator, end))) is not end:
            yield item

    def pipeline(self, name: str) -> Model:
        """The checkpoint of that name, loaded once. Raises PokediffError for one that is not offered."""
        if name not in list(self.checkpoints):  # a program may send a list, which is no key
            raise PokediffError(f"unknown checkpoint {name!r}; checkpoints: {', '.join(self.checkpoints)}")
        return self.in_thread(lambda: self._load(name))

    def _load(self, name: str) -> Model:
        if name not in self._pipelines:
            self._pipelines[name] = sampling.load_pipeline(SampleConfig(checkpoint=self.checkpoints[name]))
        return self._pipelines[name]

    def can_choose(self, name: str) -> bool:
        """Whether the checkpoint has a scorer, for `best_of`; not one that cannot be loaded: drawing says why."""
        try:
            return getattr(self.pipeline(name), "scorer", None) is not None
        except PokediffError:
            return False

    def pipeline_of(self, config: SampleConfig) -> Model:
        return self.pipeline(self.name_of(config))

    def cascade_of(self, config: SampleConfig) -> PokeDiffPipeline:
        """Raises PokediffError for a baseline, which shows no time steps."""
        pipeline = self.pipeline_of(config)
        if not isinstance(pipeline, PokeDiffPipeline):
            raise PokediffError(f"{pipeline.name} shows no time steps.")
        return pipeline

    def name_of(self, config: SampleConfig) -> str:
        """The name under which the page offers the checkpoint of these settings."""
        return next(name for name, path in self.checkpoints.items() if path == config.checkpoint)

    # ------------------------------------------------------------------------------------------------- requests

    def resolved(self, name: str | None = None, **values: Any) -> Sampling:
        """Fields of `Sampling`, filled with the checkpoint's defaults. Raises PokediffError for a wrong one."""
        pipeline = self.pipeline(name or self.first)
        default = self.size if self.size in pipeline.sizes else None
        return pipeline.resolved(from_values({"size": default, **values}, Sampling, "settings"))

    def settings(self, checkpoint: str | None = None, **values: Any) -> SampleConfig:
        """Settings of a drawing from a page or a program: fields of `SampleConfig` and of `Sampling`; None is the
        default, `checkpoint` a key of `self.checkpoints`.

        Raises PokediffError for unknown or wrong fields, and for values beyond LIMITS.
        """
        name = checkpoint or self.first
        values = {"seed": new_seed(), **{key: value for key, value in values.items() if value is not None}}
        if isinstance(self.pipeline(name), DrawsAtOnce) and values.get("num_inference_steps") == 0:
            del values["num_inference_steps"]  # of the hidden slider
        own = {key: values.pop(key) for key in Sampling.__dataclass_fields__ if key in values}
        values |= {"sampling": self.resolved(name, **own), "checkpoint": self.checkpoints.get(name)}
        config = from_values(values, SampleConfig, "settings")
        if not any(prompt.strip() for prompt in config.prompt):
            raise PokediffError("Write a prompt first.")
        check_limits(config)
        if config.background:
            parse_color(config.background)
        return config

    def chosen(self, config: SampleConfig) -> Iterator[Job]:
        """The jobs of a drawing, each with the best of its `best_of` seeds; between two of them other requests run."""
        pipeline = self.pipeline_of(config)
        for job in sampling.make_jobs(config.prompt, config):
            yield self.in_thread(partial(sampling.choose, pipeline, [job], config))[0]

    def draw(self, config: SampleConfig, jobs: Sequence[Job] | None = None) -> Iterator[Frame]:
        """Every step of one batch of pictures; the last one holds the finished pictures. `jobs` are `chosen` ones."""
        pipeline, jobs = self.pipeline_of(config), list(self.chosen(config)) if jobs is None else jobs
        once = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, best_of=1))
        return self._steps(lambda: sampling.draw(pipeline, jobs, once))

    def evaluations(self, config: SampleConfig) -> list[Evaluation]:
        """The evaluation behind each step of `draw`, without the last step."""
        strength = config.strength if config.image and not config.mask else 1.0
        return self.pipeline_of(config).evaluations(config.sampling, strength)

    # The next three yield None while there is nothing new to show: at each of them the request may be cancelled.

    def draw_all(self, config: SampleConfig, batch_size: int = 8) -> Iterator[tuple[list[Job], np.ndarray] | None]:
        """Many pictures, batch by batch: all jobs done so far and their pictures (N, H, W, 4)."""
        jobs, done = list[Job](), list[np.ndarray]()
        for job in self.chosen(config):
            jobs.append(job)
            if config.sampling.chooses:  # otherwise there is nothing to wait for
                yield None
        if isinstance(pipeline := self.pipeline_of(config), DrawsAtOnce) and pipeline.slow:
            batch_size = 1  # so that it can be stopped
        for start in range(0, len(jobs), batch_size):
            for frame in self.draw(config, jobs[start : start + batch_size]):
                last = frame
                yield None
            done.extend(last.x0)
            yield jobs[: len(done)], np.stack(done)

    def influence(self, config: SampleConfig) -> Iterator[Influence | None]:
        """The influence of each word of the first prompt."""
        pipeline, prompt, seed = self.cascade_of(config), config.prompt[0], config.seed or 0
        return self._steps(lambda: watch_words(pipeline, prompt, seed, config.sampling))

    def attention(self, config: SampleConfig) -> Attention | None:
        """What a baseline attends to when it draws the first prompt; None for a cascade, which reads the text as one
        vector.
        """
        model = self.pipeline_of(config)
        if not isinstance(model, Baseline):
            return None
        return self.in_thread(lambda: model.attention(config.prompt[0], config.seed or 0))

    def compare(self, config: SampleConfig, samplers: Sequence[str], steps: Sequence[int]) -> Iterator[Compared | None]:
        """The first prompt and seed by several samplers and numbers of steps, one after another."""
        if not samplers or not steps or len(samplers) * len(steps) > 4 * len(SAMPLERS):
            raise PokediffError(f"Choose a sampler and a number of steps, at most {4 * len(SAMPLERS)} pairs.")
        for sampler in samplers:
            for number in steps:
                values = {**vars(config.sampling), "sampler": sampler, "num_inference_steps": number}
                one = dataclasses.replace(config, sampling=self.resolved(self.name_of(config), **values))
                check_limits(one)
                begin = time.monotonic()
                for frame in self.draw(one):
                    last = frame
                    yield None
                yield Compared(one, last.x0[0], time.monotonic() - begin)

    # ------------------------------------------------------------------------------------------------ neighbours

    def neighbours(self, pictures: np.ndarray) -> list[Neighbour] | str:
        """The nearest training picture of each (N, H, W, 4), or a sentence with the reason why there is none."""
        if self.data is None:
            return "The training pictures are not on this machine, so drawings cannot be checked for copies."
        if self.training is None:
            return "The training pictures are still loading; draw again in a moment."
        return self.training.nearest(pictures)

    def _read_training(self, data: Path) -> None:
        try:
            self.training = TrainingPictures(data, min(NEIGHBOUR_SIZE, *self.pipeline(self.first).sizes))
        except Exception as error:  # any error: the page must stop announcing them
            print(f"no comparison with training pictures: {error}")
            self.data = None


def check_limits(config: SampleConfig) -> None:
    """Raise PokediffError for resolved settings beyond LIMITS."""
    sampling = config.sampling
    bounded = {
        "prompts": (len(config.prompt), LIMITS.prompts),
        "characters in a prompt": (max(map(len, (*config.prompt, sampling.negative_prompt))), LIMITS.prompt),
        "pictures of a prompt": (config.num_images_per_prompt, LIMITS.pictures),
        "pictures": (len(config.prompt) * config.num_images_per_prompt, LIMITS.batch),
        "steps": (sampling.num_inference_steps or 0, LIMITS.steps),
        "guidance scale": (sampling.guidance_scale or 0, LIMITS.guidance),
        "seed": (config.seed or 0, LIMITS.seed),
        "enlarge": (config.enlarge, LIMITS.enlarge),
        "pictures of an interpolation": (config.interpolate, LIMITS.interpolation),
        "drawings of a picture": (sampling.best_of or 1, LIMITS.best_of),
    }
    for what, (value, most) in bounded.items():
        if not value <= most:  # not `value > most`: NaN must fail too
            raise PokediffError(f"At most {most} {what}, not {value}.")


def new_seed() -> int:
    return secrets.randbelow(LIMITS.seed + 1)
