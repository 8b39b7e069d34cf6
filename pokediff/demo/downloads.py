"""The files that a page offers for download, named by prompt and seed, one folder per drawing."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pokediff.config import SampleConfig
from pokediff.data.images import can_write_mp4, composite, encode_png, enlarge
from pokediff.drawing.atlas import atlas_files, seed_of, unique_names
from pokediff.drawing.jobs import Job, make_jobs, slug
from pokediff.drawing.sample import Model
from pokediff.drawing.sheets import FACTS, Frame, write_drawing
from pokediff.files import read_json, write_whole
from pokediff.paths import shipped

KEEP_MINUTES = 60
LABELLED_SIDE, LABEL_HEIGHT, LABEL_LINES = 160, 40, 3  # px, px and lines of a picture on the sheet of a ZIP


class Downloads:
    """Writes drawings below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.animations: tuple[Literal["gif", "mp4"], ...] = ("gif", "mp4") if can_write_mp4() else ("gif",)

    def new_folder(self) -> Path:
        """An empty folder with an unguessable name. Folders older than KEEP_MINUTES are deleted."""
        for old in self.folder.glob("drawing-*"):
            with suppress(FileNotFoundError):  # another request deleted it
                if old.stat().st_mtime < time.time() - 60 * KEEP_MINUTES:
                    shutil.rmtree(old, ignore_errors=True)
        out = self.folder / f"drawing-{secrets.token_urlsafe(12)}"
        out.mkdir(parents=True)
        return out

    def write(
        self,
        pipeline: Model,
        config: SampleConfig,
        frames: Sequence[Frame],
        jobs: Sequence[Job] | None = None,
    ) -> list[Path]:
        """The files of a drawing: what `sample` writes, the enlarged copies excepted, by names that tell drawings
        apart; a sprite sheet as a ZIP, for its files name each other. Returns the settings, a sample.json, last.
        """
        *files, facts = self._write(pipeline, config, frames, jobs)
        sheet = [path for path in files if path.name in atlas_files(config)]
        if sheet:
            archive = facts.with_name(f"{facts.stem}-sheet.zip")
            pack(archive, sheet)
            files = [archive, *(path for path in files if path not in sheet)]
        return [*files, facts]

    def write_zip(self, pipeline: Model, config: SampleConfig, jobs: Sequence[Job], pictures: np.ndarray) -> Path:
        """One ZIP of finished pictures (N, S, S, 4), a labelled sheet, and a sample.json with the prompt of each."""
        files = self._write(pipeline, config, [Frame(pictures, pictures, 0.0)], jobs)
        more = f"-and-{len(jobs) - 1}-more" if len(jobs) > 1 else ""
        archive = files[-1].with_name(f"{files[-1].stem}{more}.zip")
        labelled = encode_png(labelled_sheet(pictures, [job.prompt for job in jobs]))
        pack(archive, [path for path in files if not path.stem.endswith("-all")], {"labelled.png": labelled})
        return archive

    def write_interpolation(
        self, pipeline: Model, config: SampleConfig, jobs: Sequence[Job], pictures: np.ndarray
    ) -> tuple[Path, Path]:
        """As `write_zip`, and the animation."""
        archive = self.write_zip(pipeline, config, jobs, pictures)
        return archive, next(archive.parent.glob("*-interpolation.gif"))

    def _write(
        self, pipeline: Model, config: SampleConfig, frames: Sequence[Frame], jobs: Sequence[Job] | None
    ) -> list[Path]:
        out, jobs = self.new_folder(), make_jobs(config.prompt, config) if jobs is None else jobs
        animations = self.animations if len(frames) > 1 else ()
        config = dataclasses.replace(config, animations=animations)
        if config.sheet:  # tools want sprites of their own size
            config = dataclasses.replace(config, enlarge=1)
        name = Path(config.checkpoint or "").name
        if config.checkpoint == str(shipped("checkpoints", name).resolve()):
            config = dataclasses.replace(config, checkpoint=name)  # its name, which every machine resolves
        write_drawing(out, config, pipeline, jobs, [(frames[-1].x0, frames)])
        return rename(out, jobs)

    def write_picture(self, rgba: np.ndarray, name: str, factor: int = 1) -> Path:
        """One picture, straight RGBA uint8 (S, S, 4), enlarged, as NAME.png."""
        path = self.new_folder() / f"{name}.png"
        write_whole(path, encode_png(enlarge(rgba, factor)))
        return path

    def keep_input(self, picture: np.ndarray, mask: np.ndarray | None = None) -> dict[str, str]:
        """Write what img2img or inpainting starts from: straight RGBA uint8 (H, W, 4), and bool (H, W). Returns the
        paths by their names in `SampleConfig`.
        """
        out = self.new_folder()
        write_whole(out / "image.png", encode_png(picture))
        if mask is None:
            return {"image": str(out / "image.png")}
        write_whole(out / "mask.png", encode_png(np.where(mask, 255, 0).astype(np.uint8)))
        return {"image": str(out / "image.png"), "mask": str(out / "mask.png")}


