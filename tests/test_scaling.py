"""Several processes on one machine and on two hosts: network namespaces with a link that can be slowed down and cut."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch.distributed.run
from conftest import ROOT
from forks import ended, forked
from test_training import assert_same_state, newest_state
from tiny import tiny_config, tiny_stage

from pokediff.config import SampleConfig, Sampling, TrainConfig, dump_yaml
from pokediff.data.dataset import TrainingBatches, caption_vectors, load_pictures
from pokediff.drawing.sample import load_checkpoint, sample
from pokediff.errors import PokediffError
from pokediff.evaluation.features import CachedFeatures, FeatureNet
from pokediff.evaluation.generators import Drawer
from pokediff.training import launch
from pokediff.training.launch import missing_processes, number_of_processes, processes
from pokediff.training.stages import train

PATIENCE = 300  # seconds until a test that waits for another process fails
LATER = 10**6  # steps
TRAIN = str(ROOT / "train.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# train.py on machines that miss each other after ten seconds.
IMPATIENT = """
from datetime import timedelta
from pokediff.cli import main
from pokediff.training import launch

launch.MEET_EVERY, launch.LOST_AFTER = 1.0, timedelta(seconds=10)
main(command="train", prog="train.py")
"""
NAMES = (*launch.STARTED_BY, "ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_WORLD_SIZE")
NAMES = (*NAMES, "SLURM_STEP_NUM_TASKS", "GLOO_SOCKET_IFNAME")
DRAWN = {"0000.png", "0004.png", "grid.png", "denoising.gif", "large/0002.png"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without launchers."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


# ------------------------------------------------------------------------------------------------------- the launchers


def accelerate_started(monkeypatch: pytest.MonkeyPatch, *options: str, cpu: bool = True) -> None:
    """This process is the one that `accelerate launch` started with these options."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: ["accelerate", "launch", *options, "train.py"])


@pytest.mark.parametrize("cpu", [True, False])
def test_accelerate_starts_as_many_processes_as_it_was_told(alone, cpu):
    alone.setattr(launch, "on_cpu", lambda: True)  # there is no GPU, whether --cpu says so or not
    accelerate_started(alone, "--num_processes", "2", cpu=cpu)
    assert missing_processes() == ["--standalone", "--nproc_per_node", "2"]
    accelerate_started(alone, "--num-processes=4", "--num_machines=2", "--machine_rank", "1", cpu=cpu)
    place = ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29500"]
    assert missing_processes() == [*place, "--nproc_per_node", "2"]
    accelerate_started(alone, "--num_processes", "1", cpu=cpu)
    assert missing_processes() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "one process of several: give accelerate launch --cpu and --num_processes N"),
        (("--num_processes", "2"), "one process of 2: give it --multi_gpu"),
        (("--num_processes", "3", "--num_machines", "2"), "--num_processes 3 cannot be shared by 2 machines"),
    ],
)
def test_a_launch_that_would_train_alone_is_an_error(alone, options, words):
    accelerate_started(alone, *options)
    alone.setattr(launch, "on_cpu", lambda: "2 machines" in words)
    with pytest.raises(PokediffError, match=words):
        missing_processes()


def test_processes_that_cannot_meet_are_an_error(alone):
    assert number_of_processes() == 1
    alone.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(PokediffError, match="srun started processes that do not know of each other"):
        number_of_processes()
    alone.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert number_of_processes() == 4
    alone.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    with pytest.raises(PokediffError, match="works in one process"), processes(shares=False):
        pass


def test_gloo_listens_where_the_first_machine_is(alone):
    launch.listen_where_others_are("127.0.0.1")
    assert "GLOO_SOCKET_IFNAME" not in os.environ  # loopback leads nowhere
    with pytest.raises(PokediffError, match="no way to MASTER_ADDR no-such-host"):
        launch.listen_where_others_are("no-such-host.invalid")


