from __future__ import annotations

import json
from collections import Counter

import pytest

from pokediff.data.records import Record, read_records, split_of, with_full_splits, write_records
from pokediff.errors import PokediffError
from pokediff.files import write_whole


def write_rows(folder, *rows) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_what_is_written_is_read(tmp_path):
    records = [
        Record("images/1.png", name="Flabébé", dex=669, types=("fairy",), descriptions=("It floats.",)),
        Record("images/2.png", captions=("a blue turtle", "a turtle"), shiny=True),
    ]
    write_records(tmp_path, records)
    assert read_records(tmp_path) == records
    first = json.loads((tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert next(iter(first)) == "file_name"  # Hugging Face ImageFolder
    assert first["name"] == "Flabébé"


def test_blank_captions_are_none(tmp_path):
    write_rows(tmp_path, {"file_name": "a.png", "captions": ["", " a cat "]}, {"file_name": "b.png", "text": " "})
    assert [record.captions for record in read_records(tmp_path)] == [("a cat",), ()]


def test_text_is_a_caption_and_unknown_columns_are_left_alone(tmp_path):
    write_rows(tmp_path, {"file_name": "a.png", "text": "a red dragon", "artist": "me", "habitat": None})
    assert read_records(tmp_path) == [Record("a.png", captions=("a red dragon",))]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"name": "x"}, "file_name"),
        ({"file_name": "a.png", "dex": "many"}, "dex"),
        ({"file_name": "../a.png"}, "inside the folder"),
        ({"file_name": "/etc/a.png"}, "inside the folder"),
        ({"file_name": "a\\..\\..\\b.png"}, "inside the folder"),
        ({"file_name": "C:\\a.png"}, "inside the folder"),
        ("{not json", "not JSON"),
        ("[1, 2]", "JSON object"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, words):
    write_rows(tmp_path, {"file_name": "good.png"}, row)
    with pytest.raises(PokediffError, match=words) as error:
        read_records(tmp_path)
    assert "metadata.jsonl:2" in str(error.value)


def test_no_rows_and_rows_twice_are_errors(tmp_path):
    with pytest.raises(PokediffError, match="neither a metadata"):
        read_records(tmp_path)
    write_rows(tmp_path, "")
    with pytest.raises(PokediffError, match="empty"):
        read_records(tmp_path)
    write_rows(tmp_path, {"file_name": "a.png"}, {"file_name": "a.png"})
    with pytest.raises(PokediffError, match="is listed twice"):
        read_records(tmp_path)


def test_the_split_goes_by_family_and_stays_when_data_is_added():
    assert len({split_of(Record(f"{i}.png", family=5, name=str(i))) for i in range(50)}) == 1
    # Written down once: a change of the hash would leak test families into training.
    expected = {1: "train", 25: "train", 46: "validation", 50: "validation", 9: "test", 39: "test"}
    assert {family: split_of(Record("a.png", family=family)) for family in expected} == expected
    splits = [split_of(Record(f"{i}.png", family=i)) for i in range(4000)]
    assert 0.08 < splits.count("test") / 4000 < 0.12
    assert 0.035 < splits.count("validation") / 4000 < 0.065


def test_a_small_set_has_validation_and_test_pictures():
    """60 files 0.jpg .. 59.jpg: the hash alone may give none."""
    for seed in range(20):
        names = [f"{seed}/{index}.jpg" for index in range(200)]
        held_out: set[str] = set()
        known: set[str] = set()
        for number in (60, 61, 75, 120, 200):
            splits = {r.file_name: split_of(r) for r in with_full_splits([Record(name) for name in names[:number]])}
            count = Counter(splits.values())
            assert count["validation"] >= 3
            assert count["test"] >= 3
            assert count["train"] >= 0.6 * number
            now = {name for name, split in splits.items() if split != "train"}
            assert now - held_out <= splits.keys() - known  # added data moves no picture out of training
            held_out, known = now, set(splits)


def test_a_large_set_keeps_its_splits_and_one_family_is_not_torn():
    large = [Record(f"{index}.png", family=index) for index in range(1000)]
    assert with_full_splits(large) == large
    one = [Record(f"{index}.png", family=1) for index in range(100)]
    assert with_full_splits(one) == one  # no family is cut, and most of the set must stay for training


def test_the_split_of_a_row_is_obeyed(tmp_path):
    write_rows(tmp_path, {"file_name": "a.png", "split": "dev"}, {"file_name": "b.png", "split": "fold 3"})
    a, b = read_records(tmp_path)
    assert (a.split, b.split) == ("validation", None)


def test_the_text_of_a_scraped_row_repeats_its_captions(tmp_path):
    record = Record("a.png", dex=1, name="Seedy", colors=("green",), retrieved_at="2026-01-01T00:00:00+00:00")
    write_records(tmp_path, [record], ["a green creature"])
    assert json.loads((tmp_path / "metadata.jsonl").read_text())["text"] == "a green creature"
    assert read_records(tmp_path) == [record]
    write_rows(tmp_path, {"file_name": "a.png", "dex": 1, "colors": ["green"], "text": "by a person"})
    assert read_records(tmp_path)[0].captions == ("by a person",)


def test_without_a_family_the_species_is_kept_together():
    assert Record("a.png", dex=7).family_key == Record("b.png", dex=7, form="mega").family_key
    assert Record("a.png").family_key == "a.png"


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_whole(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
