"""Reading of text, JSON and tables; atomic writing; folders that are ours alone."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys

import pytest

from pokediff import files
from pokediff.errors import PokediffError, one_line_errors
from pokediff.files import (
    aside,
    move_whole,
    own_folder,
    read_csv,
    read_json,
    read_log,
    read_rows,
    read_text,
    write_whole,
)

# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_text_of_every_encoding_that_says_what_it_is(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / "a").write_bytes(f"{mark}é\r\nü\rx\n".encode(encoding))
    assert read_text(tmp_path / "a") == "é\nü\nx\n"


def test_other_text_is_named(tmp_path):
    (tmp_path / "a").write_bytes("é".encode("cp1252"))
    with pytest.raises(PokediffError, match="a is not UTF-8 text: save it as UTF-8"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "where"),
    [("{", ":1: not JSON"), ("{\n\n]", ":3: not JSON"), ("[" * 100_000, ":1: not JSON"), ("9" * 5000, ":1: not JSON")],
)
def test_what_is_no_json_is_named_with_its_line(tmp_path, text, where):
    (tmp_path / "a").write_text(text)
    with pytest.raises(PokediffError, match=where):
        read_json(tmp_path / "a")


def test_rows(tmp_path):
    (tmp_path / "a").write_text('\ufeff{"a": 1}\r\n\r\n{"b": 2}', encoding="utf-8")
    assert [row for _, row in read_rows(tmp_path / "a")] == [{"a": 1}, {"b": 2}]
    (tmp_path / "a").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(PokediffError, match=":2: a row must be a JSON object"):
        list(read_rows(tmp_path / "a"))


def test_a_log_that_was_cut_keeps_its_whole_rows(tmp_path):
    (tmp_path / "a").write_bytes('{"a": "é"}\n3\n{"b": 2}\n{"c": "é'.encode()[:-1])
    assert read_log(tmp_path / "a") == [{"a": "é"}, {"b": 2}]
    assert read_log(tmp_path / "none") == []


def test_tables(tmp_path):
    (tmp_path / "a").write_text('\ufeffName ; Prompt\r\nx;"a; b"\r\n;c\r\n', encoding="utf-8")
    assert [row for _, row in read_csv(tmp_path / "a", "prompt")] == [{"name": "x", "prompt": "a; b"}, {"prompt": "c"}]
    for text, words in (("a,b\n", ":1: the header must have a column prompt"), ("prompt\na,b\n", ":2: more values")):
        (tmp_path / "a").write_text(text)
        with pytest.raises(PokediffError, match=words):
            list(read_csv(tmp_path / "a", "prompt"))
    (tmp_path / "a").write_text('prompt\n"' + "x" * 200_000)
    with pytest.raises(PokediffError, match="not CSV"):
        list(read_csv(tmp_path / "a", "prompt"))


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, capsys, step):
    write_whole(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(SystemExit) as exit, one_line_errors():
        write_whole(tmp_path / "a", "new")
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'a'}: No space left on device: make space")
    assert error.count("\n") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_full_disk_is_one_line_where_a_folder_is_copied(tmp_path, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    with pytest.raises(SystemExit), one_line_errors():
        shutil.copytree(tmp_path / "a", tmp_path / "c", copy_function=full)
    assert re.fullmatch("error: .*No space left on device: make space.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (RuntimeError(f"host:80 [Errno {errno.ECONNREFUSED}] refused\nmore"), "host:80 [Errno N] refused"),
        (RuntimeError(f"Is a directory (os error {errno.EISDIR})"), "disk: Is a directory"),
        (OSError(errno.EIO, "Input/output error"), "disk: Input/output error"),
    ],
)
def test_an_error_that_is_not_of_a_disk_does_not_say_so(capsys, error, line):
    with pytest.raises(SystemExit), one_line_errors():
        raise error
    assert re.sub(r"Errno \d+", "Errno N", capsys.readouterr().err) == f"error: {line}\n"


def test_a_write_ends_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, real=real, name=name: order.append(name) or real(*args))
    write_whole(tmp_path / "a", "x")
    assert order == ["fsync", "replace"]


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_other_files_is_not_written_to(tmp_path):
    (tmp_path / "0000.png").write_text("mine")
    with pytest.raises(PokediffError, match=r"holds other files \(0000.png\)"), own_folder(tmp_path, "run.json"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["0000.png"]


def test_a_new_an_empty_and_an_own_folder_are(tmp_path):
    for name in ("new", "empty", "own"):
        if name != "new":
            (tmp_path / name).mkdir()
        if name == "own":
            (tmp_path / name / "run.json").write_text("{}")
        with own_folder(tmp_path / name, "run.json"):
            (tmp_path / name / "x").write_text("")
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["run.json", "x"]


def test_nothing_stays_of_a_folder_where_nothing_was_written(tmp_path):
    with own_folder(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_output_that_was_cut_while_it_was_moved_is_ours(tmp_path, monkeypatch, number):
    moved, replace = [], os.replace

    def cut(old, new):
        if len(moved) == number:
            raise KeyboardInterrupt
        moved.append(new)
        replace(old, new)

    def write():
        with own_folder(tmp_path, "index", ".new"), aside(tmp_path / ".new", "index") as new:
            (new / "part").mkdir()
            for name in ("part/a", "index"):
                (new / name).touch()
            move_whole(new, tmp_path, last=("index",))

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(files.os, "replace", cut)
        write()
    assert (tmp_path / ".new").exists() == (number < 2)
    write()
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"part", "part/a", "index"}


def test_nothing_stays_of_output_that_failed_before_it_was_moved(tmp_path):
    with pytest.raises(KeyboardInterrupt), own_folder(tmp_path / "out"), aside(tmp_path / "out" / ".new") as new:
        (new / "a").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_lock_names_the_other_process_and_ends_with_it(tmp_path):
    code = f"""
import sys, pathlib
from pokediff.files import own_folder
with own_folder(pathlib.Path({str(tmp_path / "a")!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(PokediffError, match=rf"process {other.pid} .* writes to"), own_folder(tmp_path / "a"):
            pass
    finally:
        other.kill()
        other.communicate()
    with own_folder(tmp_path / "a"):  # it was killed, so it could not tidy up
        pass
    assert list(tmp_path.iterdir()) == []


def test_new_folders_are_numbered(tmp_path):
    names = [files.new_folder(tmp_path / "a").name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]
