"""What an adapter costs: one training step of a Stable Diffusion U-Net under LoRaD and its alternatives.

    python benchmarks/adapters.py                       # SD 1.5's configuration, random weights, a GPU
    python benchmarks/adapters.py --model tiny --batch-sizes 2 --device cpu    # a smoke test

Every method adapts the same layers of the same frozen bfloat16 network, holds what it trains in float32 and
runs under autocast, as the training scripts of diffusers do; full fine-tuning trains the bfloat16 weights
themselves, its cheapest form. "LoRaD, forward hook" is the usual way to write such an adapter: the module
computes its linear map, then a hook computes it again with the turned weight, and autograd keeps every
intermediate. Medians of repeated steps in one process; memory is the allocator's peak within a step. Launched
one by one, the kernels of a step this size wait for the host; captured in a CUDA graph, as the trainer's
`--cuda-graphs` does, the time is the GPU's alone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal

import diffusers
import peft
import torch
import torch.nn.functional as F
import tyro
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, OFTConfig, inject_adapter_in_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from published import make_network

from wadi.backbones import UNetBackbone, student_config
from wadi.distill.regions import compile_regions, compiling
from wadi.distill.roles import enable_gradient_checkpointing
from wadi.errors import WadiError
from wadi.graph import record
from wadi.lorad.layer import LoRaDLayer
from wadi.lorad.rotation import angles, rotate, rotated_weight

RANKS = {"sd15": 256, "tiny": 4}
METHODS = ("lorad", "hook", "lora", "full", "dora", "oft")
NAMES = {
    "lorad": "LoRaD",
    "hook": "LoRaD, forward hook",
    "lora": "LoRA (PEFT)",
    "dora": "DoRA (PEFT)",
    "oft": "OFT (PEFT)",
    "full": "full fine-tuning",
}


@dataclass
class Options:
    """Time adapters side by side."""

    model: Literal["sd15", "tiny"] = "sd15"
    """Configuration of the U-Net; its weights are random."""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    """Latents a step."""
    methods: tuple[Literal["lorad", "hook", "lora", "full", "dora", "oft"], ...] = METHODS
    """What to compare."""
    compile: bool = False
    """Compile the repeated blocks, of every method alike."""
    repeats: int = 8
    """Timed steps; the median counts."""
    seconds: float = 10.0
    """Stop repeating a case after this long."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    out: Path | None = None
    """JSON file for the figures."""


class Clock:
    """Milliseconds of a call and the memory it needed."""

    def __init__(self, options: Options) -> None:
        self.cuda, self.options = torch.device(options.device).type == "cuda", options

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median milliseconds and peak GiB, after three calls to warm up."""
        for _ in range(3):
            call()
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        times, start = [], time.perf_counter()
        while len(times) < self.options.repeats and time.perf_counter() - start < self.options.seconds:
            before = time.perf_counter()
            call()
            self.wait()
            times.append(1000 * (time.perf_counter() - before))
        return statistics.median(times), self.peaks()[0]

    def peaks(self) -> tuple[float, float]:
        """GiB since the last reset: allocated, and reserved by the allocator."""
        if not self.cuda:
            return float("nan"), float("nan")
        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()


class HookAdapter(nn.Module):
    """LoRaD as it is usually written: a forward hook that computes the layer again."""

    def __init__(self, layer: nn.Linear, r: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(layer.out_features, r, device=layer.weight.device))
        self.B = nn.Parameter(torch.empty(r, layer.in_features // 2, device=layer.weight.device))
        nn.init.xavier_uniform_(self.B)
        layer.register_forward_hook(self.turn)

    def turn(self, layer: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Replace what the layer computed by what its turned weight computes."""
        with torch.autocast(output.device.type, enabled=False):
            theta = self.A @ self.B
            cosine, sine = theta.cos(), theta.sin()
            odd, even = layer.weight.float()[:, 0::2], layer.weight.float()[:, 1::2]
            turned = torch.stack([odd * cosine - even * sine, odd * sine + even * cosine], -1).flatten(1)
            turned = turned.to(output.dtype)
        return F.linear(inputs[0].to(output.dtype), turned, layer.bias)


def equal_rank(network: nn.Module, names: set[str], parameters: int) -> int:
    """The rank at which LoRA on these layers has as many parameters as LoRaD, to the nearest."""
    shapes = [module.weight.shape for name, module in network.named_modules() if name in names]
    return max(1, round(parameters / sum(out + fan_in for out, fan_in in shapes)))


