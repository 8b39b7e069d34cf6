"""Prompts from a CSV file: files named by it, and a second run that draws only what is missing."""

from __future__ import annotations

import csv

import pytest

from pokediff import cli
from pokediff.config import SampleConfig
from pokediff.data.images import read_image
from pokediff.drawing.table import read_table
from pokediff.errors import PokediffError

TABLE = """name,prompt,seed,number
slime,a green slime,7,
dragon,"a red dragon, one eye",,2
,a blue bird,3,1
"""


@pytest.fixture
def run(tmp_path, tiny_checkpoint, capsys):
    """Draw a table, and return what was printed last."""

    def draw(text: str, *words: str) -> str:
        (tmp_path / "prompts.csv").write_text(text, encoding="utf-8")
        given = ["sample", "--prompts-file", str(tmp_path / "prompts.csv"), "--checkpoint", str(tiny_checkpoint)]
        cli.main([*given, "--out", str(tmp_path / "out"), "--size", "32", "--steps", "2", *words])
        return capsys.readouterr().out.strip().splitlines()[-1].partition(":")[0]

    return draw


def manifest(out):
    with (out / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_files_are_named_by_the_table_and_only_the_missing_ones_are_drawn(run, tmp_path):
    out = tmp_path / "out"
    assert run(TABLE) == "4 pictures drawn, 0 were there"
    files = ["slime.png", "dragon-1.png", "dragon-2.png", "a-blue-bird.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "manifest.csv"])
    first = manifest(out)
    assert list(first) == files
    assert (first["slime.png"]["seed"], first["a-blue-bird.png"]["seed"]) == ("7", "3")
    before = {file: (out / file).read_bytes() for file in files}
    assert run(TABLE) == "0 pictures drawn, 4 were there"

    (out / "dragon-2.png").unlink()
    assert run(TABLE) == "1 picture drawn, 3 were there"
    assert manifest(out) == first  # random seeds are kept, so the pictures are the same
    assert {file: (out / file).read_bytes() for file in files} == before

    assert run(TABLE.replace("green", "yellow") + "new,a cat,1,\n") == "2 pictures drawn, 3 were there"
    assert (out / "slime.png").read_bytes() != before["slime.png"]
    assert run(TABLE, "--enlarge", "2") == "4 pictures drawn, 0 were there"  # other settings
    assert read_image((out / "slime.png").read_bytes()).shape == (64, 64, 4)
    assert "new.png" in manifest(out)  # nothing is deleted


def test_seeds_count_from_the_option(run, tmp_path):
    run("prompt\na cat\na dog\n", "--seed", "5", "-n", "2")
    assert [row["seed"] for row in manifest(tmp_path / "out").values()] == ["5", "6", "7", "8"]


def test_foreign_files_are_left_alone(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slime.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        run(TABLE)
    assert "holds other files (slime.png)" in capsys.readouterr().err
    (tmp_path / "out" / "manifest.csv").write_text("file,prompt,seed,settings\n")
    with pytest.raises(SystemExit):
        run(TABLE)
    assert "slime.png exists and is not in manifest.csv" in capsys.readouterr().err
    assert (tmp_path / "out" / "slime.png").read_bytes() == b"mine"
    (tmp_path / "out" / "manifest.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        run(TABLE)
    assert "was not written by an earlier drawing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,text\na,b\n", "must have a column prompt"),
        ("name,prompt\n../x,a cat\n", "cannot be the name of a file"),
        ("name,prompt\n.x,a cat\n", "cannot be the name of a file"),
        ("name,prompt\nx,a cat, red\n", "more values than columns"),
        ("prompt,seed\na cat,one\n", "must be a whole number"),
        ("prompt,number\na cat,0\n", "at least 1"),
        ("prompt\n\n", "holds no prompts"),
        ("prompt\na cat\nA cat!\n", "two pictures would be a-cat.png"),
        ("name,prompt,number\nx,a cat,2\nX-1,a dog,\n", "two pictures would be x-1.png"),
    ],
)
def test_tables_that_cannot_be_drawn(text, message, tmp_path):
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(PokediffError, match=message):
        read_table(SampleConfig(prompts_file=str(tmp_path / "prompts.csv")))


def test_what_a_table_excludes(tmp_path):
    file = str(tmp_path / "prompts.tsv")
    with pytest.raises(PokediffError, match="exclude other prompts"):
        read_table(SampleConfig(prompts_file=file, prompt=("a cat",)))
    with pytest.raises(PokediffError, match="exclude save_frames, sheet"):
        read_table(SampleConfig(prompts_file=file, save_frames=2, sheet=("tiled",)))
    with pytest.raises(PokediffError, match="not found"):
        read_table(SampleConfig(prompts_file=file))
    (tmp_path / "prompts.tsv").write_text("Name;Prompt\nкіт;a cat; \n".replace("; \n", "\n"), encoding="utf-8")
    (row,) = read_table(SampleConfig(prompts_file=file))
    assert row.files == ["кіт.png"]
