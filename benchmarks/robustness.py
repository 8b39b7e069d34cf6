"""The attack as a whole: kills, full disks, mutated inputs, the worst wiki, a crowd at the demo. Prints figures.

    python benchmarks/robustness.py kills                      # SIGKILL at random moments, then the same bytes
    python benchmarks/robustness.py disk                       # every command on a disk that fills up
    python benchmarks/robustness.py inputs --number 10000      # mutated inputs of every kind
    python benchmarks/robustness.py load --minutes 10          # 50 clients at the demo, well-behaved and not

One JSON line for each case; the exit code is 1 when something was found. Everything is drawn from --seed, so a finding
can be repeated: `inputs --only checkpoint --first 17 --number 1 --trace`. Needs Linux.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where a test imports this file

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
FORK = multiprocessing.get_context("fork")
CPU_S, WALL_S = 20.0, 600.0  # of one input; the second is for one that waits, and long: the machine may be busy
MEMORY = 1_500_000_000  # bytes beyond what the libraries take: 64 million pixels, decoded, take half of it
LONGEST_LINE = 1007  # letters: "error: " and 1,000 of errors.printable


# ------------------------------------------------------------------------------------------------------------ inputs


class Hang(BaseException):
    """An input used up its time."""


@dataclass
class Watch:
    """What a read of an input must not do, seen by Python's audit events."""

    folder: Path
    outside: Path
    active: bool = False
    links_allowed: bool = False
    seen: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or self.seen is None:
            return
        if event == "pickle.find_class":
            self.seen.append(f"pickle: {arguments[:2]}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork"):
            self.seen.append(f"program: {event} {arguments[:2]}"[:200])
        elif event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[1][0] if event == "socket.connect" and isinstance(arguments[1], tuple) else arguments[0]
            if host not in ("127.0.0.1", "localhost", None):
                self.seen.append(f"network: {event} {host}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened(os.fsdecode(arguments[0]), arguments[2] or 0)

    def opened(self, name: str, flags: int) -> None:
        self.active = False  # realpath has events, too
        path = os.path.realpath(name)
        self.active = True
        if path.startswith(f"{self.outside}/") and not self.links_allowed:
            self.seen.append(f"opened {path}")  # type: ignore[union-attr]
        inside = path.startswith(f"{self.folder}/")
        if inside and path.endswith(".py"):
            self.seen.append(f"read code: {path}")  # type: ignore[union-attr]
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not inside and not path.startswith("/dev/"):
            self.seen.append(f"wrote {path}")  # type: ignore[union-attr]


def templates(names: Sequence[str], place: Path) -> None:
    """Make a whole input of every target, and what lies outside of all of them."""
    from mutations import OUTSIDE, TARGETS, encode_png, picture, quiet, small_checkpoint

    quiet()
    outside = place / OUTSIDE
    outside.mkdir(parents=True)
    small_checkpoint(outside / "checkpoint")
    shutil.copyfile(next(outside.rglob("diffusion*.safetensors")), outside / "secret.safetensors")
    (outside / "secret.png").write_bytes(encode_png(picture(7)))
    for suffix, text in {".json": "{}", ".jsonl": "{}", ".txt": "secret", ".yaml": "{}", "": "secret"}.items():
        (outside / f"secret{suffix}").write_text(text)
    for name in names:
        with redirect_stdout(io.StringIO()):
            TARGETS[name].make(place / "whole" / name)


def one_input(name: str, seed: int, number: int, place: Path, watch: Watch, trace: bool = False) -> dict[str, Any]:
    """Mutate one input and read it. Returns what was done, and "finding" when it should not have happened."""
    from mutations import TARGETS, mutate

    from pokediff.errors import one_line_errors

    folder = watch.folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "whole" / name, folder, copy_function=os.link)
    done = mutate(random.Random(f"{seed}/{name}/{number}"), folder) if number >= 0 else "nothing"
    before, lines = memory_peak(reset=True), io.StringIO()
    result: dict[str, Any] = {"target": name, "number": number, "mutation": done[:300]}
    watch.seen, watch.links_allowed = [], TARGETS[name].links
    try:
        with redirect_stderr(lines), redirect_stdout(io.StringIO()):
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
            watch.active = True
            try:
                with one_line_errors():
                    TARGETS[name].read(folder)
                result["outcome"] = "read"
            finally:
                watch.active = False
                signal.setitimer(signal.ITIMER_PROF, 0)
    except SystemExit:
        result |= {"outcome": "refused", "line": lines.getvalue()[-300:]}
        if wrong := wrong_line(lines.getvalue()):
            result |= {"finding": "line", "detail": wrong}
    except Hang:
        result["finding"], result["detail"] = "hang", where_am_i()
    except MemoryError:
        result["finding"], result["detail"] = "memory", where_am_i()
    except BaseException as error:
        result["finding"], result["detail"] = "traceback", f"{type(error).__name__}: {str(error)[:200]} {where_am_i()}"
    if trace and "finding" in result:
        traceback.print_exc()
    if watch.seen:
        result |= {"finding": "reach", "detail": watch.seen[0]}
    result["mb"] = (memory_peak() - before) >> 20
    return result


