"""What Python makes of edge cases and whole pictures, against which web/test checks pictures.ts and atlas.ts: a part of
web_values.py.

Both languages compute the same inputs, and the file has digests of large results, so it stays small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pokediff.data.images import composite, enlarge, from_model, grid
from pokediff.drawing import pixelart
from pokediff.drawing.atlas import WRITERS, Sprite, make_layout
from pokediff.drawing.pixelart import apply_palette, finish, harden, pick_palette, remove_faint, remove_specks

COLORS = (2, 3, 14, 64, 256)
FRAMES = [(7, 11), (16, 17), (100000, 1), (150, 1650)]  # ms of the two frames of a sprite


def sections() -> dict[str, Any]:
    """{name of the file in web/test/values: its content}."""
    return {
        "edges": {"model": model(), "pictures": pictures(), "composite": blends(), "lab": lab(), "sheets": sheets()}
    }


def random(seed: int) -> Callable[[], int]:
    """Numbers 0 to 65535 (the generator of Numerical Recipes), which pictures.test.ts has too."""
    state = seed

    def draw() -> int:
        nonlocal state
        state = (state * 1664525 + 1013904223) % 2**32
        return state >> 16

    return draw


def model() -> list[dict[str, Any]]:
    """Of model outputs with values outside [-1, 1] and halves between two levels."""
    rows = []
    for channels in (4, 3, 1):
        for side in (32, 64, 128):
            draw = random(side + channels)
            drawn = [draw() for _ in range(channels * side * side)]
            x = [(n % 255 + 0.5) / 127.5 - 1 if n % 3 == 0 else n / 29000 - 1.1 for n in drawn]
            picture = from_model(torch.tensor(x, dtype=torch.float32).reshape(1, channels, side, side))[0]
            rows.append({"channels": channels, "side": side, "digest": digest(picture)})
    return rows


def shapes() -> dict[str, np.ndarray]:
    """Pictures by name, straight RGBA."""
    made = {f"shaded {side}": shaded(side, random(side), 24) for side in (32, 64, 128)}
    made |= {"grey": shaded(32, random(1), 1, grey=True), "flat": shaded(32, random(2), 1) // 86 * 86}
    made |= {f"islands {seed}": islands(random(seed)) for seed in range(12)}
    made["tie"] = np.zeros((32, 32, 4), np.uint8)
    made["tie"][1, 3] = made["tie"][0, 9] = made["tie"][9, 0] = 255
    made["empty"] = np.zeros((16, 16, 4), np.uint8)
    made["one colour"] = np.full((16, 16, 4), 200, np.uint8)
    return made


def shaded(side: int, draw: Callable[[], int], noise: int, grey: bool = False) -> np.ndarray:
    """A disc with a soft edge in a gradient with noise."""
    picture = np.zeros((side, side, 4), np.uint8)
    for y in range(side):
        for x in range(side):
            for c in range(3):
                slope = x + y if grey else x * (c + 1) + y * (3 - c)
                picture[y, x, c] = min(255, slope * 63 // side + draw() % noise)
            distance = (2 * x - side) ** 2 + (2 * y - side) ** 2
            picture[y, x, 3] = max(0, min(255, 1500 - distance * 1600 // (side * side)))
    return picture


def islands(draw: Callable[[], int]) -> np.ndarray:
    """Up to seven rectangles of at most 12 x 12 px, some of them specks beside others."""
    width, height = 20 + draw() % 30, 20 + draw() % 30
    picture = np.zeros((height, width, 4), np.uint8)
    for _ in range(1 + draw() % 7):
        top, left, tall, wide, alpha = (draw() for _ in range(5))
        rows = slice(top % height, top % height + 1 + tall % 12)
        columns = slice(left % width, left % width + 1 + wide % 12)
        picture[rows, columns] = [draw() % 256, draw() % 256, draw() % 256, alpha % 256]
    return picture


def pictures() -> dict[str, Any]:
    """Of each picture of `shapes`, the results of all functions."""
    rows = {}
    for name, picture in shapes().items():
        numbers = COLORS if len(picture) < 128 else COLORS[:3]  # the others take seconds
        palettes = {str(number): pick_palette(picture, number) for number in numbers}
        rows[name] = {
            "input": digest(picture),
            "faint": digest(remove_faint(picture)),
            "specks": digest(remove_specks(picture)),
            "hard": digest(harden(picture)),
            "enlarged": digest(enlarge(picture, 3)),
            "grid": digest(grid(np.stack([picture] * 3))),
            "palettes": {number: digest(palette) for number, palette in palettes.items()},
            "applied": digest(apply_palette(picture, np.array([[250, 250, 250], [9, 9, 9], [200, 60, 0]], np.uint8))),
            "finished": digest(finish(picture, 14, hard_alpha=True)),
        }
    return rows


def blends() -> list[dict[str, Any]]:
    """All colours under all alphas over some backgrounds."""
    alpha, color = np.mgrid[:256, :256].astype(np.uint8)
    table = np.stack([color, color, color, alpha], axis=-1)
    backgrounds = [[255, 255, 255], [0, 0, 0], [17, 128, 201]]
    return [{"background": under, "digest": digest(composite(table, under))} for under in backgrounds]


def lab() -> str:
    """Of every fifth level of red, green and blue."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return digest(pixelart._to_lab(colors).astype("<i4"))


def sheets() -> dict[str, str]:
    """Texts with odd durations, and names and prompts that need escapes."""
    prompts = ['"quoted" & <tag>', "tab\t, line\nand \\ backslash", "猫 é \u2028 \x7f", ""]
    blank = np.zeros((4, 4, 4), np.uint8)
    sprites = [Sprite(f"s-é-{k}", prompts[k], 4294967295 - k, (blank, blank), ms) for k, ms in enumerate(FRAMES)]
    layout, _ = make_layout(sprites)
    return {tool: write(layout) for tool, write in WRITERS.items()}


def digest(values: np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of the bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
