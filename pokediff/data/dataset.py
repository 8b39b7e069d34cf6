"""From folders of pictures to training batches.

A batch is a pure function of (seed, step): pictures, captions, augmentation. So a resumed run continues exactly, and
several processes take slices of the same batch.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import psutil
import torch
from safetensors import SafetensorError

from pokediff.config import DatasetConfig
from pokediff.data.captions import STYLES, captions_of, shared_captions
from pokediff.data.colors import measured_colors
from pokediff.data.images import BadImage, fit_square, read_image, unpremultiply
from pokediff.data.records import Record, Split, has_license, picture_bytes, read_records, split_of, with_full_splits
from pokediff.errors import PokediffError, first_line
from pokediff.model.text import (
    TextEncoder,
    embeddings_path,
    encode_captions,
    load_embeddings,
    load_text_encoder,
    save_embeddings,
)

MEMORY_SHARE = 0.3  # of the free memory that pixels may fill; a larger set lies in a temporary file
BROKEN_SHARE, FEW_BROKEN = 0.01, 30  # more broken pictures than both are an error, and so is a tenth of all
NAMED = 10  # broken pictures that are reported by name
DECODED_SIDE = 1024  # larger pictures are shrunk towards this many px as they are decoded
SCALE, ROTATION, STRETCH = 0.2, 20.0, 0.2  # standard deviations: log2, degrees, log2 (cut at 1.5 of them)
AUGMENT_LABELS = 8  # mirrored, shift right, shift down; scale, rotation (2), anisotropy (2)

Folders = str | Path | Sequence[str | Path]
Progress = Callable[..., Iterable]  # as tqdm: progress(items, total=, desc=, unit=)


def no_progress(items: Iterable, **_: Any) -> Iterable:
    return items


def folder_list(folders: Folders) -> list[Path]:
    """One folder or several, as a list."""
    return [Path(folders)] if isinstance(folders, str | Path) else [Path(folder) for folder in folders]


# ---------------------------------------------------------------------------------------------------------- pictures


class Rows:
    """A view of some rows of an array in memory or in a mapped file; indexing reads just these rows (read only)."""

    def __init__(self, array: np.ndarray, index: np.ndarray) -> None:
        self.array, self.index = array, index
        self.shape = (len(index), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: Any) -> np.ndarray:  # an index, a slice or several indices
        return np.asarray(self.array[self.index[which]])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def pick(self, index: Sequence[int]) -> Rows:
        return Rows(self.array, self.index[list(index)])


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures with their captions, in file order."""

    records: tuple[Record, ...]
    pixels: Rows  # (N, S, S, 4) uint8, premultiplied RGBA
    captions: tuple[tuple[str, ...], ...]
    digest: str  # sha256 of names, families, captions and file contents of all that was loaded

    def __len__(self) -> int:
        return len(self.records)

    def straight(self) -> np.ndarray:
        """All pictures as straight RGBA, uint8 (N, S, S, 4)."""
        pixels = np.empty(self.pixels.shape, np.uint8)
        for index, picture in enumerate(self.pixels):  # one at a time: unpremultiply works in float32
            pixels[index] = unpremultiply(picture)
        return pixels

    def split(self, split: Split) -> Pictures:
        return self.where(lambda record: split_of(record) == split)

    def where(self, keep: Callable[[Record], bool]) -> Pictures:
        """The pictures whose record `keep` accepts."""
        return self.pick([index for index, record in enumerate(self.records) if keep(record)])

    def spread(self, number: int) -> Pictures:
        """At most `number` pictures, evenly spaced over the data set."""
        if number >= len(self):
            return self
        return self.pick(np.linspace(0, len(self) - 1, number).round().astype(int).tolist())

    def with_shared_captions(self) -> Pictures:
        """With only those captions that several of these pictures share: the captions for training."""
        return replace(self, captions=tuple(shared_captions(self.records, self.captions)))

    def pick(self, index: Sequence[int]) -> Pictures:
        """The pictures at these positions; a view of the pixels."""
        records, captions = tuple(self.records[i] for i in index), tuple(self.captions[i] for i in index)
        return Pictures(records, self.pixels.pick(index), captions, self.digest)


