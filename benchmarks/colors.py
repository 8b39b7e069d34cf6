"""Does a checkpoint draw in the colour that the prompt asks for?

    python benchmarks/colors.py --checkpoint checkpoints/pokediff-32

Four styles, eleven colours, five creatures, one picture each (seed = its number). A picture counts when the colour
asked for is its main colour, or one of its two main colours, by `images.main_colors`. Prints a JSON object; --out keeps
a sheet.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from pokediff import PokeDiffPipeline
from pokediff.images import COLOR_ANCHORS, encode_png, enlarge, grid, main_colors
from pokediff.pipeline import quiet
from pokediff.sampling import DEFAULT_CHECKPOINT

STYLES = ("official artwork", "cel-shaded render", "vector drawing", "pixel sprite")
NOUNS = ("creature", "dragon", "turtle", "bird", "mouse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="a PNG with all pictures, a row for each style and creature")
    args = parser.parse_args()
    quiet()
    pipe = PokeDiffPipeline.from_pretrained(args.checkpoint)
    asked = list(itertools.product(STYLES, NOUNS, COLOR_ANCHORS))
    prompts = [f"{style} of {'an' if color[0] in 'aeiou' else 'a'} {color} {noun}" for style, noun, color in asked]
    pictures = pipe.generate(prompts, range(len(prompts)), guidance_scale=args.guidance_scale)
    found = [main_colors(picture) for picture in pictures]
    first = np.array([colors[:1] == (color,) for (_, _, color), colors in zip(asked, found, strict=True)])
    either = np.array([color in colors for (_, _, color), colors in zip(asked, found, strict=True)])

    def share(hits: np.ndarray, place: int, value: str) -> float:
        return round(float(hits[[row[place] == value for row in asked]].mean()), 3)

    print(
        json.dumps(
            {
                "pictures": len(pictures),
                "main_color": round(float(first.mean()), 3),
                "one_of_two_main_colors": round(float(either.mean()), 3),
                "by_style": {style: share(either, 0, style) for style in STYLES},
                "by_color": {color: share(either, 2, color) for color in COLOR_ANCHORS},
            },
            indent=2,
        )
    )
    if args.out:
        args.out.write_bytes(encode_png(enlarge(grid(pictures, columns=len(COLOR_ANCHORS)), 3)))


if __name__ == "__main__":
    main()
