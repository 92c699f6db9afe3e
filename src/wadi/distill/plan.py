"""`wadi distill --plan`: parameters, memory and time of a run, before it loads anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wadi.backbones.outline import META, configuration_folder, outline, outlined_encoders
from wadi.distill.checks import check_network, check_preset, check_sharding, free_memory
from wadi.distill.config import GRID_PROMPTS, DistillConfig, FakeOptions, StudentOptions
from wadi.distill.rehearsal import Ledger, Rehearsal, decoding, encoding, rehearse
from wadi.errors import WadiError, tell
from wadi.teachers.kinds import read_model_header
from wadi.teachers.original import usual_model

GIB = 2**30
_SECONDS = 0.2
"""How long each measurement of a device takes."""


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, measured.

    Attributes:
        operations: floating-point operations of a large matrix product.
        traffic: bytes that a large copy reads and writes.
        launches: kernels that the host can start one by one, with autograd around them.
    """

    operations: float
    traffic: float
    launches: float


@dataclass(frozen=True)
class Plan:
    """What a run will need. All memory is in bytes, and an estimate of what torch allocates.

    It does not cover text encoders that stay on the GPU for a large set of prompts, the context of CUDA (0.3
    to 0.6 GiB), the workspaces of cuBLAS and cuDNN, what the allocator reserves but does not use, and what
    `torch.compile` and CUDA graphs change.

    Attributes:
        config: the options of the run.
        kind: the class of the teacher's pipeline.
        image_size: height and width of the images in pixels.
        rehearsal: what one step allocates and computes.
        encoding: peak of a text encoder at work, with its weights.
        grid: peak of a sample grid beyond what the trainer holds; 0 without sample grids.
    """

    config: DistillConfig
    kind: str
    image_size: tuple[int, int]
    rehearsal: Rehearsal
    encoding: int
    grid: int

    @property
    def held(self) -> int:
        """Bytes that the trainer holds throughout."""
        return sum(self.rehearsal.held.values())

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at most, by what the run does."""
        found = self.rehearsal
        return {
            # the base comes to the device after it
            **({"encoding of prompts": self.encoding} if self.encoding else {}),
            "update of the student": self.held + found.student,
            "update of the fake model": self.held + found.fake,
            **({"sample grid": self.held + self.grid} if self.grid else {}),
        }

    @property
    def most(self) -> int:
        """Bytes that the run needs at most."""
        return max(self.peaks.values())

    @property
    def operations(self) -> int:
        """Floating-point operations of a step."""
        student, fake = self.rehearsal.student_work.operations, self.rehearsal.fake_work.operations
        return self.config.optimizer.gradient_accumulation_steps * (student + self.config.fake.updates * fake)

    def seconds(self, speed: Speed) -> float:
        """The time of a step on a device.

        A kernel takes as long as its operations or its traffic, whichever is longer. The host launches the
        kernels one by one, and the slower of the two decides.
        """
        student, fake = self.rehearsal.student_work.kernels, self.rehearsal.fake_work.kernels
        each = [
            max(
                sum(
                    max(operations / speed.operations, traffic / speed.traffic)
                    for operations, traffic in kernels
                ),
                len(kernels) / speed.launches,
            )
            for kernels in (student, fake)
        ]
        updates = self.config.fake.updates
        return self.config.optimizer.gradient_accumulation_steps * (each[0] + updates * each[1])


def make_plan(config: DistillConfig, folder: str | None = None, processes: int | None = None) -> Plan:
    """Plan a run from the configurations of its teacher; weights are neither read nor fetched.

    Args:
        config: the options, as `wadi.distill.run.resolve` gives them.
        folder: folder or hub id of the teacher, if it is not the one that the options name.
        processes: over which the base is spread, if the options want that. The default is one for each GPU
            that is here, and at least two.

    Raises:
        WadiError: the teacher is missing or cannot be distilled, or an option does not fit it.
    """
    teacher = config.model.pretrained_model_name_or_path
    processes = processes or max(2, torch.cuda.device_count())
    check_sharding(config, processes)
    found_in = configuration_folder(folder or _configurations(config))
    backbone = outline(found_in, config.run.dtype, config.model.resolution, config.run.base_precision)
    if folder is None:  # a run checks it itself
        check_preset(config, backbone.pipeline)
        check_network(config, backbone)
    encoders = outlined_encoders(found_in, backbone)
    try:
        found = rehearse(config, backbone, encoders, processes)
        grid = 0
        if config.run.validation_steps:
            rows = len(config.run.validation_prompts) or GRID_PROMPTS
            images = rows * len(config.run.validation_seeds)
            grid = max(found.validation, decoding(backbone, images))
        peak = 0 if config.model.text_encoder_device == "cpu" else encoding(backbone, encoders)
    except (NotImplementedError, RuntimeError, LookupError, StopIteration) as error:  # needs values
        raise WadiError(f"{teacher}: cannot be planned: {' '.join(str(error).split())[:200]}") from error
    return Plan(config, type(backbone.pipeline).__name__, backbone.image_size, found, peak, grid)


def _configurations(config: DistillConfig) -> str:
    """What has the configurations of the teacher: itself, or another model if it is a single file."""
    model = config.model
    file = Path(model.pretrained_model_name_or_path)
    if not file.is_file():
        return model.pretrained_model_name_or_path
    return model.teacher_config or usual_model(read_model_header(file))


def describe(plan: Plan, free: int, speed: Speed | None) -> str:
    """The plan as a table for the terminal.

    Args:
        plan: what to describe.
        free: bytes that can be allocated; see `free_memory`.
        speed: of the device; ``None`` if there is no GPU.
    """
    config, found = plan.config, plan.rehearsal
    samples, micro = config.optimizer.train_batch_size, config.optimizer.gradient_accumulation_steps
    gradients = 4 * found.parameters["student"]
    labels = ("network, frozen", _trained("student", config.student), _trained("fake model", config.fake))
    counts = zip(labels, found.parameters.values(), strict=True)
    rows: list[tuple[str, str]] = [
        ("teacher", f"{config.model.pretrained_model_name_or_path} ({plan.kind})"),
        ("images", f"{plan.image_size[0]} x {plan.image_size[1]} pixels"),
        ("batch", f"{samples * micro} a step, {samples} at once"),
        ("", ""),
        ("parameters", "millions"),
        *((f"  {label}", f"{n / 1e6:.2f}") for label, n in counts),
        ("", ""),
        ("memory, estimated", ""),
        *((f"  {name}", gib(n)) for name, n in found.held.items()),
        ("  = held throughout", gib(plan.held)),
        ("  gradients of the student", gib(gradients)),
        ("  activations and temporaries", gib(found.student - gradients)),
        ("  at most in", ""),
        *((f"    {name}", gib(n)) for name, n in plan.peaks.items()),
        ("  free", gib(free)),
        ("", ""),
        ("time, estimated", ""),
        ("  a step", f"{plan.operations / 1e12:.3g} TFLOP{_seconds(plan, speed)}"),
        (f"  {config.run.max_train_steps} steps", _in_all(plan, speed)),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{value}".rstrip() for name, value in rows)


def print_plan(config: DistillConfig, device: torch.device) -> None:
    """Print the plan of a run, and warn if the memory is too small.

    Raises:
        WadiError: see `make_plan`.
    """
    plan, free = make_plan(config), free_memory(device)
    torch.backends.cuda.matmul.allow_tf32 = config.run.allow_tf32
    speed = measure_speed(device, config.run.dtype) if device.type == "cuda" else None
    print(describe(plan, free, speed))
    warn_if_short(plan, free)


def announce(
    config: DistillConfig, device: torch.device, folder: str | None = None, processes: int | None = None
) -> Plan | None:
    """Print the memory line of a run that is about to load, and warn if the memory is too small.

    Returns:
        The plan; None if the run cannot be planned. Loading the teacher tells what is wrong with it.
    """
    try:
        plan = make_plan(config, folder, processes)
    except Exception:  # an estimate must not end a run
        return None
    free = free_memory(device)
    print(f"memory: {gib(plan.most)} estimated, {gib(free)} free on {device}", flush=True)
    warn_if_short(plan, free)
    return plan


def warn_if_short(plan: Plan, free: int) -> None:
    """Warn if a run needs more memory than is free, and name what helps."""
    if plan.most <= free:
        return
    where = max(plan.peaks, key=lambda name: plan.peaks[name])
    config, found = plan.config, plan.rehearsal
    whole = "full" in (config.student.method, config.fake.method)
    hints = {
        "--gradient-checkpointing": not config.run.gradient_checkpointing,
        "a smaller --train-batch-size": config.optimizer.train_batch_size > 1,
        "--mixed-precision bf16": config.run.mixed_precision == "no" and not whole,
        "--base-precision int8": config.run.base_precision is None and not whole,
        "--shard-base on several cards": not config.run.shard_base and not whole,
        "lower ranks": plan.held - found.held["frozen base"] > plan.most / 4,
    }
    if where == "encoding of prompts":
        hints = {"--text-encoder-device cpu": True, "wadi prompts encode on another machine": True}
    elif where == "sample grid":
        hints = {"fewer validation prompts or seeds": True, "--validation-steps 0": True}
    useful = [hint for hint, helps in hints.items() if helps]
    tell(
        f"the run needs about {gib(plan.most)} ({where}), and {gib(free)} are free"
        + (f"; try {' or '.join(useful)}" if useful else "")
    )


def peak_line(plan: Plan, allocated: int) -> str:
    """The line at the end of a run: what was allocated at most, beside the estimate."""
    return f"memory: {gib(allocated)} allocated at most, {gib(plan.most)} were estimated"


def measure_speed(device: torch.device, dtype: torch.dtype, side: int = 4096) -> Speed:
    """Measure a device for less than a second.

    Args:
        device: to measure.
        dtype: of the matrix product.
        side: of its matrices.
    """
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(64, 64, device=device)
    net = nn.Sequential(
        *(layer for _ in range(8) for layer in (nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()))
    )

    def small(network: nn.Module, inputs: torch.Tensor) -> None:
        network(inputs).sum().backward()

    ledger, shapes = Ledger(), torch.empty(64, 64, device=META)
    with ledger, ledger.part() as counted:
        small(net.to(META), shapes)
    kernels = len(counted.work.kernels)
    net = net.to_empty(device=device)
    product, copy = _duration(device, lambda: a @ b), _duration(device, lambda: a.copy_(b))
    return Speed(
        operations=2 * side**3 / product,
        traffic=2 * a.nbytes / copy,
        launches=kernels / _duration(device, lambda: small(net, x)),
    )


def _duration(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of a call, when many follow each other."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < _SECONDS or not calls:
        for _ in range(10):
            call()
        wait()
        calls += 10
    return passed / calls


def _trained(who: str, options: StudentOptions | FakeOptions) -> str:
    return f"{who}, {options.method}" + ("" if options.method == "full" else f" of rank {options.rank}")


def gib(count: int) -> str:
    """Bytes as a text of three digits: GiB, or MiB if there are few."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _seconds(plan: Plan, speed: Speed | None) -> str:
    return "" if speed is None else f", {plan.seconds(speed):.2f} s"


def _in_all(plan: Plan, speed: Speed | None) -> str:
    if speed is None:
        return "the time is measured on a GPU, and there is none here"
    hours = plan.seconds(speed) * plan.config.run.max_train_steps / 3600
    return f"{hours:.1f} hours, without prompts, sample grids and checkpoints"