def name_of(job: Job) -> str:
    """A name for the files of a picture: the words of its prompt, and its seed."""
    return f"{slug(job.nearest_prompt)}-{seed_of(job)}"


def rename(out: Path, jobs: Sequence[Job]) -> list[Path]:
    """Give the files of a drawing in `out` names by prompt and seed, in its sample.json too; the sprite sheet keeps its
    own. Returns them, sample.json last, without the enlarged copies and the sheet of a single picture.
    """
    names = unique_names([name_of(job) for job in jobs])
    first, content = names[0], read_json(out / FACTS)
    renamed = {name: name for name in content["files"] if "/" not in name}  # all but the enlarged copies
    renamed |= {f"{index:04}.png": f"{name}.png" for index, name in enumerate(names)}
    renamed |= {f"denoising.{kind}": f"{first}.{kind}" for kind in ("gif", "mp4")}
    renamed |= {"interpolation.gif": f"{first}-interpolation.gif", "grid.png": f"{first}-all.png"}
    renamed |= {f"{kind}.png": f"{first}-{kind}.png" for kind in ("image", "mask")} | {FACTS: f"{first}.json"}
    found = [name for name in renamed if (out / name).is_file() and (name != "grid.png" or len(jobs) > 1)]
    for name in found:
        (out / name).replace(out / renamed[name])
    for row in content["pictures"]:
        row["file"] = renamed[row["file"]]
    for kind in ("image", "mask"):
        if name := content["settings"].get(kind):
            content["settings"][kind] = renamed[name]
    content["files"] = sorted((renamed[name] for name in found), key=lambda name: (name == renamed[FACTS], name))
    write_whole(out / renamed[FACTS], json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return [out / name for name in content["files"]]


def pack(archive: Path, files: Sequence[Path], others: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """A ZIP of files, and of `others` by name."""
    with zipfile.ZipFile(archive, "w") as bundle:
        for path in files:
            bundle.write(path, path.name)
        for name, data in others.items():
            bundle.writestr(name, data)


def labelled_sheet(pictures: np.ndarray, labels: Sequence[str], columns: int = 4) -> np.ndarray:
    """Pictures (N, S, S, 4) on white, each above its label, RGB uint8 (H, W, 3)."""
    width, height = LABELLED_SIDE + 8, LABELLED_SIDE + LABEL_HEIGHT + 8
    factor = max(1, LABELLED_SIDE // pictures.shape[1])
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = index % columns * width + 4, index // columns * height + 4
        shown = composite(enlarge(picture, factor))
        sheet.paste(Image.fromarray(shown), (left + (LABELLED_SIDE - shown.shape[1]) // 2, top))
        text = wrapped(label, font, LABELLED_SIDE)
        canvas.multiline_text((left, top + LABELLED_SIDE + 2), text, fill="black", font=font, spacing=2)
    return np.asarray(sheet)


def wrapped(text: str, font: Any, width: int) -> str:
    """`text` in at most LABEL_LINES lines of at most `width` px."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], f"{lines[LABEL_LINES - 1]} …"]
    return "\n".join(lines)
