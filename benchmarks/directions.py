"""Time and peak memory of `wadi directions` and `wadi directions swap` at full size, random weights.

    python benchmarks/directions.py                          # SD 1.5's U-Net against a fine-tune of it
    python benchmarks/directions.py --model pixart-256       # PixArt-alpha XL/2
    python benchmarks/directions.py --student lorad          # an adapter, not whole weights
    python benchmarks/directions.py --model tiny             # a smoke test

The weights are normal, of the shapes of the configuration, and so are the changes (a fiftieth of their size):
what is timed does not depend on the values. Files are written to --folder first (SD 1.5 in float32: 6.9 GB).
Each command runs in a process of its own; memory is the most that was resident in that process, pages of the
read files included, as the kernel tells it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import DDIMScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from published import make_network

from wadi.backbones import student_config
from wadi.files import save_tensors, write_json

SHARD_ELEMENTS = 2**28

MEASURED = """
import json, resource, sys, time
start = time.perf_counter()
from wadi import cli
code = cli.main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
unit = 1 if sys.platform == "darwin" else 1024
figures = [time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit]
print(json.dumps([code, *figures]))
"""


@dataclass
class Options:
    """Time the comparison and the swap of two networks."""

    model: Literal["sd15", "pixart-256", "tiny"] = "sd15"
    """Configuration of the networks."""
    student: Literal["full", "lorad"] = "full"
    """Whole weights, or an adapter of the paper's rank."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the files."""
    threads: int = min(2, os.cpu_count() or 1)
    """CPU threads, as OMP_NUM_THREADS."""
    swap: bool = False
    """Also the swap, which writes another 3.4 GB for SD 1.5."""
    folder: Path | None = None
    """Where the files go for as long as it runs; the system's temporary folder if not given."""
    out: Path | None = None
    """JSON file for the figures."""


def write_network(network: nn.Module, folder: Path, dtype: torch.dtype, changed: bool) -> None:
    """Random weights in shards, of which at most one is in memory; the second is the first, changed."""
    folder.mkdir(parents=True)
    network.save_config(folder)
    places, shard, held, number = {}, {}, 0, 0
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    for i, (key, shape) in enumerate(shapes.items()):
        tensor = _noise(i, shape) / math.sqrt(max(1, math.prod(shape[1:])))
        if key.endswith("running_var"):
            tensor = tensor.abs() + 1
        if changed:
            tensor += 0.02 * tensor.std(correction=0) * _noise(i + len(shapes), shape)
        shard[key], held = tensor.to(dtype), held + tensor.numel()
        if held > SHARD_ELEMENTS or i == len(shapes) - 1:
            name = f"diffusion_pytorch_model-{number:05d}.safetensors"
            save_tensors(folder / name, shard)
            places.update(dict.fromkeys(shard, name))
            shard, held, number = {}, 0, number + 1
    index = {"metadata": {}, "weight_map": places}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


@functools.cache
def _numbers() -> torch.Tensor:
    return torch.randn(2**26, generator=torch.Generator().manual_seed(0))


def _noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers, from somewhere in a list of many: drawing 20 billion takes minutes."""
    count, numbers = math.prod(shape), _numbers()
    if count >= len(numbers):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    start = seed * 1_000_003 % (len(numbers) - count)
    return numbers[start : start + count].view(shape)


def write_adapter(network: nn.Module, folder: Path) -> None:
    """An adapter of the paper's rank with random factors."""
    config = student_config(network)
    config.inference_mode = True
    tensors = {}
    for name, module in network.named_modules():
        if name in config.target_modules:
            rows, columns = module.weight.shape
            generator = torch.Generator().manual_seed(len(tensors))
            for part, shape in (("A", (rows, config.r)), ("B", (config.r, columns // 2))):
                key = f"base_model.model.{name}.lorad_{part}"
                tensors[key] = 0.03 * torch.randn(shape, generator=generator)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    config.save_pretrained(folder)


def write_pipeline(source: Path, folder: Path, part: str) -> None:
    """A pipeline folder of a scheduler and the network in `source`, for the swap."""
    folder.mkdir()
    (folder / part).symlink_to(source.resolve())
    DDIMScheduler().save_pretrained(folder / "scheduler")
    kind, network = {
        "unet": ("StableDiffusionPipeline", "UNet2DConditionModel"),
        "transformer": ("PixArtAlphaPipeline", "PixArtTransformer2DModel"),
    }[part]
    parts = {part: ["diffusers", network], "scheduler": ["diffusers", "DDIMScheduler"]}
    write_json(folder / "model_index.json", {"_class_name": kind, **parts})


def measure(arguments: list[str], threads: int) -> dict[str, float]:
    """Run one command of wadi in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], env=environment, text=True, stdout=subprocess.PIPE
    )
    if done.returncode or not done.stdout:
        raise SystemExit(f"wadi {' '.join(arguments)} failed with status {done.returncode}")
    code, seconds, cpu_seconds, peak = json.loads(done.stdout.splitlines()[-1])
    if code:
        raise SystemExit(f"wadi {' '.join(arguments)} failed with status {code}")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak / 2**30}


def run(options: Options, folder: Path) -> dict[str, dict[str, float]]:
    """Write the files, and measure each command."""
    with torch.device("meta"):
        network = make_network(options.model)
    dtype, part = getattr(torch, options.dtype), "transformer" if options.model == "pixart-256" else "unet"
    start = time.perf_counter()
    teacher, student = folder / "teacher", folder / "student"
    write_network(network, teacher, dtype, changed=False)
    if options.student == "full":
        write_network(network, student, dtype, changed=True)
    else:
        write_adapter(network, student)
    print(f"files written in {time.perf_counter() - start:.0f} s", flush=True)
    out = ["--out", str(folder / "compared")]
    commands = {"directions": ["directions", str(teacher), str(student), *out]}
    if options.swap:
        write_pipeline(teacher, folder / "pipeline", part)
        pair = [str(folder / "pipeline"), str(student)]
        out = ["--out", str(folder / "swapped")]
        commands["directions swap"] = ["directions", "swap", *pair, "--take", "norms", *out]
    return {name: measure(arguments, options.threads) for name, arguments in commands.items()}


def main(options: Options) -> None:
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = run(options, Path(folder))
    print(f"{'':16} {'seconds':>8} {'CPU s':>8} {'peak GiB':>9}   {options.threads} threads")
    for name, figures in found.items():
        print(f"{name:16} " + "{seconds:8.1f} {cpu_seconds:8.1f} {peak_gib:9.2f}".format(**figures))
    if options.out is not None:
        config = {key: str(value) for key, value in vars(options).items()}
        write_json(options.out, {"config": config, "figures": found})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