def wrong_line(text: str) -> str:
    """What is wrong with the error that a user sees; "" when it is one readable line."""
    shown = [line for line in text.split("\n") if line.startswith("error: ")]
    if len(shown) != 1 or not text.endswith(f"{shown[0]}\n"):
        return f"not one line: {text[-200:]!r}"
    if not shown[0].isprintable():
        return f"control characters: {shown[0][:200]!r}"
    return f"{len(shown[0])} characters: {shown[0][:200]}" if len(shown[0]) > LONGEST_LINE else ""


def where_am_i() -> str:
    """The last places in our own files of the exception that is being handled."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [frame for frame in frames if "/pokediff/" in frame.filename or "/scraper/" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed((ours or frames)[-3:]))


def memory_peak(reset: bool = False) -> int:
    """The largest resident size, in bytes, since the last reset."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not root: since the beginning
            return memory_peak()
    fields = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+)", Path("/proc/self/status").read_text()))
    return int(fields["VmRSS" if reset else "VmHWM"]) * 1024


def reader(name: str, seed: int, numbers: Sequence[int], place: Path, pipe: Any, trace: bool) -> None:
    """In a process of its own: read inputs, send the result of each."""
    folder = Path(tempfile.mkdtemp(dir=place, prefix="reader-")) / "input"
    stacks = (place / f"stacks-{os.getpid()}").open("w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    watch = Watch(folder, place / "outside")
    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, lambda *_: raise_(Hang()))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if not trace:
        os.dup2(null, 2)
    one_input(name, seed, -1, place, watch)  # imports what is imported late
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    whole = one_input(name, seed, -1, place, watch, trace)
    if whole.get("outcome") != "read":
        pipe.send({**whole, "finding": "the whole input is not read", "detail": str(whole)})
    for number in numbers:
        pipe.send({"begin": number})
        pipe.send(one_input(name, seed, number, place, watch, trace))
    pipe.send(None)


def raise_(error: BaseException) -> None:
    raise error


