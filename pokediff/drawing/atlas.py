"""Sprite sheets for other tools: sheet.png, and the file in which a tool reads where each sprite lies.

| tool | file | what it reads |
| --- | --- | --- |
| aseprite | sheet.aseprite.json | frames with durations, a tag for each sprite (Aseprite's own export, "array") |
| texturepacker | sheet.texturepacker.json | frames by name, animations (TexturePacker's "hash": Phaser, PixiJS) |
| godot | sheet.tres | a SpriteFrames resource of Godot 4, an animation for each sprite |
| tiled | sheet.tsx | a tile set, prompt and seed as properties of a tile, animations |

A sprite is one picture; with `save_frames` it is the animation of its denoising, and an interpolation is one sprite.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from pokediff import __version__
from pokediff.config import SampleConfig
from pokediff.data.images import encode_png, grid, read_image
from pokediff.drawing.jobs import Job, slug
from pokediff.files import write_whole

IMAGE = "sheet.png"
FILES = {
    "aseprite": "sheet.aseprite.json",
    "texturepacker": "sheet.texturepacker.json",
    "godot": "sheet.tres",
    "tiled": "sheet.tsx",
}
GAP = 2  # transparent px between cells, so that an engine that interpolates does not mix neighbours
SECONDS, HOLD_MS = 3.0, 1500  # of an animation of the denoising, and how long its last picture stays
STEP_MS = 125  # of a picture of an interpolation; also the duration of one that stands alone


@dataclass(frozen=True)
class Sprite:
    """One or several frames, straight RGBA uint8 (S, S, 4), and how long each is shown."""

    name: str  # words and hyphens, unique in its sheet
    prompt: str
    seed: int
    frames: tuple[np.ndarray, ...]
    ms: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """A frame on the sheet."""

    sprite: Sprite
    frame: int  # its number within the sprite
    x: int  # px from the left
    y: int  # px from the top
    ms: int

    @property
    def name(self) -> str:
        """Unique: the sprite's, with the frame's number if it has several."""
        return self.sprite.name if len(self.sprite.frames) == 1 else f"{self.sprite.name}-{self.frame:02}"


@dataclass(frozen=True)
class Layout:
    """Cells of equal size, row by row, GAP px apart."""

    cells: tuple[Cell, ...]
    side: int  # px of a cell
    columns: int
    width: int  # px of the whole sheet
    height: int

    @property
    def sprites(self) -> list[tuple[Sprite, list[int]]]:
        """Each sprite with the positions of its cells."""
        found: dict[str, tuple[Sprite, list[int]]] = {}
        for index, cell in enumerate(self.cells):
            found.setdefault(cell.sprite.name, (cell.sprite, []))[1].append(index)
        return list(found.values())


def atlas_files(config: SampleConfig) -> list[str]:
    """The files that `write_atlas` writes."""
    return [IMAGE, *(FILES[tool] for tool in config.sheet)] if config.sheet else []


def write_atlas(out: Path, config: SampleConfig, jobs: Sequence[Job]) -> None:
    """Write the sheet of OUT/0000.png ..., and of their frames in OUT/frames, for the tools of `config`."""
    if not config.sheet:
        return
    pictures = [read_image((out / f"{index:04}.png").read_bytes()) for index in range(len(jobs))]
    sprites = make_sprites(out, config, jobs, pictures)
    layout, sheet = make_layout(sprites)
    write_whole(out / IMAGE, encode_png(sheet))
    for tool in config.sheet:
        write_whole(out / FILES[tool], WRITERS[tool](layout))


def make_sprites(out: Path, config: SampleConfig, jobs: Sequence[Job], pictures: Sequence[np.ndarray]) -> list[Sprite]:
    if config.interpolate:
        first = jobs[0]
        return [Sprite("interpolation", first.prompt, first.seed, tuple(pictures), (STEP_MS,) * len(pictures))]
    names = unique_names([f"{slug(job.nearest_prompt)}-{seed_of(job)}" for job in jobs])
    sprites = []
    for index, (job, name, picture) in enumerate(zip(jobs, names, pictures, strict=True)):
        steps = sorted((out / "frames" / f"{index:04}").glob("*-x0.png"))[:-1]  # the last one is the picture
        frames = [*(read_image(path.read_bytes()) for path in steps), picture]
        ms = [round(1000 * SECONDS / len(frames))] * len(steps) + [HOLD_MS if steps else STEP_MS]
        sprites.append(Sprite(name, job.prompt, seed_of(job), tuple(frames), tuple(ms)))
    return sprites


def seed_of(job: Job) -> int:
    """Of a variation, the seed that it moves to."""
    return job.seed if job.to is None else job.to[1]


def unique_names(names: Sequence[str]) -> list[str]:
    """The same names; those that occur again get -2, -3 ..."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return result


