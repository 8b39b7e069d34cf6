"""Generators to measure: a model that draws pictures for prompts, or a folder of pictures with their prompts."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pokediff.config import Sampling, plain
from pokediff.data.images import BadImage, encode_png, read_image
from pokediff.errors import PokediffError
from pokediff.files import as_row, is_own_file, read_json, read_rows, refuse_foreign, write_whole
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.progress import ProgressBar

LISTS = ("sample.json", "metadata.jsonl")


class ImageGenerator(Protocol):
    """A pipeline, an exported model, a baseline."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> np.ndarray:
        """Straight RGBA uint8 (N, S, S, 4), one picture for each prompt and seed; the same seed, the same picture."""
        ...


@dataclass(frozen=True)
class Generated:
    """Straight RGBA uint8 (N, S, S, 4), the prompts, and the seconds a picture where they were measured."""

    pixels: np.ndarray
    prompts: tuple[str, ...]
    seconds_per_image: float | None = None


def read_generated(folder: Path) -> Generated:
    """Pictures of one size: a folder with sample.json, or with metadata.jsonl (`file_name`, `text` or `prompt`).

    Raises PokediffError when neither is there, a row or picture is broken, or the pictures are no squares of one size.
    """
    if (folder / LISTS[0]).is_file():
        rows = as_row(read_json(folder / LISTS[0]), str(folder / LISTS[0])).get("pictures")
        pairs = (
            [(row.get("file"), row.get("prompt") or "") for row in rows if isinstance(row, dict)]
            if isinstance(rows, list)
            else []
        )
    elif (folder / LISTS[1]).is_file():
        rows = [row for _, row in read_rows(folder / LISTS[1])]
        pairs = [(row.get("file_name"), row.get("text") or row.get("prompt") or "") for row in rows]
    else:
        raise PokediffError(f"{folder} has no {' or '.join(LISTS)}, which list the prompt of each picture")
    if not pairs:
        raise PokediffError(f"{folder} lists no pictures")
    pixels = [_read_picture(folder, file) for file, _ in pairs]
    sizes = sorted({picture.shape[:2] for picture in pixels})
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        raise PokediffError(f"{folder}: the pictures must be squares of one size; they have {sizes[:4]}")
    return Generated(np.stack(pixels), tuple(prompt for _, prompt in pairs))


def _read_picture(folder: Path, file: Any) -> np.ndarray:
    """A picture that a list names. Raises PokediffError when it is not named, not there, elsewhere, or broken."""
    named = isinstance(file, str) and "\0" not in file and not Path(file).is_absolute() and ".." not in Path(file).parts
    if not named or ((folder / file).exists() and not is_own_file(folder / file, folder)):
        raise PokediffError(f"{folder}: a row of the list names {file!r} and not a picture in this folder")
    try:
        return read_image((folder / file).read_bytes())
    except BadImage as error:
        raise PokediffError(f"{folder / file}: {error}") from None


@dataclass(frozen=True)
class Drawer:
    """A generator with its settings. `folder` caches its drawings until settings change."""

    generator: ImageGenerator
    sampling: Sampling
    folder: Path
    batch_size: int = 16
    facts: dict[str, Any] = field(default_factory=dict)  # what identifies the generator, for the report

    @property
    def size(self) -> int:
        assert self.sampling.size is not None
        return self.sampling.size

    def draw(self, name: str, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> Generated:
        """One picture for each prompt into folder/name, the k-th from seed k unless `seeds` are given.

        Several processes share the work. Returns all pictures, in every process.
        """
        from accelerate import PartialState

        state = PartialState()
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        folder = self.folder / name
        key = {"system": self.facts, "sampling": plain(self.sampling), "prompts": list(prompts), "seeds": seeds}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        mark = folder / "settings.json"
        earlier = read_json(mark) if mark.is_file() else {}
        paths = [folder / f"{index:05}.png" for index in range(len(prompts))]
        state.wait_for_everyone()
        if state.is_main_process and earlier.get("digest") != digest:
            refuse_foreign(folder, (mark.name,))
            if folder.is_dir():
                shutil.rmtree(folder)  # of other settings
            folder.mkdir(parents=True)
            earlier = {"digest": digest, "system": self.facts, "sampling": plain(self.sampling)}
            rows = zip(paths, prompts, seeds, strict=True)
            lines = [json.dumps({"file_name": path.name, "text": text, "seed": seed}) for path, text, seed in rows]
            write_whole(folder / LISTS[1], "\n".join(lines) + "\n")
            write_whole(mark, json.dumps(earlier, indent=1) + "\n")
        state.wait_for_everyone()
        todo = [index for index, path in enumerate(paths) if not path.is_file()]
        state.wait_for_everyone()  # all processes must see the same cache
        mine = todo[state.process_index :: state.num_processes]
        batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        seconds: list[float] = []
        for batch in ProgressBar(batches, desc=f"{name}: {len(mine)}", unit="batch", disable=not state.is_main_process):
            start = time.monotonic()
            drawn = self.generator.generate([prompts[i] for i in batch], [seeds[i] for i in batch], self.sampling)
            seconds.append((time.monotonic() - start) / len(batch))
            for index, picture in zip(batch, drawn, strict=True):
                write_whole(paths[index], encode_png(picture))
        state.wait_for_everyone()
        if seconds and state.is_main_process:
            earlier["seconds_per_image"] = float(np.median(seconds))
            write_whole(mark, json.dumps(earlier, indent=1) + "\n")
        pixels = np.stack([read_image(path.read_bytes()) for path in paths])
        return Generated(pixels, tuple(prompts), earlier.get("seconds_per_image"))


def denoisers_used(pipeline: PokeDiffPipeline, sampling: Sampling) -> dict[str, dict[str, Any]]:
    """The denoisers that draw with `sampling`, by name: the size of each, in px, its steps, those of them that are
    guided, and its factor of guidance at high noise.
    """
    used: dict[str, dict[str, Any]] = {}
    for step in pipeline.evaluations(sampling):
        factor = pipeline.cascade[step.denoiser].config.get("high_noise_guidance", 1.0)
        new = {"size": step.size, "evaluations": 0, "guided": 0, "high_noise_guidance": factor}
        row = used.setdefault(step.denoiser, new)
        row["evaluations"] += 1
        row["guided"] += int(pipeline.guidance(step.denoiser, step.sigma, sampling) != 1)
    return used