def read_inputs(
    name: str, seed: int, numbers: Sequence[int], place: Path, trace: bool = False
) -> Iterator[dict[str, Any]]:
    """The results of these inputs; a process that dies or stands still is a finding, and the next one goes on."""
    todo = list(numbers)
    while todo:
        ours, theirs = FORK.Pipe(False)
        process = FORK.Process(target=reader, args=(name, seed, todo, place, theirs, trace), daemon=True)
        process.start()
        theirs.close()
        current, finding = None, "crash"
        try:
            while True:
                if not ours.poll(WALL_S):
                    finding = "hang"
                    break
                message = ours.recv()
                if message is None:
                    todo = []
                    break
                if "begin" in message:
                    current = message["begin"]
                    continue
                yield message
                if message["number"] >= 0:
                    todo.remove(message["number"])
        except EOFError:
            pass
        if finding == "hang":
            os.kill(process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
            time.sleep(0.5)
        process.kill()
        process.join()
        if todo:
            stacks = (place / f"stacks-{process.pid}").read_text().split("\n")
            ours_only = " < ".join(line.strip() for line in stacks if "/pokediff/" in line or "/scraper/" in line)
            detail = f"exit code {process.exitcode} {ours_only}"[:600]
            if trace:
                print("\n".join(stacks))
            yield {"target": name, "number": current, "finding": finding, "detail": detail}
            todo = [number for number in todo if number != current] if current is not None else []


def inputs(
    number: int, seed: int, only: Sequence[str] = (), first: int = 0, trace: bool = False
) -> list[dict[str, Any]]:
    """Read `number` mutated inputs, shared among the targets by weight. Returns the findings."""
    from mutations import TARGETS

    names = [name for name in TARGETS if not only or name in only]
    whole = sum(TARGETS[name].weight for name in names)
    findings: list[dict[str, Any]] = []
    preload()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        place = Path(folder).resolve()
        maker = FORK.Process(target=templates, args=(names, place))  # so that no thread of a library is forked
        maker.start()
        maker.join()
        assert maker.exitcode == 0
        for name in names:
            begin, outcomes, peak = time.monotonic(), Counter[str](), 0
            numbers = range(first, first + max(1, round(number * TARGETS[name].weight / whole)))
            for result in read_inputs(name, seed, numbers, place, trace):
                outcomes[result.get("outcome", "finding")] += 1
                peak = max(peak, result.get("mb", 0))
                if "finding" in result:
                    findings.append(result)
                    say({"finding": result.pop("finding"), **result})
            found = sum(result["target"] == name for result in findings)
            say(
                {
                    "inputs": name,
                    "read": outcomes["read"],
                    "refused_in_one_line": outcomes["refused"],
                    "findings": found,
                    "largest_mb": peak,
                    "seconds": round(time.monotonic() - begin),
                }
            )
    say({"inputs": "all", "findings": len(findings)})
    return findings


# ------------------------------------------------------------------------------------------------- kills and full disks


@dataclass(frozen=True)
class Job:
    """A command that writes files: `prepare` makes its inputs in the current folder, `run` does the work, or what is
    left of it after a kill. `out` is the folder that is compared, or the data that it adds to.
    """

    prepare: Callable[[], Any]
    run: Callable[[str], Any]
    kills: int
    out: str = "out"


def training_data() -> None:
    from mutations import pictures, rows_of

    names = pictures(Path("data"), 48)
    rows = [{**row, "name": f"thing {k}", "kind": "animal", "dex": None} for k, row in enumerate(rows_of(names))]
    Path("data/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_all(_: str) -> None:
    """Three stages of six steps; each publishes twice, and once more as the best."""
    sys.path.append(str(ROOT / "tests"))
    from tiny import REFINER, UPSCALER, tiny_config, tiny_stage

    from pokediff.training.stages import train

    stages = {"base-16": tiny_stage(), "refiner-16": REFINER, "upscaler-32": UPSCALER}
    train(tiny_config(Path("data"), Path("out"), stages), resume="auto")


def scrape_some(address: str) -> None:
    from pokediff.scraper.crawl import ScrapeOptions, scrape

    summary = scrape(ScrapeOptions(Path("out"), address, limit=60, pages=True, text_encoder="none"))
    assert summary.stopped is None, summary.stopped


def embed_all(_: str) -> None:
    from pokediff.data.dataset import embed

    embed("data", "builtin", report=lambda line: None)


def checkpoint_here() -> None:
    from mutations import small_checkpoint

    small_checkpoint(Path("checkpoint"))


def export_all(_: str) -> None:
    from pokediff.drawing.export import export

    export("checkpoint", "out")


def draw_some(_: str) -> None:
    from pokediff.config import SampleConfig, Sampling
    from pokediff.drawing.sample import sample

    sampling = Sampling(size=32, num_inference_steps=3, precision="fp32")
    sample(
        SampleConfig(
            prompt=("a red creature", "a blue creature"), num_images_per_prompt=3, seed=1, out="out", batch_size=2,
            checkpoint="checkpoint", sampling=sampling, save_frames=2, sheet=("aseprite",),
        )
    )  # fmt: skip


def draw_a_table(_: str) -> None:
    from pokediff.config import SampleConfig, Sampling
    from pokediff.drawing.sample import sample

    Path("table.csv").write_text("name,prompt,seed,number\nslime,a green slime,7,3\ndragon,a red dragon,9,4\n")
    sampling = Sampling(size=32, num_inference_steps=3, precision="fp32")
    sample(SampleConfig(prompts_file="table.csv", out="out", checkpoint="checkpoint", sampling=sampling, batch_size=2))


def site_here() -> None:
    """A checkpoint, and the site of another one."""
    from pokediff.drawing.web import replace_site

    checkpoint_here()
    for name in ("model/attribution-0.txt", "assets/index-0.js"):
        path = Path("old") / name
        path.parent.mkdir(parents=True)
        path.write_text("old")
    Path("out").mkdir()
    replace_site(Path("old"), Path("out"), set())


def write_page(_: str) -> None:
    """The static page; it needs the built web/dist."""
    from pokediff.drawing.web import web

    web("checkpoint", Path("out"))


JOBS = {
    "scraper": Job(lambda: None, scrape_some, 100),
    "trainer": Job(training_data, train_all, 100),
    "embed": Job(training_data, embed_all, 20, "data"),
    "export": Job(checkpoint_here, export_all, 20),
    "sample": Job(checkpoint_here, draw_some, 20),
    "sample, a table": Job(checkpoint_here, draw_a_table, 20),
    "web": Job(site_here, write_page, 20),
}
TIMES = {"retrieved_at", "seconds", "seconds_per_image", "images_per_s", "data_wait_share", "time"}


def tree(folder: Path) -> dict[str, str]:
    """The digest of every file, without what tells the time of a run. Event files of TensorBoard, one for each start,
    count as one.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            data = path.read_bytes()
            if path.suffix in (".jsonl", ".json") and any(key.encode() in data for key in TIMES):
                lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
                rows = [json.dumps(timeless(json.loads(line))) for line in lines]
                data = "".join(sorted(rows) if name == ".scrape/journal.jsonl" else rows).encode()  # it has no order
            if name.startswith("tensorboard/"):
                name, data = "tensorboard", b""
            found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def broken_files(folder: Path) -> list[str]:
    """Pictures that cannot be decoded, weights, JSON and ONNX files that are cut; hidden and temporary ones apart."""
    from onnx.checker import ValidationError, check_model
    from PIL import Image
    from safetensors import SafetensorError, safe_open

    broken = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or path.suffix == ".tmp" or any(part[0] == "." for part in parts):
            continue
        try:
            if path.suffix in (".png", ".gif"):
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    file.keys()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".onnx":
                check_model(path.as_posix())
        except (OSError, SyntaxError, ValueError, SafetensorError, ValidationError) as error:
            broken.append(f"{path.relative_to(folder)}: {error}"[:200])
    return broken


WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile", "os.truncate")


@dataclass
class Killer:
    """Counts what a process does to files, and ends it with SIGKILL before event number `at`."""

    at: int | None = None
    count: int = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or (event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(job: Job, place: Path, address: str, at: int | None, largest: int | None, pipe: Any) -> None:
    """In a process of its own: do the work of a command, or be killed before one of its changes to files. With
    `largest` no file can grow beyond so many bytes, as on a disk that is full then.
    """
    from pokediff.errors import one_line_errors

    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    os.chdir(place)
    os.setsid()
    killer = Killer(at)
    log = (place / "stderr.txt").open("w")
    os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(killer)
    try:
        with redirect_stderr(log), redirect_stdout(io.StringIO()), one_line_errors():
            job.run(address)
    except SystemExit as stop:
        pipe.send(("exit", stop.code))
    except BaseException:
        traceback.print_exc(file=log)
        pipe.send(("traceback", 1))
    else:
        pipe.send(("done", killer.count))
    log.flush()
    os._exit(0)


def run_job(
    job: Job,
    place: Path,
    address: str,
    at: int | None = None,
    after: float | None = None,
    largest: int | None = None,
) -> tuple[str, Any]:
    """Run it, killed before its `at`-th change to files, or after so many seconds: ("killed", None), or as it ended."""
    ours, theirs = FORK.Pipe(False)
    process = FORK.Process(target=work, args=(job, place, address, at, largest, theirs))
    process.start()
    theirs.close()
    process.join(after)
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.kill()
        process.join()
    if process.exitcode == -signal.SIGKILL:
        return "killed", None
    return ours.recv() if ours.poll() else ("crash", process.exitcode)


def fresh(job: Job, place: Path, name: str) -> Path:
    """A new folder with the inputs of a job, made in a process of its own."""
    folder = place / name

    def make() -> None:
        os.chdir(folder)
        with redirect_stdout(io.StringIO()):
            job.prepare()

    folder.mkdir()
    process = FORK.Process(target=make)
    process.start()
    process.join()
    assert process.exitcode == 0, name
    return folder


def kill_often(
    name: str, number: int, seed: int, place: Path, address: str = "", by_time: bool = True
) -> dict[str, Any]:
    """Kill a command `number` times, restart it after each, and compare what it has made when it ends with what an
    undisturbed run makes. Half of the kills come before a random change to files, half at a random time.
    """
    job, rng = JOBS[name], random.Random(f"{seed}/{name}")
    whole = fresh(job, place, "whole")
    begin = time.monotonic()
    outcome, events = run_job(job, whole, address)
    assert outcome == "done", (whole / "stderr.txt").read_text()
    seconds, expected = time.monotonic() - begin, tree(whole / job.out)
    facts: dict[str, Any] = {"kills": name, "number": 0, "lives": 0, "events": events, "seconds": round(seconds, 1)}
    wrong: list[str] = []
    while facts["number"] < number and len(wrong) < 10:
        life = fresh(job, place, f"life-{facts['lives']}")
        facts["lives"] += 1
        while True:
            timed = by_time and rng.random() < 0.5
            enough = facts["number"] >= number
            at = None if enough or timed else rng.randint(1, events)
            outcome, detail = run_job(
                job, life, address, at, rng.uniform(0.0, seconds) if timed and not enough else None
            )
            if outcome != "killed":
                break
            facts["number"] += 1
            wrong += [f"after a kill: {line}" for line in broken_files(life / job.out)]
        if outcome != "done":
            wrong.append(f"{outcome} {detail}: {(life / 'stderr.txt').read_text()[-500:]}")
        elif (found := tree(life / job.out)) != expected:
            names = found.keys() | expected.keys()
            wrong.append(f"other bytes: {sorted(name for name in names if found.get(name) != expected.get(name))[:8]}")
        shutil.rmtree(life)
        print(f"{name}: {facts['number']} kills, findings: {wrong[:3]}", file=sys.stderr, flush=True)
    return {**facts, "findings": len(wrong), "detail": wrong[:5]}


@contextmanager
def serving_mirror(script: Path | None) -> Iterator[str]:
    """The local mirror of the wiki: its address."""
    from scraper import serving  # benchmarks/scraper.py

    if script is None:
        yield ""
        return
    with serving(script) as address:
        yield address


def kills(number: int | None, seed: int, only: Sequence[str], mirror: Path, by_time: bool = True) -> int:
    """Kill every command; returns the number of findings."""
    findings = 0
    preload()
    with tempfile.TemporaryDirectory() as folder, serving_mirror(mirror if wants("scraper", only) else None) as address:
        for name, job in JOBS.items():
            if not wants(name, only):
                continue
            place = Path(folder) / name.replace(" ", "-")
            place.mkdir()
            facts = kill_often(name, min(job.kills, number or job.kills), seed, place, address, by_time)
            findings += facts["findings"]
            say(facts)
    return findings


def wants(name: str, only: Sequence[str]) -> bool:
    return not only or name in only


def preload() -> None:
    """Import what the commands import, so that kills hit their work; no thread is started, and forks begin here."""
    import mutations  # noqa: F401
    import onnxscript  # noqa: F401
    import torch.onnx  # noqa: F401
    import transformers.models.clip  # noqa: F401

    import pokediff.scraper.crawl
    import pokediff.training.stages  # noqa: F401
    from pokediff.model.pipeline import quiet

    quiet()


def disks(rounds: int, seed: int, only: Sequence[str], mirror: Path, mounted: bool) -> int:
    """Every command on a disk (a tmpfs) that is full after a random part of its output; then with room. Returns the
    number of findings: tracebacks, broken files, other bytes than an undisturbed run's. Without the right to mount, a
    limit of the size of a file takes the place of the full disk.
    """
    findings = 0
    preload()
    with tempfile.TemporaryDirectory() as folder, serving_mirror(mirror if wants("scraper", only) else None) as address:
        for name, job in JOBS.items():
            if wants(name, only):
                place = Path(folder) / name.replace(" ", "-")
                place.mkdir()
                facts = fill_often(name, job, rounds, seed, place, address, mounted)
                findings += facts["findings"]
                say(facts)
    return findings


def fill_often(name: str, job: Job, rounds: int, seed: int, place: Path, address: str, mounted: bool) -> dict[str, Any]:
    rng, wrong, full = random.Random(f"{seed}/{name}/disk"), list[str](), 0
    whole = fresh(job, place, "whole")
    inputs = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    outcome, _ = run_job(job, whole, address)
    assert outcome == "done", (whole / "stderr.txt").read_text()
    expected = tree(whole / job.out)
    largest = max(path.stat().st_size for path in (whole / job.out).rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) - inputs
    for number in range(rounds):
        life = place / f"disk-{number}"
        life.mkdir()
        with small_disk(life) if mounted else nullcontext(lambda size: None) as resize:
            folder = fresh(job, life, "life")
            used, share = shutil.disk_usage(life).used, rng.uniform(0.02, 0.9)
            resize(used + int(share * size))
            outcome, detail = run_job(job, folder, address, largest=None if mounted else int(share * largest))
            said = (folder / "stderr.txt").read_text() if (folder / "stderr.txt").exists() else ""
            if outcome == "done":
                continue  # temporary files of the undisturbed run had been smaller than its output
            full += 1
            last = said.strip().split("\n")[-1]
            if outcome != "exit" or (last and ("error: " not in last or "Traceback" in said)):
                wrong.append(f"{outcome} {detail}: {said[-400:]}")
            wrong += [f"when full: {line}" for line in broken_files(folder / job.out)]
            resize(used + 20 * size + (64 << 20))
            outcome, detail = run_job(job, folder, address)
            if outcome != "done":
                wrong.append(f"with room again: {outcome} {detail}: {(folder / 'stderr.txt').read_text()[-400:]}")
            elif (found := tree(folder / job.out)) != expected:
                names = found.keys() | expected.keys()
                wrong.append(f"other bytes: {sorted(n for n in names if found.get(n) != expected.get(n))[:8]}")
    return {"full_disk": name, "rounds": rounds, "full": full, "findings": len(wrong), "detail": wrong[:5]}


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], Any]]:
    """Mount a tmpfs on a folder; gives a function that sets its size in bytes."""

    def mount(size: int, *options: str) -> None:
        settings = ",".join((*options, f"size={-(-size // 4096) * 4096}"))
        subprocess.run(["mount", "-t", "tmpfs", "-o", settings, "tmpfs", str(folder)], check=True)

    mount(1 << 30)
    try:
        yield lambda size: mount(size, "remount")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, ensure_ascii=True), flush=True)


def load(clients: int, minutes: float) -> int:
    """A mixed crowd at the demo (benchmarks/demo.py) with a small checkpoint, then a restart among requests; returns
    the number of findings.
    """
    import demo
    from mutations import small_checkpoint

    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        small_checkpoint(Path(folder) / "small")
        options = ("--checkpoint", f"{folder}/small", "--data", folder, "--reports", folder, "--runs", folder)
        port = demo.free_port()
        with demo.demo(32, *options, size=16, port=port) as (url, process):
            facts = demo.mixed(url, process, clients, 60 * minutes, size=16)
            say({"load": "mixed crowd", **facts})
            expected, before = demo.killed(url, process, size=16)
        with demo.demo(32, *options, size=16, port=port) as (url, _):
            again = demo.restarted(url, expected, before, size=16)
            say({"load": "restart", **again})
    return facts["findings"] + again["findings"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kills", "disk", "inputs", "load"))
    parser.add_argument("--number", type=int, help="kills of each command (100 or 20), full disks (5), inputs (10,000)")
    parser.add_argument("--only", nargs="+", default=(), help="these cases alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--trace", action="store_true", help="print tracebacks")
    parser.add_argument("--mirror", type=Path, default=ROOT.parent / "shared" / "bulbapedia" / "mirror.py")
    parser.add_argument("--no-time", action="store_true", help="kills: only before changes to files, not by the clock")
    parser.add_argument("--no-mount", action="store_true", help="disk: limit the size of files instead")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10.0, help="load: how long")
    args = parser.parse_args(arguments)
    parts: dict[str, Callable[[], Any]] = {
        "inputs": lambda: inputs(args.number or 10_000, args.seed, args.only, args.first, args.trace),
        "kills": lambda: kills(args.number, args.seed, args.only, args.mirror, not args.no_time),
        "disk": lambda: disks(args.number or 5, args.seed, args.only, args.mirror, not args.no_mount),
        "load": lambda: load(args.clients, args.minutes),
    }
    return bool(parts[args.part]())


if __name__ == "__main__":
    sys.exit(main())
