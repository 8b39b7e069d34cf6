"""How does training scale with processes, and with machines?

    python benchmarks/scaling.py --picture docs/images/scaling.png      # the picture needs matplotlib

Measured: pictures a second, the share of the time that waits for data, and the bytes that cross the network in a step,
of 1, 2 and 4 processes on this machine, each with a batch of its own (`--batch`). With root on Linux the processes run
in a network namespace, so that the bytes are theirs alone.

Calculated: pictures a second of 1 to 64 machines as the one measured, with the same batch each. A step takes

    t(n) = t(1) + 2 (n - 1) / n * G / bandwidth + 2 (n - 1) * latency

G: bytes of the gradient; a ring all-reduce sends 2 (n - 1) / n of them from each machine, in 2 (n - 1) rounds. DDP
sends while the backward pass still computes, which the formula leaves out: it is a lower bound of the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
EVERY = 2  # steps a line of the log
MACHINES, GIGABITS = (1, 2, 4, 8, 16, 32, 64), (1, 10, 100)
LATENCY = 50e-6  # seconds a round, of a local network


def write_data(folder: Path, number: int = 200) -> None:
    """Coloured discs of 32 px with captions: what a picture shows does not change the speed."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for index in range(number):
        picture = np.zeros((32, 32, 4), np.uint8)
        color = (*(int(value) for value in rng.integers(0, 256, 3)), 255)
        cv2.circle(picture, (16, 16), int(rng.integers(5, 15)), color, -1)
        cv2.imwrite(str(folder / f"{index:04}.png"), picture)
        rows.append(json.dumps({"file_name": f"{index:04}.png", "text": f"a disc {index % 20}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def loopback_bytes(process: int) -> int:
    """Bytes that were sent on the loopback device of a process's network namespace."""
    lines = Path(f"/proc/{process}/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def measure(processes: int, batch: int, lines: int, data: Path, folder: Path) -> dict[str, Any]:
    """Medians of the log lines after the first, and bytes a step of all processes together."""
    out = folder / f"run-{processes}"
    config = folder / "base.yaml"  # without the styles of its own data
    config.write_text(f"extends: {ROOT / 'configs' / 'pokemon.yaml'}\ndataset: {{styles: null}}\n")
    words = ["--config", str(config), "--data", str(data), "--out", str(out), "--stages", "base-32", "--no-compile"]
    words += ["--stages.base-32.batch-size", str(batch * processes), "--log-every", str(EVERY), "--threads", "1"]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(ROOT / "train.py"),
    ]
    command = [sys.executable, *launcher, *words]
    if alone := hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip"):
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    rows: list[dict[str, Any]] = []
    sent: list[tuple[int, int]] = []  # (step, bytes) when a line appeared
    try:
        while len(rows) < lines + 1:
            if started.poll() is not None:
                raise SystemExit(f"the training ended with code {started.returncode}")
            time.sleep(0.01)
            text = (out / "log.jsonl").read_text() if (out / "log.jsonl").is_file() else ""
            found = [
                json.loads(line) for line in text.splitlines(True) if line.endswith("\n") and "images_per_s" in line
            ]
            if len(found) > len(rows):
                rows = found
                sent.append((rows[-1]["step"], loopback_bytes(started.pid) if alone else 0))
    finally:
        if started.poll() is None:
            workers = psutil.Process(started.pid).children(recursive=True)  # each in a process group of its own
            for process in (started, *workers):
                process.kill()
            started.wait()
    steps, total = (last - first for first, last in zip(sent[0], sent[-1], strict=True))
    median = {name: statistics.median(row[name] for row in rows[1:]) for name in ("images_per_s", "data_wait_share")}
    return {
        "processes": processes,
        "images_per_s": round(median["images_per_s"], 1),
        "data_wait_share": round(median["data_wait_share"], 4),
        "megabytes_per_step_and_process": round(total / steps / processes / 1e6, 2) if alone else None,
    }


def calculated(step: float, batch: int, gradient: float) -> list[dict[str, float]]:
    """Pictures a second by machines (rows) and bandwidth."""
    rows = []
    for n in MACHINES:
        row: dict[str, float] = {"machines": n}
        for gigabits in GIGABITS:
            exchange = 2 * (n - 1) / n * gradient / (gigabits * 1e9 / 8) + 2 * (n - 1) * LATENCY
            row[f"{gigabits} Gbit/s"] = round(n * batch / (step + exchange), 1)
        rows.append(row)
    return rows


def draw(measured: list[dict[str, Any]], curve: list[dict[str, float]], file: Path) -> None:
    """Pictures a second by machines: the measured one, and the calculated curves."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=110, layout="constrained")
    machines, one = [row["machines"] for row in curve], measured[0]["images_per_s"]
    axes.plot(machines, [one * n for n in machines], ":", color="gray", label="n times one machine")
    for gigabits in reversed(GIGABITS):
        axes.plot(machines, [row[f"{gigabits} Gbit/s"] for row in curve], label=f"{gigabits} Gbit/s, calculated")
    axes.plot([1], [one], "o", color="black", label="one machine, measured")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(machines, map(str, machines))
    ticks = [one * n for n in machines]
    axes.set_yticks(ticks, [f"{value:,.0f}" for value in ticks])
    axes.set(xlabel="machines", ylabel="training pictures/s")
    axes.legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=32, help="pictures a step and process")
    parser.add_argument("--lines", type=int, default=5, help=f"of the log, {EVERY} steps each")
    parser.add_argument("--gradient-mb", type=float, help="megabytes (default: from two processes, measured)")
    parser.add_argument("--picture", type=Path, help="PNG or SVG file of the curves")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "data")
        rows = []
        for processes in args.processes:
            rows.append(measure(processes, args.batch, args.lines, Path(folder) / "data", Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    # of two processes each sends the gradient once: 2 (n - 1) / n = 1
    pair = next((row["megabytes_per_step_and_process"] for row in rows if row["processes"] == 2), None)
    gradient = args.gradient_mb or pair
    print(json.dumps({"machine": platform.platform(), "gradient_mb": gradient}))
    if gradient:
        curve = calculated(args.batch / rows[0]["images_per_s"], args.batch, gradient * 1e6)
        for row in curve:
            print(json.dumps(row))
        if args.picture:
            draw(rows, curve, args.picture)


if __name__ == "__main__":
    main()
