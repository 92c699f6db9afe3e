"""Time and memory of `wadi distill` on one GPU and on several of one host, each with its own batch.

    python benchmarks/teachers.py sdxl --out teachers/sdxl
    python benchmarks/scaling.py --preset sdxl --teacher teachers/sdxl --cuda-graphs
    python benchmarks/scaling.py --processes 2 --steps 12 --preset flux-dev --teacher FOLDER --shard-base
    python benchmarks/scaling.py --steps 4 --cpu --preset none --teacher FOLDER    # does it run?

All other options are those of `wadi distill`. Every process trains on as many images a step as one alone
does: efficiency is the time of a step alone over the time of a step together. The run is started as a user
starts it, with `accelerate launch`, and goes through loading, encoding, training and the checkpoint; sample
grids, export and report are omitted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
import adapters

from wadi.commands.distill import parse
from wadi.distill import DistillConfig
from wadi.distill import run as run_room

PROMPTS = ["a red cat", "a blue dog on a hill", "two green birds in a tree", "a small house by the sea"]
LOGS = 4
"""The steps are logged so often. The first of these parts warms up, and the others are timed."""


@dataclass
class Options:
    """Time `wadi distill` on one process and on several."""

    processes: tuple[int, ...] = (1, 2)
    """How many to start, one after the other."""
    steps: int = 40
    """Updates of the student; the first quarter warms up."""
    cpu: bool = False
    """Processes on the CPU."""
    worker: Path | None = None
    """What the processes are started with; omit it."""
    out: Path | None = None
    """JSON file for the figures."""


def work(folder: Path) -> None:
    """One process of several: a run without its export; writes the peak of its device's memory."""
    run_room.export = lambda trainer, run: None
    run_room.distill(DistillConfig.load(folder / "config.yaml"))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    (folder / f"peak-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak))


def launched(options: Options, distil: list[str], processes: int) -> dict[str, float]:
    """Milliseconds of a step, and the most GiB that any process allocated."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        config, _ = parse(["--prompts", str(folder / "prompts.txt"), *distil])
        config.replace(
            output_dir=str(folder / "run"),
            max_train_steps=options.steps,
            logging_steps=options.steps // LOGS,
            checkpointing_steps=options.steps,
            validation_steps=0,
        ).save(folder / "config.yaml")
        subprocess.run(
            [*_launcher(options, processes), __file__, "--worker", str(folder)],
            check=True,
            env=os.environ | ({"ACCELERATE_USE_CPU": "1"} if options.cpu else {}),
        )
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        first, last = rows[0], rows[-1]
        peaks = [json.loads(path.read_text()) for path in folder.glob("peak-*.json")]
    seconds = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    samples = processes * config.optimizer.train_batch_size * config.optimizer.gradient_accumulation_steps
    return {"samples": samples, "ms": 1000 * seconds, "peak_gib": max(peaks) / 2**30}


def _launcher(options: Options, processes: int) -> list[str]:
    if options.cpu:  # what accelerate hands over to; by itself it starts several only with MPI
        several = ["--standalone", "--nproc_per_node", str(processes)]
        return [sys.executable, "-m", "torch.distributed.run", *several]
    several = ["--multi_gpu"] if processes > 1 else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", *several]
    return [*launch, "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]


def main(options: Options, distil: list[str]) -> None:
    """Start every number of processes and print the table."""
    if options.worker is not None:
        work(options.worker)
        return
    head = adapters.header(adapters.Options(device="cpu" if options.cpu else "cuda"))
    print(head.replace("sd15", " ".join(distil), 1), flush=True)
    print("| processes | images a step | ms a step | images/s | efficiency | most GiB a card |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    rows = {}
    for processes in options.processes:
        rows[processes] = row = launched(options, distil, processes)
        alone = rows[options.processes[0]]["ms"]
        print(
            f"| {processes} | {row['samples']} | {row['ms']:.0f} | {1000 * row['samples'] / row['ms']:.2f} | "
            f"{alone / row['ms']:.3f} | {row['peak_gib']:.2f} |",
            flush=True,
        )
    if options.out is not None:
        report = {"header": head, "options": str(options), "distill": distil, "rows": rows}
        options.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(*tyro.cli(Options, return_unknown_args=True))
