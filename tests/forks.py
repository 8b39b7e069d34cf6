"""Processes of their own that need no seconds to import torch, diffusers and transformers: forks of one that has."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    IMPORTED = ["pokediff.training.stages", "pokediff.drawing.sample", "pokediff.evaluation.generators", "pytest"]
    IMPORTED += ["transformers.models.clip", "torch._dynamo", "torch.distributed.run", "pokediff.scraper.crawl"]
    CONTEXT.set_forkserver_preload(IMPORTED)


def forked(work: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> BaseProcess:
    """Start a process that calls a function of a module, with its output in a file, in the environment of this one and
    with these variables.
    """
    process = CONTEXT.Process(target=_work, args=(work, arguments, log, {**os.environ, **environment}))
    process.start()
    return process


def _work(work: Callable[..., Any], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work(*arguments)


def ended(process: BaseProcess, seconds: float = 600) -> int | None:
    """Wait for it, so long; then it is killed. Returns its exit code."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode
