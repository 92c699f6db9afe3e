"""Samples a second of WaDi's training on one GPU and on several of one host, each with its own batch.

    python benchmarks/scaling.py --processes 1 2         # SD 1.5's configuration, random weights
    python benchmarks/scaling.py --model tiny --batch-size 2 --cpu    # does it run?

Every process trains on as many latents a step as one alone does, and gradients are averaged by
DistributedDataParallel: efficiency is the time of a step alone over the time of a step together. Started as a
user starts it, with `accelerate launch`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
import adapters
import iteration


@dataclass
class Options:
    """Time one training iteration on one process and on several."""

    model: Literal["sd15", "pixart-256", "tiny"] = "sd15"
    """Configuration of the network; its weights are random."""
    processes: tuple[int, ...] = (1, 2)
    """How many to start, one after the other."""
    batch_size: int = 16
    """Latents an iteration, of each process."""
    gradient_checkpointing: bool = False
    """Recompute in backward."""
    repeats: int = 8
    """Timed runs of three iterations; the median counts."""
    cpu: bool = False
    """Processes on the CPU."""
    worker: Path | None = None
    """What the processes are started with; leave it out."""
    out: Path | None = None
    """JSON file for the figures."""


def work(options: Options) -> None:
    """One process of several: time the trainer's steps; the first writes the median."""
    device = "cpu" if options.cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not options.cpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    like = iteration.Options(model=options.model, device=device)
    step = iteration.ours(like, options.batch_size, options.gradient_checkpointing)
    wait = (lambda: None) if options.cpu else torch.cuda.synchronize
    times = []
    for run in range(-1, options.repeats):
        wait()
        start = time.perf_counter()
        for _ in range(iteration.CHAIN):
            step()
        wait()
        if run >= 0:
            times.append(1000 * (time.perf_counter() - start) / iteration.CHAIN)
    if os.environ.get("RANK", "0") == "0":
        options.worker.write_text(json.dumps(statistics.median(times)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launched(options: Options, processes: int) -> float:
    """Milliseconds of a step on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "milliseconds.json"
        several = ["--multi_gpu"] if processes > 1 and not options.cpu else []
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)),
            *several,
            *(["--cpu"] if options.cpu else []),
            __file__,
            *("--worker", str(result), "--model", options.model, "--batch-size", str(options.batch_size)),
            *("--repeats", str(options.repeats)),
            "--gradient-checkpointing" if options.gradient_checkpointing else "--no-gradient-checkpointing",
            *(["--cpu"] if options.cpu else []),
        ]
        subprocess.run(command, check=True)
        return json.loads(result.read_text())


def main(options: Options) -> None:
    """Start every number of processes and print the table."""
    if options.worker is not None:
        work(options)
        return
    head = adapters.header(adapters.Options(device="cpu" if options.cpu else "cuda"))
    print(head.replace("sd15", options.model, 1), flush=True)
    milliseconds = {processes: launched(options, processes) for processes in options.processes}
    print("| processes | batch | ms a step | samples/s | efficiency |\n| --- | --- | --- | --- | --- |")
    first = options.processes[0]
    for processes, ms in milliseconds.items():
        samples = processes * options.batch_size
        print(
            f"| {processes} | {samples} | {ms:.0f} | {1000 * samples / ms:.1f} | "
            f"{milliseconds[first] / ms:.2f} |"
        )
    if options.out is not None:
        report = {"header": head, "options": str(options), "milliseconds": milliseconds}
        options.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))