def make_layout(sprites: Sequence[Sprite]) -> tuple[Layout, np.ndarray]:
    """The cells, and the sheet (H, W, 4): a row for each animation, or a square of single pictures."""
    longest = max(len(sprite.frames) for sprite in sprites)
    columns = longest if longest > 1 else max(1, round(len(sprites) ** 0.5))
    side = len(sprites[0].frames[0])
    cells, pictures = [], list[np.ndarray]()
    for sprite in sprites:
        for frame, picture in enumerate(sprite.frames):
            row, column = divmod(len(pictures), columns)
            place = (column * (side + GAP), row * (side + GAP))
            cells.append(Cell(sprite, frame, *place, sprite.ms[frame]))
            pictures.append(picture)
    sheet = grid(np.stack(pictures), columns, GAP)
    return Layout(tuple(cells), side, columns, sheet.shape[1], sheet.shape[0]), sheet


# --------------------------------------------------------------------------------------------------------- the tools


def aseprite(layout: Layout) -> str:
    """As `aseprite --batch --sheet --data --format json-array --list-tags` writes it."""
    tags = [
        {"name": sprite.name, "from": rows[0], "to": rows[-1], "direction": "forward", "data": sprite.prompt}
        for sprite, rows in layout.sprites
    ]
    frames = [{"filename": cell.name, **_trim(cell, layout.side), "duration": cell.ms} for cell in layout.cells]
    return _json({"frames": frames, "meta": {**_meta(layout), "frameTags": tags, "layers": [], "slices": []}})


def texturepacker(layout: Layout) -> str:
    """TexturePacker's "JSON (Hash)"; `animations` is read by PixiJS."""
    frames = {cell.name: {**_trim(cell, layout.side), "pivot": {"x": 0.5, "y": 0.5}} for cell in layout.cells}
    moving = {s.name: [layout.cells[row].name for row in rows] for s, rows in layout.sprites if len(rows) > 1}
    return _json({"frames": frames, "animations": moving, "meta": _meta(layout)})


def godot(layout: Layout) -> str:
    """A SpriteFrames resource; durations are multiples of an animation's 1 / speed."""
    lines = [f'[gd_resource type="SpriteFrames" load_steps={len(layout.cells) + 2} format=3]', ""]
    lines += [f'[ext_resource type="Texture2D" path="{IMAGE}" id="1"]', ""]
    side = layout.side
    for index, cell in enumerate(layout.cells):
        lines += [f'[sub_resource type="AtlasTexture" id="{index + 1}"]', 'atlas = ExtResource("1")']
        lines += [f"region = Rect2({cell.x}, {cell.y}, {side}, {side})", ""]
    animations = []
    for sprite, rows in layout.sprites:
        unit = min(layout.cells[row].ms for row in rows)
        frames = [
            f'{{"duration": {layout.cells[row].ms / unit:.4g}, "texture": SubResource("{row + 1}")}}' for row in rows
        ]
        loop = str(len(rows) > 1).lower()
        body = f'"frames": [{", ".join(frames)}], "loop": {loop}, "name": "{sprite.name}", "speed": {1000 / unit:.4g}'
        animations.append(f"{{{body}}}")
    return "\n".join([*lines, "[resource]", f"animations = [{', '.join(animations)}]", ""])


def tiled(layout: Layout) -> str:
    """A tile set of Tiled; its tiles are the cells."""
    columns, side = layout.columns, layout.side
    sizes = {"tilewidth": side, "tileheight": side, "spacing": GAP, "tilecount": len(layout.cells), "columns": columns}
    root = _element("tileset", version="1.10", name="pokediff", **sizes)
    root.append(_element("image", source=IMAGE, width=layout.width, height=layout.height))
    for sprite, rows in layout.sprites:
        tile = _element("tile", id=rows[0])
        properties = _element("properties")
        properties.append(_element("property", name="name", value=sprite.name))
        properties.append(_element("property", name="prompt", value=sprite.prompt))
        properties.append(_element("property", name="seed", value=sprite.seed))  # beyond Tiled's int
        tile.append(properties)
        if len(rows) > 1:
            animation = _element("animation")
            animation.extend(_element("frame", tileid=row, duration=layout.cells[row].ms) for row in rows)
            tile.append(animation)
        root.append(tile)
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


WRITERS: dict[str, Callable[[Layout], str]] = {
    "aseprite": aseprite,
    "texturepacker": texturepacker,
    "godot": godot,
    "tiled": tiled,
}


def _trim(cell: Cell, side: int) -> dict[str, object]:
    """Where a frame lies; frames are neither rotated nor trimmed."""
    size = {"w": side, "h": side}
    place = {"frame": {"x": cell.x, "y": cell.y, **size}, "rotated": False, "trimmed": False}
    return {**place, "spriteSourceSize": {"x": 0, "y": 0, **size}, "sourceSize": size}


def _meta(layout: Layout) -> dict[str, object]:
    size = {"w": layout.width, "h": layout.height}
    return {"app": "pokediff", "version": __version__, "image": IMAGE, "format": "RGBA8888", "size": size, "scale": "1"}


def _json(values: dict[str, object]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _element(tag: str, **attributes: object) -> ElementTree.Element:
    return ElementTree.Element(tag, {name: str(value) for name, value in attributes.items()})
