from __future__ import annotations

import csv
import json
import os
import sys
import unicodedata
from io import BytesIO

import pytest
from PIL import Image

from pokediff.data import layouts
from pokediff.data.captions import captions_of
from pokediff.data.images import encode_png, read_image
from pokediff.data.records import picture_bytes, read_records, split_of
from pokediff.errors import PokediffError


def draw(folder, *names: str) -> None:
    """Small pictures; the suffix decides their format."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.new("RGB", (8, 8), (20 * number % 256, 90, 40)).save(path, kind)


def read(folder):
    """{file_name: record} and the lines that were reported."""
    lines: list[str] = []
    return {record.file_name: record for record in read_records(folder, lines.append)}, lines


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("column", ["text", "caption", "captions", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_every_table_and_caption_column_is_read(tmp_path, kind, column):
    draw(tmp_path, "a.png", "images/b.png")
    rows = [{"file_name": "a.png", column: "a red, round dragon"}, {"file_name": "images/b.png", column: 'a "cat"'}]
    with (tmp_path / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    records, lines = read(tmp_path)
    assert records["a.png"].captions == ("a red, round dragon",)
    assert records["images/b.png"].captions == ('a "cat"',)
    assert lines == [f"captions: 2 of 2, from metadata.{kind}"]


def test_a_table_in_each_split_folder_is_read_with_its_split(tmp_path):
    for split in ("train", "validation", "test"):
        draw(tmp_path, f"{split}/0.png", f"{split}/images/1.png")
        rows = [{"file_name": "0.png", "text": f"one {split}"}, {"file_name": "images/1.png", "text": "two"}]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, lines = read(tmp_path)
    assert len(records) == 6
    assert records["test/images/1.png"].captions == ("two",)
    assert [split_of(records[f"{split}/0.png"]) for split in ("train", "validation", "test")] == [
        "train",
        "validation",
        "test",
    ]
    assert lines == ["captions: 6 of 6, from test/metadata.jsonl, train/metadata.jsonl and 1 more"]
    assert picture_bytes(records["test/0.png"]) == (tmp_path / "test" / "0.png").read_bytes()


def test_train_alone_is_split_like_other_data(tmp_path):
    draw(tmp_path, "train/0.png", "test/1.png")
    records, _ = read(tmp_path)
    assert records["train/0.png"].split is None
    assert records["test/1.png"].split == "test"


def test_a_table_of_a_spreadsheet(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png")
    text = '\ufefffile_name;Text;dex;types\r\na.png;"a dog; or a cat";7;\r\nb.png;;;fire, water\r\nc.png;;;\r\n'
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    records, lines = read(tmp_path)
    assert records["a.png"].captions == ("a dog; or a cat",)
    assert records["a.png"].dex == 7
    assert records["b.png"].types == ("fire", "water")
    assert lines == ["captions: 2 of 3, from metadata.csv; measured colours are used for the rest"]


def test_paths_of_windows_paths_with_a_dot_and_captions_of_several_lines(tmp_path):
    draw(tmp_path, "images/a.png", "b.png")
    text = 'file_name,text\nimages\\a.png,"two\nlines"\n./b.png,of\u2028text\n'  # Unicode's own line separator
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    records, lines = read(tmp_path)
    assert [(name, *record.captions) for name, record in records.items()] == [
        ("images/a.png", "two\nlines"),
        ("b.png", "of\u2028text"),
    ]
    assert lines == ["captions: 2 of 2, from metadata.csv"]


def test_columns_without_a_caption_are_named(tmp_path):
    draw(tmp_path, "fox_1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,description,split\nfox_1.png,x,train\n2.png,y,\n")
    _, lines = read(tmp_path)
    assert lines == [
        "captions: 0 of 2, from metadata.csv; file names are used instead",
        "not read: columns description (captions are in a column captions, text, caption, prompt)",
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", "image,text\na.png,x\n", "metadata.csv:1: the header must have a column file_name"),
        ("metadata.csv", "file_name,text\na.png,x,y\n", "metadata.csv:2: more values than columns"),
        ("metadata.csv", "file_name,dex\n\na.png,many\n", "metadata.csv:3: dex"),
        ("metadata.json", '{"a.png": "x"}', "must be a list of objects"),
        ("metadata.json", "[{]", "metadata.json:1: not JSON"),
        ("metadata.json", '[{"text": "x"}]', "metadata.json: row 1: file_name"),
        ("metadata.csv", "", "column file_name"),
        ("metadata.json", "[]", "metadata.json is empty"),
        ("metadata.json", '[{"file_name": "a.png", "text": "a \\ud800 cat"}]', "row 1: text must be UTF-8 text"),
        ("metadata.json", '[{"file_name": "a.png", "text": 5}]', "row 1: text must be a text or a list of texts"),
    ],
)
def test_a_broken_table_is_named_with_its_line(tmp_path, name, text, words):
    draw(tmp_path, "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(PokediffError, match=words):
        read_records(tmp_path)


def test_what_is_not_read_is_named(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    for name in ("metadata.csv", "labels.tsv", "failures.jsonl", "README.txt"):
        (tmp_path / name).write_text("file_name,text\n")
    (tmp_path / "a.txt").write_text("another x")
    _, lines = read(tmp_path)
    assert lines == [
        "captions: 1 of 1, from metadata.jsonl",
        "not used: 1 picture not in metadata.jsonl",
        "not read: a.txt, labels.tsv and 1 more (captions come from metadata.jsonl)",
    ]


def test_a_table_of_another_name_is_no_table_but_named(tmp_path):
    draw(tmp_path, "a.png")
    (tmp_path / "captions.csv").write_text("file_name,text\na.png,x\n")
    (tmp_path / "captions.txt").write_text("x")
    (tmp_path / "metadata.yaml").write_text("x")
    _, lines = read(tmp_path)
    assert lines == [
        "captions: 0 of 1, from no file; measured colours are used instead",
        "not read: captions.csv, captions.txt and 1 more "
        "(captions are read from metadata.jsonl, .csv, .json or .parquet)",
    ]


# ---------------------------------------------------------------------------------------------------------- kohya


def test_text_files_beside_pictures(tmp_path):
    draw(tmp_path, "one.png", "two.JPG", "three.webp", "four.png", "five.png", "six.png")
    (tmp_path / "ONE.txt").write_text("a box\n\n a red box \n")
    (tmp_path / "two.caption").write_text("a dog")
    (tmp_path / "three.webp.TXT").write_text("a cat")
    (tmp_path / "five.txt").write_text("\n")
    (tmp_path / "six.text").write_text("a fox")
    records, lines = read(tmp_path)
    assert records["one.png"].captions == ("a box", "a red box")
    assert records["two.JPG"].captions == ("a dog",)
    assert records["three.webp"].captions == ("a cat",)
    assert records["four.png"].genus == "four"
    assert records["six.png"].captions == ("a fox",)
    line = "captions: 4 of 6, from .txt files and .text files and .caption files; file names are used for the rest"
    assert lines == [line]


def test_the_table_of_kohya_maps_names_without_a_suffix(tmp_path):
    draw(tmp_path, "sub/one.png", "v1.2.png", "three.png")
    table = {"sub/one": {"tags": "red, box", "caption": "a box"}, "v1.2": {"tags": "dog"}, "three.png": {}}
    (tmp_path / "metadata.json").write_text(json.dumps(table))
    records, lines = read(tmp_path)
    assert {name: record.captions for name, record in records.items()} == {
        "sub/one.png": ("a box", "red, box"),
        "v1.2.png": ("dog",),
        "three.png": (),
    }
    assert lines == ["captions: 2 of 3, from metadata.json; file names are used for the rest"]


def test_the_folder_of_kohya_is_a_caption_without_its_number(tmp_path):
    draw(tmp_path, "10_sks dog/a.png", "10_sks dog/b.png")
    (tmp_path / "10_sks dog" / "a.txt").write_text("a dog that sits")
    records, lines = read(tmp_path)
    assert records["10_sks dog/a.png"].captions == ("a dog that sits",)
    assert records["10_sks dog/b.png"].genus == "sks dog"
    assert "a sks dog" in captions_of(records["10_sks dog/b.png"])
    assert lines == ["captions: 2 of 2, from .txt files and folder names"]


def test_the_image_folder_of_kohya(tmp_path):
    draw(tmp_path, "img/10_dragon/0.png", "img/10_dragon/1.png")
    records, lines = read(tmp_path)
    assert {record.genus for record in records.values()} == {"dragon"}
    assert lines == ["captions: 2 of 2, from folder names"]


# -------------------------------------------------------------------------------------------------------- folders


def test_a_folder_per_class(tmp_path):
    draw(tmp_path, "cat/IMG_1.png", "cat/IMG_2.png", "red_panda/x.png", "red_panda/y.png")
    records, lines = read(tmp_path)
    assert records["red_panda/x.png"].genus == "red panda"
    assert captions_of(records["cat/IMG_1.png"], ("brown",))[:3] == ("a cat", "a brown cat", "a brown creature")
    assert lines == ["captions: 4 of 4, from folder names"]


@pytest.mark.parametrize(
    "names",
    [
        ("cat/fox_1.png", "fox_2.png"),  # a picture outside of the classes
        ("cat/fox_1.png", "cat/fox_2.png"),  # one folder
        ("images/fox_1.png", "more/fox_2.png"),  # a name that says nothing
        ("2019/fox_1.png", "2020/fox_2.png"),
        ("cat/tabby/fox_1.png", "dog/fox_2.png"),  # two depths
    ],
)
def test_other_folders_are_no_classes(tmp_path, names):
    draw(tmp_path, *names)
    records, lines = read(tmp_path)
    assert all(record.genus == "fox" for record in records.values())
    assert lines == ["captions: 2 of 2, from file names"]


def test_words_of_file_names(tmp_path):
    draw(tmp_path, "fire_dragon_03.png", "FireDragon.png", "IMG_0001.png", "7.png")
    records, lines = read(tmp_path)
    assert [record.genus for record in records.values()] == [None, "fire dragon", None, "fire dragon"]
    assert lines == ["captions: 2 of 4, from file names; measured colours are used for the rest"]


def test_classes_below_splits(tmp_path):
    draw(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/cat/1.png", "val/dog/1.png")
    records, _ = read(tmp_path)
    assert {name: (record.genus, split_of(record)) for name, record in records.items()} == {
        "train/cat/0.png": ("cat", "train"),
        "train/dog/0.png": ("dog", "train"),
        "val/cat/1.png": ("cat", "validation"),
        "val/dog/1.png": ("dog", "validation"),
    }


def test_hidden_and_system_files_are_skipped(tmp_path):
    draw(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", ".git/b.png", "x/@eaDir/a.png")
    (tmp_path / "__MACOSX" / "metadata.csv").write_text("nothing")
    records, lines = read(tmp_path)
    assert list(records) == ["a.png"]
    assert lines == ["captions: 0 of 1, from no file; measured colours are used instead"]


def test_what_pillow_opens_is_used_and_the_rest_is_counted(tmp_path):
    names = [f"a{suffix}" for suffix in (".tif", ".jfif", ".avif", ".tga", ".png")]
    draw(tmp_path, *names)
    for name in ("a.heic", "b.heic", "c.svg", "d.mp4", "e.eps", "notes.md"):
        (tmp_path / name).write_bytes(b"?")
    records, lines = read(tmp_path)
    assert sorted(records) == sorted(names)
    for record in records.values():
        assert read_image(picture_bytes(record)).shape == (8, 8, 4)
    assert lines[1].startswith("not used: 2 .heic, 1 ")
    assert all(suffix in lines[1] for suffix in (".svg", ".mp4", ".eps"))
    assert ".md" not in lines[1]


# ---------------------------------------------------------------------------------------------------- names of files


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("sub\\a.png", "sub/a.png"),
        ("./a.png", "a.png"),
        ("\u00e9.png", "e\u0301.png"),  # one sign in the table, two in the folder
        ("e\u0301.png", "\u00e9.png"),
        ("A.PNG", "a.png"),
    ],
)
def test_a_file_is_found_under_the_name_that_another_system_gave_it(tmp_path, listed, there):
    draw(tmp_path, there)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": listed, "text": "a cat"}), encoding="utf-8")
    (record,) = read_records(tmp_path)
    assert read_image(picture_bytes(record)).shape == (8, 8, 4)
    assert record.captions == ("a cat",)


def test_a_split_does_not_depend_on_how_a_system_writes_a_letter(tmp_path):
    splits = {}
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, f"é{number}.png") for number in range(60)]
        draw(tmp_path / form, *names)
        splits[form] = {unicodedata.normalize("NFC", r.file_name): split_of(r) for r in read_records(tmp_path / form)}
    assert splits["NFC"] == splits["NFD"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that are not UTF-8")
def test_a_name_that_is_not_utf8_is_told(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    os.rename(tmp_path / "b.png", os.fsencode(tmp_path) + b"/dr\xe9.png")
    records, lines = read(tmp_path)
    assert list(records) == ["a.png"]
    assert lines[1] == r"not used: dr\xe9.png (the name is not UTF-8: rename it)"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_a_path_elsewhere_is_told(tmp_path):
    draw(tmp_path, "a.png", "back\\slash.png", "Type: Null.png")
    records, lines = read(tmp_path)
    assert list(records) == ["a.png"]
    reason = r"a name with \ or :, a path on other systems: rename it"
    assert lines[1] == rf"not used: Type: Null.png, back\slash.png ({reason})"


def test_drawings_of_our_own_are_told_and_not_used(tmp_path):
    draw(tmp_path, "a.png", "model/0000.png", "model/large/0000.png", "other/b.png")
    facts = {"settings": {}, "pictures": [{"file": "0000.png"}], "files": ["0000.png"]}
    (tmp_path / "model" / "sample.json").write_text(json.dumps(facts))
    (tmp_path / "other" / "sample.json").write_text("[]")
    records, lines = read(tmp_path)
    assert list(records) == ["a.png", "other/b.png"]
    assert lines[1] == "not used: model (drawings of pokediff: give that folder, too)"
    assert "0000.png" in read(tmp_path / "model")[0]


def test_a_link_to_a_folder_is_told_and_not_followed(tmp_path):
    draw(tmp_path / "else", "b.png")
    draw(tmp_path / "set", "a.png")
    try:
        (tmp_path / "set" / "more").symlink_to(tmp_path / "else")
    except OSError:
        pytest.skip("no links here")
    records, lines = read(tmp_path / "set")
    assert list(records) == ["a.png"]
    assert lines[1] == "not used: more (a link to a folder: give that folder, too)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("дракон_03", "дракон"),
        ("火龙0", "火龙"),
        ("龍", "龍"),
        ("कुत्ता_1", "कुत्ता"),
        ("e\u0301toile", "\u00e9toile"),
        ("FireDragon", "fire dragon"),
        ("IMG_1234", ""),
        ("ab", ""),
    ],
)
def test_words_of_any_script(name, words):
    assert layouts.words_of(name) == words


def test_a_folder_of_nothing_but_test_pictures_is_split_like_any_other(tmp_path):
    draw(tmp_path, *(f"test/{number}.png" for number in range(60)))
    splits = {split_of(record) for record in read_records(tmp_path)}
    assert splits == {"train", "validation", "test"}


# -------------------------------------------------------------------------------------------------------- parquet


def red(level: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGBA", (8, 8), (level, 0, 0, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_as_datasets_writes_it(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    draw(tmp_path / "data", "beside.png")
    beside = (tmp_path / "data" / "beside.png").read_bytes()
    (tmp_path / "data" / "beside.png").unlink()
    for part in range(2):
        images = [{"bytes": red(10 * part + k), "path": f"{k}.png"} for k in range(7)]
        table = pyarrow.table({"image": images, "text": [f"picture {part} {k}" for k in range(7)]})
        parquet.write_table(table, tmp_path / "data" / f"train-{part}.parquet", row_group_size=3)
    records, lines = read(tmp_path)
    assert len(records) == 14
    assert lines == ["captions: 14 of 14, from data/train-0.parquet, data/train-1.parquet"]
    for part, k in ((1, 6), (0, 2), (0, 3), (1, 0)):
        record = records[f"data/train-{part}.parquet#{k}"]
        assert record.captions == (f"picture {part} {k}",)
        assert read_image(picture_bytes(record))[0, 0].tolist() == [10 * part + k, 0, 0, 255]
    (tmp_path / "data" / "beside.png").write_bytes(beside)
    table = pyarrow.table({"file_name": ["beside.png"], "text": ["a table without pictures"]})
    parquet.write_table(table, tmp_path / "data" / "metadata.parquet")
    records, _ = read(tmp_path)
    assert records["data/beside.png"].captions == ("a table without pictures",)
    assert picture_bytes(records["data/beside.png"]) == beside


def test_parquet_of_several_splits_with_a_picture_beside_it(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    draw(tmp_path, "preview.png")
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        table = pyarrow.table({"image": [{"bytes": red(1), "path": "1.png"}], "text": [split]})
        parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001-1f2e.parquet")
    records, lines = read(tmp_path)
    assert [record.split for record in records.values()] == ["train", "validation"]
    assert lines[0].startswith("captions: 2 of 2, from data/train-00000-of-00001-1f2e.parquet, data/validation-")
    assert lines[1].startswith("not used: 1 picture not in")


def test_a_file_that_is_no_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_bytes(encode_png(read_image(red(1))))
    with pytest.raises(PokediffError, match=r"train\.parquet is not a parquet file"):
        read_records(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(PokediffError, match=r'pip install "pokediff\[parquet\]"'):
        read_records(tmp_path)
