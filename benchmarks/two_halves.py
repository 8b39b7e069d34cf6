"""Do two models trained on different creatures draw the same picture from the same noise?

    python benchmarks/two_halves.py split --data DATA --out FOLDER
    python benchmarks/two_halves.py compare CHECKPOINT_A CHECKPOINT_B --prompts-file prompts.txt

`split` writes FOLDER/a and FOLDER/b: half of the training families each, all validation and test families in both.
Train one model on each with the same configuration. `compare` prints the distance of their pictures at equal seeds over
that at different seeds: 1 is no agreement, 0 the same picture (Kadkhodaie et al., "Generalization in diffusion models
arises from geometry-adaptive harmonic representations", 2024).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np

from pokediff import PokeDiffPipeline
from pokediff.config import SampleConfig
from pokediff.data.records import read_records, split_of, write_records
from pokediff.drawing.jobs import read_prompts
from pokediff.errors import one_line_errors
from pokediff.evaluation.distances import mean_estimate
from pokediff.evaluation.looks import picture_distance
from pokediff.model.pipeline import quiet


def split(data: Path, out: Path, seed: int) -> None:
    records = read_records(data)
    families = sorted({record.family_key for record in records if split_of(record) == "train"})
    random.Random(seed).shuffle(families)
    half_a = set(families[: len(families) // 2])
    for name, mine in (("a", half_a), ("b", set(families) - half_a)):
        kept = [record for record in records if split_of(record) != "train" or record.family_key in mine]
        for record in kept:
            target = out / name / record.file_name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / record.file_name, target)
        write_records(out / name, kept)
        print(f"{out / name}: {len(kept)} pictures")


def compare(a: str, b: str, prompts_file: str, seeds: int) -> None:
    quiet()
    prompts = [prompt for prompt in read_prompts(SampleConfig(prompts_file=prompts_file)) for _ in range(seeds)]
    numbers = list(range(len(prompts)))
    drawn = [PokeDiffPipeline.from_pretrained(path).generate(prompts, numbers) for path in (a, b)]
    shifted = [number + len(prompts) for number in numbers]
    other = PokeDiffPipeline.from_pretrained(b).generate(prompts, shifted)
    ratio = picture_distance(drawn[0], drawn[1]) / picture_distance(drawn[0], other).mean()
    estimate = mean_estimate(np.asarray(ratio))
    print(json.dumps({"ratio": estimate.value, "low": estimate.low, "high": estimate.high, "pictures": len(prompts)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("split")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--seed", type=int, default=0)
    two = verbs.add_parser("compare")
    two.add_argument("checkpoints", nargs=2)
    two.add_argument("--prompts-file", required=True, help="a text file, one prompt a line")
    two.add_argument("--seeds", type=int, default=8, help="pictures of each prompt")
    args = parser.parse_args()
    with one_line_errors():
        if args.verb == "split":
            split(args.data, args.out, args.seed)
        else:
            compare(*args.checkpoints, args.prompts_file, args.seeds)


if __name__ == "__main__":
    main()