def adapt(network: nn.Module, method: str, r: int) -> nn.Module:
    """Freeze the network and add what `method` trains."""
    network.requires_grad_(method == "full")
    config = student_config(network, r)
    names = set(config.target_modules)
    layers = [module for name, module in network.named_modules() if name in names]
    equal = sum(r * (layer.out_features + layer.in_features // 2) for layer in layers)
    if method == "lorad":
        inject_adapter_in_model(config, network)
    elif method in ("lora", "dora"):
        rank = equal_rank(network, names, equal)
        lora = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=config.target_modules, use_dora=method == "dora"
        )
        inject_adapter_in_model(lora, network)
    elif method == "oft":
        block = max(size for size in (64, 32, 16, 8) if all(x.in_features % size == 0 for x in layers))
        inject_adapter_in_model(
            OFTConfig(r=0, oft_block_size=block, target_modules=config.target_modules), network
        )
    elif method == "hook":
        network.hooks = nn.ModuleList([HookAdapter(layer, r) for layer in layers])
    if method != "full":
        cast_training_params(network, torch.float32)
    return network


def measure(options: Options, method: str, batch: int, checkpointing: bool, clock: Clock) -> dict:
    """Forward and whole step of one method."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    with torch.device(device):
        network = adapt(make_network(options.model).to(torch.bfloat16), method, RANKS[options.model])
        size = network.config.sample_size
        x, target = torch.randn(2, batch, 4, size, size)
        states = torch.randn(batch, 77, network.config.cross_attention_dim, dtype=torch.bfloat16)
        t = torch.randint(1000, (batch,))
    if checkpointing:
        network.train()
        enable_gradient_checkpointing(network)
    if options.compile:
        compile_regions(network, UNetBackbone.blocks)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=clock.cuda)

    def predict() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(x.bfloat16(), t, states, return_dict=False)[0]

    def step() -> None:
        F.mse_loss(predict().float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with compiling() if options.compile else contextlib.nullcontext():
        with torch.no_grad():
            forward, _ = clock(predict)
        whole, peak = clock(step)
        graph = _replayed(step, clock) if clock.cuda else float("nan")
    return {
        "method": method,
        "batch_size": batch,
        "gradient_checkpointing": checkpointing,
        "trainable": sum(parameter.numel() for parameter in trained),
        "forward_ms": forward,
        "step_ms": whole,
        "graph_ms": graph,
        "peak_gib": peak,
    }


def rotation(options: Options, clock: Clock) -> dict:
    """All adapted layers turned once, in a CUDA graph where there is a GPU, and the error against float64."""
    with torch.device(options.device):
        network = adapt(make_network(options.model).to(torch.bfloat16), "lorad", RANKS[options.model])
    layers = [module for module in network.modules() if isinstance(module, LoRaDLayer)]
    for layer in layers:
        nn.init.normal_(layer.lorad_A["default"], std=0.1)
    work = [(layer.base_layer.weight.detach(), layer._factors(["default"])) for layer in layers]

    with torch.no_grad():
        milliseconds = _replayed(lambda: [rotated_weight(*each) for each in work], clock)
    return {"layers": len(layers), "milliseconds": milliseconds, "relative_error": rotation_error(work)}


def _replayed(call: Callable[[], object], clock: Clock) -> float:
    """Median milliseconds of a call, captured as a CUDA graph where there is a GPU; NaN if it cannot be."""
    if not clock.cuda:
        return clock(call)[0]
    try:
        graph, _ = record(call)
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", flush=True)
        return float("nan")
    return clock(graph.replay)[0]


@torch.no_grad()
def rotation_error(work: list) -> dict[str, float]:
    """Largest relative error of a turned weight against float64, by dtype of the weight."""
    worst = {}
    for dtype in (torch.bfloat16, torch.float32):
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = dtype != torch.float32
        errors = []
        for weight, factors in work:
            exact = rotate(weight.to(dtype).double(), angles(*(f.double() for f in factors[0][:2])))
            ours = rotated_weight(weight.to(dtype), factors)
            errors.append(((ours.double() - exact).norm() / exact.norm()).item())
        torch.backends.cuda.matmul.allow_tf32 = allowed
        worst[str(dtype).removeprefix("torch.")] = max(errors)
    return worst


def header(options: Options) -> str:
    """Machine, versions and date."""
    cuda = torch.device(options.device).type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, PEFT {peft.__version__}"
    return f"{options.model}, bfloat16, {machine}, {versions}, {date.today()}"


def table(rows: list[dict]) -> str:
    """Markdown: a row for each method, batch size and checkpointing, with ratios to LoRaD's step."""
    lines = [
        "| batch | checkpointing | method | trainable, M | forward, ms | step, ms | LoRaD / it "
        "| step in a CUDA graph, ms | LoRaD / it | peak, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours = [
            other
            for other in rows
            if other.get("method") == "lorad"
            and all(other[key] == row[key] for key in ("batch_size", "gradient_checkpointing"))
        ]
        if "error" in row:
            figures = f"- | - | {row['error']} | - | - | - | -"
        else:
            eager, graph = (
                f"{row[key]:.1f} | " + (f"{ours[0][key] / row[key]:.2f}" if ours else "-")
                for key in ("step_ms", "graph_ms")
            )
            figures = (
                f"{row['trainable'] / 1e6:.2f} | {row['forward_ms']:.1f} | {eager} | {graph} | "
                f"{row['peak_gib']:.1f}"
            )
        checkpointing = "yes" if row["gradient_checkpointing"] else "no"
        lines.append(f"| {row['batch_size']} | {checkpointing} | {NAMES[row['method']]} | {figures} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measure everything and print the table."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    clock, rows = Clock(options), []
    print(header(options), flush=True)
    turned = rotation(options, clock)
    print(
        f"all {turned['layers']} layers turned once: {turned['milliseconds']:.2f} ms; "
        + ", ".join(
            f"relative error in {name} {error:.1e}" for name, error in turned["relative_error"].items()
        ),
        flush=True,
    )
    for checkpointing in (False, True):
        for batch in options.batch_sizes:
            for method in options.methods:
                case = partial(measure, options, method, batch, checkpointing, clock)
                rows.append(_attempt(case, method, batch, checkpointing))
                gc.collect()
                torch.cuda.empty_cache()
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if options.out is not None:
        options.out.write_text(
            json.dumps({"header": header(options), "rotation": turned, "steps": rows}, indent=2)
        )


def _attempt(case: Callable[[], dict], method: str, batch: int, checkpointing: bool) -> dict:
    try:
        return case()
    except torch.OutOfMemoryError:
        error = "out of memory"
    except WadiError as reason:
        error = str(reason)
    return {
        "method": method,
        "batch_size": batch,
        "gradient_checkpointing": checkpointing,
        "error": error,
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
