"""Layouts: the usual folder formats of data sets, read as rows.

| layout | captions |
| --- | --- |
| metadata.jsonl, .csv, .json or .parquet, in the folder or in each subfolder (Hugging Face ImageFolder) | its columns |
| parquet files that hold pictures, as `datasets` writes them | their other columns |
| WebDataset shards (shards.py) | .txt and .json of a sample, or its class, .cls |
| MNIST's idx files (idx.py) | its labels |
| x.png with x.txt, x.caption, x.text or x.png.txt (kohya) | one a line |
| a folder per class, or kohya's 10_name | the folder's name |
| pictures alone | none: records.py takes the words of the file names |

The first layout that fits is read. Hidden files, system folders and our own drawings are skipped. Nothing here decodes
a picture.
"""

from __future__ import annotations

import mimetypes
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from pokediff.data.idx import IDX_ROW, idx_files, idx_picture, read_idx_rows
from pokediff.data.images import picture_formats
from pokediff.data.shards import CLASS_NAMES, SHARD_ROW, class_names, read_shard_rows, shard_picture
from pokediff.errors import PokediffError, first_line
from pokediff.files import Row, as_row, is_own_file, is_text, read_csv, read_json, read_rows, read_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json", "metadata.parquet")  # the first of a folder is read
TABLE_NAMES = "metadata.jsonl, .csv, .json or .parquet"
SIDECARS = (".txt", ".caption", ".text")
# Files that may hold captions: named when they are not read.
TABLES = frozenset(".jsonl .ndjson .csv .tsv .json .parquet .arrow .xlsx .xls .ods .yaml .yml .xml".split())
# Files that may hold pictures and are not read, beside those that the system knows as pictures, films or archives.
ARCHIVES = frozenset(".zip .rar .7z .tar .tgz .gz .xz .bz2".split())
UNREAD = ARCHIVES | frozenset(".heic .heif .jxl .xcf .kra .ase .aseprite .clip .eps .ai .tfrecord".split())
# Files of the scraper and of `datasets` that hold no captions.
NO_CAPTIONS = {"failures.jsonl", "state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLITS |= {"test": "test"}
# Words of file and folder names without information about the picture.
GENERIC = SPLITS.keys() | frozenset(
    """img image images picture pictures pic pics sprite sprites photo photos dsc screenshot untitled frame frames
    final copy data dataset file files folder class""".split()
)
KOHYA_FOLDER = re.compile(r"\d+_(?=.*[^\W\d])")  # "10_sks dog": seen ten times an epoch
PARQUET_ROW = re.compile(r"(.+\.parquet)#(\d+)", re.IGNORECASE)
ROW_GROUPS_IN_MEMORY = 4


@dataclass(frozen=True)
class Listing:
    """The rows of a folder, before validation."""

    rows: tuple[Row, ...]
    source: str  # where the captions come from, "" when there are none
    notes: tuple[str, ...]  # what was found and not read


def require_folder(folder: Path) -> None:
    """Raise PokediffError for a file, and for what does not exist."""
    if folder.is_file():
        cure = "unpack it, and give its folder" if folder.suffix.lower() in ARCHIVES else "give the folder it is in"
        raise PokediffError(f"{folder} is a file and not a folder of pictures: {cure}")
    if not folder.is_dir():
        raise PokediffError(f"{folder} not found")


def read_listing(folder: Path) -> Listing:
    """The rows of a folder of pictures, in file order.

    Raises PokediffError when the folder does not exist, holds no pictures, has a broken metadata file, or has parquet
    files and pyarrow is not installed.
    """
    require_folder(folder)
    notes: list[str] = []
    files = sorted(_walk(folder, notes))
    suffixes = picture_formats()[1]
    pictures = [file for file in files if file.suffix.lower() in suffixes]
    tables = _metadata_files(files)
    if not tables:
        parquet = [file for file in files if file.suffix.lower() == ".parquet"]
        tables = parquet if not pictures or _hold_pictures(folder, parquet) else []
    shards = [] if tables or pictures else [file for file in files if file.suffix.lower() == ".tar"]
    notes += _unused([file for file in files if file not in shards], suffixes)
    if shards:
        return _read_shards(folder, files, shards, notes)
    if not tables and not pictures and (idx := idx_files(files)):
        return Listing(tuple(row for file in idx for row in read_idx_rows(folder, file)), _names(idx), tuple(notes))
    if not tables and not pictures:
        found = f"; {'; '.join(notes)}" if notes else ""
        raise PokediffError(f"{folder} holds neither a {METADATA[0]} nor pictures (docs/data.md){found}")
    if not tables:
        rows, source = _rows_of_pictures(folder, files, pictures)
        return Listing(_with_splits(rows), source, (*notes, *_unread(files, pictures, (), source)))
    rows = [row for file in tables for row in _read_table(folder, file)]
    _find_files(rows, files, pictures)
    source = _names(tables)
    left = len({file.as_posix() for file in pictures} - {str(row.get("file_name")) for _, row in rows})
    if left:
        notes.append(f"not used: {left} picture{'s' * (left > 1)} not in {source}")
    return Listing(_with_splits(rows), source, (*notes, *_unread(files, pictures, tables, source)))


def picture_bytes(folder: Path, file_name: str) -> bytes:
    """The picture file of a row: a file of the folder, a row of a parquet or idx file ("train.parquet#17"), or a sample
    of a shard ("train-000.tar#key").

    Raises OSError when it cannot be read.
    """
    if match := IDX_ROW.fullmatch(file_name):
        return idx_picture(folder, match[1], int(match[2]))
    if match := SHARD_ROW.fullmatch(file_name):
        return shard_picture(_own(folder / match[1], folder), match[2])
    match = PARQUET_ROW.fullmatch(file_name)
    if not match:
        return _own_bytes(folder / file_name, folder)
    path = _own(folder / match[1], folder)
    try:
        with _broken_parquet(path):
            starts = _row_group_starts(path)
            group = max(index for index, start in enumerate(starts) if start <= int(match[2]))
            value = _image_column(path, group)[int(match[2]) - starts[group]].as_py()
    except PokediffError as error:
        raise OSError(str(error)) from None
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return _own_bytes(path.parent / PurePosixPath(str(value["path"])).name, folder)  # no other folder
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise OSError("the row holds no picture")
    return data


def _own_bytes(path: Path, folder: Path) -> bytes:
    if path.exists() and not is_own_file(path, folder):
        raise OSError("a link out of the folder, or no file")
    return path.read_bytes()


@lru_cache(maxsize=4096)
def _own(path: Path, folder: Path) -> Path:
    """A file that holds many pictures; a table may name one that the walk left out."""
    if path.exists() and not is_own_file(path, folder):
        raise OSError("a link out of the folder, or no file")
    return path


def stem_of(file_name: str) -> str:
    """The part of a row's file_name that may have words: not the number of a row, nor the name of a shard."""
    if PARQUET_ROW.fullmatch(file_name):
        return ""
    match = SHARD_ROW.fullmatch(file_name)
    return PurePosixPath(match[2]).name if match else PurePosixPath(file_name).stem


def words_of(name: str, shortest: int = 3) -> str:
    """The words of a file or folder name: "fire_dragon_03" and "FireDragon" are "fire dragon", "IMG_1234" is "".

    Letters of any script count, with their marks; `shortest` is for alphabets: a Chinese word may be one sign.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(word for word in split_words(name, shortest) if word not in GENERIC)


def split_words(text: str, shortest: int) -> list[str]:
    """The words of a text of any script, in lower case."""
    letters = (sign if unicodedata.category(sign)[0] in "LM" else " " for sign in unicodedata.normalize("NFC", text))
    words = "".join(letters).lower().split()
    return [word for word in words if len(word) >= shortest or unicodedata.category(word[0]) == "Lo"]


# ------------------------------------------------------------------------------------------------------ the folder


def _walk(folder: Path, notes: list[str]) -> Iterator[PurePosixPath]:
    """All files below a folder, relative to it, without hidden ones and without what systems leave there.

    `notes` gets a line for links to folders, which are not followed, for links out of the folder and pipes, for names
    that are not UTF-8 or no names on other systems, and for drawings of our own.
    """
    links, foreign, unnamed, odd, drawn = [], [], [], [], []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] not in ".~" and name.lower() not in SYSTEM_FOLDERS]
        inside = PurePosixPath(Path(place).relative_to(folder).as_posix())
        if inside.parts and _is_drawing(Path(place), folder):  # given as the data set itself, it is used
            drawn.append(inside)
            folders.clear()
            continue
        links += [inside / name for name in folders if Path(place, name).is_symlink()]
        for file in (inside / name for name in names if name[0] not in ".~"):
            if not is_own_file(folder / file, folder):
                foreign.append(file)
            elif not is_text(str(file)):
                unnamed.append(PurePosixPath(os.fsencode(str(file)).decode(errors="backslashreplace")))
            elif set("\\:") & set(str(file)):
                odd.append(file)
            else:
                yield file
    if links:
        notes.append(f"not used: {_names(links)} (a link to a folder: give that folder, too)")
    if foreign:
        notes.append(f"not used: {_names(foreign)} (a link out of the folder, or no file: copy the file to its place)")
    if unnamed:
        notes.append(f"not used: {_names(unnamed)} (the name is not UTF-8: rename it)")
    if odd:
        notes.append(f"not used: {_names(sorted(odd))} (a name with \\ or :, a path on other systems: rename it)")
    if drawn:
        notes.append(f"not used: {_names(drawn)} (drawings of pokediff: give that folder, too)")


def _is_drawing(place: Path, folder: Path) -> bool:
    """Whether `pokediff sample` wrote a folder: a model that learns from its own drawings gets worse."""
    facts = place / "sample.json"
    if not is_own_file(facts, folder):
        return False
    try:
        found = read_json(facts)
    except (OSError, PokediffError):
        return False
    return isinstance(found, dict) and {"settings", "pictures", "files"} <= found.keys()


def _unused(files: Sequence[PurePosixPath], pictures: frozenset[str]) -> list[str]:
    """One line that counts the files of pictures, films and archives that cannot be read."""

    def may_hold_pictures(file: PurePosixPath) -> bool:
        if file.suffix.lower() in pictures:
            return False
        kind = mimetypes.guess_type(file.name)[0] or ""
        return file.suffix.lower() in UNREAD or kind.startswith(("image/", "video/"))

    found = Counter(file.suffix.lower() for file in files if may_hold_pictures(file))
    counts = ", ".join(f"{number} {suffix}" for suffix, number in found.most_common())
    return [f"not used: {counts} (no format that is read here: save them as PNG)"] if found else []


def _find_files(rows: Sequence[Row], files: Sequence[PurePosixPath], pictures: Sequence[PurePosixPath]) -> None:
    """Give rows the names that their files have in the folder: another system may have written é as two signs, or
    ignore the case of letters, and kohya leaves the suffix out.
    """
    there = {str(file) for file in files}
    alike = {_folded(str(file.with_suffix(""))): str(file) for file in reversed(pictures)}
    alike |= {_folded(str(file)): str(file) for file in reversed(files)}
    for _, row in rows:
        name = row.get("file_name")
        if isinstance(name, str) and name not in there:
            row["file_name"] = alike.get(_folded(name), name)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _read_shards(
    folder: Path, files: Sequence[PurePosixPath], shards: Sequence[PurePosixPath], notes: list[str]
) -> Listing:
    classes, rows, spoilt, left_out = class_names(folder, files), [], [], 0
    for shard in shards:
        found, less = read_shard_rows(folder, shard, classes)
        rows += found
        left_out += less
        spoilt += [shard] if less else []
    if spoilt:
        what = "no plain picture with a key, nor its text"
        notes.append(f"not used: {left_out} member{'s' * (left_out > 1)} of {_names(spoilt)} ({what})")
    unread = [file for file in files if file.name.lower() != CLASS_NAMES]
    source = _names(shards)
    return Listing(_with_splits(rows), source, (*notes, *_unread(unread, (), shards, source)))


def _metadata_files(files: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """The metadata file of the folder itself, else that of every subfolder that has one."""
    found: dict[PurePosixPath, PurePosixPath] = {}
    for name in METADATA:
        for file in files:
            if file.name.lower() == name:
                found.setdefault(file.parent, file)
    top = found.get(PurePosixPath("."))
    return [top] if top else sorted(found.values())


def _with_splits(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Give rows below train/, validation/ and test/ their split. Without validation, train is split like other data,
    and without anything else, so is test.
    """
    of_row = [_split_of_path(str(row.get("file_name"))) for _, row in rows]
    if not {"train", None} & set(of_row):
        of_row = [None] * len(of_row)
    if "validation" not in of_row:
        of_row = [None if split == "train" else split for split in of_row]
    named = zip(rows, of_row, strict=True)
    return tuple((where, {"split": split, **row} if split else row) for (where, row), split in named)


def _split_of_path(file_name: str) -> str | None:
    """The split of "train/x.png", or of a row of "data/train-00000-of-00001.parquet" or "train-000.tar"."""
    match = PARQUET_ROW.fullmatch(file_name) or SHARD_ROW.fullmatch(file_name)
    path = PurePosixPath((match[1] if match else file_name).lower())
    name = re.split("[^a-z]", path.name)[0] if match else ""
    return SPLITS.get(path.parts[0]) or SPLITS.get(name)


def _unread(
    files: Sequence[PurePosixPath], pictures: Sequence[PurePosixPath], read: Sequence[PurePosixPath], source: str
) -> list[str]:
    """One line that names the files which look like metadata and were not read."""
    sidecars = {beside for file in pictures for beside in _sidecar_names(file)}

    def looks_like_metadata(file: PurePosixPath) -> bool:
        if file in read or file.name.lower() in NO_CAPTIONS:
            return False
        if file.suffix.lower() not in SIDECARS:
            return file.suffix.lower() in TABLES
        if str(file).lower() in sidecars:
            return bool(read)
        return not read and re.search("caption|prompt|label|metadata|tags", file.stem.lower()) is not None

    found = [file for file in files if looks_like_metadata(file)]
    if not found:
        return []
    hint = f"captions come from {source}" if source else f"captions are read from {TABLE_NAMES}"
    return [f"not read: {_names(found)} ({hint})"]


def _names(files: Sequence[PurePosixPath]) -> str:
    """ "metadata.csv", "train/metadata.jsonl, test/metadata.jsonl", or the first two and how many more."""
    shown = ", ".join(map(str, files[:2]))
    return f"{shown} and {len(files) - 2} more" if len(files) > 2 else shown


# --------------------------------------------------------------------------------------- pictures without a table


def _rows_of_pictures(
    folder: Path, files: Sequence[PurePosixPath], pictures: Sequence[PurePosixPath]
) -> tuple[list[Row], str]:
    """A row for every picture: captions from the text file beside it, else the words of its class folder."""
    texts = {str(file).lower(): file for file in files if file.suffix.lower() in SIDECARS}
    classes = _class_words(pictures)
    rows, sources = [], Counter[str]()
    for picture in pictures:
        row: dict[str, Any] = {"file_name": picture.as_posix()}
        beside = next((texts[name] for name in _sidecar_names(picture) if name in texts), None)
        lines = read_text(folder / beside).splitlines() if beside else []
        if captions := [line.strip() for line in lines if line.strip()]:
            row["captions"] = captions
            sources[f"{beside.suffix.lower()} files"] += 1  # type: ignore[union-attr]
        elif picture in classes:
            row["genus"] = classes[picture]
            sources["folder names"] += 1
        rows.append((str(folder / picture), row))
    return rows, " and ".join(source for source, _ in sources.most_common())


def _sidecar_names(picture: PurePosixPath) -> list[str]:
    """The names, in lower case, of the text files that may belong to a picture."""
    stem, name = str(picture.with_suffix("")).lower(), str(picture).lower()
    return [beside + suffix for beside in (stem, name) for suffix in SIDECARS]


def _class_words(pictures: Sequence[PurePosixPath]) -> dict[PurePosixPath, str]:
    """{picture: the words of its folder}, empty unless the layout is a folder per class.

    As ImageFolder infers it: every picture lies in a folder at one depth (below train/, img/ or the like, if any), and
    there are several such folders, each with a name that says something. One folder is enough if it is kohya's
    "10_name".
    """
    places = {}
    for picture in pictures:
        places[picture] = parts = picture.parent.parts
        if len(parts) > 1 and parts[0].lower() in GENERIC:
            places[picture] = parts = parts[1:]
        if len(parts) != 1:
            return {}
    names = {parts[0] for parts in places.values()}
    words = {name: words_of(KOHYA_FOLDER.sub("", name, count=1), shortest=2) for name in names}
    is_kohya = all(KOHYA_FOLDER.match(name) for name in names)
    if not all(words.values()) or len(names) < (1 if is_kohya else 2):
        return {}
    return {picture: words[parts[0]] for picture, parts in places.items()}


# ---------------------------------------------------------------------------------------------------------- tables


def _read_table(folder: Path, file: PurePosixPath) -> Iterator[Row]:
    """Rows whose file_name is relative to `folder`, with forward slashes; in the file, it is relative to the file."""
    readers = {".jsonl": read_rows, ".csv": _read_csv, ".json": _read_json, ".parquet": _read_parquet}
    for where, row in readers[file.suffix.lower()](folder / file):
        if isinstance(name := row.get("file_name"), str):
            row["file_name"] = (file.parent / name.replace("\\", "/")).as_posix()
        yield where, row


def _read_csv(path: Path) -> Iterator[Row]:
    return read_csv(path, "file_name")


def _read_json(path: Path) -> Iterator[Row]:
    rows = read_json(path)
    if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
        rows = [_kohya_row(name, row) for name, row in rows.items()]
    if not isinstance(rows, list):
        raise PokediffError(f"{path}: must be a list of objects, each with a file_name")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", as_row(row, f"{path}: row {number}")


def _kohya_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row of {"x": {"caption": "a cat", "tags": "cat, red"}}, which kohya's scripts write."""
    captions = [row[key] for key in ("caption", "tags") if row.get(key)]
    return {"file_name": name, "captions": captions, **row}


def _read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a parquet file. Where it has a column of pictures, file_name is the file and the row's number."""
    file = _parquet(path)
    image = _image_name(file)
    columns = [name for name in file.schema_arrow.names if name != image]
    number = 0
    with _broken_parquet(path):
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                place = {"file_name": f"{path.name}#{number}"} if image else {}
                yield f"{path}: row {number}", {**row, **place}
                number += 1


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise PokediffError(f'reading {path.name} needs pyarrow: pip install "pokediff[parquet]"') from None
    with _broken_parquet(path):
        return ParquetFile(path)


@contextmanager
def _broken_parquet(path: Path) -> Iterator[None]:
    """Make a PokediffError of the errors of pyarrow, which are OSErrors, ValueErrors, KeyErrors and others."""
    try:
        yield
    except PokediffError:
        raise
    except Exception as error:
        raise PokediffError(f"{path} is not a parquet file, or not whole ({first_line(error)})") from None


def _hold_pictures(folder: Path, files: Sequence[PurePosixPath]) -> bool:
    """Do all these parquet files have a column of pictures? Not known without pyarrow."""
    return bool(files) and find_spec("pyarrow") is not None and all(_image_name(_parquet(folder / f)) for f in files)


def _image_name(file: Any) -> str | None:
    """The column of pictures: a struct with `bytes`, as `datasets` writes it, or plain bytes."""
    for field in file.schema_arrow:
        parts = {field.type.field(i).name for i in range(field.type.num_fields)}
        if "bytes" in parts or str(field.type) in ("binary", "large_binary"):
            return field.name
    return None


@lru_cache(maxsize=64)
def _row_group_starts(path: Path) -> list[int]:
    metadata = _parquet(path).metadata
    return [0, *accumulate(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups - 1))]


@lru_cache(maxsize=ROW_GROUPS_IN_MEMORY)
def _image_column(path: Path, group: int) -> Any:
    file = _parquet(path)
    return file.read_row_group(group, columns=[_image_name(file)]).column(0)
