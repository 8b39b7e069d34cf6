"""Write docs/words.md: the words that the shipped checkpoints know, from their words.json.

    python benchmarks/words.py                                              # the page
    python benchmarks/words.py --count checkpoints/pokediff --data FOLDER   # first count them in the training data

`pokediff.data.vocabulary` says what counts as a word.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pokediff.config import TrainConfig, load_yaml
from pokediff.data.dataset import load_pictures
from pokediff.data.vocabulary import ATTRIBUTION, FEWEST_PICTURES, read_words, word_list, write_words
from pokediff.errors import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "words.md"
SIZE = 32  # px, to which pictures are decoded; their colours are measured before


def count(checkpoint: Path, data: list[str], config: Path) -> None:
    """Count the words of the training pictures of a configuration, and write them into the checkpoint."""
    pictures = load_pictures(data, SIZE, load_yaml(config, TrainConfig).dataset).split("train")
    write_words(checkpoint, pictures.records)


def page() -> str:
    parts = [
        "# Words\n\nA model draws what it has seen. These words describe at least "
        f"{FEWEST_PICTURES} training pictures each, the most frequent first; others are drawn by their resemblance to\n"
        "these, as far as the text encoder sees one.\n"
    ]
    for folder in sorted((ROOT / "checkpoints").iterdir(), reverse=True):
        if words := read_words(folder):
            attributed = f"[Whose pictures they were](../checkpoints/{folder.name}/{ATTRIBUTION})"
            note = f"{attributed}.\n\n" if (folder / ATTRIBUTION).is_file() else ""
            parts.append(f"## {folder.name}\n\n{note}{word_list(words)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=Path, help="count the words of this checkpoint first")
    parser.add_argument("--data", nargs="+", help="its training data")
    parser.add_argument("--config", type=Path, help="its configuration (default: that of its recipe in configs/)")
    args = parser.parse_args()
    if args.count and not args.data:
        parser.error("--count needs --data")
    if args.count:
        config = args.config or ROOT / "configs" / {"pokediff": "pokemon-open.yaml"}.get(
            args.count.name, f"{args.count.name}.yaml"
        )
        count(args.count, args.data, config)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main()
