"""Processes of their own, forked by a server that has imported torch once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.tiny", "pytest", "wadi.cli", "wadi.distill.run", "wadi.emoji.judge"])


class Process:
    """A function of a module, run in a process of its own; what it prints goes into files.

    Args:
        folder: where stdout and stderr go.
        work: the function; a whole number that it returns is the exit status.
        arguments: what it is called with.
        environment: variables that are set before it runs.
        name: how the files begin.
    """

    def __init__(
        self,
        folder: Path,
        work: Callable[..., Any],
        *arguments: Any,
        environment: dict[str, str] | None = None,
        name: str = "process",
    ) -> None:
        self.files = [folder / f"{name}.{stream}" for stream in ("out", "err")]
        for path in self.files:
            path.touch()
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | (environment or {})
        self.process = SERVER.Process(target=_run, args=(self.files, environment, work, arguments))
        self.process.start()

    def communicate(self, timeout: float = 250) -> tuple[int, str, str]:
        """Wait for its end: exit status, stdout and stderr. It is killed after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode, *(path.read_text() for path in self.files)


def _run(files: list[Path], environment: dict[str, str], work: Callable[..., Any], arguments: tuple) -> None:
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported stays
    status = work(*arguments)
    if isinstance(status, int):
        sys.exit(status)


def start_two(folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Process]:
    """Two processes on the CPU that know each other, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    return [
        Process(
            folder,
            work,
            *arguments,
            environment=both | {"RANK": rank, "LOCAL_RANK": rank},
            name=f"rank-{rank}",
        )
        for rank in ("0", "1")
    ]
