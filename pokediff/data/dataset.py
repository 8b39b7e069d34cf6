"""From folders of pictures to training batches.

A batch is a pure function of (seed, step): pictures, captions, augmentation. So a resumed run continues exactly, and
several processes take slices of the same batch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import torch
from safetensors import SafetensorError

from pokediff.config import DatasetConfig
from pokediff.data.cache import Source, Store, remembered
from pokediff.data.captions import STYLES, captions_of, shared_captions
from pokediff.data.decoding import cores, decode_all, needs_colors, read_picture
from pokediff.data.images import BadImage, unpremultiply
from pokediff.data.packed import Arrays, Captions, Ragged, Records, Texts
from pokediff.data.records import Record, Split, has_license, read_records, split_of, with_full_splits
from pokediff.errors import PokediffError, first_line
from pokediff.model.text import (
    OtherWeights,
    TextEncoder,
    embeddings_path,
    encode_captions,
    encoder_files,
    load_embeddings,
    load_text_encoder,
    save_embeddings,
)

WORTH = 4 << 20  # bytes of files: a smaller data set takes about a second, and needs no cache
MANY_CAPTIONS = 64  # their vectors are kept: already the encoder takes a second to load
BROKEN_SHARE, FEW_BROKEN = 0.01, 30  # more broken pictures than both are an error, and so is a tenth of all
NAMED = 10  # broken pictures that are reported by name
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

    def pick(self, index: np.ndarray) -> Rows:
        return Rows(self.array, self.index[index])


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures with their captions, in file order."""

    records: Records
    pixels: Rows  # (N, S, S, 4) uint8, premultiplied RGBA
    captions: Captions
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
        return self.pick(np.flatnonzero(self.records.column("split", object) == split))

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
        return replace(self, captions=shared_captions(self.records, self.captions))

    def pick(self, index: Sequence[int] | np.ndarray) -> Pictures:
        """The pictures at these positions; a view of the pixels."""
        index = np.asarray(index, np.int64)
        return Pictures(self.records.pick(index), self.pixels.pick(index), self.captions.pick(index), self.digest)


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

    A large data set is decoded once and then read from the cache (cache.py), with the same result. `report` gets a line
    that says where the captions come from, one for each of the first NAMED broken pictures, which are skipped, and one
    for styles of `captions.STYLES` that do not occur. Raises PokediffError when too many are broken (BROKEN_SHARE), for
    an unknown style or kind, or when nothing is left.
    """
    folders = folder_list(folders)
    lines: list[str] = []

    def make(store: Store) -> Arrays:
        def say(line: str) -> None:
            lines.append(line)
            report(line)

        arrays = _decoded(folders, image_size, select, say, progress, limit, store)
        names = json.dumps({"lines": lines, "roots": list(map(str, folders))})
        return {**arrays, "names": np.frombuffer(names.encode(), np.uint8)}

    arrays = remembered(
        f"prepared pictures of {' and '.join(map(str, folders))}, {image_size} px",
        ["pictures", image_size, limit, select and [_sorted(select.styles), _sorted(select.kinds), select.licenses]],
        lambda: Source.of(*folders, without="embeddings-*.safetensors"),
        make,
        report,
        lambda source: source.size >= WORTH,
    )
    names = json.loads(arrays["names"].tobytes())
    for line in names["lines"][len(lines) :]:  # of an earlier start
        report(line)
    records = Records.from_arrays(arrays, dict(zip(names["roots"], map(str, folders), strict=True)))
    pixels = Rows(arrays["pixels"], np.arange(len(records)))
    return Pictures(records, pixels, Captions.from_arrays(arrays), arrays["digest"].tobytes().hex())


def _sorted(weights: Mapping[str, float] | None) -> list[tuple[str, bool]] | None:
    """What of `styles` or `kinds` decides which pictures are read."""
    return None if weights is None else sorted((name, weight > 0) for name, weight in weights.items())


def _decoded(
    folders: Sequence[Path],
    image_size: int,
    select: DatasetConfig | None,
    report: Callable[[str], Any],
    progress: Progress,
    limit: int | None,
    store: Store,
) -> Arrays:
    """The arrays of `load_pictures`: `pixels`, `digest`, and those of records and captions."""
    name = " and ".join(map(str, folders))
    records = [record for folder in folders for record in read_records(folder, report)]
    if select is not None:
        records = with_full_splits(_selected(records, select, name, report))
    if limit is not None and limit < len(records):
        by_split = ([record for record in records if split_of(record) == split] for split in get_args(Split))
        records = [record for part in by_split for record in part[:: -(-len(records) // limit)]]
    digest = sha256()
    kept: list[Record] = []
    captions: list[tuple[str, ...]] = []
    pixels = store.empty("pixels", (len(records), image_size, image_size, 4))
    broken: list[str] = []
    results = progress(decode_all(records, image_size), total=len(records), desc="pictures", unit="")
    for record, result in zip(records, results, strict=True):
        if isinstance(result, BadImage):
            broken.append(record.file_name)
            if len(broken) <= NAMED:
                report(f"skipped {record.file_name}: {result}")
            continue
        pixels[len(kept)] = result.pixels
        kept.append(result.record)
        captions.append(result.captions)
        named = (record.split,) if record.split else ()  # the hash is not part of the digest, a given split is
        facts = (record.file_name, record.family_key, result.captions, *named)
        digest.update(repr(facts).encode() + result.sha256)
    if len(broken) > NAMED:
        report(f"skipped {len(broken) - NAMED} more")
    if broken and (10 * len(broken) >= len(records) or len(broken) > max(FEW_BROKEN, BROKEN_SHARE * len(records))):
        raise PokediffError(
            f"{len(broken)} of {len(records)} pictures in {name} are missing or broken, the first is {broken[0]}: save "
            "them again, or take them out"
        )
    packed = Records.of(kept).arrays() | Captions.of(captions).arrays()
    return {"pixels": pixels[: len(kept)], "digest": np.frombuffer(digest.digest(), np.uint8), **packed}


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


# ----------------------------------------------------------------------------------------------- vectors of captions


@dataclass(frozen=True)
class CaptionVectors:
    """The vectors of all captions, and which of them belong to which picture. Row 0 is the empty prompt."""

    table: torch.Tensor  # (M, D) float32
    rows: Sequence[np.ndarray]  # of each picture, the rows of its captions


def caption_vectors(
    folders: Folders,
    pictures: Pictures,
    encoder_name: str,
    progress: Progress = no_progress,
    report: Callable[[str], Any] = print,
) -> CaptionVectors:
    """Vectors from FOLDER/embeddings-<encoder>.safetensors of all folders; others are encoded now, but not written.
    Those of many captions are kept in the cache.
    """
    folders, captions = folder_list(folders), pictures.captions
    used = captions.used()
    letters = captions.texts.letters.pick(used)

    def make(_: Store) -> Arrays:
        return {"vectors": _encoded(folders, Texts(letters), encoder_name, progress, report).numpy()}

    arrays = remembered(
        "vectors of captions",
        [
            "vectors",
            encoder_name,
            *(sha256(part.data).hexdigest() for part in (letters.values, letters.starts)),
        ],
        lambda: Source.of(*(embeddings_path(folder, encoder_name) for folder in folders), *encoder_files(encoder_name)),
        make,
        report,
        lambda _: len(used) >= MANY_CAPTIONS,
    )
    with warnings.catch_warnings():  # of a table that cannot be written to; nobody does
        warnings.simplefilter("ignore", UserWarning)
        table = torch.from_numpy(arrays["vectors"])
    row_of = np.zeros(len(captions.texts), np.int64)
    row_of[used] = 1 + np.arange(len(used))
    return CaptionVectors(table, Ragged(row_of[captions.numbers.values], captions.numbers.starts))


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
            return captions_of(read_picture(record)[0] if needs_colors(record) else record)
        except BadImage:
            return ()  # load_pictures skips it, too

    with ThreadPoolExecutor(cores()) as pool:
        found = list(progress(pool.map(captions, records), total=len(records), desc="captions", unit=""))
    texts = list(dict.fromkeys(caption for several in found for caption in several if caption))
    table = _encoded([Path(folder)], texts, encoder_name, progress, report, encoder)
    path = embeddings_path(folder, encoder_name)
    save_embeddings(path, encoder_name, ["", *texts], table)
    return path


def _encoded(
    folders: Sequence[Path],
    captions: Sequence[str],
    encoder_name: str,
    progress: Progress,
    report: Callable[[str], Any],
    encoder: TextEncoder | None = None,
) -> torch.Tensor:
    """The vectors (1 + N, D) float32 of the empty prompt and N different captions."""
    texts = ["", *captions]
    known: dict[str, torch.Tensor] = {}
    for folder in folders:
        known.update(_stored(embeddings_path(folder, encoder_name), encoder_name, report))
    if missing := [text for text in texts if text not in known]:
        encoder = encoder or load_text_encoder(encoder_name)
        vectors = encode_captions(
            encoder, missing, progress=lambda items: progress(items, desc="embeddings", unit="batch")
        )
        known.update(zip(missing, vectors, strict=True))
    return torch.stack([known[text] for text in texts])


def _stored(path: Path, encoder_name: str, report: Callable[[str], Any]) -> dict[str, torch.Tensor]:
    """The vectors of a file, {} when it is damaged or the encoder has changed: they can be made again."""
    try:
        return load_embeddings(path, encoder_name)
    except OtherWeights as error:
        report(f"{error}: its vectors are made again")
        return {}
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

    def captions(self, number: int) -> torch.Tensor:
        """(number, D) text vectors of captions, drawn as those of the batches are."""
        rng = np.random.default_rng([self.seed, number])
        index = np.searchsorted(self.chances, rng.random(number) * self.chances[-1], side="right")
        rows = (self.vectors.rows[i] for i in index)
        return self.vectors.table[[mine[int(rng.random() * len(mine))] for mine in rows]]

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
    records = Records.of(records)
    codes, names = records.coded("kind")
    weights = np.array([(kinds or {}).get(name, 1.0) for name in names])[codes]
    if shares is not None:
        codes, names = records.coded("style")
        for code in sorted(np.unique(codes), key=names.__getitem__):
            weights[codes == code] *= shares[names[code]] / weights[codes == code].sum()
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
