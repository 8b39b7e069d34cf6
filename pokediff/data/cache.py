"""What takes long to make from a data set is made once, and mapped from a cache at the next start.

An entry is a folder of .npy files, named by a hash of all that it depends on: names, sizes and times of the data set's
files, settings, and the code and libraries that made it. The files are not read for it, since that takes as long as the
work that it spares: the system sets the time of a file's last change (ctime) whenever it is written or renamed, and no
program can set it back. What changes during the work, or moments before, is not kept.

Entries lie in $POKEDIFF_CACHE, else in pokediff/ of $XDG_CACHE_HOME or ~/.cache; with an empty POKEDIFF_CACHE nothing
is kept. They may fill a quarter of the disk's free space; those unused for the longest go first, and all may be deleted
at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from filelock import FileLock, Timeout

from pokediff import __version__
from pokediff.data.packed import Arrays

MEMORY_SHARE = 0.3  # of the free memory that one array may fill; a larger one lies in a file
DISK_SHARE = 0.25  # of the free space that the cache may fill
SETTLED = 2.0  # seconds: two changes within one tick of a disk's clock, 2 s at most, have the same time
ABOUT = "about.json"  # of an entry: what it is; its time is that of the last use
LIBRARIES = """numpy pillow opencv-python-headless opencv-python pyarrow torch transformers tokenizers
    open_clip_torch""".split()

Report = Callable[[str], Any]


# ---------------------------------------------------------------------------------------------- what an entry is of


@dataclass(frozen=True)
class Source:
    """The files that something is made from, as they are at this moment."""

    digest: str  # of their names, sizes and times
    size: int  # bytes
    changed: float  # when the newest one was changed, seconds since 1970

    @classmethod
    def of(cls, *places: Path, without: str = "") -> Source:
        """Of files, and of folders with all that is in them but hidden files and names like the pattern `without`."""
        digest, size, changed = hashlib.sha256(), 0, 0
        for place in places:
            digest.update(b"place\0")
            for path in _files(place, without):
                try:
                    found = os.stat(path)
                except OSError:  # a link that leads nowhere, or no such file
                    digest.update(os.fsencode(path[len(str(place)) :]))
                    continue
                times = f"\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0"
                digest.update(os.fsencode(path[len(str(place)) :] + times))
                size += found.st_size
                changed = max(changed, found.st_mtime_ns, found.st_ctime_ns)
        return cls(digest.hexdigest(), size, changed / 1e9)


def _files(place: Path, without: str) -> Iterator[str]:
    if not place.is_dir():
        yield str(place)
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if name[0] not in ".~")
        links = [name for name in folders if os.path.islink(f"{folder}/{name}")]
        for name in (*links, *sorted(names)):
            if name[0] not in ".~" and not (without and fnmatchcase(name, without)):
                yield f"{folder}/{name}"


@cache
def _maker() -> str:
    """The code that makes entries, and the libraries on which their bits depend."""
    digest = hashlib.sha256(f"{__version__} {sys.version_info[:2]} {sys.byteorder}".encode())
    package = Path(__file__).parent.parent
    for file in (*sorted(package.glob("data/*.py")), package / "files.py", package / "model" / "text.py"):
        digest.update(file.read_bytes() if file.is_file() else b"")
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            digest.update(f"{library} {version(library)}\n".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ making and finding


def remembered(
    what: str,
    settings: Sequence[Any],
    source: Callable[[], Source],
    make: Callable[[Store], Arrays],
    report: Report,
    worth: Callable[[Source], bool],
) -> Arrays:
    """The arrays of `make`, from the cache where `make` has run before with the same settings and source.

    Only what is `worth` it is kept. Processes that want the same at once wait for the first, whichever it is. A cache
    that cannot be written to is one line of `report`, "`what` are not kept: ...", and no error.
    """
    folder, before, began = cache_folder(), source(), time.time()
    if folder is None or not worth(before):
        return make(Store())
    name = hashlib.sha256(json.dumps([settings, before.digest, _maker()]).encode()).hexdigest()[:32]
    if known := _open(folder / name):
        return known
    try:
        lock = _lock(folder, name, lambda: report(f"waiting for another process that makes the same {what}"))
    except (OSError, NotImplementedError) as error:
        report(_not_kept(what, folder, error))
        return make(Store())
    store = Store(folder, name)
    try:
        if known := _open(folder / name):
            return known
        arrays = make(store)
        settled = before.changed < began - SETTLED and source() == before
        if settled and store.keep(arrays, what):
            return _open(folder / name) or arrays
        if store.failure:
            report(_not_kept(what, folder, store.failure))
        return arrays
    finally:
        store.close()
        lock.release()


def cache_folder() -> Path | None:
    """Where entries lie; None: nowhere."""
    if (own := os.environ.get("POKEDIFF_CACHE")) is not None:
        return Path(own).expanduser().absolute() if own else None
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "pokediff"
    except RuntimeError:  # no home
        return None


def _lock(folder: Path, name: str, waits: Callable[[], Any]) -> FileLock:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waits()
        lock.acquire()
    return lock


def _not_kept(what: str, folder: Path, error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return f"{what} are not kept for the next start, {folder}: {reason}"


def _open(entry: Path) -> Arrays | None:
    """The arrays of an entry, read-only; None where it is missing or damaged."""
    try:
        names = json.loads((entry / ABOUT).read_bytes())["arrays"]
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    with suppress(OSError):  # a cache of others
        os.utime(entry / ABOUT)
    return arrays


class Store:
    """Gives `make` its large arrays, and keeps what it made in the cache; `Store()` keeps nothing.

    Nothing here raises an error of the disk but `empty`, where neither cache nor temporary files have room.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self.folder, self.name = folder, name
        self.failure: OSError | None = None
        self._new: Path | None = None  # the entry, while it is being written
        self._written: set[str] = set()  # its arrays that are in its files already

    def empty(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array, uninitialized: in memory, or where it would fill that, in a file, which ends with it unless it
        is kept, whole or its first rows, under this name.
        """
        size = math.prod(shape)
        if size <= MEMORY_SHARE * psutil.virtual_memory().available:
            return np.empty(shape, np.uint8)
        if new := self._place(size):
            try:
                with (new / f"{name}.npy").open("wb+") as file:
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                    array = _mapped(file, shape)
                self._written.add(name)
                return array
            except OSError as error:
                self._give_up(error)
        with tempfile.TemporaryFile() as temporary:
            return _mapped(temporary, shape)

    def keep(self, arrays: Arrays, what: str) -> bool:
        """Write the arrays as an entry, whole or not at all; False: not, for the reason in `failure`."""
        new = self._place(sum(array.nbytes for name, array in arrays.items() if name not in self._written))
        if new is None or self.folder is None:
            return False
        try:
            for name, array in arrays.items():
                if name in self._written:
                    array.flush()  # type: ignore[attr-defined]  # a memmap
                    continue
                with (new / f"{name}.npy").open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            about = json.dumps({"what": what, "arrays": list(arrays)})
            (new / ABOUT).write_text(about, encoding="utf-8")
            shutil.rmtree(self.folder / self.name, ignore_errors=True)  # a damaged one
            os.rename(new, self.folder / self.name)
        except OSError as error:
            self._give_up(error)
            return False
        self._new = None
        return True

    def close(self) -> None:
        """Remove what was not kept."""
        if self._new is not None:
            shutil.rmtree(self._new, ignore_errors=True)
            self._new = None

    def _place(self, size: int) -> Path | None:
        """The folder of the new entry, with room for so many bytes more."""
        if self.folder is None or self.failure is not None:
            return None
        try:
            _make_room(self.folder, size, self._new)
            self._new = self._new or Path(tempfile.mkdtemp(".tmp", f".{self.name}.", self.folder))
        except OSError as error:
            self._give_up(error)
        return self._new

    def _give_up(self, error: OSError) -> None:
        self.failure = error
        self.close()


def _mapped(file: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file from its present place on."""
    start = file.tell()
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no signal on the first use of a page
        os.posix_fallocate(file.fileno(), 0, start + math.prod(shape))
    return np.memmap(file, np.uint8, "r+" if start else "w+", start, shape)


def _make_room(folder: Path, size: int, own: Path | None) -> None:
    """Delete what killed processes left, and the entries unused for the longest, for `size` bytes more.

    Raises OSError when the share of the cache is less than that.
    """
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):
            if path.suffix == ".tmp" and path != own:
                _remove_left(path, folder)
            elif (path / ABOUT).is_file():
                entries.append(((path / ABOUT).stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path))
    filled = sum(entry[1] for entry in entries)
    share = DISK_SHARE * (shutil.disk_usage(folder).free + filled)
    if size > share:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB are more than a quarter of the free space")
    for _, freed, path in sorted(entries):
        if filled + size <= share:
            break
        shutil.rmtree(path, ignore_errors=True)
        filled -= freed


def _remove_left(path: Path, folder: Path) -> None:
    """Remove an entry that is being written, unless its writer lives and has the lock."""
    lock = FileLock(folder / f"{path.name.split('.')[1]}.lock")
    with suppress(Timeout):
        lock.acquire(timeout=0)
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
