"""WebDataset shards as a data set."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest
from test_layouts import draw, read, red

from pokediff.data import shards
from pokediff.data.captions import captions_of
from pokediff.data.dataset import load_pictures
from pokediff.data.images import read_image
from pokediff.data.records import picture_bytes, read_records
from pokediff.errors import PokediffError


def write_shard(path, members: dict[str, bytes | str], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_shards_are_rows(tmp_path, form):
    long = "a" * (80 if form == tarfile.USTAR_FORMAT else 200)
    for part in range(2):
        write_shard(
            tmp_path / f"train-{part}.tar",
            {
                "0.png": red(10 * part),
                "0.txt": "a dragon\n\na red dragon\n",
                "0.json": json.dumps({"style": "sprite", "key": "0", "text": "a dragon", "types": ["fire"]}),
                f"{long}/1.seg.png": red(200),
                f"{long}/1.png": red(10 * part + 1),
                f"{long}/1.json": json.dumps({"caption": "a cat"}),
                "two.words_2.PNG": red(10 * part + 2),
            },
            format=form,
        )
    records, lines = read(tmp_path)
    assert list(records) == [f"train-{part}.tar#{key}" for part in range(2) for key in ("0", f"{long}/1", "two")]
    first = records["train-1.tar#0"]
    assert (first.captions, first.style, first.types) == (("a dragon", "a red dragon"), "sprite", ("fire",))
    assert records[f"train-0.tar#{long}/1"].captions == ("a cat",)
    assert records["train-0.tar#two"].genus == "two"
    assert [read_image(picture_bytes(record))[0, 0, 0] for record in records.values()] == [0, 1, 2, 10, 11, 12]
    assert lines == ["captions: 4 of 6, from train-0.tar, train-1.tar; file names are used for the rest"]


def test_folders_and_names_of_shards_are_splits(tmp_path):
    for name in ("train/0.tar", "val/0.tar", "test-000.tar"):
        write_shard(tmp_path / name, {"train/x.png": red(1)})
    records, _ = read(tmp_path)
    assert {name: record.split for name, record in records.items()} == {
        "test-000.tar#train/x": "test",
        "train/0.tar#train/x": "train",
        "val/0.tar#train/x": "validation",
    }


def test_classes_by_number_and_name(tmp_path):
    write_shard(tmp_path / "0.tar", {"a.png": red(1), "a.cls": "1", "b.png": red(2), "b.cls": "fox"})
    records, _ = read(tmp_path)
    assert records["0.tar#a"].captions == ("1",)
    assert captions_of(records["0.tar#b"])[0] == "a fox"
    (tmp_path / "classnames.txt").write_text("a bear\nred panda\n")
    records, lines = read(tmp_path)
    assert records["0.tar#a"].genus == "red panda"
    assert lines == ["captions: 2 of 2, from 0.tar"]


def test_shards_beside_pictures_are_left_alone(tmp_path):
    draw(tmp_path, "a.png")
    (tmp_path / "backup.tar").write_bytes(b"?")
    records, lines = read(tmp_path)
    assert list(records) == ["a.png"]
    assert lines[1].startswith("not used: 1 .tar")


def test_members_of_a_stranger_lead_nowhere(tmp_path):
    """Links, devices, sparse files and names outside are left out and counted."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
        info = tarfile.TarInfo("sparse.png")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 50)}
        archive.addfile(info)
        for name in (
            "/etc/d.png",
            "../e.png",
            "x/../../f.png",
            "C:g.png",
            "ok.png",
            "._ok.png",
            "__meta__.json",
            "README",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(red(1))
            archive.addfile(info, io.BytesIO(red(1)))
    records, lines = read(tmp_path)
    assert list(records) == ["0.tar#ok"]
    assert lines[1] == "not used: 10 members of 0.tar (no plain picture with a key, nor its text)"


@pytest.mark.parametrize("length", [0, 100, 511, 700, 1500, 3500])
def test_a_shard_that_was_cut_is_told(tmp_path, length):
    write_shard(tmp_path / "0.tar", {f"{number}.png": os.urandom(1000) for number in range(4)})
    with (tmp_path / "0.tar").open("r+b") as file:
        file.truncate(length)
    with pytest.raises(PokediffError, match=r"0\.tar is not a tar file, or not whole"):
        read_records(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [2 << 20, (1 << 60) - 1, -512])
def test_sizes_that_lie_are_refused(tmp_path, kind, size):
    info = tarfile.TarInfo("a.png")
    info.type, info.size = kind, size
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 << 20)  # there is as much to read as the smallest says
    if (kind, size) == (tarfile.REGTYPE, 2 << 20):
        assert list(read(tmp_path)[0]) == ["0.tar#a"]  # no lie: a picture that is none, skipped like any other
        return
    with pytest.raises(PokediffError, match="not a tar file, or not whole"):
        read_records(tmp_path)


def test_texts_that_are_none_are_told_with_their_place(tmp_path):
    for name, data, words in (
        ("a.json", "[1]", r"0\.tar#a\.json: a row must be a JSON object"),
        ("a.json", "{", r"0\.tar#a\.json:1: not JSON"),
        ("a.json", '{"dex": "many"}', r"0\.tar#a: dex"),
        ("a.txt", b"\xff\xfe\xfd", r"0\.tar#a\.txt is not UTF-8"),
        ("a.txt", b"x" * (shards.LARGEST_TEXT + 1), r"0\.tar#a\.txt has 1048577 bytes"),
    ):
        shards._index.cache_clear()
        write_shard(tmp_path / "0.tar", {"a.png": red(1), name: data})
        with pytest.raises(PokediffError, match=words):
            read_records(tmp_path)


def test_a_table_names_no_shard_outside(tmp_path):
    write_shard(tmp_path / "else" / "0.tar", {"a.png": red(1)})
    (tmp_path / "set").mkdir()
    try:
        (tmp_path / "set" / "0.tar").symlink_to(tmp_path / "else" / "0.tar")
    except OSError:
        pytest.skip("no links here")
    (tmp_path / "set" / "metadata.jsonl").write_text('{"file_name": "0.tar#a", "text": "x"}')
    (record,) = read_records(tmp_path / "set")
    with pytest.raises(OSError, match="a link out of the folder"):
        picture_bytes(record)


def test_pictures_of_shards_are_those_of_the_files(tmp_path, data):
    records = read_records(data)
    members: dict[str, bytes | str] = {}
    for number, record in enumerate(records):
        members |= {f"{number:03}.png": (data / record.file_name).read_bytes(), f"{number:03}.txt": f"picture {number}"}
    write_shard(tmp_path / "0.tar", members)
    found = load_pictures(tmp_path, 40)
    assert (found.pixels[:] == load_pictures(data, 40).pixels[:]).all()
    assert found.captions[79] == ("picture 79",)
