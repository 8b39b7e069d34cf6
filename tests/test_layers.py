"""Imports go one way: this is the order of the house (docs/architecture.md)."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

LAYERS = [  # rooms; inside a room modules may import each other, without a circle
    {"errors", "config"},
    {"data", "model"},
    {"drawing", "training", "evaluation"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in (ROOT / "pokediff").rglob("*.py") if not path.stem.startswith("__"))


def name_of(path) -> str:
    """ "evaluation.report" for pokediff/evaluation/report.py."""
    return ".".join(path.relative_to(ROOT / "pokediff").with_suffix("").parts)


def imports_of(path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_below(path):
    mine = name_of(path)
    assert mine in LEVEL, "say in LAYERS where the new module stands"
    for name in imports_of(path):
        match = re.match(r"pokediff\.((?:evaluation\.|demo\.)?\w+)", name)
        if match and match[1] in LEVEL:
            assert LEVEL[match[1]] < LEVEL[mine], f"{mine} imports {match[1]}"


def test_the_scraper_stands_alone():
    for path in (ROOT / "scraper").glob("*.py"):
        ours = {name for name in imports_of(path, top_level_only=True) if name.startswith("pokediff")}
        assert all(re.match(r"pokediff\.(records|errors)\b", name) for name in ours), path.name
    assert not any(name.startswith("pokediff") for name in imports_of(ROOT / "scraper" / "client.py"))


def test_no_pickle_is_loaded():
    for path in [*MODULES, *(ROOT / "scraper").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load\(|import pickle|pickle\.load|allow_pickle=True", text), path.name