def test_any_number_of_processes_draws_the_same_batches(data):
    pictures = load_pictures(data, 16).with_shared_captions()
    vectors = caption_vectors([data], pictures, "builtin")

    def batch(step: int, world: int) -> list[list[float]]:
        options = dict(batch_size=8, caption_dropout=0.2, seed=3, world=world)
        config = tiny_config(data, Path("unused")).dataset
        parts = [TrainingBatches(pictures, vectors, config, rank=rank, **options)[step] for rank in range(world)]
        return [[*part.pixels.flatten().tolist(), *part.text.flatten().tolist()] for part in parts]

    for world in (2, 4, 8):
        whole, parts = batch(5, 1)[0], batch(5, world)
        pixels = 8 * 16 * 16 * 4
        mine = [part[: pixels // world] for part in parts] + [part[pixels // world :] for part in parts]
        assert [value for part in mine for value in part] == whole


# ----------------------------------------------------------------------------------------------------- on one machine


def torchrun(words: Sequence[str], host: str = "") -> None:
    """The command torchrun, in the network namespace `host`; what it starts are forks of this process."""
    enter(host)
    torch.distributed.run.main(["--run-path", "--start-method=fork", *words])


def enter(host: str) -> None:
    """Move this process into a network namespace."""
    if host:
        with Path("/run/netns", host).open() as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0


def wait_for(path: Path, pattern: str, *started: BaseProcess) -> None:
    begun = time.monotonic()
    while not list(path.glob(pattern)):
        assert all(process.is_alive() for process in started), "ended too early"
        assert time.monotonic() - begun < PATIENCE, f"no {pattern}"
        time.sleep(0.02)


def write_config(config: TrainConfig) -> str:
    path = Path(f"{config.out}.yaml")
    path.write_text(dump_yaml(config))
    return str(path)


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("error: ")]


def quiet_stage(max_steps: int):
    """A state every two steps, and nothing else before the end."""
    return tiny_stage(max_steps=max_steps, checkpoint_every=2, validate_every=LATER, preview_every=LATER)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_state_of_one_process_goes_on_with_two_and_torchrun_restarts_the_killed(data, tmp_path):
    one = train(tiny_config(data, tmp_path / "one", {"base-16": quiet_stage(2)}))
    shutil.copytree(one, tmp_path / "two")
    config = tiny_config(data, tmp_path / "two", {"base-16": quiet_stage(16)})
    words = ["--standalone", "--nproc_per_node", "2", "--max-restarts", "1", TRAIN, "--config", write_config(config)]
    started = forked(torchrun, [*words, "--resume", "auto"], log=tmp_path / "log", **ONE_THREAD)
    wait_for(tmp_path / "two", ".writer", started)  # of the first process
    victim = max(process.pid for process in psutil.Process(started.pid).children())
    wait_for(tmp_path / "two" / "state" / "base-16", "step-*4", started)
    os.kill(victim, signal.SIGKILL)
    assert ended(started, PATIENCE) == 0, (tmp_path / "log").read_text()
    train(replace(config, out=str(one)), resume="auto")
    assert_same_state(newest_state(tmp_path / "two"), newest_state(one), rtol=1e-2, atol=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert {row["step"]: row["processes"] for row in rows if "loss" in row} == {
        1: 1,
        2: 1,
        **dict.fromkeys(range(3, 17), 2),
    }
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (facts["processes"], facts["machines"]) == (2, 1)
    assert "2 processes on 1 machine" in (tmp_path / "log").read_text()


# --------------------------------------------------------------------------------------------------------- on two hosts


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a slow link between 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need the program ip, and root")
    names = [f"pokediff-{os.getpid()}-{k}" for k in (1, 2)]
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add link0 netns {names[0]} type veth peer name link0 netns {names[1]}")
    for k, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{k}/24 dev link0", f"-n {name} link set lo up"]
        commands.append(f"-n {name} link set link0 up")
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"this system allows no network namespaces: {done.stderr.strip()}")
        # so that the link is cut within a few steps of the first state; not all kernels can do it
        slow = f"netns exec {names[0]} tc qdisc add dev link0 root tbf rate 30mbit burst 64k latency 100ms"
        subprocess.run(["ip", *slow.split()], capture_output=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_both(hosts: list[str], tmp_path: Path, *words: str) -> list[BaseProcess]:
    """torchrun on both hosts, one process each; output in host-1 and host-2."""
    place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=10.77.0.1", "--master_port=29444"]
    return [
        forked(torchrun, [*place, f"--node_rank={k}", *words], host, log=tmp_path / f"host-{k + 1}", **ONE_THREAD)
        for k, host in enumerate(hosts)
    ]


@pytest.mark.slow
def test_two_hosts_train_and_stop_when_their_link_is_cut(hosts, data, tmp_path):
    config = tiny_config(data, tmp_path / "run", {"base-16": quiet_stage(LATER)})
    (tmp_path / "main.py").write_text(IMPATIENT)
    started = on_both(hosts, tmp_path, str(tmp_path / "main.py"), "--config", write_config(config))
    wait_for(tmp_path / "run" / "state" / "base-16", "step-*", *started)
    subprocess.run(["ip", "-n", hosts[0], "link", "set", "link0", "down"], check=True)
    assert [ended(process, PATIENCE) for process in started] == [1, 1]  # of torchrun, for a process that failed
    for k in (1, 2):
        (line,) = errors(tmp_path / f"host-{k}")
        assert f"process {k - 1} of 2" in line
        assert "--resume auto" in line
    assert "2 processes on 2 machines" in (tmp_path / "host-1").read_text()
    state = newest_state(tmp_path / "run")
    step = json.loads((state / "progress.json").read_text())["progress"]["step"]
    # the state is that of one process, and one process goes on from it
    one = tiny_config(data, tmp_path / "one", {"base-16": quiet_stage(step)})
    assert_same_state(state, newest_state(train(one)), rtol=1e-2, atol=1e-4)
    train(replace(config, stages={"base-16": quiet_stage(step + 2)}), resume="auto")
    assert newest_state(tmp_path / "run").name == f"step-{step + 2:08}"


@pytest.mark.slow
def test_two_hosts_resume_and_draw(hosts, data, tiny_checkpoint, tmp_path):
    """All in one launch: resume a training, draw five pictures of which three are there, draw for an evaluation."""
    run = train(tiny_config(data, tmp_path / "one", {"base-16": quiet_stage(2)}))
    shutil.copytree(run, tmp_path / "two")
    config = tiny_config(data, tmp_path / "two", {"base-16": quiet_stage(6)})
    sampling = Sampling(size=32, num_inference_steps=3, precision="fp32")
    drawing = SampleConfig(
        prompt=tuple(f"a {color} creature" for color in ("red", "green", "blue", "yellow", "red")),
        checkpoint=str(tiny_checkpoint), out=str(tmp_path / "drawn"), seed=0, batch_size=2, sampling=sampling,
    )  # fmt: skip
    (tmp_path / "table.csv").write_text(
        "name,prompt\nfirst,a red creature\nsecond,a blue creature\nthird,a green one\n"
    )
    table = replace(drawing, prompt=(), prompts_file=str(tmp_path / "table.csv"), out=str(tmp_path / "two" / "table"))
    tabled = sample(replace(table, out=str(tmp_path / "tabled")))
    whole = sample(replace(drawing, out=str(tmp_path / "whole")))
    shutil.copytree(whole, tmp_path / "drawn")
    for name in ("0003.png", "0004.png", "grid.png"):  # as if it had been killed
        (tmp_path / "drawn" / name).unlink()
    (tmp_path / "main.py").write_text(f"""
from pathlib import Path
import numpy as np
from pokediff.config import *
from pokediff.drawing.sample import load_checkpoint, sample
from pokediff.evaluation.features import CachedFeatures, FeatureNet
from pokediff.evaluation.generators import Drawer
from pokediff.training.launch import processes
from pokediff.training.stages import train

def mean(rgb):
    print("a batch to features")
    return rgb.mean((2, 3))

with processes():
    train(load_yaml(Path({write_config(config)!r}), TrainConfig), resume="auto")
    sample({drawing!r})
    sample({table!r})
    drawer = Drawer(load_checkpoint({str(tiny_checkpoint)!r}, "cpu"), {sampling!r}, Path({str(tmp_path / "two")!r}), 2)
    pixels = drawer.draw("report", {drawing.prompt!r}).pixels
    CachedFeatures(FeatureNet("mean", "", mean), "white", Path({str(tmp_path / "two")!r}) / "cache").share(
        np.concatenate([pixels] * 15), pixels
    )
""")
    started = on_both(hosts, tmp_path, str(tmp_path / "main.py"))
    assert [ended(process, PATIENCE) for process in started] == [0, 0], (tmp_path / "host-1").read_text()
    train(replace(config, out=str(run)), resume="auto")
    assert_same_state(newest_state(tmp_path / "two"), newest_state(run), rtol=1e-2, atol=1e-4)

    def content(folder: Path) -> dict[str, bytes]:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if path.suffix != ".json"}

    assert content(tmp_path / "drawn") == content(whole)
    assert content(whole).keys() >= DRAWN
    assert content(tmp_path / "two" / "table") == content(tabled)
    assert content(tabled).keys() == {"first.png", "second.png", "third.png", "manifest.csv"}
    facts = json.loads((tmp_path / "drawn" / "sample.json").read_text())
    assert facts["processes"] == 2
    assert len(facts["pictures"]) == 5
    said = (tmp_path / "host-1").read_text()
    assert "3 of 5 pictures are in" in said
    assert "5 pictures, seed 0" in said
    assert "pictures" not in (tmp_path / "host-2").read_text()  # the first process alone speaks
    drawer = Drawer(load_checkpoint(str(tiny_checkpoint), "cpu"), sampling, tmp_path / "one", 2)
    pixels = drawer.draw("report", drawing.prompt).pixels
    assert content(tmp_path / "two" / "report") == content(tmp_path / "one" / "report")
    net = CachedFeatures(FeatureNet("mean", "", lambda rgb: rgb.mean((2, 3))), "white", tmp_path / "one" / "cache")
    net(np.concatenate([pixels] * 15))
    net(pixels)
    assert content(tmp_path / "two" / "cache") == content(tmp_path / "one" / "cache")
    assert [text.count("a batch to features") for text in (said, (tmp_path / "host-2").read_text())] == [3, 1]


@pytest.mark.slow
def test_two_trainings_in_one_folder_are_refused(alone, data, tmp_path):
    """Two processes that do not know of each other, as of two terminals."""
    from pokediff.files import own_folder

    with own_folder(tmp_path / "run", "run.json"), pytest.raises(PokediffError, match="writes to"):
        train(tiny_config(data, tmp_path / "run"))