def load_pictures(
    folders: Folders,
    image_size: int,
    select: DatasetConfig | None = None,
    report: Callable[[str], Any] = print,
    progress: Progress = no_progress,
    limit: int | None = None,
) -> Pictures:
    """Decode one data set, or several as one, at image_size px: all pictures, or those of the styles, kinds and
    licences that `select` uses; with `limit`, about that many, spread evenly over each split.

    `report` gets a line that says where the captions come from, one for each of the first NAMED broken pictures, which
    are skipped, and one for styles of `captions.STYLES` that do not occur. Raises PokediffError when too many are
    broken (BROKEN_SHARE), for an unknown style or kind, or when nothing is left.
    """
    folders = folder_list(folders)
    name = " and ".join(map(str, folders))
    records = [record for folder in folders for record in read_records(folder, report)]
    if select is not None:
        records = with_full_splits(_selected(records, select, name, report))
    if limit is not None and limit < len(records):
        by_split = ([record for record in records if split_of(record) == split] for split in get_args(Split))
        records = [record for part in by_split for record in part[:: -(-len(records) // limit)]]

    def load(record: Record) -> tuple[Record, np.ndarray, bytes] | BadImage:
        try:
            record, rgba, data = _decoded(record)
        except BadImage as error:
            return error
        return record, fit_square(rgba, image_size), hashlib.sha256(data).digest()

    digest = hashlib.sha256()
    kept: list[tuple[Record, tuple[str, ...]]] = []
    store = _array_for((len(records), image_size, image_size, 4))
    broken: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = progress(pool.map(load, records), total=len(records), desc="pictures", unit="")
        for record, result in zip(records, results, strict=True):
            if isinstance(result, BadImage):
                broken.append(record.file_name)
                if len(broken) <= NAMED:
                    report(f"skipped {record.file_name}: {result}")
                continue
            record, store[len(kept)], content = result
            captions = captions_of(record)
            named = (record.split,) if record.split else ()  # the hash is not part of the digest, a given split is
            digest.update(repr((record.file_name, record.family_key, captions, *named)).encode() + content)
            kept.append((record, captions))
    if len(broken) > NAMED:
        report(f"skipped {len(broken) - NAMED} more")
    if broken and (10 * len(broken) >= len(records) or len(broken) > max(FEW_BROKEN, BROKEN_SHARE * len(records))):
        raise PokediffError(
            f"{len(broken)} of {len(records)} pictures in {name} are missing or broken, the first is {broken[0]}: save "
            "them again, or take them out"
        )
    kept_records, captions_of_all = zip(*kept, strict=True)
    return Pictures(kept_records, Rows(store, np.arange(len(kept))), captions_of_all, digest.hexdigest())


def _selected(records: list[Record], select: DatasetConfig, name: str, report: Callable[[str], Any]) -> list[Record]:
    """The records of the licences, styles and kinds that a configuration uses."""
    if select.licenses is not None:
        found = len(records)
        it_has = ", ".join(sorted({record.license or "(none)" for record in records}))
        records = [record for record in records if has_license(record, select.licenses)]
        if not records:
            raise PokediffError(f"{name} has no pictures of licence {', '.join(select.licenses)}; it has: {it_has}")
        report(f"licences: {len(records)} of {found} pictures are used")
    if select.styles is not None:
        records = _of_styles(records, set(select.styles), name, report)
    if select.kinds is not None:
        kinds = {record.kind or "" for record in records}
        if unknown := select.kinds.keys() - kinds:
            it_has = ", ".join(sorted(kind or "(none)" for kind in kinds))
            raise PokediffError(f"{name} has no pictures of kind {', '.join(sorted(unknown))}; it has: {it_has}")
        records = [record for record in records if select.kinds.get(record.kind or "", 1.0) > 0]
        if not records:
            raise PokediffError(f"{name}: dataset.kinds leaves no picture with a positive weight")
    return records


def _of_styles(records: list[Record], wanted: set[str], name: str, report: Callable[[str], Any]) -> list[Record]:
    known = {record.style for record in records}
    if missing := wanted - known:
        it_has = ", ".join(sorted(style or "(none)" for style in known))
        words = f"{name} has no pictures of style {', '.join(sorted(missing))}; it has: {it_has}"
        if missing == wanted or missing - STYLES.keys():  # nothing is left, or a style is misspelt
            raise PokediffError(words)
        report(f"{words}. The rest is used")
    return [record for record in records if record.style in wanted]


def _needs_colors(record: Record) -> bool:
    """Whether its captions need colours that its row does not have."""
    return not record.captions and not record.colors


def _decoded(record: Record) -> tuple[Record, np.ndarray, bytes]:
    """The record with its colours, its picture (straight RGBA) and its file. Raises BadImage."""
    try:
        data = picture_bytes(record)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    rgba = read_image(data, side=DECODED_SIDE)
    return replace(record, colors=measured_colors(rgba)) if _needs_colors(record) else record, rgba, data


def _array_for(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialized uint8 array, in memory or, where memory is short, in a temporary file deleted with it."""
    if math.prod(shape) <= MEMORY_SHARE * psutil.virtual_memory().available:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no signal on the first use of a page
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        return np.memmap(file, np.uint8, "w+", shape=shape)


# ----------------------------------------------------------------------------------------------- vectors of captions


@dataclass(frozen=True)
class CaptionVectors:
    """The vectors of all captions, and which of them belong to which picture. Row 0 is the empty prompt."""

    table: torch.Tensor  # (M, D) float32
    rows: tuple[np.ndarray, ...]  # of each picture, the rows of its captions


def caption_vectors(
    folders: Folders,
    pictures: Pictures,
    encoder_name: str,
    progress: Progress = no_progress,
    report: Callable[[str], Any] = print,
) -> CaptionVectors:
    """Vectors from FOLDER/embeddings-<encoder>.safetensors of all folders; others are encoded now, but not written."""
    captions, table = _encoded(folder_list(folders), pictures.captions, encoder_name, progress, report)
    row_of = {caption: row for row, caption in enumerate(captions)}
    rows = tuple(np.array([row_of[caption] for caption in several]) for several in pictures.captions)
    return CaptionVectors(table, rows)


def embed(
    folder: str | Path,
    encoder_name: str,
    report: Callable[[str], Any] = print,
    progress: Progress = no_progress,
) -> Path:
    """Write the vectors of all captions of a data set into its folder; existing ones are kept. Returns the path.

    Decodes only pictures whose captions need colours that their row does not have.
    """
    records = read_records(folder, report)
    encoder = load_text_encoder(encoder_name)  # before the pictures: it may be unavailable

    def captions(record: Record) -> tuple[str, ...]:
        try:
            return captions_of(_decoded(record)[0] if _needs_colors(record) else record)
        except BadImage:
            return ()  # load_pictures skips it, too

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(progress(pool.map(captions, records), total=len(records), desc="captions", unit=""))
    texts, table = _encoded([Path(folder)], found, encoder_name, progress, report, encoder)
    path = embeddings_path(folder, encoder_name)
    save_embeddings(path, encoder_name, texts, table)
    return path


def _encoded(
    folders: Sequence[Path],
    captions: Iterable[Sequence[str]],
    encoder_name: str,
    progress: Progress,
    report: Callable[[str], Any],
    encoder: TextEncoder | None = None,
) -> tuple[tuple[str, ...], torch.Tensor]:
    """The empty prompt and all different captions (M), and their vectors (M, D) float32."""
    texts = ("", *dict.fromkeys(caption for several in captions for caption in several if caption))
    known: dict[str, torch.Tensor] = {}
    for folder in folders:
        known.update(_stored(embeddings_path(folder, encoder_name), encoder_name, report))
    if missing := [text for text in texts if text not in known]:
        encoder = encoder or load_text_encoder(encoder_name)
        vectors = encode_captions(
            encoder, missing, progress=lambda items: progress(items, desc="embeddings", unit="batch")
        )
        known.update(zip(missing, vectors, strict=True))
    return texts, torch.stack([known[text] for text in texts])


def _stored(path: Path, encoder_name: str, report: Callable[[str], Any]) -> dict[str, torch.Tensor]:
    """The vectors of a file, {} when it is damaged: they can be made again."""
    try:
        return load_embeddings(path, encoder_name)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        report(f"{path} is damaged ({first_line(error)}): its vectors are made again")
        return {}


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Batch:
    """The tensors of one training step."""

    pixels: torch.Tensor  # (B, S, S, 4) uint8, premultiplied RGBA
    text: torch.Tensor  # (B, D) float32
    augment: torch.Tensor  # (B, augment_dim) float32, 0 where nothing was done to the picture


class TrainingBatches(torch.utils.data.Dataset):
    """`batches[step]` is the slice of process `rank` of `world` of that step's batch.

    Args:
        batch_size: pictures in a batch, over all processes.
        caption_dropout: share of captions replaced by the empty prompt, for classifier-free guidance.
        augment_dim: labels a picture, the first of AUGMENT_LABELS. With config.warp it must be AUGMENT_LABELS.
    """

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
        augment_dim: int = 3,
    ) -> None:
        if batch_size % world:
            raise PokediffError(f"batch_size {batch_size} cannot be shared by {world} processes")
        if config.warp and augment_dim < AUGMENT_LABELS:
            raise PokediffError(
                f"dataset.warp needs {AUGMENT_LABELS} augmentation labels, this network has {augment_dim}: set it to 0"
            )
        self.pictures, self.vectors, self.config = pictures, vectors, config
        self.batch_size, self.caption_dropout, self.seed = batch_size, caption_dropout, seed
        self.augment_dim = augment_dim
        self.mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.chances = np.cumsum(draw_chances(pictures.records, config.styles, config.kinds))

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        size = self.batch_size  # draw for all processes alike, then take this one's slice
        index = np.searchsorted(self.chances, rng.random(size) * self.chances[-1], side="right")
        caption, dropped = rng.random(size), rng.random(size) < self.caption_dropout
        mirrored = rng.random(size) < self.config.flip
        reach = round(self.config.max_shift * self.pictures.pixels.shape[1])
        moved = rng.random(size) < self.config.shift
        shift = rng.integers(-reach, reach + 1, (size, 2)) * moved[:, None]  # (B, 2): right, down

        warped = rng.random((size, 3)) < self.config.warp  # scale, rotation, anisotropy
        normal = rng.standard_normal((size, 3)).clip(-1.5, 1.5) * warped
        scale, angle, stretch = normal[:, 0] * SCALE, np.radians(ROTATION) * normal[:, 1], normal[:, 2] * STRETCH
        along = rng.random(size) * np.pi  # the axis of the stretch

        pixels, rows = [], []
        for i in range(size)[self.mine]:
            picture = self.pictures.pixels[index[i]]
            picture = translate(picture[:, ::-1] if mirrored[i] else picture, *shift[i])
            if warped[i].any():
                picture = warp(picture, scale[i], angle[i], stretch[i], along[i])
            pixels.append(picture)
            mine = self.vectors.rows[index[i]]
            rows.append(0 if dropped[i] else mine[int(caption[i] * len(mine))])
        turned = [(np.cos(angle) - 1) * 5, np.sin(angle) * 2]
        stretched = [stretch * np.cos(2 * along) * 5, stretch * np.sin(2 * along) * 5]
        # (B, AUGMENT_LABELS), each about -1 to 1
        labels = np.column_stack([mirrored, shift / max(1, reach), scale * 5, *turned, *stretched])
        augment = torch.zeros(len(rows), self.augment_dim)
        known = min(self.augment_dim, AUGMENT_LABELS)
        augment[:, :known] = torch.from_numpy(labels[self.mine, :known].astype(np.float32))
        return Batch(torch.from_numpy(np.stack(pixels)), self.vectors.table[rows], augment)


def draw_chances(
    records: Sequence[Record], shares: Mapping[str, float] | None, kinds: Mapping[str, float] | None = None
) -> np.ndarray:
    """(N,) sampling probabilities of pictures: proportional to the weights of their kinds, above 0 (1 where `kinds` has
    none), and with `shares` so that each style has its fraction of the batches.
    """
    weights = np.array([(kinds or {}).get(record.kind or "", 1.0) for record in records])
    if shares is not None:
        styles = np.array([record.style or "" for record in records])
        for style in np.unique(styles):
            weights[styles == style] *= shares[style] / weights[styles == style].sum()
    return weights / weights.sum()


def translate(pixels: np.ndarray, right: int, down: int) -> np.ndarray:
    """A picture (S, S, 4) moved by whole pixels; the uncovered rows and columns are transparent."""
    moved = np.zeros_like(pixels)
    height, width = pixels.shape[:2]
    moved[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = pixels[
        max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
    ]
    return moved


def warp(pixels: np.ndarray, scale: float, angle: float, stretch: float, along: float) -> np.ndarray:
    """Scale by 2^scale, rotate, and stretch by 2^stretch along an axis, about the centre.

    Geometric part of the augmentation pipe of Karras et al., "Elucidating the Design Space of Diffusion-Based
    Generative Models" (2022), appendix F.2. `pixels` is premultiplied uint8 (S, S, 4), angles are radians.
    """

    def rotation(a: float) -> np.ndarray:
        return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])

    side = pixels.shape[0]
    stretched = rotation(along) @ np.diag([2**stretch, 2**-stretch]) @ rotation(-along)
    double = stretched @ rotation(angle) * 2**scale * 2  # rendered at twice the size, then averaged: no aliasing
    offset = np.array([side - 0.5] * 2) - double @ np.array([(side - 1) / 2] * 2)
    large = cv2.warpAffine(pixels, np.column_stack([double, offset]), (2 * side, 2 * side), flags=cv2.INTER_LINEAR)
    return large.reshape(side, 2, side, 2, 4).mean((1, 3)).round().astype(np.uint8)
