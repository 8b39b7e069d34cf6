"""How fast are training and drawing on this machine?

    python benchmarks/speed.py --config configs/pokemon.yaml --stage base-32 --data ../shared/data/pokemon

Training: pictures a second of one stage of `train.py`, everything included (data, clipping, optimizer, average), median
of the log lines after the first. Drawing: the shipped checkpoint, default steps and guidance and `--fast`, every size,
one picture and sixteen at once, median of five, and the best of eight of 64 px; and a whole `sample.py`, imports
included. Run it alone: a second load on the cores makes the figures worthless.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pokediff import PokeDiffPipeline
from pokediff.drawing.sample import BEST_OF
from pokediff.model.pipeline import quiet
from pokediff.paths import shipped

ROOT = Path(__file__).resolve().parent.parent


def training(config: Path, stage: str, data: Path, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--data", str(data)]
        command += ["--out", f"{folder}/run", "--stages", stage, "--max-steps", str(steps), "--no-compile"]
        if not stage.startswith("base"):  # it cannot draw previews alone
            command += ["--base", str(shipped("checkpoints", "pokediff"))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "images_per_s" in row][1:]
    median = {name: statistics.median(row[name] for row in rows) for name in ("images_per_s", "data_wait_share")}
    return {
        "stage": stage,
        "training_images_per_s": round(median["images_per_s"]),
        "data_wait_share": round(median["data_wait_share"], 4),
    }


def sampling(checkpoint: str, precisions: Sequence[str]) -> dict:
    quiet()
    pipe = PokeDiffPipeline.from_pretrained(checkpoint)
    result: dict[str, float] = {}
    variants = [{}] + [{"fast": True}] * pipe.has_fast + [{"best_of": BEST_OF}] * (pipe.scorer is not None)
    for size, options, precision, number in itertools.product(pipe.sizes, variants, precisions, (1, 16)):
        if "best_of" in options and size != pipe.image_size:
            continue
        seconds = []
        for _ in range(6):
            begin = time.monotonic()
            pipe.generate(["a blue water turtle"] * number, range(number), size=size, precision=precision, **options)
            seconds.append(time.monotonic() - begin)
        name = "_".join([f"s_per_image_{size}px", *options, precision, f"batch_{number}"])
        result[name] = round(statistics.median(seconds[1:]) / number, 3)
    return result


def cold(checkpoint: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "sample.py"), "a blue water turtle"]
        seconds = []
        for _ in range(3):
            begin = time.monotonic()
            arguments = ["--checkpoint", checkpoint, "--out", folder]
            subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.monotonic() - begin)
    return {"cold_sample_py_s": round(statistics.median(seconds), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "pokemon.yaml")
    parser.add_argument("--stage", default="base-32", help="of the configuration (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a data set; without it training is not measured")
    parser.add_argument("--checkpoint", default="pokediff", help="default: %(default)s")
    parser.add_argument(
        "--precision", nargs="+", default=["bf16", "fp32"], help="of drawings; fp32 where a processor has no bf16"
    )
    parser.add_argument("--steps", type=int, default=120, help="of training (default: %(default)s)")
    args = parser.parse_args()
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    result = {**machine, "torch": torch.__version__}
    if args.data:
        result |= training(args.config, args.stage, args.data, args.steps)
    result |= sampling(args.checkpoint, args.precision) | cold(args.checkpoint)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
