"""Training and drawing on a GPU: pictures a second, share of its bf16 peak, and where the time goes.

    python benchmarks/gpu.py --config configs/pokemon-large-gpu.yaml --stage base-32 --data ../shared/data/pokemon

Training: `train_step` of one stage on real batches, after the first steps; seconds until the validation loss of the
averaged weights is `--loss`, validation left out; the operators that take most time. The share is of the fastest square
matrix product in bf16 here, three forward passes counted for a step. Drawing: the shipped checkpoint, default steps and
guidance. Without a GPU the same runs on the CPU, to try the script:

    python benchmarks/gpu.py --data ../shared/data/pokemon --steps 10 --batch-size 8 --no-compile --loss 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pokediff import PokeDiffPipeline
from pokediff.config import StageConfig, TrainConfig, load_yaml
from pokediff.model.denoiser import compile_network
from pokediff.model.pipeline import quiet
from pokediff.training.build import Run, Stage, prepare
from pokediff.training.loop import train_step, validate
from pokediff.training.stages import start

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # steps: compiling, choosing kernels
PROFILED = 4  # steps
WINDOW = 10  # steps that are timed together
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, when all that was started on the device has ended."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_tflops(side: int) -> float:
    """TFLOP/s of the fastest of ten bf16 products of `side`² matrices."""
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        begin = now()
        a @ b
        seconds.append(now() - begin)
    return 2 * side**3 / min(seconds) / 1e12


def steps_of(run: Run, stage: Stage) -> Iterator[int]:
    """Train; gives the number of each step that is done."""
    if run.config.compile:
        compile_network(stage.denoiser)
    denoiser, optimizer = run.accelerator.prepare(stage.denoiser, stage.optimizer)
    loader = torch.utils.data.DataLoader(
        stage.batches, batch_size=None, sampler=range(stage.config.max_steps), num_workers=run.config.workers
    )
    for step, pictures in enumerate(loader):
        train_step(run, stage, denoiser, optimizer, pictures, step)
        yield step + 1


def training(run: Run, stage: Stage, steps: int, peak: float) -> dict[str, Any]:
    """Pictures a second of `steps` steps, and the table of the operators of a few more."""
    done, rates = steps_of(run, stage), []
    for _ in range(WARM_UP):
        next(done)
    for _ in range(max(1, steps // WINDOW)):
        begin, number = now(), min(WINDOW, steps)
        for _ in range(number):
            next(done)
        rates.append(number * stage.config.batch_size / (now() - begin))
    rate, work = statistics.median(rates), 3 * stage.facts["gflops"] / 1000
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities) as recorded:
        for _ in range(PROFILED):
            next(done)
    key = f"self_{DEVICE}_time_total"
    print(recorded.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60))
    return {
        "batch_size": stage.config.batch_size,
        "training_images_per_s": round(rate, 1),
        "tflops": round(rate * work, 2),
        "share_of_peak": round(rate * work / peak, 3),
    }


def seconds_to_loss(run: Run, stage: Stage, target: float, every: int) -> float | None:
    """Seconds of training until the validation loss, looked at every few steps, is `target`; None when max_steps comes
    first.
    """
    spent, begin = 0.0, now()
    for step in steps_of(run, stage):
        if step % every == 0:
            spent += now() - begin
            if validate(run, stage)["validation_loss"] <= target:
                return round(spent, 1)
            begin = now()
    return None


def sampling(checkpoint: str, numbers: tuple[int, ...]) -> dict[str, float]:
    """Seconds a picture, median of three after one, of each size and number of pictures at once."""
    pipe, result = PokeDiffPipeline.from_pretrained(checkpoint).to(DEVICE), {}
    for size in pipe.sizes:
        for number in numbers:
            seconds = []
            for _ in range(4):
                begin = now()
                pipe.generate(["a blue water turtle"] * number, range(number), size=size)
                seconds.append((now() - begin) / number)
            result[f"s_per_image_{size}px_batch_{number}"] = round(statistics.median(seconds[1:]), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "pokemon.yaml")
    parser.add_argument("--stage", default="base-32", help="of the configuration (default: %(default)s)")
    parser.add_argument("--data", required=True, help="a data set")
    parser.add_argument("--checkpoint", default="pokediff", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, help="default: that of the stage")
    parser.add_argument("--steps", type=int, default=200, help="that are timed (default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--loss", type=float, help="train until this validation loss, and tell the seconds")
    args = parser.parse_args()
    quiet()
    config = load_yaml(args.config, TrainConfig)
    stage: StageConfig = config.stages[args.stage]
    stage = replace(stage, batch_size=args.batch_size or stage.batch_size)
    base = None if args.stage == next(iter(config.stages)) else args.checkpoint
    compiled = config.compile and args.compile
    config = replace(config, data=[args.data], base=base, stages={args.stage: stage}, compile=compiled)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu, to try the script: no figures of a GPU"
    peak = peak_tflops(8192 if DEVICE == "cuda" else 1024)
    result = {"device": device, "torch": torch.__version__, "peak_bf16_tflops": round(peak, 2)}
    with tempfile.TemporaryDirectory() as folder:
        run = start(config, Path(folder) / "run")
        result |= {"stage": args.stage, "compile": config.compile, "precision": run.accelerator.mixed_precision}
        result |= training(run, prepare(run, args.stage), args.steps, peak)
        if args.loss:
            result["seconds_to_loss"] = seconds_to_loss(run, prepare(run, args.stage), args.loss, args.steps)
    result |= sampling(args.checkpoint, (1, 64) if DEVICE == "cuda" else (1,))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
