"""draw_table(config): the prompts of a CSV file to pictures that are named by it; what is there is not drawn again.

    name,prompt,seed,number
    slime,a green slime,7,
    dragon,"a red dragon, one eye",,4        # dragon-1.png to dragon-4.png

Only `prompt` is required. OUT/manifest.csv lists every picture with its prompt, seed and the digest of its settings; a
picture is drawn again when one of them has changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokediff.config import SampleConfig
from pokediff.data.images import encode_png, enlarge
from pokediff.drawing.jobs import MAX_SEED, Job, slug
from pokediff.drawing.sheets import Frame, on_background
from pokediff.errors import PokediffError
from pokediff.files import own_folder, read_csv, read_text, require_file, write_whole
from pokediff.training.launch import join

MANIFEST = "manifest.csv"
COLUMNS = ("file", "prompt", "seed", "settings")
NOT_HERE = ("image", "mask", "variation", "interpolate", "save_frames", "sheet")
SETTINGS = ("sampling", "palette", "hard_alpha", "clean", "raw", "enlarge", "background")  # that change a picture


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    prompt: str
    seed: int | None
    number: int

    @property
    def files(self) -> list[str]:
        if self.number == 1:
            return [f"{self.name}.png"]
        return [f"{self.name}-{k}.png" for k in range(1, self.number + 1)]


def is_table(config: SampleConfig) -> bool:
    return Path(config.prompts_file or "").suffix.lower() in (".csv", ".tsv")


def draw_table(
    config: SampleConfig, out: Path, facts: dict[str, Any], draw: Callable[[Sequence[Job]], Frame]
) -> tuple[int, int]:
    """Draw what OUT does not hold yet, by all processes together, after its entries in the manifest. Returns the
    numbers of pictures that were drawn and that were there.

    Args:
        config: its settings, resolved.
        facts: what else identifies the drawings, such as the sha256 of the weights.
        draw: the last frame of a batch of jobs.

    Raises PokediffError for a table that cannot be read, and rather than overwrite a file that is not in the manifest.
    """
    from accelerate.utils import broadcast_object_list

    state = join()
    with own_folder(out, MANIFEST) if state.is_main_process else nullcontext():
        found = list_missing(config, out, facts) if state.is_main_process else ([], 0)
        missing, there = broadcast_object_list([found])[0]
        batches = [missing[start : start + config.batch_size] for start in range(0, len(missing), config.batch_size)]
        for batch in batches[state.process_index :: state.num_processes]:
            last = draw([Job(entry["prompt"], int(entry["seed"])) for entry in batch])
            for entry, picture, job in zip(batch, last.x0, last.jobs, strict=True):
                shown = on_background(enlarge(picture, config.enlarge), config)
                write_whole(out / entry["file"], encode_png(shown, job.facts()))
        state.wait_for_everyone()
    return len(missing), there


def list_missing(config: SampleConfig, out: Path, facts: dict[str, Any]) -> tuple[list[dict[str, str]], int]:
    """The entries of the pictures to draw, which are in the manifest from now on, and the number of those that are
    there. Pictures of earlier settings are removed: what is in the manifest and is there counts as drawn.
    """
    rows, known = read_table(config), read_manifest(out / MANIFEST)
    chosen = {name: value for name, value in vars(config).items() if name in SETTINGS}
    settings = hashlib.sha256(json.dumps([chosen, facts], default=vars, sort_keys=True).encode()).hexdigest()[:16]
    wanted = list(pictures_of(rows, known, config, settings))
    done = {entry["file"] for entry in wanted if known.get(entry["file"]) == entry and (out / entry["file"]).is_file()}
    missing = [entry for entry in wanted if entry["file"] not in done]
    if foreign := [entry["file"] for entry in missing if entry["file"] not in known and (out / entry["file"]).exists()]:
        raise PokediffError(f"{out / foreign[0]} exists and is not in {MANIFEST}: choose another --out")
    for entry in missing:
        (out / entry["file"]).unlink(missing_ok=True)
        known[entry["file"]] = entry
    if missing:
        write_manifest(out / MANIFEST, known)  # first, since it marks the pictures as ours
    return missing, len(done)


def pictures_of(
    rows: Sequence[Row], known: dict[str, dict[str, str]], config: SampleConfig, settings: str
) -> Iterator[dict[str, str]]:
    """The entry of every picture: the seed of its row, that of the manifest, the next one after `config.seed`, or a
    random one.
    """
    chance, index = random.SystemRandom(), 0
    for row in rows:
        for k, file in enumerate(row.files):
            earlier = known.get(file, {})
            if row.seed is not None:
                seed = row.seed + k
            elif earlier.get("prompt") == row.prompt:
                seed = int(earlier["seed"])
            else:
                seed = chance.randint(0, MAX_SEED) if config.seed is None else config.seed + index
            index += 1
            yield dict(zip(COLUMNS, (file, row.prompt, str(seed), settings), strict=True))


def read_table(config: SampleConfig) -> list[Row]:
    """The rows of `config.prompts_file`. Raises PokediffError with the line that is wrong."""
    if given := [name for name in NOT_HERE if getattr(config, name)]:
        raise PokediffError(f"prompts from a table exclude {', '.join(given)}")
    if config.prompt:
        raise PokediffError("prompts from a table exclude other prompts")
    path = Path(str(config.prompts_file))
    require_file(path, "prompts file")
    found = [(where, cells) for where, cells in read_csv(path, "prompt") if cells.get("prompt")]
    rows = [_row(cells, config.num_images_per_prompt, where) for where, cells in found]
    if not rows:
        raise PokediffError(f"{path} holds no prompts")
    files = [file.lower() for row in rows for file in row.files]  # some file systems do not tell letter case apart
    if twice := [file for file in dict.fromkeys(files) if files.count(file) > 1]:
        raise PokediffError(f"{path}: two pictures would be {twice[0]}: give each prompt a name of its own")
    return rows


def _row(cells: dict[str, str], number: int, where: str) -> Row:
    name = cells.get("name") or slug(cells["prompt"])
    if name[0] == "." or set(name) & set('/\\:*?"<>|') or not name.isprintable():
        raise PokediffError(f"{where}: {name!r} cannot be the name of a file")
    for key in ("seed", "number"):
        value = cells.get(key, "")
        if value and not (value.isdecimal() and len(value) < 19):
            raise PokediffError(f"{where}: {key} {value!r} must be a whole number")
    number = int(cells.get("number") or number)
    if number < 1:
        raise PokediffError(f"{where}: number must be at least 1")
    return Row(name, cells["prompt"], int(cells["seed"]) if cells.get("seed") else None, number)


def read_manifest(path: Path) -> dict[str, dict[str, str]]:
    """The entries of a manifest by file; {} without one. Raises PokediffError for another table of that name."""
    if not path.is_file():
        return {}
    table = csv.DictReader(io.StringIO(read_text(path)))
    try:
        entries = list(table)
    except csv.Error as error:
        raise PokediffError(f"{path} is not CSV ({error}): choose another --out") from None
    whole = all(None not in entry and None not in entry.values() for entry in entries)
    if tuple(table.fieldnames or ()) != COLUMNS or not whole:
        raise PokediffError(f"{path} was not written by an earlier drawing: choose another --out")
    return {entry["file"]: entry for entry in entries}


def write_manifest(path: Path, entries: dict[str, dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries.values())
    write_whole(path, text.getvalue())
