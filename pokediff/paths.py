"""Paths of the shipped files: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).resolve().parent


def shipped(kind: Literal["checkpoints", "configs", "web"], name: str = "") -> Path:
    """The path of a shipped file or folder, which need not exist: shipped("configs", "x.yaml").

    setup.cfg maps checkpoints/, configs/ and web/ of the repository into the package; an editable install reads them
    there.
    """
    inside = PACKAGE / kind
    return (inside if inside.is_dir() else PACKAGE.parent / kind) / name
