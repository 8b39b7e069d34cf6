"""Prepared pictures that are kept for the next start."""

from __future__ import annotations

import errno
import os
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_data
from filelock import FileLock
from forks import ended, forked

from pokediff.config import DatasetConfig
from pokediff.data import cache, dataset, decoding
from pokediff.data.cache import Source
from pokediff.data.dataset import TrainingBatches, caption_vectors, load_pictures


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A data set for which a cache is used, whatever its size and age, with a broken picture and a style that lacks."""
    monkeypatch.setattr(cache, "SETTLED", -1e9)
    monkeypatch.setattr(dataset, "WORTH", 0)
    monkeypatch.setattr(dataset, "MANY_CAPTIONS", 0)
    monkeypatch.setenv("POKEDIFF_CACHE", str(tmp_path / "cache"))
    folder = write_data(tmp_path / "data", number=48)
    (folder / "images" / "0007.png").write_bytes(b"<html>")
    return folder


@pytest.fixture
def no_decoding(monkeypatch):
    """no_decoding(): from now on nothing is decoded or encoded."""

    def fail(*_):
        raise AssertionError("it is in the cache")

    def forbid() -> None:
        monkeypatch.setattr(dataset, "decode_all", fail)
        monkeypatch.setattr(dataset, "load_text_encoder", fail)

    return forbid


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder.parent / "cache").iterdir() if path.is_dir())


def load(folder: Path, size: int = 16, **options):
    lines: list[str] = []
    return load_pictures(folder, size, report=lines.append, **options), lines


def batches_of(folder: Path) -> list[torch.Tensor]:
    """Steps of one process and of two."""
    select = DatasetConfig(styles={"sprite": 1.0, "artwork": 2.0}, warp=0.3)
    pictures = load_pictures(folder, 16, select, report=lambda _: None).split("train").with_shared_captions()
    vectors = caption_vectors(folder, pictures, "builtin")
    made = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        options = dict(batch_size=8, caption_dropout=0.2, seed=3, augment_dim=8, rank=rank, world=world)
        batches = TrainingBatches(pictures, vectors, select, **options)
        made += [getattr(batches[step], name) for step in (0, 7) for name in ("pixels", "text", "augment")]
    return made


def test_batches_have_the_same_bits_with_a_cache_and_without(folder, no_decoding, monkeypatch):
    first = batches_of(folder)
    assert len(entries(folder)) == 2  # pictures and vectors
    with monkeypatch.context() as without:
        without.setenv("POKEDIFF_CACHE", "")
        plain = batches_of(folder)
    no_decoding()
    second = batches_of(folder)
    for others in (plain, second):
        for a, b in zip(first, others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_second_start_tells_the_same(folder, no_decoding):
    first, lines = load(folder)
    moved = folder.rename(folder.with_name("moved"))
    no_decoding()
    again, same = load(moved)
    assert isinstance(again.pixels.array, np.memmap)
    assert (again.digest, same) == (first.digest, lines)
    assert list(again.records) == list(first.records)
    assert again.captions == first.captions
    assert {record.root for record in again.records} == {str(moved)}
    assert any("skipped images/0007.png" in line for line in same)


def test_what_was_changed_is_prepared_again(folder):
    """Also where size and time of the file are as before."""
    first, _ = load(folder)
    file = folder / "images" / "0003.png"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    broken, _ = load(folder)
    assert len(broken) == len(first) - 1
    file.unlink()
    shutil.copy2(folder / "images" / "0004.png", file)
    assert load(folder)[0].digest not in (first.digest, broken.digest)


def test_settings_have_entries_of_their_own(folder):
    chosen = [
        load(folder)[0],
        load(folder, 24)[0],
        load(folder, limit=20)[0],
        load(folder, select=DatasetConfig(styles={"sprite": 1.0}))[0],
    ]
    assert len({(pictures.digest, pictures.pixels.shape) for pictures in chosen}) == 4
    load(folder, select=DatasetConfig(styles={"sprite": 0.5}, flip=0.0))  # the same pictures
    assert len(entries(folder)) == 4


def test_what_changed_moments_before_or_meanwhile_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", 3600.0)
    load(folder)
    assert entries(folder) == []
    monkeypatch.setattr(cache, "SETTLED", -1e9)
    decode = dataset.decode_all

    def scraped_meanwhile(*arguments):
        (folder / "new.txt").touch()
        return decode(*arguments)

    monkeypatch.setattr(dataset, "decode_all", scraped_meanwhile)
    load(folder)
    assert entries(folder) == []


def test_a_small_set_needs_no_cache(folder, monkeypatch):
    monkeypatch.setattr(dataset, "WORTH", 4 << 20)
    load(folder)
    assert not (folder.parent / "cache").exists()


@pytest.mark.parametrize("name", ["pixels.npy", "records.npy", "about.json"])
def test_a_damaged_entry_is_made_again(folder, name):
    pixels = load(folder)[0].pixels[:]
    (entry,) = entries(folder)
    with (entry / name).open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    again, _ = load(folder)
    np.testing.assert_array_equal(again.pixels[:], pixels)
    assert entries(folder) == [entry]
    assert cache._open(entry) is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("large", [False, True])
def test_a_full_disk_is_one_line(folder, monkeypatch, number, large):
    """Of arrays in memory, and of those that would lie in the cache from the start."""

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache.os, "fsync", full)
    if large:
        monkeypatch.setattr(cache, "MEMORY_SHARE", 0.0)
        monkeypatch.setattr(cache.np.lib.format, "write_array_header_1_0", full)
    pictures, lines = load(folder)
    assert len(pictures) == 47
    assert [line for line in lines if "not kept" in line] == [lines[-1]]
    assert os.strerror(number) in lines[-1]
    assert entries(folder) == []


def test_a_cache_that_cannot_be_written_to_is_one_line(folder, monkeypatch):
    (folder.parent / "cache").write_text("a file")
    pictures, lines = load(folder)
    assert len(pictures) == 47
    assert lines[0].startswith(f"prepared pictures of {folder}, 16 px are not kept for the next start")


def test_a_set_too_big_for_memory_is_written_where_it_is_kept(folder, monkeypatch, no_decoding):
    in_memory, _ = load(folder)
    shutil.rmtree(folder.parent / "cache")
    monkeypatch.setattr(cache, "MEMORY_SHARE", 0.0)
    on_disk, _ = load(folder)
    no_decoding()
    again, _ = load(folder)
    for pictures in (on_disk, again):
        assert isinstance(pictures.pixels.array, np.memmap)
        np.testing.assert_array_equal(pictures.pixels[:], in_memory.pixels[:])
    assert len(entries(folder)) == 1


def test_the_oldest_entries_make_room(folder, monkeypatch):
    for size in (16, 17, 18):
        load(folder, size)
        for entry in entries(folder):
            about = entry / cache.ABOUT
            os.utime(about, (about.stat().st_atime, about.stat().st_mtime - 100))
    load(folder, 16)  # used again
    free = shutil.disk_usage(folder).free
    filled = sum(file.stat().st_size for entry in entries(folder) for file in entry.iterdir())
    monkeypatch.setattr(cache, "DISK_SHARE", (filled + 40_000) / (free + filled))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    load(folder, 19)
    assert len(entries(folder)) == 3
    sizes = {np.load(entry / "pixels.npy", mmap_mode="r").shape[1] for entry in entries(folder)}
    assert sizes == {16, 18, 19}
    monkeypatch.setattr(cache, "DISK_SHARE", 0.0)
    assert "more than a quarter" in load(folder, 20)[1][-1]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(folder):
    place = folder.parent / "cache"
    for name in ("dead", "alive"):
        (place / f".{name}.x.tmp").mkdir(parents=True)
    with FileLock(place / "alive.lock"):
        load(folder)
    assert sorted(path.name for path in place.glob(".*.tmp")) == [".alive.x.tmp"]


def test_times_of_the_files_are_the_source(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"12345")
    first = Source.of(tmp_path)
    assert first.size == 5
    for name in (".git/x", ".hidden", "x-1.safetensors"):
        (tmp_path / name).touch()
    assert Source.of(tmp_path, without="x-*.safetensors").digest == first.digest
    assert Source.of(tmp_path).digest != first.digest
    assert Source.of(tmp_path / "none").size == 0
    assert Source.of(tmp_path / "sub" / "a.png").digest != Source.of(tmp_path / "sub").digest


def load_and_tell(folder: Path, pause: float = 0.0) -> None:
    """Load the data set as a small one is not loaded else, with a pause before each picture."""
    cache.SETTLED, dataset.WORTH, decode = -1e9, 0, decoding._decode
    decoding._decode = lambda *picture: (time.sleep(pause), decode(*picture))[1]
    pictures = dataset.load_pictures(folder, 16, report=print)
    print(pictures.digest, pictures.pixels[:].sum())


@pytest.mark.slow
def test_two_processes_at_once_and_one_that_is_killed(folder, tmp_path):
    place = folder.parent / "cache"

    def start(log: str, *pause: float) -> BaseProcess:
        return forked(load_and_tell, folder, *pause, log=tmp_path / log, POKEDIFF_CACHE=str(place))

    killed = start("killed", 0.2)
    try:
        while not list(place.glob("*.lock")):
            assert killed.is_alive()
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.join()
    assert entries(folder) == []
    both = [start(log) for log in ("first", "second")]
    assert [ended(process) for process in both] == [0, 0]
    said = [(tmp_path / log).read_text().splitlines() for log in ("first", "second")]
    assert said[0][-1] == said[1][-1]
    assert len(entries(folder)) == 1


def test_processes_decode_as_threads_do(folder, monkeypatch):
    plain, lines = load(folder)
    shutil.rmtree(folder.parent / "cache")
    monkeypatch.setattr(decoding, "MANY", 0)
    monkeypatch.setattr(decoding, "cores", lambda: 2)
    shared, same = load(folder)
    assert (shared.digest, same) == (plain.digest, lines)
    np.testing.assert_array_equal(shared.pixels[:], plain.pixels[:])
