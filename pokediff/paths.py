"""Where the files that come with pokediff lie: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pokediff.errors import PokediffError

PACKAGE = Path(__file__).resolve().parent


def shipped(kind: Literal["checkpoints", "configs"], name: str = "") -> Path:
    """The path of a file or folder that comes with pokediff, whether or not it exists: shipped("configs", "x.yaml").

    setup.cfg maps checkpoints/ and configs/ of the repository into the package; an editable install reads them there.
    """
    inside = PACKAGE / kind
    return (inside if inside.is_dir() else PACKAGE.parent / kind) / name


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint: `name` itself if it is a folder, else the shipped checkpoint of that name.

    Raises PokediffError when there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    known = {index.parent.name: index.parent for index in sorted(shipped("checkpoints").glob("*/model_index.json"))}
    if str(name) in known:
        return known[str(name)]
    raise PokediffError(f"no checkpoint {name}: give a folder, or one of {', '.join(known) or 'none shipped'}")
