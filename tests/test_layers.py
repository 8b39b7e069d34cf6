"""The directions of imports that pyproject.toml declares, and no pickle."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT
from importlinter import cli

SOURCES = sorted(
    path for folder in ("pokediff", "scraper", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")
)
UNPICKLING = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


def test_imports_go_one_way(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    code = cli.lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert code == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def unpickles(source: str) -> list[str]:
    """What in this source can run code out of a data file: pickle and its like, torch.load, NumPy with allow_pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNPICKLING]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNPICKLING:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle_is_loaded(path):
    assert unpickles(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "np.load('x', allow_pickle=True)",
        "import joblib",
    ],
)
def test_the_search_for_pickles_finds_them(source):
    assert unpickles(source)
