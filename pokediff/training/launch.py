"""Several processes, on one machine or many: who starts them, how they meet, and what they do when one is lost.

torchrun, accelerate launch or MPI start them; torch.distributed connects them, GPUs by NCCL and CPUs by gloo.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pokediff.errors import PokediffError, first_line
from pokediff.progress import ProgressBar

if TYPE_CHECKING:
    from accelerate import PartialState

STARTED_BY = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}  # torchrun or MPI
MEET_EVERY = 5.0  # seconds between the signs of life
LOST_AFTER = timedelta(seconds=30)  # without one, a process or the way to it is lost
# The longest wait for a process that lives: the first one validates, draws and writes while the others wait.
WORKING = timedelta(hours=6)
ALONE = "give accelerate launch --cpu and --num_processes N on its command line, or use torchrun --nproc_per_node N"
LOST = (
    "another process has ended, or its machine cannot be reached; its own error says why. What was written is whole: "
    "start all of them again, a training with --resume auto"
)


# ------------------------------------------------------------------------------------------------------- the launchers


def missing_processes() -> list[str]:
    """The options with which torchrun starts what `accelerate launch --num_processes N` did not; [] elsewhere.

    Without several GPUs and MPI accelerate 1.x sets MASTER_ADDR and starts one process. N is known only from the
    command line of the launcher, our parent.
    """
    if not {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() or STARTED_BY & os.environ.keys():
        return []
    import psutil

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("num_processes", "num_machines", "machine_rank"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    given = parser.parse_known_args(psutil.Process(os.getppid()).cmdline())[0]
    if given.num_processes is None:
        raise PokediffError(f"accelerate launch started one process of several: {ALONE}")
    machines = given.num_machines or 1
    if given.num_processes <= 1 and machines <= 1:
        return []
    if not on_cpu():
        raise PokediffError(
            f"accelerate launch started one process of {given.num_processes}: give it --multi_gpu, with no more "
            "processes than GPUs, or --cpu"
        )
    if given.num_processes % machines:
        raise PokediffError(f"--num_processes {given.num_processes} cannot be shared by {machines} machines")
    options = ["--nproc_per_node", str(given.num_processes // machines)]
    if machines == 1:
        return ["--standalone", *options]
    place = [f"--master_addr={os.environ['MASTER_ADDR']}", f"--master_port={os.environ['MASTER_PORT']}"]
    return [f"--nnodes={machines}", f"--node_rank={given.machine_rank or 0}", *place, *options]


def start_missing_processes() -> None:
    """Where `accelerate launch --num_processes N` started one process on a CPU, become torchrun, which starts N; else
    do nothing.
    """
    if not (options := missing_processes()):
        return
    command = [sys.executable, "-m", "torch.distributed.run", *options, *sys.argv]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if os.name == "nt":  # where exec returns to the shell at once
        raise SystemExit(subprocess.call(command))
    os.execv(sys.executable, command)


def number_of_processes() -> int:
    """How many processes the launcher started, on all machines."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and not STARTED_BY & os.environ.keys():
        raise PokediffError(
            "srun started processes that do not know of each other: start one torchrun a machine with it, srun "
            "--ntasks-per-node 1 torchrun --nnodes N --nproc_per_node M --rdzv_backend c10d --rdzv_endpoint HOST:29400"
        )
    return max((int(os.environ[name]) for name in STARTED_BY & os.environ.keys()), default=1)


def on_cpu() -> bool:
    """Whether processes share work on CPUs: the launcher says so, or there is no GPU that could."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or torch.xpu.is_available())


def machines() -> int:
    """How many machines share the work, each with as many processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return world // int(os.environ.get("LOCAL_WORLD_SIZE", world))


