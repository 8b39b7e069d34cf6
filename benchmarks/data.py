"""How long does a start with many pictures take, the first one and the second?

    python benchmarks/data.py --number 1000000

writes WebDataset shards (or `--layout parquet`, `files`) of generated pictures with captions, and prepares them for
training in one process after another: prepared pictures and their records, the training split with the captions that it
shares, vectors of the captions, the first batch. Imports are not counted. The first process finds an empty cache, the
second one that the first has filled. `--seconds 2` makes a slower second start an error.

Captions are combinations of `--words` words each in three places: 20 words make 8,000 captions. Their vectors are those
of the built-in text encoder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARD = 10_000  # pictures in a shard
WORDS = """red green blue yellow brown white black pink purple orange gray round square tall small long flat striped
    spotted shiny winged horned furry scaly spiky""".split()


def samples(number: int, words: int) -> Iterator[tuple[str, bytes, str]]:
    """Key, PNG of 32 px and caption. The pictures are 1,000 different ones in turn: what they show takes no time."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(1000):
        image = Image.fromarray(rng.integers(0, 8, (8, 8), np.uint8), "P").resize((32, 32), Image.Resampling.NEAREST)
        image.putpalette(rng.integers(0, 256, 24, np.uint8).tobytes())
        file = io.BytesIO()
        image.save(file, "PNG")
        pictures.append(file.getvalue())
    names = [f"{WORDS[place % len(WORDS)]}{place // len(WORDS) or ''}" for place in range(words)]
    for index in range(number):
        a, b, c = (names[place] for place in rng.integers(0, words, 3))
        yield f"{index:07}", pictures[index % 1000], f"a {a} {b} creature with {c} spots"


def write_data(folder: Path, layout: str, number: int, words: int) -> None:
    """Shards, parquet files or files of the pictures."""
    folder.mkdir(parents=True)
    found = samples(number, words)
    for shard in range(-(-number // SHARD)):
        part = [next(found) for _ in range(min(SHARD, number - shard * SHARD))]
        if layout == "shards":
            with tarfile.open(folder / f"{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for key, png, caption in part:
                    for name, data in ((f"{key}.png", png), (f"{key}.txt", caption.encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        elif layout == "parquet":
            import pyarrow
            from pyarrow import parquet

            images = [{"bytes": png, "path": f"{key}.png"} for key, png, _ in part]
            table = pyarrow.table({"image": images, "text": [caption for *_, caption in part]})
            parquet.write_table(table, folder / f"{shard:05}.parquet", row_group_size=1000)
        else:
            (folder / f"{shard:05}").mkdir()
            for key, png, _ in part:
                (folder / f"{shard:05}" / f"{key}.png").write_bytes(png)
            rows = [json.dumps({"file_name": f"{shard:05}/{key}.png", "text": caption}) for key, _, caption in part]
            with (folder / "metadata.jsonl").open("a") as table:
                table.write("\n".join(rows) + "\n")


def start(folder: Path, size: int) -> dict[str, float]:
    """Seconds of the parts of a start, in this process."""
    from pokediff.config import DatasetConfig
    from pokediff.data.dataset import TrainingBatches, caption_vectors, load_pictures

    times, cpu = [time.perf_counter()], time.process_time()
    pictures = load_pictures(folder, size)
    times.append(time.perf_counter())
    training = pictures.split("train").with_shared_captions()
    validation = pictures.split("validation").spread(512)
    times.append(time.perf_counter())
    vectors = caption_vectors(folder, training, "builtin")
    caption_vectors(folder, validation, "builtin")
    times.append(time.perf_counter())
    batches = TrainingBatches(training, vectors, DatasetConfig(), batch_size=32, caption_dropout=0.1, seed=0)
    first = batches[0]
    times.append(time.perf_counter())
    names = ("pictures_s", "splits_s", "vectors_s", "batch_s")
    row = {name: round(b - a, 3) for name, a, b in zip(names, times, times[1:], strict=False)}
    row |= {"total_s": round(times[-1] - times[0], 3), "processor_s": round(time.process_time() - cpu, 3)}
    row |= {"pictures": len(pictures), "captions": len(vectors.table) - 1}
    row["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    row["batch"] = hash(first.pixels.numpy().tobytes() + first.text.numpy().tobytes()) % 2**32
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20_000, help="pictures")
    parser.add_argument("--layout", choices=["shards", "parquet", "files"], default="shards")
    parser.add_argument("--words", type=int, default=20, help="in each of three places of a caption")
    parser.add_argument("--size", type=int, default=32, help="px that the pictures are prepared at")
    parser.add_argument("--folder", type=Path, help="where data and cache are kept (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, help="the longest second start that is no error")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.size)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        data = folder / f"{args.layout}-{args.number}-{args.words}"
        print(json.dumps({"machine": platform.platform(), "layout": args.layout}), flush=True)
        if not data.exists():
            began = time.perf_counter()
            write_data(data.with_name("new"), args.layout, args.number, args.words)
            os.sync()
            data.with_name("new").rename(data)
            time.sleep(3)  # what was written moments before is not kept
            print(
                json.dumps({"start": "none", "writing_the_data_s": round(time.perf_counter() - began, 1)}), flush=True
            )
        environment = {**os.environ, "POKEDIFF_CACHE": str(folder / "cache"), "PYTHONHASHSEED": "0"}
        command = [sys.executable, __file__, "--start", str(data), "--size", str(args.size)]
        rows = []
        for name in ("first", "second", "third"):
            answer = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(answer.stdout.splitlines()[-1]))
            print(json.dumps({"start": name, **rows[-1]}), flush=True)
    if len({row["batch"] for row in rows}) > 1:
        raise SystemExit("error: the starts gave different batches")
    if args.seconds and rows[1]["total_s"] > args.seconds:
        raise SystemExit(f"error: the second start took {rows[1]['total_s']} s, more than {args.seconds}")


if __name__ == "__main__":
    main()
