"""Sprite sheets, read by parsers of the tools' own users, and compared with the pictures that they should hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import pytiled_parser
from godot_parser import load as load_godot

from pokediff import cli
from pokediff.data.images import read_image
from pokediff.drawing.atlas import Sprite, make_layout, unique_names

TOOLS = ("aseprite", "texturepacker", "godot", "tiled")


@pytest.fixture(scope="module", params=[0, 3], ids=["pictures", "animations"])
def drawn(request, tmp_path_factory, tiny_checkpoint) -> Path:
    """Three pictures of two prompts, alone or with three frames of their denoising."""
    out = tmp_path_factory.mktemp("drawing") / "out"
    words = [
        "sample",
        "a red & blue <cat>",
        "ein Drache ß",
        "-n",
        "2",
        "--seed",
        "7",
        "--steps",
        "3",
        "--out",
        str(out),
    ]
    words += ["--checkpoint", str(tiny_checkpoint), "--size", "32", "--save-frames", str(request.param)]
    cli.main([*words, "--sheet", *TOOLS, "--precision", "fp32"])
    return out


def expected(out: Path) -> dict[str, list[np.ndarray]]:
    """The frames of each sprite by its name, from the files of the drawing."""
    names = ["a-red-blue-cat-7", "a-red-blue-cat-8", "ein-drache-ß-9", "ein-drache-ß-10"]
    found = {}
    for index, name in enumerate(names):
        steps = sorted((out / "frames" / f"{index:04}").glob("*-x0.png"))[:-1]
        found[name] = [read_image(path.read_bytes()) for path in (*steps, out / f"{index:04}.png")]
    return found


def cut(out: Path, x: float, y: float, side: float = 32) -> np.ndarray:
    sheet = read_image((out / "sheet.png").read_bytes())
    return sheet[int(y) : int(y + side), int(x) : int(x + side)]


def test_aseprite_s_frames_and_tags(drawn):
    data = json.loads((drawn / "sheet.aseprite.json").read_text(encoding="utf-8"))
    frames = data["frames"]
    assert {"filename", "frame", "rotated", "trimmed", "spriteSourceSize", "sourceSize", "duration"} == frames[0].keys()
    tags = {tag["name"]: frames[tag["from"] : tag["to"] + 1] for tag in data["meta"]["frameTags"]}
    assert tags.keys() == expected(drawn).keys()
    for name, pictures in expected(drawn).items():
        for frame, picture in zip(tags[name], pictures, strict=True):
            place = frame["frame"]
            assert (place["w"], place["h"], frame["rotated"], frame["trimmed"]) == (32, 32, False, False)
            np.testing.assert_array_equal(cut(drawn, place["x"], place["y"]), picture)
        assert sum(frame["duration"] for frame in tags[name]) == (125 if len(pictures) == 1 else 3500)
    size = data["meta"]["size"]
    assert read_image((drawn / "sheet.png").read_bytes()).shape == (size["h"], size["w"], 4)
    assert data["meta"]["frameTags"][0]["data"] == "a red & blue <cat>"


def test_texturepacker_s_frames_and_animations(drawn):
    data = json.loads((drawn / "sheet.texturepacker.json").read_text(encoding="utf-8"))
    for name, pictures in expected(drawn).items():
        frames = data["animations"][name] if len(pictures) > 1 else [name]
        for frame, picture in zip(frames, pictures, strict=True):
            place = data["frames"][frame]["frame"]
            np.testing.assert_array_equal(cut(drawn, place["x"], place["y"]), picture)
    assert data["meta"]["image"] == "sheet.png"


def test_tiled_s_tile_set_in_pytiled_parser(drawn):
    tiles = pytiled_parser.parse_tileset(drawn / "sheet.tsx")
    assert (tiles.tile_width, tiles.tile_height, tiles.spacing) == (32, 32, 2)
    assert tiles.image == Path("sheet.png")
    pictures = expected(drawn)
    assert tiles.tile_count == sum(len(frames) for frames in pictures.values())
    assert [tile.properties["name"] for tile in tiles.tiles.values()] == list(pictures)
    assert [tile.properties["seed"] for tile in tiles.tiles.values()] == ["7", "8", "9", "10"]
    assert tiles.tiles[0].properties["prompt"] == "a red & blue <cat>"
    for first, tile in tiles.tiles.items():
        frames = pictures[tile.properties["name"]]
        rows = [frame.tile_id for frame in tile.animation] if tile.animation else [first]
        for row, picture in zip(rows, frames, strict=True):
            y, x = (34 * part for part in divmod(row, tiles.columns))
            np.testing.assert_array_equal(cut(drawn, x, y), picture)


def test_godot_s_sprite_frames_in_godot_parser(drawn):
    resource = load_godot(str(drawn / "sheet.tres"))
    assert resource.get_ext_resources()[0].path == "sheet.png"
    regions = {part.id: part["region"] for part in resource.get_sub_resources()}
    (section,) = [part for part in resource.get_sections() if part.header.name == "resource"]
    animations = {animation["name"]: animation for animation in section["animations"]}
    pictures = expected(drawn)
    assert [str(name).strip('&"') for name in animations] == list(pictures)
    for (_, animation), frames in zip(animations.items(), pictures.values(), strict=True):
        for frame, picture in zip(animation["frames"], frames, strict=True):
            region = regions[frame["texture"].id]
            np.testing.assert_array_equal(cut(drawn, *region.args[:2]), picture)
        assert animation["loop"] == (len(frames) > 1)
        milliseconds = sum(frame["duration"] for frame in animation["frames"]) * 1000 / animation["speed"]
        assert milliseconds == pytest.approx(125 if len(frames) == 1 else 3500, rel=1e-3)


def test_an_interpolation_is_one_animation(tmp_path, tiny_checkpoint):
    out = tmp_path / "out"
    words = [
        "sample",
        "a red cat",
        "a blue dog",
        "--interpolate",
        "5",
        "--seed",
        "1",
        "--steps",
        "2",
        "--out",
        str(out),
    ]
    cli.main([*words, "--checkpoint", str(tiny_checkpoint), "--size", "32", "--sheet", "aseprite"])
    data = json.loads((out / "sheet.aseprite.json").read_text(encoding="utf-8"))
    assert [(tag["name"], tag["from"], tag["to"]) for tag in data["meta"]["frameTags"]] == [("interpolation", 0, 4)]
    cli.main([*words, "--checkpoint", str(tiny_checkpoint), "--size", "32"])  # again without: its files are gone
    assert not list(out.glob("sheet*"))


def test_names():
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a-2", "a-3"]


def test_a_single_picture_makes_a_sheet_without_gaps():
    layout, sheet = make_layout([Sprite("a", "a", 1, (np.ones((8, 8, 4), np.uint8),), (100,))])
    assert (layout.width, layout.height, layout.columns) == (8, 8, 1)
    assert sheet.shape == (8, 8, 4)
