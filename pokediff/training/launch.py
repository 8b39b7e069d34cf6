"""Several processes on a CPU, where `accelerate launch` starts only one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from pokediff.errors import PokediffError

STARTED_BY = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}  # torchrun or MPI


def missing_processes() -> int:
    """N of `accelerate launch --cpu --num_processes N` where it started one process; 0 elsewhere.

    On a CPU without MPI accelerate 1.x sets MASTER_ADDR and starts one process. N is known only from the command line
    of the launcher, our parent.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_cpu or "MASTER_ADDR" not in os.environ or STARTED_BY & os.environ.keys():
        return 0
    import psutil

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    number = parser.parse_known_args(psutil.Process(os.getppid()).cmdline())[0].num_processes
    if number is None:
        raise PokediffError(
            "accelerate launch starts one process only on a CPU: give it --num_processes N on the command line, or use "
            "torchrun --nproc_per_node N train.py ..."
        )
    return number


def start_missing_processes() -> None:
    """Where `accelerate launch --cpu --num_processes N` started one process, become torchrun, which starts N; else do
    nothing.
    """
    if (number := missing_processes()) <= 1:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command = [sys.executable, *torchrun, *sys.argv]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if os.name == "nt":  # where exec returns to the shell at once
        raise SystemExit(subprocess.call(command))
    os.execv(sys.executable, command)
