"""The scraper against a local mirror of the wiki: time, memory, and what faults, a challenge and a kill leave behind.

    python benchmarks/scraper.py --mirror ../shared/bulbapedia/mirror.py

`mirror.py` serves saved pages and pictures on loopback; it can misbehave (--faults), demand a challenge
(--challenge-after) and count its requests (/__stats__). Prints one JSON object a case.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def serving(mirror: Path, *options: str) -> Iterator[str]:
    port = random.randint(20000, 40000)
    process = subprocess.Popen(
        [sys.executable, str(mirror), "--port", str(port), *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def start(base: str, out: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scraper" / "run.py"), "--out", str(out), "--base-url", base]
    return subprocess.Popen([*command, "--text-encoder", "none"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digest(out: Path) -> str:
    """Of all pictures, names and bytes."""
    total = hashlib.sha256()
    for path in sorted((out / "images").glob("*.png")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def run(base: str, out: Path) -> dict:
    begin = time.monotonic()
    code = start(base, out).wait()
    stats = json.load(urllib.request.urlopen(f"{base}/__stats__"))
    return {
        "exit_code": code,
        "seconds": round(time.monotonic() - begin, 1),
        "pictures": len(list((out / "images").glob("*.png"))),
        "digest": digest(out),
        "requests": stats["requests"],
        "at_once": stats["max_parallel"],
        "peak_MB_so_far": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, required=True, help="the mirror's script")
    parser.add_argument("--faults", default="0.2", help="share of answers that misbehave (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outs = {name: Path(folder) / name for name in ("plain", "faults", "challenge", "killed")}
        with serving(args.mirror) as base:
            print(json.dumps({"case": "plain", **run(base, outs["plain"])}), flush=True)
            print(json.dumps({"case": "plain, again", **run(base, outs["plain"])}), flush=True)
        with serving(args.mirror, "--faults", args.faults) as base:
            for number in range(1, 6):
                result = run(base, outs["faults"])
                print(json.dumps({"case": f"faults {args.faults}, run {number}", **result}), flush=True)
                if result["exit_code"] == 0:
                    break
        with serving(args.mirror, "--challenge-after", "300") as base:
            print(json.dumps({"case": "challenge after 300", **run(base, outs["challenge"])}), flush=True)
        with serving(args.mirror) as base:
            print(json.dumps({"case": "challenge gone", **run(base, outs["challenge"])}), flush=True)
            process = start(base, outs["killed"])
            time.sleep(20)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            left = {"pictures": len(list((outs["killed"] / "images").glob("*.png")))}
            print(json.dumps({"case": "killed after 20 s", **left}), flush=True)
            print(json.dumps({"case": "killed, second start", **run(base, outs["killed"])}), flush=True)


if __name__ == "__main__":
    main()
