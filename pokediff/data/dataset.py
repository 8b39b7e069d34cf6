"""From a folder of pictures to training batches.

Every batch is a pure function of (seed, step): which pictures, which captions, how they are moved. So a resumed run
sees what an uninterrupted one would have seen, and several processes take their slices of the same batch.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pokediff.config import DatasetConfig
from pokediff.data.captions import STYLES, captions_of, shared_captions
from pokediff.data.colors import main_colors
from pokediff.data.images import BadImage, fit_square, read_image, unpremultiply
from pokediff.data.records import Record, Split, read_records, split_of
from pokediff.errors import PokediffError
from pokediff.model.text import embeddings_path, encode_captions, load_embeddings, load_text_encoder, save_embeddings

MEMORY_SHARE = 0.3  # of the free memory that decoded pictures may fill; beyond that they lie in a temporary file
BROKEN_SHARE = 0.01  # with more broken pictures than that, something else is wrong
COLOR_SIZE = 64  # px at which colours are measured, whatever size the model has: captions must not depend on it


class OnDisk:
    """Some of the rows of an array that lies in a mapped file: what is asked for is read, nothing else is in memory."""

    def __init__(self, rows: np.memmap, index: np.ndarray) -> None:
        self.rows, self.index = rows, index
        self.shape = (len(index), *rows.shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: Any) -> Any:
        """One row or several, as an array of their own; whoever keeps a part of many takes it by `pick`."""
        return np.array(self.rows[self.index[which]])

    def pick(self, index: Sequence[int]) -> OnDisk:
        return OnDisk(self.rows, self.index[list(index)])


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures in file order, with their captions. `pixels` is premultiplied RGBA uint8 (N, S, S, 4), in memory
    or, of a set too big for it, in a temporary file.
    """

    records: tuple[Record, ...]
    pixels: Any  # np.ndarray or OnDisk
    captions: tuple[tuple[str, ...], ...]
    digest: str  # sha256 over names, families, captions and file contents of all that was loaded

    def __len__(self) -> int:
        return len(self.records)

    def split(self, split: Split) -> Pictures:
        return self.where(lambda record: split_of(record) == split)

    def where(self, keep: Callable[[Record], bool]) -> Pictures:
        """Only the pictures whose record `keep` accepts."""
        return self.pick([index for index, record in enumerate(self.records) if keep(record)])

    def spread(self, number: int) -> Pictures:
        """At most `number` pictures, spread evenly over the data set."""
        if number >= len(self):
            return self
        return self.pick(np.linspace(0, len(self) - 1, number).round().astype(int).tolist())

    def with_shared_captions(self) -> Pictures:
        """Only captions that several of these pictures have in common: what is to be trained on."""
        return replace(self, captions=tuple(shared_captions(self.records, self.captions)))

    def pick(self, index: Sequence[int]) -> Pictures:
        records = tuple(self.records[i] for i in index)
        pixels = self.pixels.pick(index) if isinstance(self.pixels, OnDisk) else self.pixels[list(index)]
        return Pictures(records, pixels, tuple(self.captions[i] for i in index), self.digest)


def load_pictures(
    folder: str | Path,
    image_size: int,
    styles: Iterable[str] | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[..., Iterable] = lambda items, **_: items,
) -> Pictures:
    """Decode a data set (of these styles only, if given) at image_size px.

    A broken picture, and a style of `captions.STYLES` that does not occur, are named through `report` and skipped.
    Raises PokediffError when more than BROKEN_SHARE are broken, for a style that nobody knows, or when nothing is left.
    """
    folder = Path(folder)
    records = read_records(folder)
    if styles is not None:
        wanted, known = set(styles), {record.style for record in records}
        if missing := wanted - known:
            it_has = ", ".join(sorted(style or "(none)" for style in known))
            words = f"{folder} has no pictures of style {', '.join(sorted(missing))}; it has: {it_has}"
            if missing == wanted or missing - STYLES.keys():  # nothing left, or a style that nobody knows: misspelt
                raise PokediffError(words)
            report(f"{words}. The rest is used")
        records = [record for record in records if record.style in wanted]

    def load(record: Record) -> tuple[np.ndarray, tuple[str, ...], bytes] | BadImage:
        try:
            data = (folder / record.file_name).read_bytes()
            rgba = read_image(data)
        except OSError as error:
            return BadImage(error.strerror or str(error))
        except BadImage as error:
            return error
        colors = main_colors(unpremultiply(fit_square(rgba, COLOR_SIZE)))
        return fit_square(rgba, image_size), captions_of(record, colors), hashlib.sha256(data).digest()

    digest = hashlib.sha256()
    kept: list[tuple[Record, tuple[str, ...]]] = []
    store = _room_for(len(records), image_size)
    broken: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = progress(pool.map(load, records), total=len(records), desc="pictures", unit="")
        for record, result in zip(records, results, strict=True):
            if isinstance(result, BadImage):
                broken.append(record.file_name)
                report(f"skipped {record.file_name}: {result}")
                continue
            pixels, captions, content = result
            digest.update(repr((record.file_name, record.family_key, captions)).encode() + content)
            store[len(kept)] = pixels
            kept.append((record, captions))
    if len(broken) > BROKEN_SHARE * len(records):
        raise PokediffError(
            f"{len(broken)} of {len(records)} pictures in {folder} are broken, the first is {broken[0]}"
        )
    chosen_records, captions = zip(*kept, strict=True)
    stored: Any = store[: len(kept)]
    if isinstance(store, np.memmap):
        stored = OnDisk(store, np.arange(len(kept)))
    return Pictures(chosen_records, stored, captions, digest.hexdigest())