def threads_per_process() -> int:
    """The cores that this process may use, shared with the others on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --------------------------------------------------------------------------------------------------------- the meeting


def join(**options: Any) -> PartialState:
    """accelerate's state of this process; the first call connects the processes that a launcher started.

    accelerate connects those on a CPU only where it is told that it is one, and those of MPI only there: in any other
    case each would work alone. `options` are those of torch.distributed.init_process_group.

    Raises PokediffError when they cannot be connected.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from accelerate.utils.environment import get_cpu_distributed_information
    from torch.distributed import PrefixStore
    from torch.distributed.constants import default_pg_timeout
    from torch.distributed.rendezvous import rendezvous

    world = number_of_processes()
    if world == 1 or PartialState._shared_state:
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    places = get_cpu_distributed_information()  # under the names of torchrun or MPI
    for name in ("rank", "world_size", "local_rank", "local_world_size"):
        os.environ[name.upper()] = str(getattr(places, name))
    several_machines = places.local_world_size != world
    if "MASTER_ADDR" not in os.environ:
        if several_machines:
            raise PokediffError("MASTER_ADDR is not set: export the address of the first machine under this name")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "29500")
    if several_machines:
        listen_where_others_are(os.environ["MASTER_ADDR"])
    cpu = on_cpu()
    if not cpu and torch.cuda.is_available() and places.local_world_size > torch.cuda.device_count():
        raise PokediffError(
            f"{places.local_world_size} processes here for {torch.cuda.device_count()} GPU: start one a GPU, or on the "
            "CPU with ACCELERATE_USE_CPU=true"
        )
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # Accelerator must agree
        torch.set_num_threads(threads_per_process())  # launchers leave all but one core idle
    if not several_machines:  # where torchrun restarts processes, its store still holds addresses of the ended ones
        store, rank, _ = next(rendezvous("env://", timeout=options.get("timeout", default_pg_timeout)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        options |= {"store": PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": world}
    return PartialState(cpu=cpu, **options)


def listen_where_others_are(master: str) -> None:
    """Let gloo use the network interface that leads to the first machine. By itself it takes the one that the name of
    this host stands for, which /etc/hosts often declares to be 127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import psutil

    try:
        family, _, _, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of UDP: sends nothing, chooses a route
            own = probe.getsockname()[0]
    except OSError as error:
        raise PokediffError(f"no way to MASTER_ADDR {master}: {error.strerror}") from None
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and own in {entry.address for entry in addresses}:
            os.environ["GLOO_SOCKET_IFNAME"] = name


@contextmanager
def processes(shares: bool = True) -> Iterator[None]:
    """Around a command: starts the processes that accelerate did not, connects them, and ends this one within a
    minute when another ends before its time or its machine cannot be reached. Does nothing for a single process.

    Raises PokediffError then, and for a command that does not share its work.
    """
    if shares:
        start_missing_processes()
    if number_of_processes() == 1:
        yield
        return
    if not shares:
        raise PokediffError("this command works in one process: start it without torchrun or mpirun")
    import torch.distributed as dist

    try:
        join(timeout=WORKING)
        watch = Watch()
    except RuntimeError as error:
        raise PokediffError(
            f"the processes do not find each other ({first_line(error)}): check MASTER_ADDR, the firewall, and that "
            "GLOO_SOCKET_IFNAME, if set, is the network interface between the machines"
        ) from None
    watch.start()
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            watch.abandon()
            raise
        watch.reporting.acquire()
        raise PokediffError(lost()) from None
    except BaseException:
        watch.abandon()
        raise
    watch.leave()
    dist.destroy_process_group()


def lost() -> str:
    return f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {platform.node()}: {LOST}"


class Watch(threading.Thread):
    """Meets the watches of all other processes every MEET_EVERY seconds, and ends this process when one is missing.

    The timeout of the collectives themselves could not do it: the first process may validate or draw for an hour
    while the others wait. And without one a cut cable goes unnoticed: TCP says nothing.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        super().__init__(daemon=True)
        self.group: Any = dist.new_group(backend="gloo", timeout=LOST_AFTER)
        self.leaving, self.abandoned = threading.Event(), threading.Event()
        self.reporting = threading.Lock()  # of the thread that reports the loss: this one, or the main one

    def run(self) -> None:
        import torch
        import torch.distributed as dist

        try:
            while not self.abandoned.is_set():
                all_leave = torch.tensor([int(self.leaving.is_set())])
                dist.all_reduce(all_leave, dist.ReduceOp.MIN, group=self.group)
                if all_leave.item():
                    return
                self.leaving.wait(MEET_EVERY)
        except RuntimeError:
            if self.abandoned.is_set():
                return
            self.reporting.acquire()
            ProgressBar.write(f"error: {lost()}", file=sys.stderr)  # below the progress bar
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)  # the main thread waits for the lost one

    def leave(self) -> None:
        """Wait until all processes are done, so that none misses one that merely finished first."""
        self.leaving.set()
        self.join()

    def abandon(self) -> None:
        """Stop without the others, which will miss this process."""
        self.abandoned.set()
        self.leaving.set()
        self.join(MEET_EVERY + 1)  # Python must not end under a thread that is in C++
