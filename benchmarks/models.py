"""Memory and time of `wadi distill` on models of published sizes, and of the usual way, one after the other.

    python benchmarks/models.py                                   # every model, hours on one GPU
    python benchmarks/models.py --models sdxl --bases int8 --memory-limit 8
    python benchmarks/models.py --models tiny --no-usual          # a smoke test, on the CPU too

Each row is a run of the command itself on a teacher with random weights (teachers.py): 30 steps of one batch,
with sample grids and checkpoints, killed after step 20 (kill -9) and resumed. Then stock diffusers loads the
exported pipeline and makes an image in one step. "The usual way" is the same run with LoRA adapters of the
same rank on three copies of the network instead of one frozen base, its kernels launched one by one.

Seconds are those of a step, without sample grids and checkpoints. Memory is what PyTorch allocated at most.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
import teachers

STEPS, EVERY, KILL_AFTER = 30, 10, 20
"""Steps of a run, steps between checkpoints and sample grids, and the step after which it is killed."""
LOGGED = 5
"""Steps between two lines of metrics.jsonl."""
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tiny": ("emoji-cpu", ()),
    "sd15": ("sd15-paper", ("--train-batch-size", "4", "--gradient-checkpointing")),
    "sdxl": ("sdxl", ()),
    "sd35-medium": ("sd35-medium", ()),
    "klein-4b": ("klein-4b", ()),
    "flux-dev": ("flux-dev", ()),
    "qwen-image": ("qwen-image", ()),
    "sana-1.6b": ("sana-1.6b", ()),
    "z-image": ("z-image", ()),
}
"""Preset and options of each model."""
NOT_CAPTURED = ("z-image",)
"""Models whose steps a CUDA graph cannot hold."""
PROMPTS = ("a lighthouse at dusk", "two cats on a sofa", "a red car", "a bowl of soup")


@dataclass
class Options:
    """Measure runs of wadi distill."""

    models: tuple[Literal[tuple(ROWS)], ...] = tuple(ROWS)[1:]
    """Which models."""
    bases: tuple[Literal["bf16", "int8", "nf4"], ...] = ("bf16", "int8")
    """Precisions of the frozen base."""
    usual: bool = True
    """Also measure three copies of the network with LoRA."""
    memory_limit: float | None = None
    """GiB that a process may reserve, to show that a run fits a smaller GPU."""
    interrupted: bool = True
    """Kill each run and resume it."""
    whole: bool = True
    """Let the run end; if not, it is only killed: nothing is exported."""
    keep: bool = False
    """Keep the run folders. Teachers are always kept."""
    work: Path = Path("models")
    """Folder for teachers and runs."""
    out: Path = Path("models.jsonl")
    """File to which each row is appended."""
    more: tuple[str, ...] = field(default_factory=tuple)
    """More options of wadi distill, as one argument: --more=--fake-rank=32."""


def main(options: Options) -> None:
    """Measure every row, and print and append each when it is there."""
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    about = {"device": machine, "torch": torch.__version__, "date": str(date.today())}
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for model in options.models:
        teacher = options.work / "teachers" / model
        if not teacher.exists():
            teachers.write_teacher(teachers.Options(model, teacher))
        ways = [*options.bases, *(("usual",) if options.usual else ())]
        for way in ways:
            row = {"model": model, "base": way, "limit_gib": options.memory_limit, "options": options.more}
            row |= about | measure(options, model, teacher, way, gpu)
            print(json.dumps(row), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def measure(options: Options, model: str, teacher: Path, way: str, gpu: bool) -> dict[str, Any]:
    """One run; what it needed, or the line with which it failed."""
    run = options.work / f"run-{model}-{way}"
    shutil.rmtree(run, ignore_errors=True)
    preset, own = ROWS[model]
    usual = way == "usual"
    command = ["--preset", preset, "--teacher", str(teacher), "--prompts", str(options.work / "prompts.txt")]
    command += ["--out", str(run), "--gradient-accumulation-steps", "1", "--max-train-steps", str(STEPS)]
    command += ["--checkpointing-steps", str(EVERY), "--validation-steps", str(EVERY)]
    command += ["--logging-steps", str(LOGGED), "--checkpoints-total-limit", "1"]
    command += ["--validation-prompts", PROMPTS[0], "--validation-seeds", "0", "1", *own]
    command += ["--student-method", "lora", "--fake-method", "lora"] if usual else ["--base-precision", way]
    command += ["--cuda-graphs"] if gpu and not usual and model not in NOT_CAPTURED else []
    command += [word for option in options.more for word in option.split("=", 1)]
    found: dict[str, Any] = {"killed": False}
    if not options.whole or (options.interrupted and not usual):
        found["killed"] = killed(start(command, usual, options.memory_limit, run), run)
        command = ["--resume-from-checkpoint", str(run)]
    if not options.whole:
        found |= figures(run)
        if not found["killed"]:
            found["failed"] = last_line(run)
        shutil.rmtree(run, ignore_errors=True)
        return found
    started = time.time()
    process = start(command, usual, options.memory_limit, run)
    process.wait()
    found |= {"seconds_in_all": round(time.time() - started, 1)} | figures(run)
    if process.returncode:
        found["failed"] = last_line(run)
    elif not usual:
        found["image"] = stock_image(run, gpu)
    if not options.keep:
        shutil.rmtree(run, ignore_errors=True)
    return found


def log_file(run: Path) -> Path:
    """What the command printed, beside the run folder."""
    return run.with_suffix(".log")


def start(arguments: list[str], usual: bool, limit: float | None, run: Path) -> subprocess.Popen:
    """Start `wadi distill`, perhaps with limited memory, or with a copy of the network for each role."""
    code = ["import copy, sys, torch, wadi.cli, wadi.distill.roles as roles"]
    if limit is not None:
        total = "torch.cuda.get_device_properties(0).total_memory"
        code.append(f"torch.cuda.set_per_process_memory_fraction({limit} * 2**30 / {total})")
    if usual:
        code.append("roles.view = copy.deepcopy")
    code.append("sys.exit(wadi.cli.main())")
    with log_file(run).open("w") as log:
        command = [sys.executable, "-c", "; ".join(code), "distill", *arguments]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def killed(process: subprocess.Popen, run: Path) -> bool:
    """Kill a run after its step `KILL_AFTER` was saved; whether it had come so far."""
    checkpoint = run / "checkpoints" / f"step-{KILL_AFTER:06d}"
    while process.poll() is None:
        if checkpoint.exists():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.05)
    return False


def last_line(run: Path) -> str:
    """What the command said last, such as why it failed."""
    return (log_file(run).read_text(errors="replace").strip().splitlines() or [""])[-1][:300]


def figures(run: Path) -> dict[str, Any]:
    """Seconds a step, GiB allocated at most, and what was estimated before.

    The seconds are the median over the intervals of `LOGGED` steps without a grid or a checkpoint.
    """
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    at = {row["step"]: row["seconds"] for row in rows}
    quiet = [(step - LOGGED, step) for step in at if step % EVERY == 0 and step - LOGGED in at]
    seconds = statistics.median((at[b] - at[a]) / LOGGED for a, b in quiet) if quiet else None
    estimate = re.search(r"memory: ([\d.]+) (\w+) estimated", log_file(run).read_text(errors="replace"))
    return {
        "seconds_a_step": None if seconds is None else round(seconds, 3),
        "gib": max((row.get("allocated_gib", 0.0) for row in rows), default=None),
        "estimated_gib": float(estimate[1]) if estimate else None,
    }


def stock_image(run: Path, gpu: bool) -> str:
    """Let diffusers alone make an image with the exported pipeline; its path and spread of pixels."""
    code = (
        "import sys, numpy, torch, diffusers\n"
        "pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)\n"
        "pipeline = pipeline.to(sys.argv[2])\n"
        "options = {'guidance_scale': 1.0} if 'QwenImage' not in type(pipeline).__name__ else {}\n"
        "image = pipeline('a lighthouse', num_inference_steps=1, **options).images[0]\n"
        "image.save(sys.argv[3])\n"
        "print(image.size, round(float(numpy.asarray(image).std()), 1))"
    )
    out = run.with_suffix(".png")
    command = [sys.executable, "-c", code, str(run / "pipeline"), "cuda" if gpu else "cpu", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1][:300]


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