def _room_for(number: int, side: int) -> np.ndarray:
    """An array for so many pictures: in memory, or in a file that vanishes with it where memory is short."""
    shape = (number, side, side, 4)
    if math.prod(shape) <= MEMORY_SHARE * psutil.virtual_memory().available:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


# ----------------------------------------------------------------------------------------------- vectors of captions


@dataclass(frozen=True)
class CaptionVectors:
    """The vector of every caption in use, and which rows belong to which picture. Row 0 is the empty prompt."""

    captions: tuple[str, ...]  # M texts
    table: torch.Tensor  # (M, D) float32
    rows: tuple[np.ndarray, ...]  # per picture, the rows of its captions


def caption_vectors(
    folder: str | Path,
    pictures: Pictures,
    encoder_name: str,
    progress: Callable[..., Iterable] = lambda items, **_: items,
) -> CaptionVectors:
    """Vectors from FOLDER/embeddings-<encoder>.safetensors; what is not there is encoded now (and not written)."""
    captions = ["", *dict.fromkeys(caption for several in pictures.captions for caption in several)]
    known = load_embeddings(embeddings_path(folder, encoder_name), encoder_name)
    missing = [caption for caption in captions if caption not in known]
    if missing:
        vectors = encode_captions(
            load_text_encoder(encoder_name),
            missing,
            progress=lambda items: progress(items, desc="captions", unit="batch"),
        )
        known.update(zip(missing, vectors, strict=True))
    row_of = {caption: row for row, caption in enumerate(captions)}
    rows = tuple(np.array([row_of[caption] for caption in several]) for several in pictures.captions)
    return CaptionVectors(tuple(captions), torch.stack([known[caption] for caption in captions]), rows)


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Batch:
    pixels: torch.Tensor  # (B, S, S, 4) uint8, premultiplied
    text: torch.Tensor  # (B, D) float32
    augment: torch.Tensor  # (B, 3) float32: mirrored, shifted right, shifted down


class TrainingBatches(torch.utils.data.Dataset):
    """`batches[step]` is the slice that process `rank` of `world` takes of that step's batch."""

    def __init__(
        self,
        pictures: Pictures,
        vectors: CaptionVectors,
        config: DatasetConfig,
        *,
        batch_size: int,
        caption_dropout: float,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise PokediffError(f"batch_size {batch_size} cannot be shared by {world} processes")
        self.pictures, self.vectors, self.config = pictures, vectors, config
        self.batch_size, self.caption_dropout, self.seed = batch_size, caption_dropout, seed
        self.mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.chances = np.cumsum(draw_chances(pictures.records, config.styles))

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        size = self.batch_size  # draw for all processes alike, then take our slice
        index = np.searchsorted(self.chances, rng.random(size) * self.chances[-1], side="right")
        caption, dropped = rng.random(size), rng.random(size) < self.caption_dropout
        mirrored = rng.random(size) < self.config.flip
        reach = round(self.config.max_shift * self.pictures.pixels.shape[1])
        moved = rng.random(size) < self.config.shift
        shift = rng.integers(-reach, reach + 1, (size, 2)) * moved[:, None]  # (B, 2): right, down

        pixels, rows = [], []
        for i in range(size)[self.mine]:
            picture = self.pictures.pixels[index[i]]
            pixels.append(translate(picture[:, ::-1] if mirrored[i] else picture, *shift[i]))
            mine = self.vectors.rows[index[i]]
            rows.append(0 if dropped[i] else mine[int(caption[i] * len(mine))])
        augment = np.column_stack([mirrored, shift / max(1, reach)])[self.mine]
        return Batch(
            torch.from_numpy(np.stack(pixels)), self.vectors.table[rows], torch.from_numpy(augment.astype(np.float32))
        )


def draw_chances(records: Sequence[Record], shares: Mapping[str, float] | None) -> np.ndarray:
    """(N,) chances with which pictures are drawn: all alike, or so that each style gets its share."""
    if shares is None:
        return np.full(len(records), 1 / len(records))
    count = Counter(record.style for record in records)
    chances = np.array([shares[record.style or ""] / count[record.style] for record in records])
    return chances / chances.sum()


def translate(pixels: np.ndarray, right: int, down: int) -> np.ndarray:
    """A picture (S, S, 4) moved by whole pixels; what comes in from outside is transparent."""
    moved = np.zeros_like(pixels)
    height, width = pixels.shape[:2]
    moved[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = pixels[
        max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
    ]
    return moved


def embed(folder: str | Path, encoder_name: str, progress: Callable[..., Any] = lambda items, **_: items) -> Path:
    """Write the vectors of all captions of a data set beside it; known ones are kept. Returns the path."""
    load_text_encoder(encoder_name)  # first: it may be out of reach
    pictures = load_pictures(folder, COLOR_SIZE, progress=progress)
    vectors = caption_vectors(folder, pictures, encoder_name, progress)
    path = embeddings_path(folder, encoder_name)
    save_embeddings(path, encoder_name, vectors.captions, vectors.table)
    return path
